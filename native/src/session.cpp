#include "fedlean/session.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <iterator>

namespace fedlean {

Session::Session(std::shared_ptr<Engine> engine, const Network& network, const Options& options)
    : engine_(std::move(engine)), options_(options), model_(network, options.tensors, true) {
  training_ = model_.program(mode(true, {}));
  evaluation_ = model_.program(mode(false, {}));
}

Mode Session::mode(bool training, const Pieces& pieces) const {
  Mode m;
  m.training = training;
  if (!pieces.empty()) m.dense_rows.assign(model_.layers.size(), 0);
  for (const Piece& piece : pieces)
    if (piece.slot == kWeight) m.dense_rows[piece.node] = piece.rows;
  m.examples = options_.batch_size;
  m.threads = engine_->pool.threads();
  return m;
}

Pieces Session::all_pieces() const {
  Pieces pieces;
  for (auto [node, slot] : model_.trainable())
    pieces.push_back({node, slot, 0, model_.layers[node]->node.shape.channels});
  return pieces;
}

std::size_t Session::row_size(const Piece& piece) const {
  const int rows = model_.layers[piece.node]->node.shape.channels;
  return model_.tensor_size(piece.node, piece.slot) / rows;
}

std::size_t Session::planned_bytes() const {
  std::size_t floats = std::max({training_->floats(), evaluation_->floats(), most_arena_});
  floats += most_squares_;
  for (auto [node, slot] : model_.trainable()) {
    const std::size_t stored = model_.layers[node]->stored(slot);
    if (options_.rule.momentum != 0) floats += stored;
    if (options_.rule.proximal != 0) floats += stored;
    if (options_.clip_norm > 0) floats += stored;
  }
  return model_.planned_bytes() + floats * sizeof(float);
}

std::size_t Session::held_bytes() const {
  return model_.held_bytes() + arena_.floats() * sizeof(float);
}

void Session::build(int node, const std::uint8_t* const masks[kSlots]) {
  model_.build(node, masks);
  for (Slot slot : {kWeight, kBias}) {
    Weight& weight = model_.tensor(node, slot);
    if (!weight.trainable) continue;
    if (options_.rule.momentum != 0) weight.velocity.resize(weight.size());
    if (options_.rule.proximal != 0) weight.reference.resize(weight.size());
  }
}

void Session::reset() {
  for (const auto& layer : model_.layers) {
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
  pieces_.clear();
  most_arena_ = most_squares_ = 0;
  if (arena_.floats() > std::max(training_->floats(), evaluation_->floats())) arena_.free();
}

void Session::load(int node, Slot slot, const float* values, bool packed, bool reference) {
  model_.load(node, slot, values, packed);
  Weight& weight = model_.tensor(node, slot);
  if (reference && !weight.reference.empty()) weight.reference = weight.value;
}

// Sums and the program that adds to them; those of other pieces go first.
void Session::hold_squares(const Pieces& pieces) {
  if (pieces.empty() || pieces == pieces_) return;
  for (const Piece& piece : pieces_) {
    std::vector<float>& sums = model_.tensor(piece.node, piece.slot).squares;
    const bool same_size = std::any_of(pieces.begin(), pieces.end(), [&](const Piece& next) {
      return next.node == piece.node && next.slot == piece.slot && next.rows == piece.rows;
    });
    if (!same_size) std::vector<float>().swap(sums);  // else the memory serves again
  }
  pieces_.clear();
  importance_ = model_.program(mode(true, pieces));
  std::size_t sums = 0;
  for (const Piece& piece : pieces) {
    Weight& weight = model_.tensor(piece.node, piece.slot);
    const std::size_t row = row_size(piece);
    weight.squares.assign(piece.rows * row, 0.0f);
    weight.squares_begin = piece.first * row;
    sums += weight.squares.size();
    pieces_.push_back(piece);
  }
  most_arena_ = std::max(most_arena_, importance_->floats());
  most_squares_ = std::max(most_squares_, sums);
}

void Session::hold_gradients(bool dense) {
  for (auto [node, slot] : model_.trainable()) {
    Weight& weight = model_.tensor(node, slot);
    // Layers that no gradient reaches leave theirs untouched: 0.
    if (dense) {
      weight.all.assign(model_.tensor_size(node, slot), 0.0f);
    } else {
      weight.grad.assign(weight.size(), 0.0f);
    }
  }
}

double Session::step(const float* x, const std::int64_t* y, int examples, const Pieces& pieces) {
  hold_squares(pieces);
  const Program& program = pieces.empty() ? *training_ : *importance_;
  float* const memory = arena_.ensure(std::max(program.floats(), evaluation_->floats()));
  const Batch batch{examples};
  tapped_.reset();  // its activations are overwritten
  program.forward(engine_->kernels, engine_->pool, memory, x, batch);
  const double mean = evaluate_loss(options_.loss, program.value(memory, program.output()), y,
                                    batch, program.gradient(memory, program.output()));
  update(program, batch, !pieces.empty());
  return mean;
}

void Session::update(const Program& program, Batch batch, bool squares) {
  const bool clip = options_.clip_norm > 0;  // no update before the norm is known
  if (clip) hold_gradients(false);
  Sink sink;
  sink.update = !clip;
  sink.store = clip;
  sink.squares = squares;
  sink.rule = options_.rule;
  program.backward(engine_->kernels, engine_->pool, arena_.get(), batch, sink);
  if (clip) {
    apply(model_.trainable());
  } else {
    update_unreached(program, sink);
  }
}

double Session::loss(const float* x, const std::int64_t* y, int examples) {
  float* const memory = arena_.ensure(std::max(training_->floats(), evaluation_->floats()));
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
    Weight& weight = model_.tensor(node, slot);
    weight.take(engine_->kernels, sink, 0, weight.grad.data(), weight.size());
  }
  if (options_.clip_norm <= 0) drop_gradients();
}

// Scales the held gradients to a common norm of at most clip_norm.
void Session::clip(const std::vector<std::pair<int, Slot>>& tensors) {
  double squares = 0;
  for (auto [node, slot] : tensors) {
    const Weight& weight = model_.tensor(node, slot);
    for (std::size_t i = 0; i < weight.grad.size(); ++i)
      if (weight.kept.empty() || weight.kept[i]) squares += double(weight.grad[i]) * weight.grad[i];
  }
  const double norm = std::sqrt(squares);
  if (norm <= options_.clip_norm) return;
  const float scale = float(options_.clip_norm / norm);
  for (auto [node, slot] : tensors)
    for (float& g : model_.tensor(node, slot).grad) g *= scale;
}

void Session::drop_gradients() {
  for (auto [node, slot] : model_.trainable()) {
    std::vector<float>().swap(model_.tensor(node, slot).all);
    if (options_.clip_norm <= 0) std::vector<float>().swap(model_.tensor(node, slot).grad);
  }
}

std::size_t Session::squares_size(int node, Slot slot) const {
  const std::size_t held = model_.tensor(node, slot).squares.size();
  return held ? held : model_.tensor_size(node, slot);
}

void Session::squares(int node, Slot slot, float* values) const {
  const Weight& weight = model_.tensor(node, slot);
  if (weight.squares.empty()) {
    std::memset(values, 0, squares_size(node, slot) * sizeof(float));
  } else {
    std::copy(weight.squares.begin(), weight.squares.end(), values);
  }
}

void Session::forward(const float* x, int examples, const std::vector<int>& nodes, bool training) {
  // backward may be asked for all coordinates
  Mode m = mode(training, training ? all_pieces() : Pieces{});
  m.taps = nodes;
  m.examples = examples;
  tapped_ = model_.program(m);
  tapped_batch_ = Batch{examples};
  tapped_->forward(engine_->kernels, engine_->pool, arena_.ensure(tapped_->floats()), x,
                   tapped_batch_);
}

void Session::activation(int node, float* values) const {
  const View v = tapped_->value(arena_.get(), tapped_->tensor_of(node));
  for_values(v, tapped_batch_, [&](float x, std::size_t i) { values[i] = x; });
}

// Puts the gradients where they enter.
void Session::seed(const std::vector<int>& nodes, const std::vector<const float*>& gradients) {
  float* const memory = arena_.get();
  tapped_->clear_seeds(engine_->kernels, engine_->pool, memory, tapped_batch_);
  for (std::size_t i = 0; i < nodes.size(); ++i) {
    const View v = tapped_->gradient(memory, tapped_->tensor_of(nodes[i]));
    if (v) for_values(v, tapped_batch_, [&](float& g, std::size_t at) { g += gradients[i][at]; });
  }
}

void Session::backward(const std::vector<int>& nodes, const std::vector<const float*>& gradients,
                       bool dense) {
  seed(nodes, gradients);
  hold_gradients(dense);
  Sink sink;
  sink.store = !dense;
  sink.dense = dense;
  tapped_->backward(engine_->kernels, engine_->pool, arena_.get(), tapped_batch_, sink);
  tapped_.reset();
}

void Session::descend(const std::vector<int>& nodes, const std::vector<const float*>& gradients,
                      const Pieces& pieces) {
  hold_squares(pieces);
  seed(nodes, gradients);
  update(*tapped_, tapped_batch_, !pieces.empty());
  tapped_.reset();
}

bool Session::has_gradient(int node, Slot slot, bool dense) const {
  const Weight& weight = model_.tensor(node, slot);
  return dense ? weight.all.size() == model_.tensor_size(node, slot)
               : weight.grad.size() == weight.size();
}

void Session::gradient(int node, Slot slot, float* values, bool dense) const {
  const Weight& weight = model_.tensor(node, slot);
  if (dense) {
    std::copy(weight.all.begin(), weight.all.end(), values);
  } else {
    model_.expand(node, slot, weight.grad, values);
  }
}

void Session::set_gradient(int node, Slot slot, const float* values) {
  const Layer& layer = *model_.layers[node];
  Weight& weight = model_.tensor(node, slot);
  weight.grad.assign(weight.size(), 0.0f);
  if (slot == kWeight && layer.sparse()) {
    const std::vector<std::uint32_t> positions = layer.weight_positions();
    for (std::size_t k = 0; k < positions.size(); ++k) weight.grad[k] = values[positions[k]];
  } else {
    std::copy(values, values + weight.size(), weight.grad.begin());
  }
}

}  // namespace fedlean
