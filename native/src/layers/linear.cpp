// Linear: sparse columns, or dense on row-major copies of the activations.

#include <algorithm>
#include <cstring>

#include "fedlean/layer.h"
#include "thresholds.h"

namespace fedlean {

namespace {

// Perturbed weights that are made at once: they stay in the near caches until they are used.
constexpr int kMovedFloats = 16384;

// Columns are inputs (forward scatters, backward collects) or, where no gradient of the input is
// needed, outputs (forward collects, and there is nothing to scatter).
class SparseLinear : public Layer {
public:
  SparseLinear(const Node& node, const Shape& in, std::size_t nonzeros, bool needs_grad_in)
      : Layer(node),
        nonzeros_(nonzeros),
        inputs_(in.channels),
        outputs_(node.shape.channels),
        by_output_(!needs_grad_in) {
    const double density = double(nonzeros) / (double(outputs_) * inputs_);
    pattern_.columns = by_output_ ? outputs_ : inputs_;
    pattern_.rows = by_output_ ? inputs_ : outputs_;
    pattern_.block_rows = block_rows(pattern_.rows, density);
  }

  bool sparse() const override { return true; }
  std::size_t stored(Slot slot) const override {
    if (slot == kBias) return node.bias ? outputs_ : 0;
    return slot == kWeight ? nonzeros_ : 0;
  }
  std::size_t index_bytes() const override {
    return (std::size_t(pattern_.blocks()) * pattern_.columns + 1) * sizeof(std::uint32_t) +
           nonzeros_ * sizeof(std::uint16_t);
  }
  std::size_t built_bytes() const override { return pattern_.bytes(); }

  void build(const std::uint8_t* kept) override {
    std::vector<std::uint8_t> all;
    if (!kept) {
      all.assign(std::size_t(outputs_) * inputs_, 1);
      kept = all.data();
    }
    const std::size_t row_step = by_output_ ? 1 : inputs_, column_step = by_output_ ? inputs_ : 1;
    pattern_ = build_columns(kept, pattern_.rows, pattern_.columns, row_step, column_step,
                             pattern_.block_rows);
    cut_columns();
  }

  bool reads_input() const override { return tensors[kWeight].trainable; }

  Needs needs(const Situation& s) const override {
    Needs needs;
    needs.backward_scratch = std::size_t(s.threads) * strip();
    if (s.dense_rows > 0)
      needs.backward_scratch +=
          std::size_t(inputs_ + s.dense_rows) * s.examples + std::size_t(kGradRows) * inputs_;
    return needs;
  }

  std::vector<std::uint32_t> weight_positions() const override {
    std::vector<std::uint32_t> positions(nonzeros_);
    const std::size_t row_step = by_output_ ? 1 : inputs_, column_step = by_output_ ? inputs_ : 1;
    for (int b = 0; b < pattern_.blocks(); ++b)
      for (int c = 0; c < pattern_.columns; ++c)
        for (std::uint32_t k = start(b, c); k < start(b, c + 1); ++k)
          positions[k] =
              std::uint32_t((std::size_t(b) * pattern_.block_rows + pattern_.row[k]) * row_step +
                            c * column_step);
    return positions;
  }

  std::vector<std::uint32_t> row_major() const override {
    std::vector<std::uint32_t> order;
    order.reserve(nonzeros_);
    if (by_output_) {
      for_runs(0, outputs_, [&](const Run& run) {
        for (std::uint32_t k = run.begin; k < run.end; ++k) order.push_back(k);
      });
      return order;
    }
    // Columns are inputs and come in order: what is left is to tell the outputs of a block apart.
    order.resize(nonzeros_);
    std::uint32_t begin = 0;
    for (int b = 0; b < pattern_.blocks(); ++b) {
      const std::uint32_t end = start(b, pattern_.columns);
      std::vector<std::uint32_t> next(pattern_.block_rows + 1, 0);
      for (std::uint32_t k = begin; k < end; ++k) ++next[pattern_.row[k] + 1];
      next[0] = begin;
      for (int r = 0; r < pattern_.block_rows; ++r) next[r + 1] += next[r];
      for (std::uint32_t k = begin; k < end; ++k) order[next[pattern_.row[k]]++] = k;
      begin = end;
    }
    return order;
  }

  // Without gradients columns are outputs.  In a block of outputs the values of one block of rows
  // follow those of the one before.
  void for_runs(int begin, int end, const RunVisitor& f) const override {
    std::vector<std::uint32_t> at(pattern_.blocks(), 0);
    for (int b = 1; b < pattern_.blocks(); ++b) at[b] = at[b - 1] + count(b - 1, begin, end);
    for (int c = begin; c < end; ++c) {
      for (int b = 0; b < pattern_.blocks(); ++b) {
        f({c, start(b, c), start(b, c + 1), at[b], b});
        at[b] += count(b, c, c + 1);
      }
    }
  }
  int block_end(int begin) const override {
    std::size_t values = 0;
    for (int c = begin; c < outputs_; ++c) {
      for (int b = 0; b < pattern_.blocks(); ++b) values += count(b, c, c + 1);
      if (values > block_floats()) return c;
    }
    return outputs_;
  }
  std::size_t block_floats() const override {
    return std::min(nonzeros_, std::max<std::size_t>(kMovedFloats, inputs_));
  }
  void outer(const Run& run, float u, const float* v, float* values) const override {
    const float* const block = v + std::size_t(run.chunk) * pattern_.block_rows;
    for (std::uint32_t k = run.begin; k < run.end; ++k)
      values[k - run.begin] = u * block[pattern_.row[k]];
  }
  std::size_t columns() const override { return inputs_; }

  void forward(Pass& pass) override {
    if (pass.moved[kWeight]) return forward_moved(pass);
    if (by_output_) {
      pass.split(int(parts_.size()) - 1, [&](int, int begin, int end) {
        fill_bias(pass, parts_[begin], parts_[end]);
        for (int b = 0; b < pattern_.blocks(); ++b)
          for_panels(pass, pass.in[0], pass.out, [&](ColumnArgs& args) {
            pass.kernels.collect(args, b, parts_[begin], parts_[end]);
          });
      });
      return;
    }
    pass.split(pattern_.blocks(), [&](int, int begin, int end) {
      for (int b = begin; b < end; ++b) {
        const int first = b * pattern_.block_rows;
        fill_bias(pass, first, std::min(first + pattern_.block_rows, outputs_));
        for_panels(pass, pass.in[0], pass.out,
                   [&](ColumnArgs& args) { pass.kernels.scatter(args, b); });
      }
    });
  }

  void backward(Pass& pass) override {
    all_gradients(pass);
    if (tensors[kBias].trainable) bias_gradient(pass, tensors[kBias]);
    if (!pass.grad_in[0] && !(tensors[kWeight].trainable && (pass.sink.update || pass.sink.store)))
      return;
    pass.split(int(parts_.size()) - 1, [&](int thread, int begin, int end) {
      backward_columns(pass, parts_[begin], parts_[end], pass.scratch + thread * strip());
    });
  }

private:
  static constexpr std::size_t kStrip = 2048;  // non-zeros whose gradients wait for their update
  static constexpr int kGradRows = 8;
  static constexpr int kParts = 48;

  // One column of a block may be longer.
  std::size_t strip() const { return std::max<std::size_t>(kStrip, pattern_.block_rows); }

  std::uint32_t start(int block, int column) const {
    return pattern_.start[std::size_t(block) * pattern_.columns + column];
  }
  std::uint32_t count(int block, int begin, int end) const {  // of the columns [begin, end)
    return start(block, end) - start(block, begin);
  }

  // The outputs of the pass with its perturbed weights, in the order of for_runs.
  void forward_moved(Pass& pass) {
    pass.split(pass.out_end - pass.out_begin, [&](int, int first, int last) {
      const int begin = pass.out_begin + first, end = pass.out_begin + last;
      fill_bias(pass, begin, end);
      std::ptrdiff_t at = 0;
      for (int b = 0; b < pattern_.blocks(); ++b) {
        // the kernel counts non-zeros from the pattern's first
        const std::ptrdiff_t before = std::ptrdiff_t(start(b, pass.out_begin)) - at;
        for_panels(pass, pass.in[0], pass.out, [&](ColumnArgs& args) {
          args.value = pass.moved[kWeight] - before;
          pass.kernels.collect(args, b, begin, end);
        });
        at += count(b, pass.out_begin, pass.out_end);
      }
    });
  }

  void fill_bias(const Pass& pass, int begin, int end) const {
    for (int p = pass.panel_begin; p < pass.panel_end; ++p) {
      const int lanes = pass.lanes(p);
      pass.kernels.fill_channels(node.bias ? value(pass, kBias) + begin : nullptr,
                                 pass.out.panel(p) + std::size_t(begin) * lanes, lanes,
                                 end - begin);
    }
  }

  // f(arguments with `in` and `out` on the sides where the pattern has them), two panels at a time.
  template <typename F>
  void for_panels(const Pass& pass, const View& in, const View& out, F&& f) const {
    for (int p = pass.panel_begin; p < pass.panel_end; p += 2) {
      ColumnArgs args = {};
      args.pattern = &pattern_;
      args.value = tensors[kWeight].value.data();
      args.panels = std::min(2, pass.panel_end - p);
      for (int i = 0; i < args.panels; ++i) {
        args.lanes[i] = pass.lanes(p + i);
        (by_output_ ? args.rows : args.columns)[i] = in.panel(p + i);
        if (out) args.out[i] = out.panel(p + i);
        if (pass.grad_out) (by_output_ ? args.columns : args.rows)[i] = pass.grad_out.panel(p + i);
      }
      f(args);
    }
  }

  void backward_columns(Pass& pass, int begin, int end, float* grads) {
    if (pass.grad_in[0] && !pass.accumulate[0]) {
      for (int p = pass.panel_begin; p < pass.panel_end; ++p) {
        const int lanes = pass.lanes(p);
        std::memset(pass.grad_in[0].panel(p) + std::size_t(begin) * lanes, 0,
                    std::size_t(end - begin) * lanes * sizeof(float));
      }
    }
    for (int b = 0; b < pattern_.blocks(); ++b) {
      for (int c = begin; c < end;) {
        int stop = c + 1;
        while (stop < end && start(b, stop + 1) - start(b, c) <= strip()) ++stop;
        const std::uint32_t first = start(b, c), n = start(b, stop) - first;
        if (n) {
          std::memset(grads, 0, n * sizeof(float));
          for_panels(pass, pass.in[0], pass.grad_in[0], [&](ColumnArgs& args) {
            pass.kernels.column_backward(args, b, c, stop, grads);
          });
          tensors[kWeight].take(pass.kernels, pass.sink, first, grads, n);
        }
        c = stop;
      }
    }
  }

  void all_gradients(Pass& pass);  // of the rows that are wanted

  // Parts of the columns with about equal numbers of non-zeros.
  void cut_columns() {
    const std::uint64_t total = nonzeros_ + pattern_.columns;
    std::uint64_t sum = 0;
    parts_ = {0};
    const int parts = std::min(kParts, pattern_.columns);
    for (int c = 0; c < pattern_.columns; ++c) {
      ++sum;
      for (int b = 0; b < pattern_.blocks(); ++b) sum += start(b, c + 1) - start(b, c);
      if (sum * parts >= total * parts_.size() && int(parts_.size()) < parts)
        parts_.push_back(c + 1);
    }
    parts_.push_back(pattern_.columns);
  }

  const std::size_t nonzeros_;
  const int inputs_, outputs_;
  const bool by_output_;
  ColumnPattern pattern_;
  std::vector<int> parts_;  // of the columns
};

int examples_of(const Pass& pass) {
  int n = 0;
  for (int p = pass.panel_begin; p < pass.panel_end; ++p) n += pass.batch.used(p);
  return n;
}

// f(element, example, feature) for the examples of the pass and the features [begin, end).
template <typename F>
void for_elements(const Pass& pass, const View& v, int begin, int end, F&& f) {
  int first = 0;
  for (int p = pass.panel_begin; p < pass.panel_end; ++p) {
    const int lanes = pass.lanes(p), used = pass.batch.used(p);
    float* const panel = v.panel(p);
    for (int i = begin; i < end; ++i)
      for (int l = 0; l < used; ++l) f(panel[std::size_t(i) * lanes + l], first + l, i);
    first += used;
  }
}

void to_rows(const Pass& pass, const View& v, float* rows) {
  const std::size_t width = v.layout.shape.channels;
  pass.split(int(width), [&](int, int begin, int end) {
    for_elements(pass, v, begin, end, [&](float x, int b, int i) { rows[b * width + i] = x; });
  });
}

// Of the features [first, last).
void to_columns(const Pass& pass, const View& v, int first, int last, float* columns,
                int examples) {
  pass.split(last - first, [&](int, int begin, int end) {
    for_elements(pass, v, first + begin, first + end, [&](float x, int b, int i) {
      columns[std::size_t(i - first) * examples + b] = x;
    });
  });
}

// f(thread, begin, end) over [0, n) cut at multiples of a cache line.
template <typename F>
void split_lines(const Pass& pass, int n, F&& f) {
  constexpr int line = 16;
  const int lines = (n + line - 1) / line;
  pass.split(lines, [&](int thread, int begin, int end) {
    f(thread, begin * line, std::min(n, end * line));
  });
}

// Calls take(row, first column, gradients, how many) for all of dW = grad_columns · rows.
template <typename F>
void weight_gradients(const Pass& pass, const float* rows, const float* columns, int examples,
                      int inputs, int begin, int end, int row_begin, int row_end, float* block,
                      int block_rows, F&& take) {
  const int width = end - begin;
  for (int o = row_begin; o < row_end; o += block_rows) {
    const int n = std::min(block_rows, row_end - o);
    pass.kernels.dense_grad(columns, rows, block, examples, inputs, o, n, begin, end);
    for (int r = 0; r < n; ++r) take(o + r, begin, block + std::size_t(r) * width, width);
  }
}

void SparseLinear::all_gradients(Pass& pass) {
  const auto [from, to] = tensors[kWeight].wanted(pass.sink);
  if (from == to) return;
  const int examples = examples_of(pass), inputs = inputs_;
  const int first = int(from / inputs), outputs = int(to / inputs) - first;
  float* const rows = pass.scratch + std::size_t(pass.pool.threads()) * strip();
  float* const columns = rows + std::size_t(inputs) * examples;
  float* const block = columns + std::size_t(outputs) * examples;
  to_rows(pass, pass.in[0], rows);
  to_columns(pass, pass.grad_out, first, first + outputs, columns, examples);
  split_lines(pass, inputs, [&](int, int begin, int end) {
    weight_gradients(pass, rows, columns, examples, inputs, begin, end, 0, outputs,
                     block + std::size_t(kGradRows) * begin, kGradRows,
                     [&](int o, int i, const float* grad, int n) {
                       const std::size_t at = std::size_t(first + o) * inputs + i;
                       tensors[kWeight].take_all(pass.kernels, pass.sink, at, grad, n);
                     });
  });
}

class DenseLinear : public Layer {
public:
  DenseLinear(const Node& node, const Shape& in)
      : Layer(node), inputs_(in.channels), outputs_(node.shape.channels) {}

  std::size_t stored(Slot slot) const override {
    if (slot == kBias) return node.bias ? outputs_ : 0;
    return slot == kWeight ? std::size_t(inputs_) * outputs_ : 0;
  }
  std::size_t columns() const override { return inputs_; }
  int block_end(int begin) const override { return std::min(outputs_, begin + block_outputs()); }
  std::size_t block_floats() const override {
    return std::size_t(std::min(outputs_, block_outputs())) * inputs_;
  }

  bool reads_input() const override { return tensors[kWeight].trainable; }

  Needs needs(const Situation& s) const override {
    const std::size_t rows = std::size_t(s.examples) * inputs_;
    const std::size_t columns = std::size_t(s.examples) * outputs_;
    Needs needs;
    needs.forward_scratch = rows + columns;
    needs.backward_scratch =
        rows + columns + (s.needs_grad_in ? rows : 0) + std::size_t(kGradRows) * inputs_;
    return needs;
  }

  void forward(Pass& pass) override {
    const int examples = examples_of(pass);
    float* const rows = pass.scratch;
    float* const out = rows + std::size_t(examples) * inputs_;
    if (pass.out_begin == 0) to_rows(pass, pass.in[0], rows);
    constexpr int step = 4;  // whole register blocks
    const int outputs = pass.out_end - pass.out_begin;
    pass.split((outputs + step - 1) / step, [&](int, int begin, int end) {
      const int first = pass.out_begin + begin * step;
      const int last = std::min(pass.out_end, pass.out_begin + end * step);
      pass.kernels.dense_forward(rows, value(pass, kWeight),
                                 node.bias ? value(pass, kBias) + pass.out_begin : nullptr,
                                 out + pass.out_begin, examples, inputs_, outputs_,
                                 first - pass.out_begin, last - pass.out_begin);
      for_elements(pass, pass.out, first, last,
                   [&](float& y, int b, int o) { y = out[std::size_t(b) * outputs_ + o]; });
      fill_idle(pass, first, last);
    });
  }

  void backward(Pass& pass) override {
    if (tensors[kBias].trainable) bias_gradient(pass, tensors[kBias]);
    const bool grad_in = bool(pass.grad_in[0]);
    if (!grad_in && !tensors[kWeight].trainable) return;
    const int examples = examples_of(pass);
    float* const rows = pass.scratch;
    float* const columns = rows + std::size_t(examples) * inputs_;
    float* const block = columns + std::size_t(examples) * outputs_;
    float* const grad_rows = block + std::size_t(kGradRows) * inputs_;
    if (tensors[kWeight].trainable) to_rows(pass, pass.in[0], rows);
    to_columns(pass, pass.grad_out, 0, outputs_, columns, examples);
    split_lines(pass, inputs_, [&](int, int begin, int end) {
      if (grad_in)
        for (int b = 0; b < examples; ++b)
          std::fill_n(grad_rows + std::size_t(b) * inputs_ + begin, end - begin, 0.0f);
      // Rows of W by the block: read once for dX, updated while they are near.
      for (int o = 0; o < outputs_; o += kNearRows) {
        const int last = std::min(o + kNearRows, outputs_);
        if (grad_in)
          pass.kernels.dense_backward(columns, tensors[kWeight].value.data(), grad_rows, examples,
                                      inputs_, o, last, begin, end);
        if (tensors[kWeight].trainable)
          weight_gradients(pass, rows, columns, examples, inputs_, begin, end, o, last,
                           block + std::size_t(kGradRows) * begin, kGradRows,
                           [&](int row, int i, const float* grad, int n) {
                             const std::size_t at = std::size_t(row) * inputs_ + i;
                             tensors[kWeight].take_all(pass.kernels, pass.sink, at, grad, n);
                             tensors[kWeight].take(pass.kernels, pass.sink, at, grad, n);
                           });
      }
      if (grad_in) add_rows(pass, grad_rows, begin, end);
    });
  }

private:
  static constexpr int kGradRows = 8, kNearRows = 32;

  int block_outputs() const { return std::max(1, kMovedFloats / inputs_ / 4) * 4; }

  // Idle lanes repeat the last example.
  void fill_idle(const Pass& pass, int begin, int end) const {
    const int p = pass.panel_end - 1, lanes = pass.lanes(p), used = pass.batch.used(p);
    float* const y = pass.out.panel(p);
    for (int i = begin; i < end && used < lanes; ++i)
      std::fill_n(y + std::size_t(i) * lanes + used, lanes - used,
                  y[std::size_t(i) * lanes + used - 1]);
  }

  void add_rows(const Pass& pass, const float* grad_rows, int begin, int end) const {
    const View& to = pass.grad_in[0];
    const int p = pass.panel_end - 1, lanes = pass.lanes(p), used = pass.batch.used(p);
    if (!pass.accumulate[0])
      for (int i = begin; i < end && used < lanes; ++i)
        std::fill(to.panel(p) + std::size_t(i) * lanes + used,
                  to.panel(p) + std::size_t(i + 1) * lanes, 0.0f);
    for_elements(pass, to, begin, end, [&](float& g, int b, int i) {
      const float value = grad_rows[std::size_t(b) * inputs_ + i];
      g = pass.accumulate[0] ? g + value : value;
    });
  }

  const int inputs_, outputs_;
};

}  // namespace

std::unique_ptr<Layer> make_linear(const Node& node, const Shape& in, std::size_t nonzeros,
                                   bool needs_grad_in) {
  const double size = double(node.shape.channels) * in.channels;
  const bool sparse_is_faster = double(nonzeros) < kSparseLinearBelow * size;
  if (sparse_is_faster != node.slower)
    return std::make_unique<SparseLinear>(node, in, nonzeros, needs_grad_in);
  return std::make_unique<DenseLinear>(node, in);
}

}  // namespace fedlean
