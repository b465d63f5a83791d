// A network with its weights, as sessions hold it.  Arrays are row-major and dense, or "packed":
// the kept values of a masked tensor in row-major order.
#pragma once

#include <memory>
#include <vector>

#include "fedlean/program.h"

namespace fedlean {

struct TensorOptions {
  bool trainable[kSlots] = {};
  // Kept coordinates of a masked tensor, or -1 where there is no mask.
  std::int64_t kept[kSlots] = {-1, -1, -1, -1};
};

class Model {
public:
  // `backward`: with the patterns that gradients need.  `tensors` are per node.  The network's
  // nodes have passed check_node (limits.h); throws std::invalid_argument where the rest does not
  // fit.
  Model(const Network& network, const std::vector<TensorOptions>& tensors, bool backward);

  // Bytes of all tensors, masks and patterns, from shapes and counts alone; and those held now.
  // Of the layers that draw random numbers in training, in their order, until they are set anew.
  // Throws std::invalid_argument where there are more or fewer of them.
  void set_keys(const std::vector<std::uint64_t>& keys);
  std::size_t planned_bytes() const;
  std::size_t held_bytes() const;
  std::size_t tensor_size(int node, Slot slot) const;  // dense

  // Sets up a node's weights and their patterns; masks are per slot, null where there is none.
  void build(int node, const std::uint8_t* const masks[kSlots]);
  void load(int node, Slot slot, const float* values, bool packed);
  void read(int node, Slot slot, float* values, bool packed) const;
  void read_mask(int node, Slot slot, std::uint8_t* kept) const;  // of a masked tensor
  // Stored order -> dense, 0 where nothing is stored.
  void expand(int node, Slot slot, const std::vector<float>& stored, float* dense) const;
  std::vector<std::pair<int, Slot>> trainable() const;  // (node, slot)

  std::unique_ptr<Program> program(const Mode& mode) const {
    return std::make_unique<Program>(network, layers, structure, mode);
  }
  Weight& tensor(int node, Slot slot) const { return layers[node]->tensors[slot]; }

  const Network network;
  const std::vector<TensorOptions> tensors;
  const Structure structure;
  std::vector<std::unique_ptr<Layer>> layers;

private:
  std::vector<std::uint32_t> packed_order(int node, Slot slot) const;
};

// Uninitialised floats at cache lines.
class Arena {
public:
  // At least so many, of which nothing is kept when there were fewer.
  float* ensure(std::size_t floats);
  void free();
  float* get() const { return memory_.get(); }
  std::size_t floats() const { return floats_; }

private:
  struct Free {
    void operator()(float* memory) const;
  };
  std::unique_ptr<float[], Free> memory_;
  std::size_t floats_ = 0;
};

}  // namespace fedlean
