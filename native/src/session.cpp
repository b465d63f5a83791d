#include "fedlean/session.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <new>
#include <numeric>

namespace fedlean {

namespace {

constexpr std::size_t kAlignBytes = 64;

void free_floats(float* p) { std::free(p); }

std::unique_ptr<Layer> make_layer(const Network& network, const Structure& structure, int i,
                                  const TensorOptions& options) {
  const Node& node = network.nodes[i];
  const int source = node.inputs[0];
  const Shape& in = network.shape_of(source);
  const std::int64_t kept = options.kept[kWeight];
  switch (node.kind) {
    case Kind::kConv2d: {
      const std::size_t size = std::size_t(node.shape.channels) * (in.channels / node.groups) *
                               node.kernel * node.kernel;
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
    default:
      return make_pointwise(node);
  }
}

}  // namespace

Session::Session(std::shared_ptr<Engine> engine, const Network& network, const Options& options)
    : engine_(std::move(engine)),
      network_(network),
      options_(options),
      arena_(nullptr, free_floats) {
  std::vector<bool> trainable;
  for (const TensorOptions& t : options.tensors)
    trainable.push_back(t.trainable[kWeight] || t.trainable[kBias]);
  structure_ = std::make_unique<Structure>(network_, trainable);
  for (std::size_t i = 0; i < network_.nodes.size(); ++i) {
    layers_.push_back(make_layer(network_, *structure_, int(i), options.tensors[i]));
    for (int slot = 0; slot < kSlots; ++slot)
      layers_[i]->tensors[slot].trainable = options.tensors[i].trainable[slot];
  }
  training_ = std::make_unique<Program>(network_, layers_, *structure_, mode(true, false));
  evaluation_ = std::make_unique<Program>(network_, layers_, *structure_, mode(false, false));
}

Mode Session::mode(bool training, bool importance) const {
  Mode m;
  m.training = training;
  m.importance = importance;
  m.examples = options_.batch_size;
  m.threads = engine_->pool.threads();
  return m;
}

std::size_t Session::planned_bytes(bool importance) const {
  std::size_t floats = std::max(training_->floats(), evaluation_->floats());
  if (importance) {
    const Program program(network_, layers_, *structure_, mode(true, true));
    floats = std::max(floats, program.floats());
  }
  std::size_t bytes = 0;
  for (std::size_t i = 0; i < layers_.size(); ++i) {
    bytes += layers_[i]->index_bytes();
    for (int s = 0; s < kSlots; ++s) {
      const Slot slot = Slot(s);
      const TensorOptions& t = options_.tensors[i];
      const std::size_t stored = layers_[i]->stored(slot);
      const bool gradient = slot <= kBias && t.trainable[s];
      std::size_t copies = 1;
      if (gradient && options_.rule.momentum != 0) ++copies;
      if (gradient && options_.rule.proximal != 0) ++copies;
      if (gradient && options_.clip_norm > 0) ++copies;
      floats += stored * copies;
      if (gradient && importance) floats += tensor_size(int(i), slot);
      if (t.kept[s] >= 0 && !(slot == kWeight && layers_[i]->sparse())) bytes += stored;
    }
  }
  return bytes + floats * sizeof(float);
}

std::size_t Session::held_bytes() const {
  std::size_t bytes = arena_floats_ * sizeof(float);
  for (const auto& layer : layers_) {
    bytes += layer->built_bytes();
    for (const Weight& weight : layer->tensors) bytes += weight.bytes();
  }
  return bytes;
}

std::size_t Session::tensor_size(int node, Slot slot) const {
  const Layer& layer = *layers_[node];
  if (slot != kWeight || !layer.sparse()) return layer.stored(slot);
  const Node& n = network_.nodes[node];
  const int inputs = network_.shape_of(n.inputs[0]).channels / n.groups;
  return std::size_t(n.shape.channels) * inputs * n.kernel * n.kernel;
}

void Session::build(int node, const std::uint8_t* const masks[kSlots]) {
  Layer& layer = *layers_[node];
  if (layer.sparse()) layer.build(masks[kWeight]);
  for (int s = 0; s < kSlots; ++s) {
    Weight& weight = layer.tensors[s];
    const std::size_t n = layer.stored(Slot(s));
    weight.value.resize(n);
    const bool gradient = s <= kBias && weight.trainable;
    if (gradient && options_.rule.momentum != 0) weight.velocity.resize(n);
    if (gradient && options_.rule.proximal != 0) weight.reference.resize(n);
    if (masks[s] && !(s == kWeight && layer.sparse())) weight.kept.assign(masks[s], masks[s] + n);
  }
}

// Stored index of each kept value, in row-major order of the dense tensor.
std::vector<std::uint32_t> Session::packed_order(int node, Slot slot) const {
  const Layer& layer = *layers_[node];
  if (slot == kWeight && layer.sparse()) return layer.row_major();
  const Weight& weight = layer.tensors[slot];
  std::vector<std::uint32_t> order;
  for (std::uint32_t k = 0; k < weight.size(); ++k)
    if (weight.kept.empty() || weight.kept[k]) order.push_back(k);
  return order;
}

void Session::reset() {
  for (const auto& layer : layers_) {
    for (Weight& weight : layer->tensors) {
      std::fill(weight.velocity.begin(), weight.velocity.end(), 0.0f);
      for (auto* sums : {&weight.grad, &weight.squares, &weight.all}) {
        sums->clear();
        sums->shrink_to_fit();
      }
    }
  }
  tapped_.reset();
  importance_.reset();
  if (arena_floats_ > std::max(training_->floats(), evaluation_->floats())) {
    arena_.reset();
    arena_floats_ = 0;
  }
}

void Session::load(int node, Slot slot, const float* values, bool packed, bool reference) {
  const Layer& layer = *layers_[node];
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
  if (reference && !weight.reference.empty()) weight.reference = weight.value;
}

namespace {

// Stored order -> dense, 0 where nothing is stored.
void expand(const Layer& layer, Slot slot, const std::vector<float>& stored, float* dense,
            std::size_t size) {
  if (slot == kWeight && layer.sparse()) {
    std::memset(dense, 0, size * sizeof(float));
    const std::vector<std::uint32_t> positions = layer.weight_positions();
    for (std::size_t k = 0; k < positions.size(); ++k) dense[positions[k]] = stored[k];
  } else {
    std::copy(stored.begin(), stored.end(), dense);
  }
}

}  // namespace

void Session::read(int node, Slot slot, float* values, bool packed) const {
  const Weight& weight = tensor(node, slot);
  if (packed) {
    const std::vector<std::uint32_t> order = packed_order(node, slot);
    for (std::size_t i = 0; i < order.size(); ++i) values[i] = weight.value[order[i]];
  } else {
    expand(*layers_[node], slot, weight.value, values, tensor_size(node, slot));
  }
}

void Session::read_mask(int node, Slot slot, std::uint8_t* kept) const {
  const Layer& layer = *layers_[node];
  if (slot == kWeight && layer.sparse()) {
    std::memset(kept, 0, tensor_size(node, slot));
    for (std::uint32_t position : layer.weight_positions()) kept[position] = 1;
  } else {
    std::copy(layer.tensors[slot].kept.begin(), layer.tensors[slot].kept.end(), kept);
  }
}

float* Session::arena(std::size_t floats) {
  if (floats > arena_floats_) {
    arena_.reset();
    arena_floats_ = 0;
    const std::size_t bytes =
        (floats * sizeof(float) + kAlignBytes - 1) / kAlignBytes * kAlignBytes;
    void* const memory = std::aligned_alloc(kAlignBytes, bytes);
    if (!memory) throw std::bad_alloc();
    arena_.reset(static_cast<float*>(memory));
    arena_floats_ = floats;
  }
  return arena_.get();
}

const Program& Session::training_program(bool importance) {
  if (!importance) return *training_;
  if (!importance_) {
    for (auto [node, slot] : trainable())
      tensor(node, slot).squares.resize(tensor_size(node, slot));
    importance_ = std::make_unique<Program>(network_, layers_, *structure_, mode(true, true));
  }
  return *importance_;
}

void Session::hold_gradients(bool dense) {
  for (auto [node, slot] : trainable()) {
    Weight& weight = tensor(node, slot);
    // Layers that no gradient reaches leave theirs untouched: 0.
    if (dense) {
      weight.all.assign(tensor_size(node, slot), 0.0f);
    } else {
      weight.grad.assign(weight.size(), 0.0f);
    }
  }
}

double Session::step(const float* x, const std::int64_t* y, int examples, bool importance) {
  const Program& program = training_program(importance);
  float* const memory = arena(std::max(program.floats(), evaluation_->floats()));
  const Batch batch{examples};
  tapped_.reset();  // its activations are overwritten
  program.forward(engine_->kernels, engine_->pool, memory, x, batch);
  const double mean = evaluate_loss(options_.loss, program.value(memory, program.output()), y,
                                    batch, program.gradient(memory, program.output()));
  const bool clip = options_.clip_norm > 0;  // no update before the norm is known
  if (clip) hold_gradients(false);
  Sink sink;
  sink.update = !clip;
  sink.store = clip;
  sink.squares = importance;
  sink.rule = options_.rule;
  program.backward(engine_->kernels, engine_->pool, memory, batch, sink);
  if (clip) {
    apply(trainable());
  } else {
    update_unreached(program, sink);
  }
  return mean;
}

double Session::loss(const float* x, const std::int64_t* y, int examples) {
  float* const memory = arena(std::max(training_->floats(), evaluation_->floats()));
  tapped_.reset();
  evaluation_->forward(engine_->kernels, engine_->pool, memory, x, Batch{examples});
  return evaluate_loss(options_.loss, evaluation_->value(memory, evaluation_->output()), y,
                       Batch{examples}, View{});
}

// Weight decay and momentum move a weight whose gradient is 0.
void Session::update_unreached(const Program& program, const Sink& sink) {
  static const float zeros[1024] = {};
  for (Layer* layer : program.unreached()) {
    for (Slot slot : {kWeight, kBias}) {
      Weight& weight = layer->tensors[slot];
      for (std::size_t i = 0; i < weight.size(); i += std::size(zeros))
        weight.take(engine_->kernels, sink, i, zeros,
                    std::min(std::size(zeros), weight.size() - i));
    }
  }
}

void Session::apply(const std::vector<std::pair<int, Slot>>& tensors) {
  if (options_.clip_norm > 0) clip(tensors);
  Sink sink;
  sink.update = true;
  sink.rule = options_.rule;
  for (auto [node, slot] : tensors) {
    Weight& weight = tensor(node, slot);
    weight.take(engine_->kernels, sink, 0, weight.grad.data(), weight.size());
  }
  if (options_.clip_norm <= 0) drop_gradients();
}

// Scales the held gradients to a common norm of at most clip_norm.
void Session::clip(const std::vector<std::pair<int, Slot>>& tensors) {
  double squares = 0;
  for (auto [node, slot] : tensors) {
    const Weight& weight = tensor(node, slot);
    for (std::size_t i = 0; i < weight.grad.size(); ++i)
      if (weight.kept.empty() || weight.kept[i]) squares += double(weight.grad[i]) * weight.grad[i];
  }
  const double norm = std::sqrt(squares);
  if (norm <= options_.clip_norm) return;
  const float scale = float(options_.clip_norm / norm);
  for (auto [node, slot] : tensors)
    for (float& g : tensor(node, slot).grad) g *= scale;
}

std::vector<std::pair<int, Slot>> Session::trainable() const {
  std::vector<std::pair<int, Slot>> tensors;
  for (std::size_t i = 0; i < layers_.size(); ++i)
    for (Slot slot : {kWeight, kBias})
      if (tensor(int(i), slot).trainable) tensors.push_back({int(i), slot});
  return tensors;
}

void Session::drop_gradients() {
  for (auto [node, slot] : trainable()) {
    std::vector<float>().swap(tensor(node, slot).all);
    if (options_.clip_norm <= 0) std::vector<float>().swap(tensor(node, slot).grad);
  }
}

void Session::squares(int node, Slot slot, float* values) const {
  const Weight& weight = tensor(node, slot);
  const std::size_t n = tensor_size(node, slot);
  if (weight.squares.empty()) {
    std::memset(values, 0, n * sizeof(float));
  } else {
    std::copy(weight.squares.begin(), weight.squares.end(), values);
  }
}

void Session::forward(const float* x, int examples, const std::vector<int>& nodes, bool training) {
  Mode m = mode(training, training);  // backward may be asked for all coordinates
  m.taps = nodes;
  m.examples = examples;
  tapped_ = std::make_unique<Program>(network_, layers_, *structure_, m);
  tapped_batch_ = Batch{examples};
  tapped_->forward(engine_->kernels, engine_->pool, arena(tapped_->floats()), x, tapped_batch_);
}

namespace {

// f(element of the view, element of the row-major array) for every example.
template <typename F>
void for_values(const View& v, Batch batch, F&& f) {
  const Shape& s = v.layout.shape;
  for (int p = 0; p < batch.panels(); ++p) {
    const int lanes = batch.lanes(p);
    for (int c = 0; c < s.channels; ++c) {
      for (int y = 0; y < s.height; ++y) {
        float* const row =
            v.interior(p, lanes) +
            (std::size_t(c) * v.layout.plane() + std::size_t(y) * v.layout.row()) * lanes;
        for (int x = 0; x < s.width; ++x)
          for (int l = 0; l < batch.used(p); ++l)
            f(row[std::size_t(x) * lanes + l],
              (std::size_t(p * kPanelLanes + l) * s.channels + c) * s.height * s.width +
                  std::size_t(y) * s.width + x);
      }
    }
  }
}

}  // namespace

void Session::activation(int node, float* values) const {
  const View v = tapped_->value(arena_.get(), tapped_->tensor_of(node));
  for_values(v, tapped_batch_, [&](float x, std::size_t i) { values[i] = x; });
}

void Session::backward(const std::vector<int>& nodes, const std::vector<const float*>& gradients,
                       bool dense) {
  float* const memory = arena_.get();
  tapped_->clear_seeds(engine_->kernels, engine_->pool, memory, tapped_batch_);
  for (std::size_t i = 0; i < nodes.size(); ++i) {
    const View v = tapped_->gradient(memory, tapped_->tensor_of(nodes[i]));
    if (v) for_values(v, tapped_batch_, [&](float& g, std::size_t at) { g += gradients[i][at]; });
  }
  hold_gradients(dense);
  Sink sink;
  sink.store = !dense;
  sink.dense = dense;
  tapped_->backward(engine_->kernels, engine_->pool, memory, tapped_batch_, sink);
  tapped_.reset();
}

bool Session::has_gradient(int node, Slot slot, bool dense) const {
  const Weight& weight = tensor(node, slot);
  return dense ? weight.all.size() == tensor_size(node, slot) : weight.grad.size() == weight.size();
}

void Session::gradient(int node, Slot slot, float* values, bool dense) const {
  const Weight& weight = tensor(node, slot);
  if (dense) {
    std::copy(weight.all.begin(), weight.all.end(), values);
  } else {
    expand(*layers_[node], slot, weight.grad, values, tensor_size(node, slot));
  }
}

void Session::set_gradient(int node, Slot slot, const float* values) {
  const Layer& layer = *layers_[node];
  Weight& weight = tensor(node, slot);
  weight.grad.assign(weight.size(), 0.0f);
  if (slot == kWeight && layer.sparse()) {
    const std::vector<std::uint32_t> positions = layer.weight_positions();
    for (std::size_t k = 0; k < positions.size(); ++k) weight.grad[k] = values[positions[k]];
  } else {
    std::copy(values, values + weight.size(), weight.grad.begin());
  }
}

}  // namespace fedlean
