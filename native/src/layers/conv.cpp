// Conv2d: sparse (gather, sample) or dense, whichever is faster at its density.

#include <algorithm>
#include <cstring>
#include <numeric>
#include <stdexcept>
#include <string>

#include "conv_geometry.h"
#include "thresholds.h"

namespace fedlean {

namespace {

// What both ways share: the split of strided inputs into phases, threads, the bias.
class Conv : public Layer {
 public:
  Conv(const Node& node, const Shape& in, int in_halo, int grad_halo)
      : Layer(node), g(node, in, in_halo, grad_halo) {
    for (int ky = 0; ky < g.kernel; ++ky) {
      for (int kx = 0; kx < g.kernel; ++kx) {
        tap_offset_.push_back(g.tap_offset(ky, kx));
        tap_weight_.push_back(ky * g.kernel + kx);
      }
    }
  }

  bool reads_input() const override { return tensors[kWeight].trainable; }
  std::size_t stored(Slot slot) const override {
    if (slot == kBias) return node.bias ? g.out.channels : 0;
    return slot == kWeight ? std::size_t(g.out.channels) * group_inputs() * taps() : 0;
  }

  Needs needs(const Situation& s) const override {
    Needs needs;
    if (g.split()) {
      const std::size_t floats = std::size_t(g.in_channels()) * g.in_plane() * s.lanes;
      needs.forward_scratch = floats;
      needs.backward_scratch = floats;
    }
    if (s.importance)
      needs.backward_scratch += std::size_t(s.threads) * kGradRows * group_inputs() * taps();
    return needs;
  }

  void forward(Pass& pass) override {
    for (int p = pass.panel_begin; p < pass.panel_end; ++p) {
      const float* in = phases_of(pass, p);
      pass.split(int(out_parts_.size()) - 1, [&](int, int begin, int end) {
        convolve(pass, p, in, out_parts_[begin], out_parts_[end]);
      });
    }
  }

  void backward(Pass& pass) override {
    if (pass.grad_in[0]) {
      prepare_backward(pass);
      for (int p = pass.panel_begin; p < pass.panel_end; ++p) gradient_in(pass, p);
    }
    if (tensors[kBias].trainable) bias_gradient(pass, tensors[kBias]);
    if (!tensors[kWeight].trainable) return;
    if (g.split())
      for (int p = pass.panel_begin; p < pass.panel_end; ++p) phases_of(pass, p);
    if (sparse() && pass.sink.all_coordinates()) all_gradients(pass);
    if (!sparse() || pass.sink.update || pass.sink.store) gradient_weight(pass);
  }

 protected:
  virtual void convolve(Pass&, int panel, const float* in, int begin, int end) = 0;
  virtual void prepare_backward(Pass&) {}
  virtual void convolve_backward(Pass&, int panel, float* out, int out_row, int out_plane,
                                 bool accumulate, int begin, int end) = 0;
  virtual void gradient_weight(Pass&) = 0;

  static constexpr int kGradRows = 4;  // output channels of a dense gradient at once

  int taps() const { return g.kernel * g.kernel; }
  int group_inputs() const { return g.in.channels / g.groups; }

  // Where tap offsets of panel p count from; a strided input is first split into its phases.
  float* phases_of(Pass& pass, int p) const {
    const View& in = pass.in[0];
    const int lanes = pass.lanes(p);
    if (!g.split()) return in.panel(p) + g.in_start() * std::ptrdiff_t(lanes);
    float* const to = phase_panel(pass, p);
    pass.split(g.in.channels, [&](int, int begin, int end) {
      for (int c = begin; c < end; ++c) split_channel(in.interior(p, lanes), in.layout, to, c, lanes);
    });
    return to;
  }
  float* inputs_of(const Pass& pass, int p) const {  // after phases_of
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
          f(plane + y * g.phase_width + x, y * g.stride + g.phase_of[i].y - g.padding,
            x * g.stride + g.phase_of[i].x - g.padding);
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

  void gradient_in(Pass& pass, int p) {
    const int lanes = pass.lanes(p);
    const View& to = pass.grad_in[0];
    if (!g.split()) {
      pass.split(int(in_parts_.size()) - 1, [&](int, int begin, int end) {
        convolve_backward(pass, p, to.interior(p, lanes), to.layout.row(), to.layout.plane(),
                          pass.accumulate[0], in_parts_[begin], in_parts_[end]);
      });
      return;
    }
    float* const images = phase_panel(pass, p);
    pass.split(int(in_parts_.size()) - 1, [&](int, int begin, int end) {
      convolve_backward(pass, p, images, g.in_row(), g.in_plane(), false, in_parts_[begin],
                        in_parts_[end]);
      for (int c = in_parts_[begin]; c < in_parts_[end]; ++c)
        join_channel(images, to.interior(p, lanes), to.layout, c, lanes, pass.accumulate[0]);
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

  // Calls f(first weight, gradients, how many) for blocks of rows of the dense gradient.
  template <typename F>
  void dense_gradients(Pass& pass, float* scratch, F&& f) {
    const std::size_t row = std::size_t(group_inputs()) * taps();
    const int group_out = g.out.channels / g.groups;
    const int blocks_per_group = (group_out + kGradRows - 1) / kGradRows;
    pass.split(g.groups * blocks_per_group, [&](int thread, int begin, int end) {
      float* const block = scratch + thread * kGradRows * row;
      for (int i = begin; i < end; ++i) {
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
          args.in = inputs_of(pass, p) +
                    std::size_t(group) * group_inputs() * args.conv.in_plane * lanes;
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
  void all_gradients(Pass& pass) {
    dense_gradients(pass, pass.scratch + phase_floats(pass),
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

class SparseConv : public Conv {
 public:
  SparseConv(const Node& node, const Shape& in, int in_halo, int grad_halo, std::size_t nonzeros,
             bool needs_grad_in)
      : Conv(node, in, in_halo, grad_halo), nonzeros_(nonzeros), needs_grad_in_(needs_grad_in) {
    const double density = double(nonzeros) / double(Conv::stored(kWeight));
    chunk_ = chunk_channels(g.kernel, density, channel_pixels());
    chunk_backward_ = chunk_channels(g.kernel, density, g.grad_plane());
  }

  bool sparse() const override { return true; }
  std::size_t stored(Slot slot) const override {
    return slot == kWeight ? nonzeros_ : Conv::stored(slot);
  }

  Needs needs(const Situation& s) const override {
    Needs needs = Conv::needs(s);
    // The transposed copy of the values; after its use, partial sums of the weights' gradients.
    needs.backward_scratch += std::max(s.needs_grad_in ? nonzeros_ : 0,
                                       std::size_t(s.threads) * strip_floats()) + 16;
    return needs;
  }

  std::size_t index_bytes() const override {
    std::size_t bytes = gather_bytes(chunks(), nonzeros_);
    if (needs_grad_in_)
      bytes += gather_bytes(chunks_backward(), nonzeros_) + nonzeros_ * sizeof(std::uint32_t);
    return bytes;
  }
  std::size_t built_bytes() const override {
    const std::size_t backward = needs_grad_in_ ? backward_.bytes() : 0;
    return forward_.bytes() + backward + transposed_.size() * sizeof(std::uint32_t);
  }

  void build(const std::uint8_t* kept) override {
    build_forward(kept);
    if (needs_grad_in_) build_backward();
    std::vector<std::size_t> out_cost(g.out.channels, 1), in_cost(g.in.channels, 1);
    visit([&](std::uint32_t, int o, int c, int, int) { ++out_cost[o], ++in_cost[c]; });
    out_parts_ = cut(out_cost);
    in_parts_ = cut(in_cost);
  }

  std::vector<std::uint32_t> weight_positions() const override {
    std::vector<std::uint32_t> positions(nonzeros());
    visit([&](std::uint32_t k, int o, int c, int ky, int kx) {
      const int in_group = c % group_inputs();
      positions[k] =
          std::uint32_t(((std::size_t(o) * group_inputs() + in_group) * g.kernel + ky) * g.kernel + kx);
    });
    return positions;
  }

 protected:
  void convolve(Pass& pass, int p, const float* in, int begin, int end) override {
    const int lanes = pass.lanes(p);
    const View& out = pass.out;
    GatherArgs args;
    args.shape = g.forward_shape(lanes, out.layout.row(), out.layout.plane());
    args.pattern = &forward_;
    args.value = tensors[kWeight].value.data();
    args.in = in;
    args.out = out.interior(p, lanes);
    args.bias = node.bias ? tensors[kBias].value.data() : nullptr;
    args.accumulate = false;
    args.out_begin = begin;
    args.out_end = end;
    pass.kernels.gather(args);
  }

  void prepare_backward(Pass& pass) override {
    float* const copy = values_backward(pass);
    const float* const value = tensors[kWeight].value.data();
    pass.split(int(nonzeros()), [&](int, int begin, int end) {
      for (int i = begin; i < end; ++i) copy[i] = value[transposed_[i]];
    });
  }

  void convolve_backward(Pass& pass, int p, float* out, int out_row, int out_plane,
                         bool accumulate, int begin, int end) override {
    const int lanes = pass.lanes(p);
    GatherArgs args;
    args.shape = backward_shape(lanes, out_row, out_plane);
    args.pattern = &backward_;
    args.value = values_backward(pass);
    args.in = pass.grad_out.panel(p) + g.grad_start() * std::ptrdiff_t(lanes);
    args.out = out;
    args.bias = nullptr;
    args.accumulate = accumulate;
    args.out_begin = begin * g.phases();
    args.out_end = end * g.phases();
    pass.kernels.gather(args);
  }

  void gradient_weight(Pass& pass) override {
    const std::vector<std::uint32_t>& start = forward_.row_start;
    float* const scratch = values_backward(pass);
    for (std::size_t c = 0; c < forward_.chunks.size(); ++c) {
      const Chunk& chunk = forward_.chunks[c];
      const std::uint32_t rows = chunk.out_end - chunk.out_begin;
      const std::uint32_t first = start[chunk.first_row];
      const std::uint32_t count = start[chunk.first_row + rows] - first;
      pass.pool.run([&](int t) {
        std::uint32_t row = row_at(chunk, rows, first + share(count, t, pass));
        const std::uint32_t end = row_at(chunk, rows, first + share(count, t + 1, pass));
        while (row < end) {
          std::uint32_t stop = row + 1;
          while (stop < end && start[stop + 1] - start[row] <= kStrip) ++stop;
          sample_rows(pass, int(c), row, stop, scratch + t * strip_floats());
          row = stop;
        }
      });
    }
  }

 private:
  static constexpr std::uint32_t kStrip = 4096;  // non-zeros whose partial sums are kept at once

  std::size_t nonzeros() const { return nonzeros_; }
  int channel_pixels() const { return g.in_plane() * g.phases(); }
  std::size_t strip_floats() const {
    const std::size_t longest = std::size_t(chunk_) * taps();  // one row may exceed the strip
    return 5 * (std::max<std::size_t>(std::min<std::size_t>(kStrip, nonzeros_), longest) + 4);
  }
  std::vector<Chunk> chunks() const {
    return cut_chunks(g.in.channels, channel_pixels(), chunk_, g.out.channels, g.groups);
  }
  std::vector<Chunk> chunks_backward() const {
    return cut_chunks(g.out.channels, g.grad_plane(), chunk_backward_, g.in.channels * g.phases(),
                      g.groups);
  }

  void sample_rows(Pass& pass, int chunk, std::uint32_t begin, std::uint32_t end, float* partial) {
    const std::uint32_t first = forward_.row_start[begin];
    const std::size_t n = forward_.row_start[end] - first;
    if (n == 0) return;
    std::memset(partial, 0, 4 * n * sizeof(float));
    for (int p = pass.panel_begin; p < pass.panel_end; ++p) {
      const int lanes = pass.lanes(p);
      const View& grad = pass.grad_out;
      SampleArgs args;
      args.shape = g.forward_shape(lanes, grad.layout.row(), grad.layout.plane());
      args.pattern = &forward_;
      args.in = inputs_of(pass, p);
      args.grad = grad.interior(p, lanes);
      args.chunk = chunk;
      args.row_begin = begin;
      args.row_end = end;
      args.partial = partial;
      pass.kernels.sample(args);
    }
    float* const sums = partial + 4 * n;
    pass.kernels.fold_partials(partial, sums, n);
    tensors[kWeight].take(pass.kernels, pass.sink, first, sums, n);
  }

  float* values_backward(const Pass& pass) const {
    std::size_t used = phase_floats(pass);
    if (pass.importance)
      used += std::size_t(pass.pool.threads()) * kGradRows * group_inputs() * taps();
    return pass.scratch + (used + 15) / 16 * 16;
  }

  static std::uint32_t share(std::uint32_t count, int thread, const Pass& pass) {
    return std::uint32_t(std::uint64_t(count) * thread / pass.pool.threads());
  }
  // The first row of the chunk that starts at non-zero k or later.
  std::uint32_t row_at(const Chunk& chunk, std::uint32_t rows, std::uint32_t k) const {
    const auto begin = forward_.row_start.begin() + chunk.first_row;
    if (k == begin[rows]) return chunk.first_row + rows;
    return chunk.first_row + std::uint32_t(std::lower_bound(begin, begin + rows, k) - begin);
  }

  ConvShape backward_shape(int lanes, int out_row, int out_plane) const {
    const int height = g.split() ? g.phase_height : g.in.height;
    const int width = g.split() ? g.phase_width : g.in.width;
    ConvShape shape{lanes, height, width, g.grad_row(), out_row, out_plane};
    if (g.kernel == 1 && g.grad_row() == width && out_row == width) {
      shape.width = height * width;
      shape.height = 1;
    }
    return shape;
  }

  void build_forward(const std::uint8_t* kept) {
    const int channel = channel_pixels();
    std::vector<Tap> taps_of;
    taps_of.reserve(nonzeros_);
    std::size_t i = 0;
    const int group_out = g.out.channels / g.groups;
    for (int o = 0; o < g.out.channels; ++o) {
      const int first = o / group_out * group_inputs();
      for (int c = 0; c < group_inputs(); ++c)
        for (int t = 0; t < taps(); ++t, ++i)
          if (!kept || kept[i])
            taps_of.push_back(
                {std::uint32_t(o), std::uint32_t((first + c) * channel + tap_offset_[t])});
    }
    std::vector<std::uint32_t> position;
    forward_ = build_gather(chunks(), std::uint32_t(chunk_ * channel), g.out.channels, taps_of,
                            position);
  }

  void build_backward() {
    const int channel = g.grad_plane();
    std::vector<Tap> taps_of(nonzeros_);
    visit([&](std::uint32_t k, int o, int c, int ky, int kx) {
      taps_of[k] = {std::uint32_t(c * g.phases() + g.tap_phase(ky, kx)),
                    std::uint32_t(o * channel + g.tap_offset_backward(ky, kx))};
    });
    std::vector<std::uint32_t> position;
    backward_ = build_gather(chunks_backward(), std::uint32_t(chunk_backward_ * channel),
                             g.in.channels * g.phases(), taps_of, position);
    transposed_.resize(nonzeros_);
    for (std::size_t k = 0; k < position.size(); ++k) transposed_[position[k]] = std::uint32_t(k);
  }

  // f(non-zero, output channel, input channel, ky, kx)
  template <typename F>
  void visit(F&& f) const {
    const int plane = g.in_plane(), channel = plane * g.phases();
    const int across = g.split() ? std::min(g.stride, g.kernel) : 1;
    for (const Chunk& chunk : forward_.chunks) {
      for (std::uint32_t o = chunk.out_begin; o < chunk.out_end; ++o) {
        const std::uint32_t row = chunk.first_row + (o - chunk.out_begin);
        for (std::uint32_t k = forward_.row_start[row]; k < forward_.row_start[row + 1]; ++k) {
          const int pixel = int(chunk.in_pixel) + forward_.offset[k];
          const int phase = pixel % channel / plane, tap = pixel % plane;
          const int y = tap / g.in_row(), x = tap % g.in_row();
          f(k, int(o), pixel / channel, y * g.stride + phase / across, x * g.stride + phase % across);
        }
      }
    }
  }

  GatherPattern forward_, backward_;
  std::vector<std::uint32_t> transposed_;  // backward's non-zero -> forward's
  const std::size_t nonzeros_;
  const bool needs_grad_in_;
  int chunk_, chunk_backward_;  // channels
};

class DenseConvLayer : public Conv {
 public:
  DenseConvLayer(const Node& node, const Shape& in, int in_halo, int grad_halo)
      : Conv(node, in, in_halo, grad_halo) {
    out_parts_ = cut_even(g.out.channels);
    in_parts_ = cut_even(g.in.channels);
    phase_taps_.resize(g.phases());
    for (int ky = 0; ky < g.kernel; ++ky) {
      for (int kx = 0; kx < g.kernel; ++kx) {
        Taps& taps = phase_taps_[g.tap_phase(ky, kx)];
        taps.offset.push_back(g.tap_offset_backward(ky, kx));
        taps.weight.push_back(ky * g.kernel + kx);
      }
    }
  }

  Needs needs(const Situation& s) const override {
    Needs needs = Conv::needs(s);
    if (!s.importance)
      needs.backward_scratch += std::size_t(s.threads) * kGradRows * group_inputs() * taps();
    return needs;
  }

 protected:
  void convolve(Pass& pass, int p, const float* in, int begin, int end) override {
    const int lanes = pass.lanes(p);
    const View& out = pass.out;
    DenseConvArgs args;
    args.shape = g.forward_shape(lanes, out.layout.row(), out.layout.plane());
    args.weight = tensors[kWeight].value.data();
    args.out = out.interior(p, lanes);
    args.out_begin = begin;
    args.out_end = end;
    const int plane = g.in_plane() * g.phases(), chunk = dense_chunk(g.kernel);
    for (int c = 0; c < g.in.channels; c += chunk) {
      args.conv = dense(std::min(chunk, g.in.channels - c));
      args.in = in + std::size_t(c) * plane * lanes;
      args.bias = c == 0 && node.bias ? tensors[kBias].value.data() : nullptr;
      args.accumulate = c > 0;
      pass.kernels.dense_conv(args);
      args.weight += chunk * taps();
    }
  }

  void convolve_backward(Pass& pass, int p, float* out, int out_row, int out_plane,
                         bool accumulate, int begin, int end) override {
    const int lanes = pass.lanes(p);
    const float* const grad = pass.grad_out.panel(p) + g.grad_start() * std::ptrdiff_t(lanes);
    for (int phase = 0; phase < g.phases(); ++phase) {
      const Taps& taps_of = phase_taps_[phase];
      DenseConvArgs args;
      const int height = g.split() ? g.phase_height : g.in.height;
      const int width = g.split() ? g.phase_width : g.in.width;
      args.shape = {lanes, height, width, g.grad_row(), out_row, out_plane * g.phases()};
      if (g.kernel == 1 && g.grad_row() == width && out_row == width) {
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
    dense_gradients(pass, pass.scratch + phase_floats(pass),
                    [&](std::size_t begin, const float* grad, std::size_t n) {
                      tensors[kWeight].take_all(pass.kernels, pass.sink, begin, grad, n);
                      tensors[kWeight].take(pass.kernels, pass.sink, begin, grad, n);
                    });
  }

 private:
  struct Taps {
    std::vector<std::int32_t> offset, weight;
  };

  // Whole register blocks of output channels (12 = 2*6 = 3*4).
  static std::vector<int> cut_even(int channels) {
    std::vector<int> at;
    for (int c = 0; c < channels; c += channels >= 48 ? 12 : 4) at.push_back(c);
    at.push_back(channels);
    return at;
  }

  std::vector<Taps> phase_taps_;
};

}  // namespace

std::unique_ptr<Layer> make_conv(const Node& node, const Shape& in, int in_halo, int grad_halo,
                                 std::size_t nonzeros, bool needs_grad_in) {
  const std::size_t size = node.shape.channels * std::size_t(in.channels / node.groups) *
                           node.kernel * node.kernel;
  const ConvGeometry g(node, in, in_halo, grad_halo);
  constexpr int most = 65536;  // offsets have 16 bits
  const bool addressable = g.in_plane() * g.phases() <= most && g.grad_plane() <= most;
  // A dense grouped convolution has nothing to share between its outputs: gather is as good.
  if (node.groups > 1 && !addressable)
    throw std::invalid_argument("layer '" + node.name + "' (Conv2d): images of more than 65536 " +
                                "pixels are not supported with groups");
  if (node.groups > 1 || (addressable && double(nonzeros) < kSparseConvBelow * double(size)))
    return std::make_unique<SparseConv>(node, in, in_halo, grad_halo, nonzeros, needs_grad_in);
  return std::make_unique<DenseConvLayer>(node, in, in_halo, grad_halo);
}

}  // namespace fedlean
