#include "fedlean/weight.h"

#include <algorithm>
#include <cstring>

namespace fedlean {

void Weight::take(const Kernels& kernels, const Sink& sink, std::size_t begin, const float* g,
                  std::size_t n) {
  if (!trainable || n == 0) return;
  if (sink.store) {
    if (kept.empty()) {
      std::memcpy(grad.data() + begin, g, n * sizeof(float));
    } else {
      for (std::size_t i = 0; i < n; ++i) grad[begin + i] = kept[begin + i] ? g[i] : 0.0f;
    }
  }
  if (sink.update) {
    kernels.update(value.data() + begin, velocity.empty() ? nullptr : velocity.data() + begin,
                   reference.empty() ? nullptr : reference.data() + begin, g,
                   kept.empty() ? nullptr : kept.data() + begin, n, sink.rule);
  }
}

std::pair<std::size_t, std::size_t> Weight::wanted(const Sink& sink) const {
  if (!trainable) return {0, 0};
  if (sink.dense) return {0, all.size()};
  if (!sink.squares) return {0, 0};
  return {squares_begin, squares_begin + squares.size()};
}

void Weight::take_all(const Kernels& kernels, const Sink& sink, std::size_t begin, const float* g,
                      std::size_t n) {
  if (!trainable || n == 0) return;
  if (sink.squares) {
    const std::size_t first = std::max(begin, squares_begin);
    const std::size_t last = std::min(begin + n, squares_begin + squares.size());
    if (first < last)
      kernels.add_squares(squares.data() + (first - squares_begin), g + (first - begin),
                          last - first);
  }
  if (sink.dense) std::memcpy(all.data() + begin, g, n * sizeof(float));
}

std::size_t Weight::bytes() const {
  return sizeof(float) * (value.capacity() + velocity.capacity() + reference.capacity() +
                          grad.capacity() + squares.capacity() + all.capacity()) +
         kept.capacity();
}

}  // namespace fedlean
