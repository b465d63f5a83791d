#include "guard.h"

namespace fedlean {

namespace {

template <typename T>
bool aligned(const In<T>& array) {
  return reinterpret_cast<std::uintptr_t>(array.data()) % alignof(T) == 0;
}

}  // namespace

void expect_size(const char* what, std::size_t got, std::size_t expected) {
  if (got != expected)
    throw std::invalid_argument(std::string(what) + " has " + std::to_string(got) +
                                " elements, expected " + std::to_string(expected));
}

Loss loss_of(const std::string& name) {
  if (name != "ce" && name != "bce") throw std::invalid_argument("loss is 'ce' or 'bce'");
  return name == "ce" ? Loss::kCrossEntropy : Loss::kBinaryCrossEntropy;
}

std::vector<TensorOptions> tensors_of(const Network& network,
                                      const std::vector<std::vector<bool>>& trainable,
                                      const std::vector<std::vector<std::int64_t>>& kept) {
  if (network.nodes.empty()) throw std::invalid_argument("a network needs a layer");
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

Guard::Guard(std::shared_ptr<Engine> engine, const Model& model, int batch_size, int input_rank)
    : engine_(std::move(engine)), model_(model), batch_size_(batch_size), input_rank_(input_rank) {
  for (int i = 0; i < int(model.network.nodes.size()); ++i) {
    bool empty = true;
    for (int slot = 0; slot < kSlots; ++slot)
      empty = empty && model.tensor_size(i, Slot(slot)) == 0;
    built_.push_back(empty);
  }
}

void Guard::check_masks(int node, const std::vector<nb::object>& masks,
                        const std::uint8_t* pointers[kSlots], std::vector<In<bool>>& held) const {
  check(node, 0);
  if (built_[node]) throw std::invalid_argument("a node is built once");
  expect_size("masks", masks.size(), kSlots);
  for (int s = 0; s < kSlots; ++s) {
    const std::int64_t planned = model_.tensors[node].kept[s];
    if (masks[s].is_none() != (planned < 0))
      throw std::invalid_argument("masks are not those that were planned");
    if (masks[s].is_none()) continue;
    held.push_back(nb::cast<In<bool>>(masks[s]));
    expect_size("mask", held.back().size(), model_.tensor_size(node, Slot(s)));
    pointers[s] = reinterpret_cast<const std::uint8_t*>(held.back().data());
    if (std::int64_t(count_kept(pointers[s], held.back().size())) != planned)
      throw std::invalid_argument("mask keeps another number of coordinates than was planned");
  }
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
int Guard::check_batch(const In<float>& x, const In<std::int64_t>* y) const {
  for (int i = 0; i < int(built_.size()); ++i) check_built(i);
  const Network& network = model_.network;
  const Shape& shape = network.input;
  const std::size_t examples = x.ndim() ? x.shape(0) : 0;
  if (examples == 0 || examples > std::size_t(batch_size_))
    throw std::invalid_argument("x must have 1 to batch_size examples");
  const bool image = x.ndim() == 4 && int(x.shape(1)) == shape.channels &&
                     int(x.shape(2)) == shape.height && int(x.shape(3)) == shape.width;
  const bool vector =
      x.ndim() == 2 && shape.height * shape.width == 1 && int(x.shape(1)) == shape.channels;
  if (!(input_rank_ == 3 ? image : vector)) throw std::invalid_argument("x has another shape");
  if (!aligned(x) || (y && !aligned(*y))) throw std::invalid_argument("an array is not aligned");
  if (!engine_->kernels.all_finite(x.data(), x.size()))
    throw std::invalid_argument("x holds NaN or infinity");
  if (!y) return int(examples);
  if (y->ndim() != 1 || y->size() != examples) throw std::invalid_argument("y has another shape");
  if (network.nodes.back().shape.height * network.nodes.back().shape.width != 1)
    throw std::invalid_argument("a loss needs one logit per class");
  const std::int64_t classes = network.nodes.back().shape.channels;
  for (std::size_t i = 0; i < examples; ++i)
    if (y->data()[i] < 0 || y->data()[i] >= classes)
      throw std::invalid_argument("y has a label out of range");
  return int(examples);
}

}  // namespace fedlean
