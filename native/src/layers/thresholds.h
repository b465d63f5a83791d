// Below which density a sparse kernel beats our dense one, and how much input makes a chunk: found
// by changing them under the shapes of benchmarks/layers.py and steps.py.  Constants, not measured
// when a model is opened: the same model must give the same bits on every run.
#pragma once

#include <algorithm>

#include "fedlean/layout.h"

namespace fedlean {

constexpr double kSparseConvBelow = 0.7;
constexpr double kSparseLinearBelow = 0.55;

// Input channels per chunk of a sparse convolution: enough non-zeros per output channel to pay for
// loading and storing its tile, and at least what fits the first-level cache: the window of a tile
// of about 4 by 8 pixels in 16 lanes.
inline int chunk_channels(Sides kernel, double density, int channel_pixels) {
  const double wanted = 20.0 / (kernel.area() * std::max(density, 1e-3));
  const int near = 28000 / ((kernel.y + 3) * (kernel.x + 7) * 64);
  const int most = std::max(1, 65536 / channel_pixels);
  return std::clamp(std::max(int(wanted + 0.5), near), 1, std::min(most, 128));
}

// Input channels at once of a dense convolution: the window of a tile, of about 7 pixels in 16
// lanes, stays in the first-level cache while all output channels pass over it.
inline int dense_chunk(Sides kernel) {
  const int window_bytes = kernel.y * (kernel.x + 6) * 64;
  return std::max(4, 20000 / window_bytes);
}

// Rows per block of a sparse Linear: their activations stay in the near caches.
inline int block_rows(int rows, double density) {
  return std::min(rows, density < 0.07 ? 1024 : 256);
}

}  // namespace fedlean
