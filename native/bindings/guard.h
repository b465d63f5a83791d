// What Python passes to a model, checked: a wrong call must never corrupt memory.  Arrays are
// NumPy's, C-contiguous and of the exact type; fedlean.engine.checks words the errors.
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

#include "fedlean/session.h"

namespace fedlean {

namespace nb = nanobind;

template <typename T>
using In = nb::ndarray<const T, nb::c_contig, nb::device::cpu>;
template <typename T>
using Out = nb::ndarray<T, nb::c_contig, nb::device::cpu>;

void expect_size(const char* what, std::size_t got, std::size_t expected);
Loss loss_of(const std::string& name);
// Of tables per node and slot.
std::vector<TensorOptions> tensors_of(const Network& network,
                                      const std::vector<std::vector<bool>>& trainable,
                                      const std::vector<std::vector<std::int64_t>>& kept);

class Guard {
public:
  Guard(std::shared_ptr<Engine> engine, const Model& model, int batch_size, int input_rank);

  // Runs f while nothing else uses the engine, without holding Python's lock.
  template <typename F>
  auto alone(F&& f) const {
    nb::gil_scoped_release release;
    std::lock_guard<std::mutex> lock(engine_->busy);
    return f();
  }

  // build(pointers to the masks), alone and once per node.
  template <typename F>
  void build(int node, const std::vector<nb::object>& masks, F&& build) {
    const std::uint8_t* pointers[kSlots] = {};
    std::vector<In<bool>> held;
    check_masks(node, masks, pointers, held);
    alone([&] { build(pointers); });
    built_[node] = true;
  }

  void check(int node, int slot) const;
  void check_built(int node) const;
  void check_masked(int node, int slot) const;
  std::size_t size(int node, int slot, bool packed) const;
  // The number of examples; y may be null.
  int check_batch(const In<float>& x, const In<std::int64_t>* y) const;
  const Network& network() const { return model_.network; }

private:
  void check_masks(int node, const std::vector<nb::object>& masks,
                   const std::uint8_t* pointers[kSlots], std::vector<In<bool>>& held) const;

  std::shared_ptr<Engine> engine_;
  const Model& model_;
  const int batch_size_, input_rank_;  // input_rank: axes of one example
  std::vector<bool> built_;  // nodes whose weights are set up, or that have none
};

void bind_forward(nb::module_& m);

}  // namespace fedlean
