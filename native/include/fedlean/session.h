// A model in training: its weights, its programs, one arena.
//
// The caller (bindings) checks shapes, masks and labels; this class trusts them.
#pragma once

#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "fedlean/loss.h"
#include "fedlean/model.h"

namespace fedlean {

struct Options {
  int batch_size = 1;
  Loss loss = Loss::kCrossEntropy;
  Update rule = {};
  float clip_norm = 0;  // 0: none
  std::vector<TensorOptions> tensors;  // per node
};

struct Engine {  // what sessions share
  explicit Engine(int threads) : kernels(best_kernels()), pool(threads) {}
  const Kernels& kernels;
  ThreadPool pool;
  std::mutex busy;  // callers hold it while a session of the engine does anything
};

// Rows of a trainable tensor, along its first axis, whose gradients' squares a step sums.
struct Piece {
  int node;
  Slot slot;
  int first, rows;
  bool operator==(const Piece& other) const {
    return node == other.node && slot == other.slot && first == other.first && rows == other.rows;
  }
};
using Pieces = std::vector<Piece>;  // at most one of a tensor

class Session {
public:
  Session(std::shared_ptr<Engine> engine, const Network& network, const Options& options);

  // Bytes of everything that a training step holds, from shapes and counts alone, and with the most
  // that was asked of it since `build` or `reset`: sums of squares, and scratch for them.
  std::size_t planned_bytes() const;
  // Bytes that are held now; equals the plan once a step has run that asks for no less than others.
  std::size_t held_bytes() const;

  // As the model's.
  void build(int node, const std::uint8_t* const masks[kSlots]);
  // As after `build`: momentum, gradients and sums are gone; values are loaded anew by the caller.
  void reset();
  // `reference`: also take it as what a proximal term pulls towards.
  void load(int node, Slot slot, const float* values, bool packed, bool reference);
  const Model& model() const { return model_; }

  // What the next training pass draws from; see Model::set_keys.
  void set_keys(const std::vector<std::uint64_t>& keys) { model_.set_keys(keys); }
  // Adds squares to the sums of `pieces`, which start at 0 where the last step to name some named
  // others; those are given up.
  double step(const float* x, const std::int64_t* y, int examples, const Pieces& pieces);
  double loss(const float* x, const std::int64_t* y, int examples);
  // The sums of a tensor's piece, `squares_size` of them; where it has none, 0 for all of it.
  std::size_t squares_size(int node, Slot slot) const;
  void squares(int node, Slot slot, float* values) const;

  // Activations of `nodes` (and of the output, always the last node); read with `activation`.
  void forward(const float* x, int examples, const std::vector<int>& nodes, bool training);
  void activation(int node, float* values) const;
  void backward(const std::vector<int>& nodes, const std::vector<const float*>& gradients,
                bool dense);
  bool has_gradient(int node, Slot slot, bool dense) const;
  void gradient(int node, Slot slot, float* values, bool dense) const;
  void drop_gradients();  // what backward left
  // Instead of `backward`: one optimiser step, as `step` makes it after the loss.  No gradient is
  // kept, unless they are clipped: then the kept weights', until the norm of all is known.
  void descend(const std::vector<int>& nodes, const std::vector<const float*>& gradients,
               const Pieces& pieces);
  void set_gradient(int node, Slot slot, const float* values);
  // One optimiser step of the tensors named by (node, slot), whose gradients were set.
  void apply(const std::vector<std::pair<int, Slot>>& tensors);

private:
  Mode mode(bool training, const Pieces& pieces) const;
  Pieces all_pieces() const;
  std::size_t row_size(const Piece& piece) const;
  void hold_squares(const Pieces& pieces);
  void hold_gradients(bool dense);
  void seed(const std::vector<int>& nodes, const std::vector<const float*>& gradients);
  // Backward and update, once the gradients of `program`'s outputs are in the arena.
  void update(const Program& program, Batch batch, bool squares);
  void update_unreached(const Program& program, const Sink& sink);
  void clip(const std::vector<std::pair<int, Slot>>& tensors);

  std::shared_ptr<Engine> engine_;
  Options options_;
  Model model_;
  std::unique_ptr<Program> training_, importance_, evaluation_, tapped_;
  Pieces pieces_;  // whose sums are held, of `importance_`
  std::size_t most_arena_ = 0, most_squares_ = 0;  // floats that pieces have asked for
  Batch tapped_batch_;
  Arena arena_;
};

}  // namespace fedlean
