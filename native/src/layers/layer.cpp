#include "fedlean/layer.h"

#include <algorithm>
#include <cstring>

namespace fedlean {

// Of a weight that is stored as it is: its rows.
void Layer::for_runs(int begin, int end, const RunVisitor& f) const {
  const std::uint32_t n = std::uint32_t(columns());
  for (int o = begin; o < end; ++o) f({o, o * n, (o + 1) * n, (o - begin) * n, 0});
}

void Layer::outer(const Run& run, float u, const float* v, float* values) const {
  for (std::uint32_t i = 0; i < run.end - run.begin; ++i) values[i] = u * v[i];
}

void clear(const Pass& pass, const View& v) {
  for (int p = pass.panel_begin; p < pass.panel_end; ++p)
    std::memset(v.panel(p), 0, v.layout.pixels() * pass.lanes(p) * sizeof(float));
}

void clear_halo(const Pass& pass, const View& v) {
  const Layout& layout = v.layout;
  if (layout.bare()) return;
  pass.split(layout.shape.channels, [&](int, int begin, int end) {
    for (int p = pass.panel_begin; p < pass.panel_end; ++p) {
      const std::size_t lanes = pass.lanes(p), row = layout.row() * lanes;
      const std::size_t side = layout.halo.x * lanes;
      for (int c = begin; c < end; ++c) {
        float* const plane = v.panel(p) + std::size_t(c) * layout.plane() * lanes;
        const std::size_t height = layout.shape.height;
        // above with the first row's left side, between the rows, below
        std::memset(plane, 0, (layout.halo.y * row + side) * sizeof(float));
        for (std::size_t y = 1; y < height; ++y)
          std::memset(plane + (layout.halo.y + y) * row - side, 0, 2 * side * sizeof(float));
        std::memset(plane + (layout.halo.y + height) * row - side, 0,
                    (layout.halo.y * row + side) * sizeof(float));
      }
    }
  });
}

// Over all lanes: no gradient is in the idle ones.
void bias_gradient(const Pass& pass, Weight& bias) {
  const Layout& layout = pass.grad_out.layout;
  const bool dense = layout.bare();  // a channel is one stretch of memory
  const int rows = dense ? 1 : layout.shape.height;
  const int pixels = layout.shape.width * (dense ? layout.shape.height : 1);
  pass.split(layout.shape.channels, [&](int, int begin, int end) {
    constexpr int strip = 64;
    float sums[strip];
    for (int c = begin; c < end; c += strip) {
      const int n = std::min(strip, end - c);
      std::fill_n(sums, n, 0.0f);
      for (int p = pass.panel_begin; p < pass.panel_end; ++p) {
        const std::size_t lanes = pass.lanes(p);
        const float* const from =
            pass.grad_out.interior(p, int(lanes)) + c * layout.plane() * lanes;
        pass.kernels.sum_channels(from, pixels * lanes, rows, layout.row() * lanes, n,
                                  layout.plane() * lanes, sums);
      }
      bias.take_all(pass.kernels, pass.sink, c, sums, n);
      bias.take(pass.kernels, pass.sink, c, sums, n);
    }
  });
}

}  // namespace fedlean
