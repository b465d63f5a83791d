// How a network is run in one mode: the order of its layers, which activations share memory, what
// runs group by group of panels, and the memory plan of the whole pass.
#pragma once

#include <memory>
#include <vector>

#include "fedlean/direction.h"
#include "fedlean/layer.h"
#include "fedlean/network.h"
#include "fedlean/plan.h"

namespace fedlean {

// Fixed for a model and what is trained of it; the same in all of its programs.  Tensor t is the
// model's input (t = 0) or the output of node t - 1.
struct Structure {
  explicit Structure(const Network& network, const std::vector<bool>& trainable_nodes);
  std::vector<Sides> value_halo, grad_halo;  // per tensor
  std::vector<bool> needs_grad;  // per tensor
};

struct Mode {
  bool training = false;  // batch statistics; backward follows
  // Per node, rows of its weight whose pruned coordinates' gradients are taken too; empty: none.
  std::vector<int> dense_rows;
  std::vector<int> taps;  // nodes whose outputs are wanted, and where gradients may enter
  int examples = 0;
  int threads = 1;
  int group_panels = 2;  // that run at once where nothing is kept for backward
  bool moved = false;  // with memory for one layer's perturbed weights
};

class Program {
public:
  Program(const Network& network, const std::vector<std::unique_ptr<Layer>>& layers,
          const Structure& structure, const Mode& mode);

  std::size_t floats() const { return plan_.floats(); }
  int output() const { return output_; }  // tensor
  // Layers that could be trained but on which no loss depends: their gradients are 0.
  const std::vector<Layer*>& unreached() const { return unreached_; }
  // The tensor that holds a node's output.
  int tensor_of(int node) const { return node + 1; }

  // `x`: (examples, C, H, W) row-major.  Activations stay in `arena` until the next call.  With a
  // `direction`, which takes a mode with `moved`, the weights are moved by it.
  void forward(const Kernels&, ThreadPool&, float* arena, const float* x, Batch batch,
               const Direction* direction = nullptr) const;
  // After forward in training mode and after the outputs' gradients were put into `gradient`.
  void backward(const Kernels&, ThreadPool&, float* arena, Batch batch, const Sink& sink) const;
  void clear_seeds(const Kernels&, ThreadPool&, float* arena, Batch batch) const;

  View value(float* arena, int tensor) const;
  View gradient(float* arena, int tensor) const;  // null where none is needed

private:
  struct Tensor {
    Layout value_layout, grad_layout;
    int value_array = -1, grad_array = -1;
    int readers = 0;
    bool local = false;  // only the panels of the running group
    bool needs_grad = false, seed = false, tapped = false;
  };
  struct Step {
    Layer* layer;
    std::vector<int> inputs;
    int output;
    int node;
    int saved = -1, forward_scratch = -1, backward_scratch = -1, moved = -1;
    bool training = false, backward = false, clear_out = false, dense_gradient = false;
    std::vector<bool> accumulate, clear_grad;
  };

  void wire(const Network& network, const std::vector<std::unique_ptr<Layer>>& layers,
            const std::vector<bool>& needed);
  void swap_relu_and_pool();
  void find_region();
  void share_values();
  void share_gradients();
  void lay_out(const Mode& mode);
  bool overwritable(const Step& step, int slot) const;
  int forward_time(std::size_t step) const { return int(step); }
  int backward_time(std::size_t step) const { return int(2 * steps_.size() - step); }
  Situation situation(const Step&, const Mode&, bool local) const;
  Pass pass_of(const Step&, const Kernels&, ThreadPool&, float* arena, Batch, int panel_begin,
               int panel_end) const;
  View view(float* arena, int array, const Layout&, int first_panel) const;
  void pack(const Pass&, const float* x) const;
  void pack_vectors(const Pass&, const float* x) const;

  const Structure& structure_;
  std::vector<Tensor> tensors_;
  std::vector<Step> steps_;  // of the nodes that somebody asks for
  std::vector<Layer*> unreached_;
  std::vector<int> producer_;  // step that makes each tensor; -1 for the input
  std::size_t region_ = 0;  // the first so many steps run group by group
  bool training_ = false;
  const int group_panels_;
  int output_ = 0;
  Plan plan_;
};

}  // namespace fedlean
