#include "fedlean/layer.h"

#include <algorithm>
#include <cstring>

namespace fedlean {

void clear(const Pass& pass, const View& v) {
  for (int p = pass.panel_begin; p < pass.panel_end; ++p)
    std::memset(v.panel(p), 0, v.layout.pixels() * pass.lanes(p) * sizeof(float));
}

void clear_halo(const Pass& pass, const View& v) {
  const Layout& layout = v.layout;
  if (layout.halo == 0) return;
  pass.split(layout.shape.channels, [&](int, int begin, int end) {
    for (int p = pass.panel_begin; p < pass.panel_end; ++p) {
      const std::size_t lanes = pass.lanes(p), row = layout.row() * lanes;
      const std::size_t side = layout.halo * lanes;
      for (int c = begin; c < end; ++c) {
        float* const plane = v.panel(p) + std::size_t(c) * layout.plane() * lanes;
        const std::size_t height = layout.shape.height;
        // above with the first row's left side, between the rows, below
        std::memset(plane, 0, (layout.halo * row + side) * sizeof(float));
        for (std::size_t y = 1; y < height; ++y)
          std::memset(plane + (layout.halo + y) * row - side, 0, 2 * side * sizeof(float));
        std::memset(plane + (layout.halo + height) * row - side, 0,
                    (layout.halo * row + side) * sizeof(float));
      }
    }
  });
}

void bias_gradient(const Pass& pass, Weight& bias) {
  const View& grad = pass.grad_out;
  const Shape& shape = grad.layout.shape;
  pass.split(shape.channels, [&](int, int begin, int end) {
    for (int c = begin; c < end; ++c) {
      float sum = 0;
      for (int p = pass.panel_begin; p < pass.panel_end; ++p) {
        const int lanes = pass.lanes(p);
        float sums[kPanelLanes] = {}, products[kPanelLanes] = {}, center[kPanelLanes] = {};
        for_rows(grad, grad, p, lanes, c, c + 1, [&](const float* g, const float*, std::size_t n) {
          pass.kernels.lane_sums(g, g, center, sums, products, lanes, int(n / lanes));
        });
        for (int l = 0; l < pass.batch.used(p); ++l) sum += sums[l];
      }
      bias.take_all(pass.kernels, pass.sink, c, &sum, 1);
      bias.take(pass.kernels, pass.sink, c, &sum, 1);
    }
  });
}

}  // namespace fedlean
