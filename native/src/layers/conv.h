// Conv2d: what its sparse and its dense form share.
#pragma once

#include <algorithm>
#include <cstring>
#include <numeric>
#include <vector>

#include "conv_geometry.h"

namespace fedlean {

// The split of strided inputs into phases, threads, the bias.
class Conv : public Layer {
public:
  Conv(const Node& node, const Shape& in, Sides in_halo, Sides grad_halo)
      : Layer(node), g(node, in, in_halo, grad_halo) {
    for (int ky = 0; ky < g.kernel.y; ++ky) {
      for (int kx = 0; kx < g.kernel.x; ++kx) {
        tap_offset_.push_back(g.tap_offset(ky, kx));
        tap_weight_.push_back(ky * g.kernel.x + kx);
      }
    }
  }

  bool reads_input() const override { return tensors[kWeight].trainable; }
  std::size_t stored(Slot slot) const override {
    if (slot == kBias) return node.bias ? g.out.channels : 0;
    return slot == kWeight ? std::size_t(g.out.channels) * group_inputs() * taps() : 0;
  }
  std::size_t columns() const override { return std::size_t(group_inputs()) * taps(); }

  Needs needs(const Situation& s) const override {
    Needs needs;
    if (g.split()) {
      const std::size_t floats = std::size_t(g.in_channels()) * g.in_plane() * s.lanes;
      needs.forward_scratch = floats;
      needs.backward_scratch = floats;
    }
    if (s.dense_rows > 0)
      needs.backward_scratch += std::size_t(s.threads) * kGradRows * group_inputs() * taps();
    return needs;
  }

  void forward(Pass& pass) override {
    if (g.split() && pass.out_begin == 0)
      for (int p = pass.panel_begin; p < pass.panel_end; ++p) split_phases(pass, p);
    auto part_of = [&](int output) {
      return int(std::lower_bound(out_parts_.begin(), out_parts_.end(), output) -
                 out_parts_.begin());
    };
    const int first = part_of(pass.out_begin);
    pass.split(part_of(pass.out_end) - first, [&](int, int begin, int end) {
      for (int p = pass.panel_begin; p < pass.panel_end; ++p)
        convolve(pass, p, out_parts_[first + begin], out_parts_[first + end]);
    });
  }

  void backward(Pass& pass) override {
    if (pass.grad_in[0]) {
      prepare_backward(pass);
      gradient_in(pass);
    }
    if (tensors[kBias].trainable) bias_gradient(pass, tensors[kBias]);
    if (!tensors[kWeight].trainable) return;
    if (g.split())
      for (int p = pass.panel_begin; p < pass.panel_end; ++p) split_phases(pass, p);
    if (sparse()) all_gradients(pass);
    if (!sparse() || pass.sink.update || pass.sink.store) gradient_weight(pass);
  }

protected:
  virtual void convolve(Pass&, int panel, int begin, int end) = 0;
  virtual void prepare_backward(Pass&) {}
  virtual void convolve_backward(Pass&, int panel, float* out, int out_row, int out_plane,
                                 bool accumulate, int begin, int end) = 0;
  virtual void gradient_weight(Pass&) = 0;

  static constexpr int kGradRows = 4;  // output channels of a dense gradient at once

  int taps() const { return g.kernel.area(); }
  int group_inputs() const { return g.in.channels / g.groups; }

  // A strided input is first split into its phases.
  void split_phases(Pass& pass, int p) const {
    const View& in = pass.in[0];
    const int lanes = pass.lanes(p);
    float* const to = phase_panel(pass, p);
    pass.split(g.in.channels, [&](int, int begin, int end) {
      for (int c = begin; c < end; ++c)
        split_channel(in.interior(p, lanes), in.layout, to, c, lanes);
    });
  }
  // Where tap offsets of panel p count from.
  float* inputs_of(const Pass& pass, int p) const {
    if (g.split()) return phase_panel(pass, p);
    return pass.in[0].panel(p) + g.in_start() * std::ptrdiff_t(pass.lanes(p));
  }
  float* phase_panel(const Pass& pass, int p) const {
    const std::size_t pixels = std::size_t(g.in_channels()) * g.in_plane();
    return pass.scratch + pixels * kPanelLanes * (p - pass.panel_begin);
  }

  // Pixel (y, x) of channel c's phase image is the padded input at (y*s + phase.y, x*s + phase.x).
  template <typename F>
  void for_phase_pixels(int c, F&& f) const {
    for (int i = 0; i < g.phases(); ++i) {
      const int plane = (c * g.phases() + i) * g.in_plane();
      for (int y = 0; y < g.phase_height; ++y)
        for (int x = 0; x < g.phase_width; ++x)
          f(plane + y * g.phase_width + x, y * g.stride.y + g.phase_of[i].y - g.padding.y,
            x * g.stride.x + g.phase_of[i].x - g.padding.x);
    }
  }
  void split_channel(const float* in, const Layout& layout, float* to, int c, int lanes) const {
    const std::size_t bytes = lanes * sizeof(float);
    for_phase_pixels(c, [&](std::size_t pixel, int y, int x) {
      const bool inside = y >= 0 && y < g.in.height && x >= 0 && x < g.in.width;
      if (!inside) {
        std::memset(to + pixel * lanes, 0, bytes);
      } else {
        const std::size_t from = std::size_t(c) * layout.plane() + y * layout.row() + x;
        std::memcpy(to + pixel * lanes, in + from * lanes, bytes);
      }
    });
  }
  void join_channel(const float* from, float* out, const Layout& layout, int c, int lanes,
                    bool accumulate) const {
    float* const channel = out + std::size_t(c) * layout.plane() * lanes;
    if (!accumulate)
      for (int y = 0; y < g.in.height; ++y)
        std::memset(channel + std::size_t(y) * layout.row() * lanes, 0,
                    sizeof(float) * lanes * g.in.width);
    for_phase_pixels(c, [&](std::size_t pixel, int y, int x) {
      if (y < 0 || y >= g.in.height || x < 0 || x >= g.in.width) return;
      float* const to = channel + std::size_t(y * layout.row() + x) * lanes;
      for (int l = 0; l < lanes; ++l) to[l] += from[pixel * lanes + l];
    });
  }

  void gradient_in(Pass& pass) {
    const View& to = pass.grad_in[0];
    const bool accumulate = pass.accumulate[0];
    pass.split(int(in_parts_.size()) - 1, [&](int, int first, int last) {
      const int begin = in_parts_[first], end = in_parts_[last];
      for (int p = pass.panel_begin; p < pass.panel_end; ++p) {
        const int lanes = pass.lanes(p);
        float* const out = to.interior(p, lanes);
        if (!g.split()) {
          convolve_backward(pass, p, out, to.layout.row(), to.layout.plane(), accumulate, begin,
                            end);
          continue;
        }
        float* const images = phase_panel(pass, p);
        convolve_backward(pass, p, images, g.in_row(), g.in_plane(), false, begin, end);
        for (int c = begin; c < end; ++c)
          join_channel(images, out, to.layout, c, lanes, accumulate);
      }
    });
  }

  DenseConv dense(int channels) const {
    DenseConv conv;
    conv.in_channels = channels;
    conv.in_plane = g.in_plane() * g.phases();
    conv.taps = taps();
    conv.tap_offset = tap_offset_.data();
    conv.tap_weight = tap_weight_.data();
    conv.weight_out = std::ptrdiff_t(group_inputs()) * taps();
    conv.weight_in = taps();
    return conv;
  }

  // Calls f(first weight, gradients, how many) for blocks of rows of the dense gradient, which
  // cover the output channels [first, last).
  template <typename F>
  void dense_gradients(Pass& pass, float* scratch, int first, int last, F&& f) {
    const std::size_t row = std::size_t(group_inputs()) * taps();
    const int group_out = g.out.channels / g.groups;
    const int blocks_per_group = (group_out + kGradRows - 1) / kGradRows;
    auto block_of = [&](int output) {
      return output / group_out * blocks_per_group + output % group_out / kGradRows;
    };
    const int first_block = block_of(first);
    pass.split(block_of(last - 1) + 1 - first_block, [&](int thread, int begin, int end) {
      float* const block = scratch + thread * kGradRows * row;
      for (int i = first_block + begin; i < first_block + end; ++i) {
        const int group = i / blocks_per_group;
        const int o = group * group_out + i % blocks_per_group * kGradRows;
        const int rows = std::min(kGradRows, (group + 1) * group_out - o);
        std::memset(block, 0, rows * row * sizeof(float));
        for (int p = pass.panel_begin; p < pass.panel_end; ++p) {
          const int lanes = pass.lanes(p);
          const View& grad = pass.grad_out;
          DenseGradArgs args;
          args.shape = g.forward_shape(lanes, grad.layout.row(), grad.layout.plane());
          args.conv = dense(group_inputs());
          args.in =
              inputs_of(pass, p) + std::size_t(group) * group_inputs() * args.conv.in_plane * lanes;
          args.grad = grad.interior(p, lanes) + std::size_t(o) * grad.layout.plane() * lanes;
          args.grad_weight = block;
          args.out_begin = 0;
          args.out_end = rows;
          pass.kernels.dense_conv_grad(args);
        }
        f(o * row, block, rows * row);
      }
    });
  }
  std::size_t phase_floats(const Pass& pass) const {
    if (!g.split()) return 0;
    std::size_t lanes = 0;
    for (int p = pass.panel_begin; p < pass.panel_end; ++p) lanes += pass.lanes(p);
    return std::size_t(g.in_channels()) * g.in_plane() * lanes;
  }
  // Of the rows that are wanted.
  void all_gradients(Pass& pass) {
    const auto [from, to] = tensors[kWeight].wanted(pass.sink);
    const std::size_t row = columns();
    if (from == to) return;
    dense_gradients(pass, pass.scratch + phase_floats(pass), int(from / row),
                    int((to + row - 1) / row),
                    [&](std::size_t begin, const float* grad, std::size_t n) {
                      tensors[kWeight].take_all(pass.kernels, pass.sink, begin, grad, n);
                    });
  }

  // Cuts [0, cost.size()) into parts of about equal cost; fine enough for many threads.
  static std::vector<int> cut(const std::vector<std::size_t>& cost) {
    const std::size_t total = std::accumulate(cost.begin(), cost.end(), std::size_t(0));
    const int parts = std::min<int>(int(cost.size()), kParts);
    std::vector<int> at{0};
    std::size_t sum = 0;
    for (std::size_t i = 0; i < cost.size(); ++i) {
      sum += cost[i];
      if (sum * parts >= total * at.size() && int(at.size()) < parts) at.push_back(int(i) + 1);
    }
    while (int(at.size()) <= parts) at.push_back(int(cost.size()));
    at.back() = int(cost.size());
    return at;
  }
  static constexpr int kParts = 48;  // divisible by many numbers of threads

  const ConvGeometry g;
  std::vector<int> out_parts_, in_parts_;
  std::vector<std::int32_t> tap_offset_, tap_weight_;
};

std::unique_ptr<Layer> make_sparse_conv(const Node&, const Shape& in, Sides in_halo,
                                        Sides grad_halo, std::size_t nonzeros, bool needs_grad_in);
std::unique_ptr<Layer> make_dense_conv(const Node&, const Shape& in, Sides in_halo,
                                       Sides grad_halo);

}  // namespace fedlean
