// Conv2d with its whole weight, in NumPy's order.

#include "conv.h"
#include "thresholds.h"

namespace fedlean {

namespace {

class DenseConvLayer : public Conv {
public:
  DenseConvLayer(const Node& node, const Shape& in, Sides in_halo, Sides grad_halo)
      : Conv(node, in, in_halo, grad_halo) {
    out_parts_ = cut_even(g.out.channels);
    in_parts_ = cut_even(g.in.channels);
    phase_taps_.resize(g.phases());
    for (int ky = 0; ky < g.kernel.y; ++ky) {
      for (int kx = 0; kx < g.kernel.x; ++kx) {
        Taps& taps = phase_taps_[g.tap_phase(ky, kx)];
        taps.offset.push_back(g.tap_offset_backward(ky, kx));
        taps.weight.push_back(ky * g.kernel.x + kx);
      }
    }
  }

  int block_end(int begin) const override {
    return std::min(g.out.channels, begin + block_outputs());
  }
  std::size_t block_floats() const override {
    return columns() * std::min(g.out.channels, block_outputs());
  }

  Needs needs(const Situation& s) const override {
    Needs needs = Conv::needs(s);
    if (s.dense_rows == 0)
      needs.backward_scratch += std::size_t(s.threads) * kGradRows * group_inputs() * taps();
    return needs;
  }

protected:
  void convolve(Pass& pass, int p, int begin, int end) override {
    const int lanes = pass.lanes(p);
    const View& out = pass.out;
    const float* const in = inputs_of(pass, p);
    const int first = pass.out_begin;
    DenseConvArgs args;
    args.shape = g.forward_shape(lanes, out.layout.row(), out.layout.plane());
    args.weight = value(pass, kWeight);
    args.out = out.interior(p, lanes) + std::size_t(first) * out.layout.plane() * lanes;
    args.out_begin = begin - first;
    args.out_end = end - first;
    const int plane = g.in_plane() * g.phases(), chunk = dense_chunk(g.kernel);
    for (int c = 0; c < g.in.channels; c += chunk) {
      args.conv = dense(std::min(chunk, g.in.channels - c));
      args.in = in + std::size_t(c) * plane * lanes;
      args.bias = c == 0 && node.bias ? value(pass, kBias) + first : nullptr;
      args.accumulate = c > 0;
      pass.kernels.dense_conv(args);
      args.weight += chunk * taps();
    }
  }

  void convolve_backward(Pass& pass, int p, float* out, int out_row, int out_plane, bool accumulate,
                         int begin, int end) override {
    const int lanes = pass.lanes(p);
    const float* const grad = pass.grad_out.panel(p) + g.grad_start() * std::ptrdiff_t(lanes);
    for (int phase = 0; phase < g.phases(); ++phase) {
      const Taps& taps_of = phase_taps_[phase];
      DenseConvArgs args;
      const int height = g.split() ? g.phase_height : g.in.height;
      const int width = g.split() ? g.phase_width : g.in.width;
      args.shape = {lanes, height, width, g.grad_row(), out_row, out_plane * g.phases()};
      if (taps() == 1 && g.grad_row() == width && out_row == width) {
        args.shape.width = height * width;
        args.shape.height = 1;
      }
      args.conv.in_plane = g.grad_plane();
      args.conv.taps = int(taps_of.offset.size());
      args.conv.tap_offset = taps_of.offset.data();
      args.conv.tap_weight = taps_of.weight.data();
      args.conv.weight_out = taps();
      args.conv.weight_in = std::ptrdiff_t(g.in.channels) * taps();
      args.weight = tensors[kWeight].value.data();
      args.out = out + std::size_t(phase) * out_plane * lanes;
      args.bias = nullptr;
      args.out_begin = begin;
      args.out_end = end;
      const int chunk = dense_chunk(g.kernel);
      for (int o = 0; o < g.out.channels; o += chunk) {
        args.conv.in_channels = std::min(chunk, g.out.channels - o);
        args.in = grad + std::size_t(o) * g.grad_plane() * lanes;
        args.accumulate = accumulate || o > 0;
        pass.kernels.dense_conv(args);
        args.weight += chunk * args.conv.weight_in;
      }
    }
  }

  void gradient_weight(Pass& pass) override {
    dense_gradients(pass, pass.scratch + phase_floats(pass), 0, g.out.channels,
                    [&](std::size_t begin, const float* grad, std::size_t n) {
                      tensors[kWeight].take_all(pass.kernels, pass.sink, begin, grad, n);
                      tensors[kWeight].take(pass.kernels, pass.sink, begin, grad, n);
                    });
  }

private:
  struct Taps {
    std::vector<std::int32_t> offset, weight;
  };

  // Perturbed weights that are made at once: few enough for the near caches, enough output channels
  // for a tile of the input to be worth loading.
  static constexpr int kMovedFloats = 65536;
  int block_outputs() const { return std::max(1, kMovedFloats / int(columns()) / 4) * 4; }

  // Whole register blocks of output channels (12 = 2*6 = 3*4).
  static std::vector<int> cut_even(int channels) {
    std::vector<int> at;
    for (int c = 0; c < channels; c += 4) at.push_back(c);
    at.push_back(channels);
    return at;
  }

  std::vector<Taps> phase_taps_;
};

}  // namespace

std::unique_ptr<Layer> make_dense_conv(const Node& node, const Shape& in, Sides in_halo,
                                       Sides grad_halo) {
  return std::make_unique<DenseConvLayer>(node, in, in_halo, grad_halo);
}

}  // namespace fedlean
