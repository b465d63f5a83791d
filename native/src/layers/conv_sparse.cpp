// Conv2d on its kept weights only: gather forward and for the input's gradient, sample for the
// weights'.

#include "conv.h"
#include "thresholds.h"

namespace fedlean {

namespace {

class SparseConv : public Conv {
public:
  SparseConv(const Node& node, const Shape& in, Sides in_halo, Sides grad_halo,
             std::size_t nonzeros, bool needs_grad_in)
      : Conv(node, in, in_halo, grad_halo),
        nonzeros_(nonzeros),
        needs_grad_in_(needs_grad_in),
        by_channel_(channel_pixels()),
        by_plane_(g.in_plane()),
        by_row_(g.in_row()) {
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
    // The transposed copy of the values; after its use, sums of the weights' gradients.
    needs.backward_scratch +=
        std::max(s.needs_grad_in ? nonzeros_ : 0, std::size_t(s.threads) * strip_floats()) + 16;
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
      positions[k] = std::uint32_t(
          ((std::size_t(o) * group_inputs() + in_group) * g.kernel.y + ky) * g.kernel.x + kx);
    });
    return positions;
  }

  std::vector<std::uint32_t> row_major() const override {
    std::vector<std::uint32_t> order;
    order.reserve(nonzeros_);
    for_runs(0, g.out.channels, [&](const Run& run) {
      for (std::uint32_t k = run.begin; k < run.end; ++k) order.push_back(k);
    });
    return order;
  }

  // A row of each chunk after the other.  A block is the whole weight.
  void for_runs(int begin, int end, const RunVisitor& f) const override {
    const std::vector<std::uint32_t>& start = forward_.row_start;
    for (std::uint32_t o = begin; o < std::uint32_t(end); ++o) {
      for (std::size_t c = 0; c < forward_.chunks.size(); ++c) {
        const Chunk& chunk = forward_.chunks[c];
        if (o < chunk.out_begin || o >= chunk.out_end) continue;
        const std::uint32_t row = chunk.first_row + (o - chunk.out_begin);
        f({int(o), start[row], start[row + 1], start[row], int(c)});
      }
    }
  }

  void outer(const Run& run, float u, const float* v, float* values) const override {
    // The chunk's first input channel, counted from the first of the output's group.
    const int first =
        run.chunk * chunk_ - run.output / (g.out.channels / g.groups) * group_inputs();
    for (std::uint32_t k = run.begin; k < run.end; ++k)
      values[k - run.begin] = u * v[std::ptrdiff_t(first) * taps() + column_of(forward_.offset[k])];
  }

protected:
  void convolve(Pass& pass, int p, int begin, int end) override {
    const int lanes = pass.lanes(p);
    const View& out = pass.out;
    GatherArgs args;
    args.shape = g.forward_shape(lanes, out.layout.row(), out.layout.plane());
    args.pattern = &forward_;
    args.value = value(pass, kWeight);
    args.in = inputs_of(pass, p);
    args.out = out.interior(p, lanes);
    args.bias = node.bias ? value(pass, kBias) : nullptr;
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

  void convolve_backward(Pass& pass, int p, float* out, int out_row, int out_plane, bool accumulate,
                         int begin, int end) override {
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
  // Division of a number below 65536 without dividing.
  struct Divisor {
    explicit Divisor(int n)
        : n(std::uint32_t(n)), inverse(((std::uint64_t(1) << 32) + n - 1) / n) {}
    std::uint32_t of(std::uint32_t x) const { return std::uint32_t(x * inverse >> 32); }
    std::uint32_t n;
    std::uint64_t inverse;
  };

  // (input channel within the chunk, ky, kx) as one index; the offset is that of tap_offset.
  std::uint32_t column_of(std::uint32_t offset) const {
    const std::uint32_t channel = by_channel_.of(offset), pixel = offset - channel * by_channel_.n;
    const std::uint32_t phase = by_plane_.of(pixel), rest = pixel - phase * by_plane_.n;
    std::uint32_t y = by_row_.of(rest), x = rest - y * by_row_.n;
    if (g.split()) {
      y = y * g.stride.y + g.phase_of[phase].y;
      x = x * g.stride.x + g.phase_of[phase].x;
    }
    return channel * taps() + y / g.dilation.y * g.kernel.x + x / g.dilation.x;
  }

  static constexpr std::uint32_t kStrip = 4096;  // non-zeros whose gradients wait for their update

  std::size_t nonzeros() const { return nonzeros_; }
  int channel_pixels() const { return g.in_plane() * g.phases(); }
  std::size_t strip_floats() const {
    const std::size_t longest = std::size_t(chunk_) * taps();  // one row may exceed the strip
    return std::max<std::size_t>(std::min<std::size_t>(kStrip, nonzeros_), longest);
  }
  std::vector<Chunk> chunks() const {
    return cut_chunks(g.in.channels, channel_pixels(), chunk_, g.out.channels, g.groups);
  }
  std::vector<Chunk> chunks_backward() const {
    return cut_chunks(g.out.channels, g.grad_plane(), chunk_backward_, g.in.channels * g.phases(),
                      g.groups);
  }

  void sample_rows(Pass& pass, int chunk, std::uint32_t begin, std::uint32_t end, float* sums) {
    const std::uint32_t first = forward_.row_start[begin];
    const std::size_t n = forward_.row_start[end] - first;
    if (n == 0) return;
    std::memset(sums, 0, n * sizeof(float));
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
      args.sums = sums;
      pass.kernels.sample(args);
    }
    tensors[kWeight].take(pass.kernels, pass.sink, first, sums, n);
  }

  float* values_backward(const Pass& pass) const {
    std::size_t used = phase_floats(pass);
    if (pass.dense_gradient)
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
    if (taps() == 1 && g.grad_row() == width && out_row == width) {
      shape.width = height * width;
      shape.height = 1;
    }
    return shape;
  }

  void build_forward(const std::uint8_t* kept) {
    const int channel = channel_pixels();
    const int group_out = g.out.channels / g.groups, per_out = group_inputs() * taps();
    std::vector<std::uint32_t> pixel(per_out);  // of each weight of an output channel
    for (int i = 0; i < per_out; ++i)
      pixel[i] = std::uint32_t(i / taps() * channel + tap_offset_[i % taps()]);
    std::vector<Tap> taps_of;
    taps_of.reserve(nonzeros_);
    for (int o = 0; o < g.out.channels; ++o) {
      const std::uint32_t first = std::uint32_t(o / group_out * group_inputs()) * channel;
      auto add = [&](std::size_t i) { taps_of.push_back({std::uint32_t(o), first + pixel[i]}); };
      if (kept) {
        for_kept(kept + std::size_t(o) * per_out, per_out, add);
      } else {
        for (int i = 0; i < per_out; ++i) add(i);
      }
    }
    std::vector<std::uint32_t> position;
    forward_ =
        build_gather(chunks(), std::uint32_t(chunk_ * channel), g.out.channels, taps_of, position);
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
    struct Source {
      std::uint16_t channel, ky, kx;
    };
    std::vector<Source> source(std::size_t(chunk_) * channel_pixels());  // by offset
    for (int c = 0; c < chunk_; ++c)
      for (int t = 0; t < taps(); ++t)
        source[c * channel_pixels() + tap_offset_[t]] = {
            std::uint16_t(c), std::uint16_t(t / g.kernel.x), std::uint16_t(t % g.kernel.x)};
    int first = 0;
    for (const Chunk& chunk : forward_.chunks) {
      for (std::uint32_t o = chunk.out_begin; o < chunk.out_end; ++o) {
        const std::uint32_t row = chunk.first_row + (o - chunk.out_begin);
        for (std::uint32_t k = forward_.row_start[row]; k < forward_.row_start[row + 1]; ++k) {
          const Source& s = source[forward_.offset[k]];
          f(k, int(o), first + s.channel, int(s.ky), int(s.kx));
        }
      }
      first += chunk_;
    }
  }

  GatherPattern forward_, backward_;
  std::vector<std::uint32_t> transposed_;  // backward's non-zero -> forward's
  const std::size_t nonzeros_;
  const bool needs_grad_in_;
  int chunk_, chunk_backward_;  // channels
  const Divisor by_channel_, by_plane_, by_row_;
};

}  // namespace

std::unique_ptr<Layer> make_sparse_conv(const Node& node, const Shape& in, Sides in_halo,
                                        Sides grad_halo, std::size_t nonzeros, bool needs_grad_in) {
  return std::make_unique<SparseConv>(node, in, in_halo, grad_halo, nonzeros, needs_grad_in);
}

}  // namespace fedlean
