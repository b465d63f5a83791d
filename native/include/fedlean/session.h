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

class Session {
public:
  Session(std::shared_ptr<Engine> engine, const Network& network, const Options& options);

  // Bytes of everything that a training step (with importance) holds, from shapes and counts alone.
  std::size_t planned_bytes(bool importance) const;
  // Bytes that are held now; equals the plan once a step has run.
  std::size_t held_bytes() const;

  // As the model's.
  void build(int node, const std::uint8_t* const masks[kSlots]);
  // As after `build`: momentum, gradients and sums are gone; values are loaded anew by the caller.
  void reset();
  // `reference`: also take it as what a proximal term pulls towards.
  void load(int node, Slot slot, const float* values, bool packed, bool reference);
  const Model& model() const { return model_; }

  double step(const float* x, const std::int64_t* y, int examples, bool importance);
  double loss(const float* x, const std::int64_t* y, int examples);
  void squares(int node, Slot slot, float* values) const;  // sums of squares; 0 before any step

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
               bool importance);
  void set_gradient(int node, Slot slot, const float* values);
  // One optimiser step of the tensors named by (node, slot), whose gradients were set.
  void apply(const std::vector<std::pair<int, Slot>>& tensors);

private:
  const Program& training_program(bool importance);
  Mode mode(bool training, bool importance) const;
  void hold_squares();
  void hold_gradients(bool dense);
  void seed(const std::vector<int>& nodes, const std::vector<const float*>& gradients);
  // Backward and update, once the gradients of `program`'s outputs are in the arena.
  void update(const Program& program, Batch batch, bool importance);
  void update_unreached(const Program& program, const Sink& sink);
  void clip(const std::vector<std::pair<int, Slot>>& tensors);

  std::shared_ptr<Engine> engine_;
  Options options_;
  Model model_;
  std::unique_ptr<Program> training_, importance_, evaluation_, tapped_;
  Batch tapped_batch_;
  Arena arena_;
};

}  // namespace fedlean
