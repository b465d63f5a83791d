// One trained (or frozen) tensor: its stored values and what the optimiser keeps beside them.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "fedlean/kernels.h"

namespace fedlean {

// What one pass does with gradients.
struct Sink {
  bool update = false;  // apply them at once
  bool store = false;  // keep them, in stored order, in Weight::grad
  bool squares = false;  // add the squares of gradients to Weight::squares, where that has them
  bool dense = false;  // keep all coordinates' gradients in Weight::all
  Update rule = {};
};

struct Weight {
  std::vector<float> value;  // in the layer's own order; as many as it stores
  std::vector<float> velocity;  // with momentum
  std::vector<float> reference;  // what was loaded, with a proximal term
  std::vector<float> grad;  // with Sink::store
  std::vector<std::uint8_t> kept;  // where a masked tensor is stored densely: 1 = kept
  // In the dense order, when a sink asks for it: a stretch of all coordinates, from squares_begin
  // on, and all of them.
  std::vector<float> squares, all;
  std::size_t squares_begin = 0;
  bool trainable = false;

  std::size_t size() const { return value.size(); }
  std::size_t bytes() const;  // of all the arrays
  // Gradients of the stored values [begin, begin + n).
  void take(const Kernels& kernels, const Sink& sink, std::size_t begin, const float* g,
            std::size_t n);
  // The coordinates, in the dense order, whose gradients `take_all` wants: kept or not.
  std::pair<std::size_t, std::size_t> wanted(const Sink& sink) const;
  // Gradients of the coordinates [begin, begin + n) in the dense order; of those wanted, and maybe
  // of others.
  void take_all(const Kernels& kernels, const Sink& sink, std::size_t begin, const float* g,
                std::size_t n);
};

}  // namespace fedlean
