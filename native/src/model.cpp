#include "fedlean/model.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>

#include "fedlean/limits.h"

namespace fedlean {

namespace {

std::unique_ptr<Layer> make_layer(const Network& network, const Structure& structure, int i,
                                  const TensorOptions& options) {
  const Node& node = network.nodes[i];
  const int source = node.inputs[0];
  const Shape& in = network.shape_of(source);
  const std::int64_t kept = options.kept[kWeight];
  switch (node.kind) {
    case Kind::kConv2d: {
      const std::size_t size =
          std::size_t(node.shape.channels) * (in.channels / node.groups) * node.kernel.area();
      return make_conv(node, in, structure.value_halo[source + 1], structure.grad_halo[i + 1],
                       kept < 0 ? size : std::size_t(kept), structure.needs_grad[source + 1]);
    }
    case Kind::kLinear: {
      const std::size_t size = std::size_t(node.shape.channels) * in.channels;
      return make_linear(node, in, kept < 0 ? size : std::size_t(kept),
                         structure.needs_grad[source + 1]);
    }
    case Kind::kGroupNorm:
    case Kind::kBatchNorm:
      return make_norm(node, in);
    case Kind::kMaxPool:
    case Kind::kAvgPool:
    case Kind::kGlobalAvgPool:
      return make_pool(node, in);
    case Kind::kDropout:
      return make_dropout(node);
    default:
      return make_pointwise(node);
  }
}

const std::vector<TensorOptions>& checked(const Network& network,
                                          const std::vector<TensorOptions>& tensors) {
  check_tensors(network, tensors);
  return tensors;
}

std::vector<bool> trained(const std::vector<TensorOptions>& tensors, bool backward) {
  std::vector<bool> nodes;
  for (const TensorOptions& t : tensors)
    nodes.push_back(backward && (t.trainable[kWeight] || t.trainable[kBias]));
  return nodes;
}

}  // namespace

Model::Model(const Network& network, const std::vector<TensorOptions>& tensors, bool backward)
    : network(network),
      tensors(checked(network, tensors)),
      structure(network, trained(tensors, backward)) {
  check_images(network, structure);
  for (std::size_t i = 0; i < network.nodes.size(); ++i) {
    layers.push_back(make_layer(network, structure, int(i), tensors[i]));
    for (int slot = 0; slot < kSlots; ++slot)
      layers[i]->tensors[slot].trainable = tensors[i].trainable[slot];
  }
}

void Model::set_keys(const std::vector<std::uint64_t>& keys) {
  std::size_t used = 0;
  for (const auto& layer : layers)
    if (layer->random() && used++ < keys.size()) layer->set_key(keys[used - 1]);
  if (used != keys.size())
    throw std::invalid_argument("a key is needed for each of the " + std::to_string(used) +
                                " layers that draw random numbers");
}

std::size_t Model::planned_bytes() const {
  std::size_t bytes = 0;
  for (std::size_t i = 0; i < layers.size(); ++i) {
    bytes += layers[i]->index_bytes();
    for (int s = 0; s < kSlots; ++s) {
      const std::size_t stored = layers[i]->stored(Slot(s));
      bytes += stored * sizeof(float);
      if (tensors[i].kept[s] >= 0 && !(s == kWeight && layers[i]->sparse())) bytes += stored;
    }
  }
  return bytes;
}

std::size_t Model::held_bytes() const {
  std::size_t bytes = 0;
  for (const auto& layer : layers) {
    bytes += layer->built_bytes();
    for (const Weight& weight : layer->tensors) bytes += weight.bytes();
  }
  return bytes;
}

std::size_t Model::tensor_size(int node, Slot slot) const {
  const Layer& layer = *layers[node];
  if (slot != kWeight || !layer.sparse()) return layer.stored(slot);
  const Node& n = network.nodes[node];
  const int inputs = network.shape_of(n.inputs[0]).channels / n.groups;
  return std::size_t(n.shape.channels) * inputs * n.kernel.area();
}

void Model::build(int node, const std::uint8_t* const masks[kSlots]) {
  Layer& layer = *layers[node];
  if (layer.sparse()) layer.build(masks[kWeight]);
  for (int s = 0; s < kSlots; ++s) {
    Weight& weight = layer.tensors[s];
    const std::size_t n = layer.stored(Slot(s));
    weight.value.resize(n);
    if (masks[s] && !(s == kWeight && layer.sparse())) weight.kept.assign(masks[s], masks[s] + n);
  }
}

// Stored index of each kept value, in row-major order of the dense tensor.
std::vector<std::uint32_t> Model::packed_order(int node, Slot slot) const {
  const Layer& layer = *layers[node];
  if (slot == kWeight && layer.sparse()) return layer.row_major();
  const Weight& weight = layer.tensors[slot];
  std::vector<std::uint32_t> order;
  for (std::uint32_t k = 0; k < weight.size(); ++k)
    if (weight.kept.empty() || weight.kept[k]) order.push_back(k);
  return order;
}

void Model::load(int node, Slot slot, const float* values, bool packed) {
  const Layer& layer = *layers[node];
  Weight& weight = tensor(node, slot);
  if (packed) {
    const std::vector<std::uint32_t> order = packed_order(node, slot);
    if (order.size() < weight.size()) std::fill(weight.value.begin(), weight.value.end(), 0.0f);
    for (std::size_t i = 0; i < order.size(); ++i) weight.value[order[i]] = values[i];
  } else if (slot == kWeight && layer.sparse()) {
    const std::vector<std::uint32_t> positions = layer.weight_positions();
    for (std::size_t k = 0; k < positions.size(); ++k) weight.value[k] = values[positions[k]];
  } else {
    for (std::size_t k = 0; k < weight.size(); ++k)
      weight.value[k] = weight.kept.empty() || weight.kept[k] ? values[k] : 0.0f;
  }
}

void Model::expand(int node, Slot slot, const std::vector<float>& stored, float* dense) const {
  const Layer& layer = *layers[node];
  if (slot == kWeight && layer.sparse()) {
    std::memset(dense, 0, tensor_size(node, slot) * sizeof(float));
    const std::vector<std::uint32_t> positions = layer.weight_positions();
    for (std::size_t k = 0; k < positions.size(); ++k) dense[positions[k]] = stored[k];
  } else {
    std::copy(stored.begin(), stored.end(), dense);
  }
}

void Model::read(int node, Slot slot, float* values, bool packed) const {
  const Weight& weight = tensor(node, slot);
  if (packed) {
    const std::vector<std::uint32_t> order = packed_order(node, slot);
    for (std::size_t i = 0; i < order.size(); ++i) values[i] = weight.value[order[i]];
  } else {
    expand(node, slot, weight.value, values);
  }
}

void Model::read_mask(int node, Slot slot, std::uint8_t* kept) const {
  const Layer& layer = *layers[node];
  if (slot == kWeight && layer.sparse()) {
    std::memset(kept, 0, tensor_size(node, slot));
    for (std::uint32_t position : layer.weight_positions()) kept[position] = 1;
  } else {
    std::copy(layer.tensors[slot].kept.begin(), layer.tensors[slot].kept.end(), kept);
  }
}

std::vector<std::pair<int, Slot>> Model::trainable() const {
  std::vector<std::pair<int, Slot>> named;
  for (std::size_t i = 0; i < layers.size(); ++i)
    for (Slot slot : {kWeight, kBias})
      if (tensor(int(i), slot).trainable) named.push_back({int(i), slot});
  return named;
}

float* Arena::ensure(std::size_t floats) {
  if (floats > floats_) {
    free();
    constexpr std::size_t line = 64;
    const std::size_t bytes = (floats * sizeof(float) + line - 1) / line * line;
    void* const memory = std::aligned_alloc(line, bytes);
    if (!memory) throw std::bad_alloc();
    memory_.reset(static_cast<float*>(memory));
    floats_ = floats;
  }
  return memory_.get();
}

void Arena::free() {
  memory_.reset();
  floats_ = 0;
}

void Arena::Free::operator()(float* memory) const { std::free(memory); }

}  // namespace fedlean
