// What a layer of the network does: say what memory it needs, then run forward and backward on
// panels.  A layer owns its weights; activations and scratch belong to the pass.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "fedlean/kernels.h"
#include "fedlean/network.h"
#include "fedlean/threads.h"
#include "fedlean/weight.h"

namespace fedlean {

// An activation or its gradient during a pass.  `local` arrays hold only the panels from
// `first_panel` on: that is how a part of the network runs a few panels at a time.
struct View {
  float* data = nullptr;
  Layout layout;
  int first_panel = 0;
  explicit operator bool() const { return data != nullptr; }
  float* panel(int p) const {
    return data + layout.pixels() * kPanelLanes * std::size_t(p - first_panel);
  }
  float* interior(int p, int lanes) const {
    return panel(p) + std::size_t(layout.origin()) * lanes;
  }
};

// One layer's part of one pass.
struct Pass {
  const Kernels& kernels;
  ThreadPool& pool;
  Batch batch;
  int panel_begin, panel_end;
  bool training;  // batch statistics
  bool dense_gradient;  // there is scratch for gradients of pruned coordinates
  std::vector<View> in;
  View out;
  float* saved;  // from forward to backward; null where there is no backward
  float* scratch;
  // Backward only.
  std::vector<View> grad_in;  // no data: not needed
  std::vector<bool> accumulate;  // per input
  View grad_out;
  Sink sink;
  // Forward only: perturbed weight and bias, or null; the weight's of the outputs of this pass,
  // which are all unless the layer comes in blocks (Layer::block_end).
  const float* moved[2] = {};
  int out_begin = 0, out_end = 0;
  bool in_training = false;  // a pass of training, also where nothing is kept for backward

  int lanes(int panel) const { return batch.lanes(panel); }
  // f(thread, begin, end) on every thread, [0, n) cut evenly.
  template <typename F>
  void split(int n, F&& f) const {
    const int threads = pool.threads();
    pool.run([&](int t) {
      const int begin = int(std::int64_t(n) * t / threads);
      const int end = int(std::int64_t(n) * (t + 1) / threads);
      if (begin < end) f(t, begin, end);
    });
  }
};

// The situation that decides how much memory a layer needs.
struct Situation {
  bool training;
  int dense_rows;  // rows of the weight whose gradients are taken densely, most at once
  bool needs_grad_in;  // of any input
  int panels;  // at once
  int lanes;  // of all these panels together
  int examples;
  int threads;
};

struct Needs {
  std::size_t saved = 0, forward_scratch = 0, backward_scratch = 0;  // floats
};

enum Slot { kWeight, kBias, kRunningMean, kRunningVar, kSlots };

// Kept weights of one output that follow one another as stored and in the dense order.
struct Run {
  int output;
  std::uint32_t begin, end;  // stored values
  std::uint32_t at;  // of the first, among those of a block of outputs
  int chunk;  // of a sparse layer's pattern
};

class Layer {
public:
  explicit Layer(const Node& node) : node(node) {}
  virtual ~Layer() = default;

  virtual Needs needs(const Situation&) const { return {}; }
  // Does backward read the input's (output's) values?
  virtual bool reads_input() const { return false; }
  virtual bool reads_output() const { return false; }
  // May the output take the first input's memory in a training pass, and the gradient of that input
  // the memory of the output's gradient?
  virtual bool in_place() const { return false; }
  // In training mode, does an example's output depend on the others'?
  virtual bool mixes_examples() const { return false; }

  // Does a pass of training draw random numbers?  If so, those of `key` until the next is set.
  virtual bool random() const { return false; }
  virtual void set_key(std::uint64_t /*key*/) {}

  virtual void forward(Pass&) = 0;
  virtual void backward(Pass&) = 0;

  // Values stored of a tensor (0: there is none); known before `build`.
  virtual std::size_t stored(Slot) const { return 0; }
  // Is the weight stored by its pattern only?  Otherwise a mask is kept beside it.
  virtual bool sparse() const { return false; }
  // Bytes besides the tensors (patterns, permutations); known before `build`.
  virtual std::size_t index_bytes() const { return 0; }
  // Builds the pattern of a sparse weight; `kept` is its mask in the dense order, or null.
  virtual void build(const std::uint8_t* /*kept*/) {}
  // What `build` really holds; equals `index_bytes`.
  virtual std::size_t built_bytes() const { return 0; }
  // Coordinates of the dense weight in stored order; empty when it is stored densely.
  virtual std::vector<std::uint32_t> weight_positions() const { return {}; }
  // Stored index of each kept weight, in the row-major order of the dense tensor.
  virtual std::vector<std::uint32_t> row_major() const { return {}; }

  // Perturbed weights are made for the outputs [begin, block_end(begin)) at once, one block after
  // the other, in the memory of the last one.  block_floats: most values of a block; known before
  // `build`.  All of this is for a layer without gradients.
  virtual int block_end(int /*begin*/) const { return node.shape.channels; }
  virtual std::size_t block_floats() const { return stored(kWeight); }
  // f(run) for the outputs of a block, in the row-major order of the dense weight.
  using RunVisitor = std::function<void(const Run&)>;
  virtual void for_runs(int begin, int end, const RunVisitor& f) const;
  // values[i] = u * v[column of the run's value i], where the dense weight is (outputs, columns).
  virtual void outer(const Run& run, float u, const float* v, float* values) const;

  // The weight (from the pass's first output on) or the bias (from the first of all).
  const float* value(const Pass& pass, Slot slot) const {
    return pass.moved[slot] ? pass.moved[slot] : tensors[slot].value.data();
  }
  // Columns of the weight as a matrix with a row per output; 0 where it is a vector.
  virtual std::size_t columns() const { return 0; }

  bool any_trainable() const { return tensors[kWeight].trainable || tensors[kBias].trainable; }

  const Node node;
  Weight tensors[kSlots];
};

// Zeros `v` for the panels of the pass: all of it, or only its interior.
void clear(const Pass&, const View& v);
void clear_halo(const Pass&, const View& v);

// One sum over pixels and used lanes per channel: dBias (and nothing else needs it this way).
void bias_gradient(const Pass&, Weight& bias);

// Layers of each kind.  `nonzeros`: kept coordinates of the weight.
std::unique_ptr<Layer> make_conv(const Node&, const Shape& in, Sides in_halo, Sides grad_halo,
                                 std::size_t nonzeros, bool needs_grad_in);
std::unique_ptr<Layer> make_linear(const Node&, const Shape& in, std::size_t nonzeros,
                                   bool needs_grad_in);
std::unique_ptr<Layer> make_norm(const Node&, const Shape& in);
std::unique_ptr<Layer> make_pool(const Node&, const Shape& in);
std::unique_ptr<Layer> make_pointwise(const Node&);
std::unique_ptr<Layer> make_dropout(const Node&);

// Zero pixels that a convolution wants around its input and around its output's gradient.
Sides input_halo(const Node& conv);
Sides gradient_halo(const Node& conv, const Shape& in);

// f(row of a, row of b, floats) for every image row of the channels [begin, end) of panel p.
template <typename F>
void for_rows(const View& a, const View& b, int p, int lanes, int begin, int end, F&& f) {
  const Shape& s = a.layout.shape;
  float* const pa = a.interior(p, lanes);
  float* const pb = b.interior(p, lanes);
  const std::size_t n = std::size_t(s.width) * lanes;
  if (a.layout.bare() && b.layout.bare()) {  // one stretch of memory
    const std::size_t plane = n * s.height;
    if (begin < end) f(pa + begin * plane, pb + begin * plane, plane * (end - begin));
    return;
  }
  for (int c = begin; c < end; ++c)
    for (int y = 0; y < s.height; ++y)
      f(pa + (std::size_t(c) * a.layout.plane() + std::size_t(y) * a.layout.row()) * lanes,
        pb + (std::size_t(c) * b.layout.plane() + std::size_t(y) * b.layout.row()) * lanes, n);
}

// f(element of the view, element of the row-major array) for every example.
template <typename F>
void for_values(const View& v, Batch batch, F&& f) {
  const Shape& s = v.layout.shape;
  for (int p = 0; p < batch.panels(); ++p) {
    const int lanes = batch.lanes(p);
    for (int c = 0; c < s.channels; ++c) {
      for (int y = 0; y < s.height; ++y) {
        float* const row =
            v.interior(p, lanes) +
            (std::size_t(c) * v.layout.plane() + std::size_t(y) * v.layout.row()) * lanes;
        for (int x = 0; x < s.width; ++x)
          for (int l = 0; l < batch.used(p); ++l)
            f(row[std::size_t(x) * lanes + l],
              (std::size_t(p * kPanelLanes + l) * s.channels + c) * s.height * s.width +
                  std::size_t(y) * s.width + x);
      }
    }
  }
}

}  // namespace fedlean
