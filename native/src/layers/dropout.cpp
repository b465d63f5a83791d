// Dropout: which elements a pass of training drops follows from its key, the example and the
// element (see fedlean.engine.dropout), so that backward draws again and nothing is kept.

#include <cmath>
#include <cstring>

#include "fedlean/direction.h"
#include "fedlean/layer.h"

namespace fedlean {

namespace {

constexpr int kBlock = 16;  // numbers of 16 bits that one block of Philox makes

// The numbers of one panel's lanes, a block at a time.
class Numbers {
public:
  // `size`: numbers of an example, whose first is that of a block.
  Numbers(std::uint64_t key, int panel, int lanes, std::size_t size)
      : key_(key),
        first_(std::uint64_t(panel) * kPanelLanes),
        lanes_(lanes),
        blocks_((size + kBlock - 1) / kBlock) {}

  // Of element i, a number per lane.
  const std::uint16_t* at(std::size_t i) {
    if (const std::size_t block = i / kBlock; block != block_) fill(block);
    return numbers_[i % kBlock];
  }

private:
  void fill(std::size_t block) {
    block_ = block;
    for (int lane = 0; lane < lanes_; ++lane) {
      std::uint64_t words[4];
      philox(key_, 1 + (first_ + lane) * blocks_ + block, 1, words);
      for (int i = 0; i < kBlock; ++i)
        numbers_[i][lane] = std::uint16_t(words[i / 4] >> (16 * (i % 4)));
    }
  }

  const std::uint64_t key_, first_;
  const int lanes_;
  const std::uint64_t blocks_;
  std::size_t block_ = ~std::size_t(0);
  std::uint16_t numbers_[kBlock][kPanelLanes] = {};
};

class Dropout : public Layer {
public:
  explicit Dropout(const Node& node)
      : Layer(node),
        below_(std::min(65535, int(std::lround(double(node.p) * 65536)))),
        scale_(float(1 / (1 - below_ / 65536.0))) {}

  bool in_place() const override { return true; }
  bool random() const override { return true; }
  void set_key(std::uint64_t key) override { key_ = key; }

  void forward(Pass& pass) override { move(pass, pass.in[0], pass.out, false, pass.in_training); }
  void backward(Pass& pass) override {
    if (pass.grad_in[0]) move(pass, pass.grad_out, pass.grad_in[0], pass.accumulate[0], true);
  }

private:
  void move(const Pass& pass, const View& from, const View& to, bool accumulate, bool drop) const {
    if (!drop && from.data == to.data) return;
    const Shape& s = from.layout.shape;
    const std::size_t pixels = std::size_t(s.height) * s.width;
    pass.split(s.channels, [&](int, int begin, int end) {
      for (int p = pass.panel_begin; p < pass.panel_end; ++p) {
        const int lanes = pass.lanes(p);
        Numbers numbers(key_, p, lanes, node.whole_channels ? s.channels : s.channels * pixels);
        std::size_t element = std::size_t(begin) * pixels;
        for_rows_of(from, to, p, lanes, begin, end, [&](int c, const float* x, float* y) {
          for (int i = 0; i < s.width; ++i, ++element, x += lanes, y += lanes) {
            const std::uint16_t* const drawn =
                drop ? numbers.at(node.whole_channels ? std::size_t(c) : element) : nullptr;
            for (int lane = 0; lane < lanes; ++lane) {
              const float kept = !drop ? x[lane] : drawn[lane] >= below_ ? x[lane] * scale_ : 0.0f;
              y[lane] = accumulate ? y[lane] + kept : kept;
            }
          }
        });
      }
    });
  }

  // f(channel, row of a, row of b), row after row.
  template <typename F>
  static void for_rows_of(const View& a, const View& b, int p, int lanes, int begin, int end,
                          F&& f) {
    auto row = [&](const View& v, int c, int y) {
      return v.interior(p, lanes) +
             (std::size_t(c) * v.layout.plane() + std::size_t(y) * v.layout.row()) * lanes;
    };
    for (int c = begin; c < end; ++c)
      for (int y = 0; y < a.layout.shape.height; ++y) f(c, row(a, c, y), row(b, c, y));
  }

  const int below_;  // numbers below are dropped
  const float scale_;
  std::uint64_t key_ = 0;
};

}  // namespace

std::unique_ptr<Layer> make_dropout(const Node& node) { return std::make_unique<Dropout>(node); }

}  // namespace fedlean
