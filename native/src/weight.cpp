#include "fedlean/weight.h"

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

void Weight::take_all(const Kernels& kernels, const Sink& sink, std::size_t begin, const float* g,
                      std::size_t n) {
  if (!trainable || n == 0) return;
  if (sink.squares) kernels.add_squares(squares.data() + begin, g, n);
  if (sink.dense) std::memcpy(all.data() + begin, g, n * sizeof(float));
}

std::size_t Weight::bytes() const {
  return sizeof(float) * (value.capacity() + velocity.capacity() + reference.capacity() +
                          grad.capacity() + squares.capacity() + all.capacity()) +
         kept.capacity();
}

}  // namespace fedlean
