// What Python passes to a model, checked: a wrong call must never corrupt memory.  Arrays are
// NumPy's, C-contiguous, aligned and of the exact type; fedlean.engine.checks words the errors.
// What is used as an index, labels and masks, is copied before it is checked: its owner may change
// it at any time.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "fedlean/limits.h"
#include "fedlean/session.h"

namespace fedlean {

namespace nb = nanobind;

template <typename T>
using In = nb::ndarray<const T, nb::c_contig, nb::device::cpu>;
template <typename T>
using Out = nb::ndarray<T, nb::c_contig, nb::device::cpu>;

void expect_size(const char* what, std::size_t got, std::size_t expected);
// That an array has so many elements, at addresses where they may be.
template <typename Array>
void expect_array(const char* what, const Array& array, std::size_t size) {
  expect_size(what, array.size(), size);
  if (reinterpret_cast<std::uintptr_t>(array.data()) % alignof(typename Array::Scalar) != 0)
    throw std::invalid_argument(std::string(what) + " is not aligned in memory");
}
Loss loss_of(const std::string& name);
int batch_size_of(int batch_size);
// Of tables per node and slot.
std::vector<TensorOptions> tensors_of(const Network& network,
                                      const std::vector<std::vector<bool>>& trainable,
                                      const std::vector<std::vector<std::int64_t>>& kept);

// Labels are a copy; empty where none were given.
struct Examples {
  int count;
  std::vector<std::int64_t> labels;
};

class Guard {
public:
  Guard(std::shared_ptr<Engine> engine, const Model& model, int batch_size);

  // Runs f while nothing else uses the engine, without holding Python's lock.  What may change
  // between calls is looked at in here only.
  template <typename F>
  auto alone(F&& f) const {
    nb::gil_scoped_release release;
    std::lock_guard<std::mutex> lock(engine_->busy);
    return f();
  }

  // build(pointers to the masks), alone and once per node.
  template <typename F>
  void build(int node, const std::vector<nb::object>& masks, F&& build) {
    const Masks copies = copied(node, masks);
    const std::uint8_t* pointers[kSlots] = {};
    for (int s = 0; s < kSlots; ++s)
      if (!masks[s].is_none()) pointers[s] = copies.of[s].data();
    alone([&] {
      if (built_[node]) throw std::invalid_argument("a node is built once");
      build(pointers);
      built_[node] = true;
    });
  }

  void check(int node, int slot) const;
  std::size_t size(int node, int slot, bool packed) const;
  // Alone:
  void check_built(int node) const;
  void check_masked(int node, int slot) const;
  Examples check_batch(const In<float>& x, const In<std::int64_t>* y) const;  // y may be null
  const Network& network() const { return model_.network; }

private:
  struct Masks {
    std::vector<std::uint8_t> of[kSlots];  // of 0 and 1
  };
  Masks copied(int node, const std::vector<nb::object>& masks) const;
  std::vector<std::int64_t> labels_of(const In<std::int64_t>& y, std::size_t examples) const;

  std::shared_ptr<Engine> engine_;
  const Model& model_;
  const int batch_size_;
  std::vector<bool> built_;  // nodes whose weights are set up, or that have none
};

void bind_forward(nb::module_& m);
void bind_merge(nb::module_& m);

}  // namespace fedlean
