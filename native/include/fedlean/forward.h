// A model that is only evaluated, at its weights or near them: no gradients, no copy of the weights
// beside those of the layer in work.
//
// The caller (bindings) checks shapes, masks and labels; this class trusts them.
#pragma once

#include <memory>
#include <vector>

#include "fedlean/session.h"

namespace fedlean {

struct ForwardOptions {
  int batch_size = 1;
  Loss loss = Loss::kCrossEntropy;
  int directions_at_once = 1;
  std::vector<TensorOptions> tensors;  // per node
};

class ForwardSession {
public:
  ForwardSession(std::shared_ptr<Engine> engine, const Network& network,
                 const ForwardOptions& options);

  // Bytes of everything that a loss holds, from shapes and counts alone; and those held now.
  std::size_t planned_bytes() const;
  std::size_t held_bytes() const;
  Model& model() { return model_; }
  const Model& model() const { return model_; }

  double loss(const float* x, const std::int64_t* y, int examples);
  // losses[i] is the loss at the weights moved by directions[i].
  void losses(const float* x, const std::int64_t* y, int examples,
              const std::vector<Direction>& directions, double* losses);
  // Activations of `nodes`, each to its array; takes more memory than the plan while it runs.
  void forward(const float* x, int examples, const std::vector<int>& nodes,
               const std::vector<float*>& values);

private:
  Mode mode(int group_panels) const;
  float* arena() { return arena_.ensure(program_->floats() * at_once_); }
  double loss_at(const float* x, const std::int64_t* y, int examples, const Direction* direction,
                 ThreadPool& pool, float* memory) const;

  std::shared_ptr<Engine> engine_;
  const ForwardOptions options_;
  const int at_once_;  // directions
  Model model_;
  ThreadPool alone_{1};
  std::unique_ptr<Program> program_;
  Arena arena_;
};

}  // namespace fedlean
