// ReLU and the other elementwise functions, Scaler, residual Add, Scale (squeeze-and-excite),
// Concat and Flatten.

#include <algorithm>
#include <cstring>

#include "fedlean/layer.h"

namespace fedlean {

namespace {

// f(p, lanes, first channel, last channel) on all threads.
template <typename F>
void channels(const Pass& pass, const View& v, F&& f) {
  pass.split(v.layout.shape.channels, [&](int, int begin, int end) {
    for (int p = pass.panel_begin; p < pass.panel_end; ++p) f(p, pass.lanes(p), begin, end);
  });
}

void copy_or_add(const Pass& pass, const View& from, const View& to, bool accumulate) {
  if (from.data == to.data) return;
  channels(pass, from, [&](int p, int lanes, int begin, int end) {
    for_rows(from, to, p, lanes, begin, end, [&](const float* x, float* y, std::size_t n) {
      if (accumulate) {
        pass.kernels.add(x, y, n);
      } else {
        std::memcpy(y, x, n * sizeof(float));
      }
    });
  });
}

class Activation : public Layer {
public:
  explicit Activation(const Node& node) : Layer(node) {}

  // ReLU's gradient needs the sign of its output, the others' the input.
  bool in_place() const override { return node.kind == Kind::kReLU; }
  bool reads_output() const override { return node.kind == Kind::kReLU; }
  bool reads_input() const override { return node.kind != Kind::kReLU; }

  void forward(Pass& pass) override {
    channels(pass, pass.out, [&](int p, int lanes, int begin, int end) {
      for_rows(pass.in[0], pass.out, p, lanes, begin, end,
               [&](const float* x, float* y, std::size_t n) {
                 if (node.kind == Kind::kReLU) {
                   pass.kernels.relu(x, y, n);
                 } else {
                   pass.kernels.curve(node.curve, x, y, n);
                 }
               });
    });
  }

  void backward(Pass& pass) override {
    if (!pass.grad_in[0]) return;
    auto f = [&](const float* value, const float* grad, float* to, std::size_t n) {
      if (node.kind == Kind::kReLU) {
        pass.kernels.relu_backward(value, grad, to, n);
      } else {
        pass.kernels.curve_backward(node.curve, value, grad, to, n);
      }
    };
    const View& values = node.kind == Kind::kReLU ? pass.out : pass.in[0];
    const View &grad = pass.grad_out, &to = pass.grad_in[0];
    const int height = to.layout.shape.height;
    const bool flat = values.layout.bare() && grad.layout.bare() && to.layout.bare();
    channels(pass, to, [&](int p, int lanes, int begin, int end) {
      if (flat && !pass.accumulate[0]) {  // one stretch of memory
        const std::size_t plane = std::size_t(to.layout.plane()) * lanes, first = begin * plane;
        f(values.panel(p) + first, grad.panel(p) + first, to.panel(p) + first,
          (end - begin) * plane);
        return;
      }
      const std::size_t n = std::size_t(to.layout.shape.width) * lanes;
      for (int c = begin; c < end; ++c) {
        for (int y = 0; y < height; ++y) {
          auto row = [&](const View& v) {
            return v.interior(p, lanes) +
                   (std::size_t(c) * v.layout.plane() + std::size_t(y) * v.layout.row()) * lanes;
          };
          if (!pass.accumulate[0]) {
            f(row(values), row(grad), row(to), n);
            continue;
          }
          constexpr std::size_t strip = 256;
          float part[strip];
          for (std::size_t i = 0; i < n; i += strip) {
            const std::size_t m = std::min(strip, n - i);
            f(row(values) + i, row(grad) + i, part, m);
            pass.kernels.add(part, row(to) + i, m);
          }
        }
      }
    });
  }
};

// Times a constant in training, the input itself in evaluation.
class Scaler : public Layer {
public:
  explicit Scaler(const Node& node) : Layer(node) {}
  bool in_place() const override { return true; }

  void forward(Pass& pass) override {
    if (pass.in_training) {
      multiply(pass, pass.in[0], pass.out, false);
    } else {
      copy_or_add(pass, pass.in[0], pass.out, false);
    }
  }
  void backward(Pass& pass) override {
    if (pass.grad_in[0]) multiply(pass, pass.grad_out, pass.grad_in[0], pass.accumulate[0]);
  }

private:
  void multiply(const Pass& pass, const View& from, const View& to, bool accumulate) const {
    channels(pass, from, [&](int p, int lanes, int begin, int end) {
      for_rows(from, to, p, lanes, begin, end, [&](const float* x, float* y, std::size_t n) {
        pass.kernels.multiply(x, node.factor, y, n, accumulate);
      });
    });
  }
};

class Add : public Layer {
public:
  explicit Add(const Node& node) : Layer(node) {}
  bool in_place() const override { return true; }

  void forward(Pass& pass) override {
    // The first input may share the output's memory: it goes first.
    copy_or_add(pass, pass.in[0], pass.out, false);
    for (std::size_t i = 1; i < pass.in.size(); ++i) copy_or_add(pass, pass.in[i], pass.out, true);
  }

  void backward(Pass& pass) override {
    for (std::size_t i = 0; i < pass.grad_in.size(); ++i)
      if (pass.grad_in[i]) copy_or_add(pass, pass.grad_out, pass.grad_in[i], pass.accumulate[i]);
  }
};

class Scale : public Layer {
public:
  explicit Scale(const Node& node) : Layer(node) {}
  bool reads_input() const override { return true; }

  void forward(Pass& pass) override {
    channels(pass, pass.out, [&](int p, int lanes, int begin, int end) {
      const float zero[kPanelLanes] = {};
      for (int c = begin; c < end; ++c) {
        const float* const gate = pass.in[1].panel(p) + std::size_t(c) * lanes;
        for_rows(pass.in[0], pass.out, p, lanes, c, c + 1,
                 [&](const float* x, float* y, std::size_t n) {
                   pass.kernels.affine(x, zero, gate, zero, y, lanes, int(n / lanes), false);
                 });
      }
    });
  }

  void backward(Pass& pass) override {
    channels(pass, pass.out, [&](int p, int lanes, int begin, int end) {
      const float zero[kPanelLanes] = {};
      for (int c = begin; c < end; ++c) {
        const float* const gate = pass.in[1].panel(p) + std::size_t(c) * lanes;
        if (pass.grad_in[0])
          for_rows(pass.grad_out, pass.grad_in[0], p, lanes, c, c + 1,
                   [&](const float* g, float* to, std::size_t n) {
                     pass.kernels.affine(g, zero, gate, zero, to, lanes, int(n / lanes),
                                         pass.accumulate[0]);
                   });
        if (pass.grad_in[1]) gate_gradient(pass, p, lanes, c);
      }
    });
  }

private:
  static void gate_gradient(const Pass& pass, int p, int lanes, int c) {
    const float zero[kPanelLanes] = {};
    float sums[kPanelLanes] = {}, products[kPanelLanes] = {};
    for_rows(pass.grad_out, pass.in[0], p, lanes, c, c + 1,
             [&](const float* g, const float* x, std::size_t n) {
               pass.kernels.lane_sums(g, x, zero, sums, products, lanes, int(n / lanes));
             });
    float* const to = pass.grad_in[1].panel(p) + std::size_t(c) * lanes;
    for (int l = 0; l < lanes; ++l) to[l] = (pass.accumulate[1] ? to[l] : 0.0f) + products[l];
  }
};

// Channels of one input after those of the other.
class Concat : public Layer {
public:
  explicit Concat(const Node& node) : Layer(node) {}

  void forward(Pass& pass) override {
    int first = 0;
    for (const View& in : pass.in) {
      for_parts(pass, in, pass.out, first, [](const float* part, float* whole, std::size_t n) {
        std::memcpy(whole, part, n * sizeof(float));
      });
      first += in.layout.shape.channels;
    }
  }

  void backward(Pass& pass) override {
    int first = 0;
    for (std::size_t i = 0; i < pass.in.size(); ++i) {
      const bool accumulate = pass.accumulate[i];
      if (pass.grad_in[i])
        for_parts(pass, pass.grad_in[i], pass.grad_out, first,
                  [&](float* part, const float* whole, std::size_t n) {
                    if (accumulate) {
                      pass.kernels.add(whole, part, n);
                    } else {
                      std::memcpy(part, whole, n * sizeof(float));
                    }
                  });
      first += pass.in[i].layout.shape.channels;
    }
  }

private:
  // f(row of a part, row of the whole, floats), where the part's channels begin at `first`.
  template <typename F>
  static void for_parts(const Pass& pass, const View& part, const View& whole, int first, F&& f) {
    auto row = [](const View& v, int p, int lanes, int c, int y) {
      return v.interior(p, lanes) +
             (std::size_t(c) * v.layout.plane() + std::size_t(y) * v.layout.row()) * lanes;
    };
    channels(pass, part, [&](int p, int lanes, int begin, int end) {
      const std::size_t n = std::size_t(part.layout.shape.width) * lanes;
      for (int c = begin; c < end; ++c)
        for (int y = 0; y < part.layout.shape.height; ++y)
          f(row(part, p, lanes, c, y), row(whole, p, lanes, first + c, y), n);
    });
  }
};

// (C, H, W) -> (C*H*W): the same order in memory, so that only a halo makes it a copy.
class Flatten : public Layer {
public:
  explicit Flatten(const Node& node) : Layer(node) {}
  bool in_place() const override { return true; }

  void forward(Pass& pass) override { move(pass, as_image(pass.out, pass.in[0]), true); }
  void backward(Pass& pass) override {
    if (pass.grad_in[0]) move(pass, as_image(pass.grad_out, pass.grad_in[0]), false);
  }

private:
  static View as_image(View vector, const View& image) {
    vector.layout = {image.layout.shape, {}};
    return vector;
  }
  static void move(Pass& pass, const View& vector, bool forward) {
    if (forward) {
      copy_or_add(pass, pass.in[0], vector, false);
    } else {
      copy_or_add(pass, vector, pass.grad_in[0], pass.accumulate[0]);
    }
  }
};

}  // namespace

std::unique_ptr<Layer> make_pointwise(const Node& node) {
  switch (node.kind) {
    case Kind::kAdd:
      return std::make_unique<Add>(node);
    case Kind::kConcat:
      return std::make_unique<Concat>(node);
    case Kind::kScaler:
      return std::make_unique<Scaler>(node);
    case Kind::kScale:
      return std::make_unique<Scale>(node);
    case Kind::kFlatten:
      return std::make_unique<Flatten>(node);
    default:
      return std::make_unique<Activation>(node);
  }
}

}  // namespace fedlean
