// A network as the engine is given it: nodes in topological order, shapes inferred by the caller
// (fedlean.spec), the last node the output.
#pragma once

#include <string>
#include <vector>

#include "fedlean/kernels.h"

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
  kCurve,  // any other elementwise function
  kScaler,
  kFlatten,
  kAdd,
  kScale,
  kConcat,
  kDropout
};

struct Node {
  std::string name;
  Kind kind;
  std::vector<int> inputs;  // indices of nodes; kModelInput for the model's input
  Shape shape;  // of the output
  Sides kernel = {1, 1}, stride = {1, 1}, padding, dilation = {1, 1};
  int groups = 1;
  bool bias = false;
  float eps = 1e-5f, momentum = 0.1f;  // of norms
  float factor = 1;  // of a scaler
  Curve curve;
  float p = 0;  // of dropout
  bool whole_channels = false;  // are dropped, rather than single elements
  bool slower = false;  // a pruned weight takes the slower of its two forms, which is smaller
};

constexpr int kModelInput = -1;

struct Network {
  Shape input;
  std::vector<Node> nodes;
  const Shape& shape_of(int node) const { return node < 0 ? input : nodes[node].shape; }
};

}  // namespace fedlean
