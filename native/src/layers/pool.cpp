// Max, average and global average pooling.  Max pooling keeps which pixel of its window won (one
// byte per output): its input need not be saved.

#include <algorithm>
#include <cstring>
#include <limits>

#include "fedlean/layer.h"

namespace fedlean {

namespace {

float* pixel(const View& v, int p, int lanes, int c, int y, int x) {
  return v.interior(p, lanes) +
         (std::size_t(c) * v.layout.plane() + std::size_t(y) * v.layout.row() + x) * lanes;
}

void clear_channel(const View& v, int p, int lanes, int c) {
  for (int y = 0; y < v.layout.shape.height; ++y)
    std::memset(pixel(v, p, lanes, c, y, 0), 0, sizeof(float) * lanes * v.layout.shape.width);
}

class Pool : public Layer {
public:
  Pool(const Node& node, const Shape& in) : Layer(node), in_(in), out_(node.shape) {}

protected:
  // f(pixel index within the window, y, x) for the window's pixels that are inside the image.
  template <typename F>
  void window(int oy, int ox, F&& f) const {
    for (int i = 0; i < node.kernel.area(); ++i) {
      const int y = oy * node.stride.y - node.padding.y + i / node.kernel.x;
      const int x = ox * node.stride.x - node.padding.x + i % node.kernel.x;
      if (y >= 0 && y < in_.height && x >= 0 && x < in_.width) f(i, y, x);
    }
  }

  // f(panel, lanes, channel) on all threads.
  template <typename F>
  void channels(const Pass& pass, F&& f) const {
    pass.split(in_.channels, [&](int, int begin, int end) {
      for (int p = pass.panel_begin; p < pass.panel_end; ++p)
        for (int c = begin; c < end; ++c) f(p, pass.lanes(p), c);
    });
  }

  const Shape in_, out_;
};

class MaxPool : public Pool {
public:
  using Pool::Pool;

  Needs needs(const Situation& s) const override {
    Needs needs;
    if (s.training) needs.saved = (out_.size() * s.lanes + 3) / 4;
    return needs;
  }

  void forward(Pass& pass) override {
    channels(pass, [&](int p, int lanes, int c) {
      for (int y = 0; y < out_.height; ++y) {
        std::uint8_t* const won = pass.saved ? winners(pass, p, lanes, c, y) : nullptr;
        float* const to = pixel(pass.out, p, lanes, c, y, 0);
        if (node.padding == Sides{}) {
          pass.kernels.max_pool_row(pixel(pass.in[0], p, lanes, c, y * node.stride.y, 0), to, won,
                                    lanes, pass.in[0].layout.row(), out_.width, node.kernel,
                                    node.stride.x);
        } else {
          clipped_row(pass, p, lanes, c, y, to, won);
        }
      }
    });
  }

  void backward(Pass& pass) override {
    if (!pass.grad_in[0]) return;
    const bool separate = node.padding == Sides{} && node.stride.y >= node.kernel.y &&
                          node.stride.x >= node.kernel.x && !pass.accumulate[0];
    channels(pass, [&](int p, int lanes, int c) {
      const View &grad = pass.grad_out, &to = pass.grad_in[0];
      const bool covers = out_.height * node.kernel.y == in_.height &&
                          out_.width * node.kernel.x == in_.width && node.stride == node.kernel;
      if (!pass.accumulate[0] && !(separate && covers)) clear_channel(to, p, lanes, c);
      for (int y = 0; y < out_.height; ++y) {
        const std::uint8_t* const won = winners(pass, p, lanes, c, y);
        const float* const g = pixel(grad, p, lanes, c, y, 0);
        if (separate) {
          pass.kernels.max_unpool_row(g, won, pixel(to, p, lanes, c, y * node.stride.y, 0), lanes,
                                      to.layout.row(), out_.width, node.kernel, node.stride.x);
          continue;
        }
        for (int x = 0; x < out_.width; ++x) {
          for (int l = 0; l < lanes; ++l) {
            const int i = won[x * lanes + l];
            const int iy = y * node.stride.y - node.padding.y + i / node.kernel.x;
            const int ix = x * node.stride.x - node.padding.x + i % node.kernel.x;
            pixel(to, p, lanes, c, iy, ix)[l] += g[x * lanes + l];
          }
        }
      }
    });
  }

private:
  std::uint8_t* winners(const Pass& pass, int p, int lanes, int c, int y) const {
    const std::size_t row = std::size_t(c) * out_.height + y;
    return reinterpret_cast<std::uint8_t*>(pass.saved) +
           out_.size() * kPanelLanes * (p - pass.panel_begin) + row * out_.width * lanes;
  }

  void clipped_row(const Pass& pass, int p, int lanes, int c, int y, float* to,
                   std::uint8_t* won) const {
    for (int x = 0; x < out_.width; ++x) {
      bool first = true;
      window(y, x, [&](int i, int iy, int ix) {
        const float* const from = pixel(pass.in[0], p, lanes, c, iy, ix);
        for (int l = 0; l < lanes; ++l) {
          float& best = to[x * lanes + l];
          if (first || from[l] > best || from[l] != from[l]) {
            best = from[l];
            if (won) won[x * lanes + l] = std::uint8_t(i);
          }
        }
        first = false;
      });
    }
  }
};

class AvgPool : public Pool {
public:
  using Pool::Pool;

  void forward(Pass& pass) override {
    const float share = 1.0f / float(node.kernel.area());
    channels(pass, [&](int p, int lanes, int c) {
      for (int y = 0; y < out_.height; ++y) {
        for (int x = 0; x < out_.width; ++x) {
          float* const to = pixel(pass.out, p, lanes, c, y, x);
          std::memset(to, 0, sizeof(float) * lanes);
          window(y, x, [&](int, int iy, int ix) {
            const float* const from = pixel(pass.in[0], p, lanes, c, iy, ix);
            for (int l = 0; l < lanes; ++l) to[l] += from[l];
          });
          for (int l = 0; l < lanes; ++l) to[l] *= share;
        }
      }
    });
  }

  void backward(Pass& pass) override {
    if (!pass.grad_in[0]) return;
    const float share = 1.0f / float(node.kernel.area());
    channels(pass, [&](int p, int lanes, int c) {
      if (!pass.accumulate[0]) clear_channel(pass.grad_in[0], p, lanes, c);
      for (int y = 0; y < out_.height; ++y) {
        for (int x = 0; x < out_.width; ++x) {
          const float* const g = pixel(pass.grad_out, p, lanes, c, y, x);
          window(y, x, [&](int, int iy, int ix) {
            float* const to = pixel(pass.grad_in[0], p, lanes, c, iy, ix);
            for (int l = 0; l < lanes; ++l) to[l] += share * g[l];
          });
        }
      }
    });
  }
};

class GlobalAvgPool : public Pool {
public:
  using Pool::Pool;

  void forward(Pass& pass) override {
    const float share = 1.0f / float(in_.height * in_.width);
    channels(pass, [&](int p, int lanes, int c) {
      float sums[kPanelLanes] = {}, products[kPanelLanes] = {}, zero[kPanelLanes] = {};
      for_rows(pass.in[0], pass.in[0], p, lanes, c, c + 1,
               [&](const float* x, const float*, std::size_t n) {
                 pass.kernels.lane_sums(x, x, zero, sums, products, lanes, int(n / lanes));
               });
      float* const to = pixel(pass.out, p, lanes, c, 0, 0);
      for (int l = 0; l < lanes; ++l) to[l] = sums[l] * share;
    });
  }

  void backward(Pass& pass) override {
    if (!pass.grad_in[0]) return;
    const float share = 1.0f / float(in_.height * in_.width);
    channels(pass, [&](int p, int lanes, int c) {
      const View& to = pass.grad_in[0];
      float zero[kPanelLanes] = {}, shift[kPanelLanes] = {};
      const float* const g = pixel(pass.grad_out, p, lanes, c, 0, 0);
      for (int l = 0; l < lanes; ++l) shift[l] = g[l] * share;
      for (int y = 0; y < in_.height; ++y) {
        float* const row = pixel(to, p, lanes, c, y, 0);
        if (!pass.accumulate[0]) std::memset(row, 0, sizeof(float) * lanes * in_.width);
        pass.kernels.affine(row, zero, zero, shift, row, lanes, in_.width, pass.accumulate[0]);
      }
    });
  }
};

}  // namespace

std::unique_ptr<Layer> make_pool(const Node& node, const Shape& in) {
  if (node.kind == Kind::kMaxPool) return std::make_unique<MaxPool>(node, in);
  if (node.kind == Kind::kAvgPool) return std::make_unique<AvgPool>(node, in);
  return std::make_unique<GlobalAvgPool>(node, in);
}

}  // namespace fedlean
