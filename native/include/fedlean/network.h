// A network as the engine is given it: nodes in topological order, shapes inferred by the caller
// (fedlean.spec), the last node the output.
#pragma once

#include <string>
#include <vector>

#include "fedlean/layout.h"

namespace fedlean {

enum class Kind {
  kLinear,
  kConv2d,
  kMaxPool,
  kAvgPool,
  kGlobalAvgPool,
  kGroupNorm,
  kBatchNorm,
  kReLU,
  kHardswish,
  kHardsigmoid,
  kScaler,
  kFlatten,
  kAdd,
  kScale
};

struct Node {
  std::string name;
  Kind kind;
  std::vector<int> inputs;  // indices of nodes; kModelInput for the model's input
  Shape shape;  // of the output
  int kernel = 1, stride = 1, padding = 0, groups = 1;
  bool bias = false;
  float eps = 1e-5f, momentum = 0.1f;  // of norms
  float factor = 1;  // of a scaler
  bool slower = false;  // a pruned weight takes the slower of its two forms, which is smaller
};

constexpr int kModelInput = -1;

struct Network {
  Shape input;
  std::vector<Node> nodes;
  const Shape& shape_of(int node) const { return node < 0 ? input : nodes[node].shape; }
};

}  // namespace fedlean
