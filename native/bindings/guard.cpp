#include "guard.h"

namespace fedlean {

void expect_size(const char* what, std::size_t got, std::size_t expected) {
  if (got != expected)
    throw std::invalid_argument(std::string(what) + " has " + std::to_string(got) +
                                " elements, expected " + std::to_string(expected));
}

Loss loss_of(const std::string& name) {
  if (name != "ce" && name != "bce") throw std::invalid_argument("loss is 'ce' or 'bce'");
  return name == "ce" ? Loss::kCrossEntropy : Loss::kBinaryCrossEntropy;
}

int batch_size_of(int batch_size) {
  if (batch_size < 1 || batch_size > kMostExamples)
    throw std::invalid_argument("batch_size must be from 1 to " + std::to_string(kMostExamples));
  return batch_size;
}

std::vector<TensorOptions> tensors_of(const Network& network,
                                      const std::vector<std::vector<bool>>& trainable,
                                      const std::vector<std::vector<std::int64_t>>& kept) {
  expect_size("trainable", trainable.size(), network.nodes.size());
  expect_size("kept", kept.size(), network.nodes.size());
  std::vector<TensorOptions> tensors(network.nodes.size());
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    expect_size("trainable", trainable[i].size(), kSlots);
    expect_size("kept", kept[i].size(), kSlots);
    for (int s = 0; s < kSlots; ++s) {
      tensors[i].trainable[s] = trainable[i][s];
      tensors[i].kept[s] = kept[i][s];
    }
  }
  return tensors;
}

Guard::Guard(std::shared_ptr<Engine> engine, const Model& model, int batch_size)
    : engine_(std::move(engine)), model_(model), batch_size_(batch_size) {
  for (int i = 0; i < int(model.network.nodes.size()); ++i) {
    bool empty = true;
    for (int slot = 0; slot < kSlots; ++slot)
      empty = empty && model.tensor_size(i, Slot(slot)) == 0;
    built_.push_back(empty);
  }
}

Guard::Masks Guard::copied(int node, const std::vector<nb::object>& masks) const {
  check(node, 0);
  expect_size("masks", masks.size(), kSlots);
  Masks copies;
  for (int s = 0; s < kSlots; ++s) {
    const std::int64_t planned = model_.tensors[node].kept[s];
    if (masks[s].is_none() != (planned < 0))
      throw std::invalid_argument("masks are not those that were planned");
    if (masks[s].is_none()) continue;
    In<bool> mask;
    if (!nb::try_cast(masks[s], mask, false))
      throw std::invalid_argument("a mask must be a C-contiguous array of bool");
    expect_size("mask", mask.size(), model_.tensor_size(node, Slot(s)));
    const auto* const bytes = reinterpret_cast<const std::uint8_t*>(mask.data());
    std::vector<std::uint8_t>& copy = copies.of[s];
    copy.resize(mask.size());
    // Who makes an array of bool from other bytes may have more in it than 0 and 1.
    for (std::size_t i = 0; i < copy.size(); ++i) copy[i] = bytes[i] != 0;
    if (std::int64_t(count_kept(copy.data(), copy.size())) != planned)
      throw std::invalid_argument("mask keeps another number of coordinates than was planned");
  }
  return copies;
}

void Guard::check(int node, int slot) const {
  if (node < 0 || node >= int(model_.network.nodes.size()) || slot < 0 || slot >= kSlots)
    throw std::invalid_argument("no such tensor");
}

void Guard::check_built(int node) const {
  check(node, 0);
  if (!built_[node]) throw std::invalid_argument("the node is not built yet");
}

void Guard::check_masked(int node, int slot) const {
  check_built(node);
  check(node, slot);
  if (model_.tensors[node].kept[slot] < 0) throw std::invalid_argument("there is no mask");
}

std::size_t Guard::size(int node, int slot, bool packed) const {
  check(node, slot);
  const std::int64_t kept = model_.tensors[node].kept[slot];
  return packed && kept >= 0 ? std::size_t(kept) : model_.tensor_size(node, Slot(slot));
}

// Everything that fedlean.engine.checks.check_batch refuses; that one words the errors.
Examples Guard::check_batch(const In<float>& x, const In<std::int64_t>* y) const {
  for (int i = 0; i < int(built_.size()); ++i) check_built(i);
  const Shape& shape = model_.network.input;
  const std::size_t examples = x.ndim() ? x.shape(0) : 0;
  if (examples == 0 || examples > std::size_t(batch_size_))
    throw std::invalid_argument("x must have 1 to batch_size examples");
  const int sides[] = {shape.channels, shape.rank == 2 ? shape.width : shape.height, shape.width};
  bool fits = x.ndim() == std::size_t(shape.rank) + 1;
  for (int axis = 0; fits && axis < shape.rank; ++axis)
    fits = x.shape(axis + 1) == std::size_t(sides[axis]);
  if (!fits) throw std::invalid_argument("x has another shape");
  expect_array("x", x, examples * shape.size());
  if (!engine_->kernels.all_finite(x.data(), x.size()))
    throw std::invalid_argument("x holds NaN or infinity");
  if (!y) return {int(examples), {}};
  return {int(examples), labels_of(*y, examples)};
}

std::vector<std::int64_t> Guard::labels_of(const In<std::int64_t>& y, std::size_t examples) const {
  if (y.ndim() != 1) throw std::invalid_argument("y has another shape");
  expect_array("y", y, examples);
  const Shape& output = model_.network.nodes.back().shape;
  if (output.rank != 1) throw std::invalid_argument("a loss needs one logit per class");
  std::vector<std::int64_t> labels(y.data(), y.data() + examples);
  for (std::int64_t label : labels)
    if (label < 0 || label >= output.channels)
      throw std::invalid_argument("y has a label out of range");
  return labels;
}

}  // namespace fedlean
