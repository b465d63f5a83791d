// What the engine takes: checked once, before anything is computed from it.  Everything behind
// counts pixels and weights in 32 bits and may do so because of these limits, which are far beyond
// what is trained on a device (fedlean.layers and fedlean.spec refuse most of it by the same
// rules).
#pragma once

#include <vector>

#include "fedlean/model.h"

namespace fedlean {

constexpr int kMostNodes = 4096, kMostInputs = 256;
constexpr int kMostSide = 1024;  // of a window, and of its steps
constexpr int kMostPoolArea = 256;  // of max pooling: the winning pixel is kept in one byte
// Of one tensor and one example, zeros around images included: with 16 lanes they fit 31 bits.
constexpr std::int64_t kMostPixels = (1 << 27) - 1;
constexpr std::int64_t kMostWeights = 1 << 30;  // of one tensor
constexpr int kMostExamples = 1 << 20;  // of a batch
constexpr int kMostThreads = 1024;

// All of these throw std::invalid_argument, which names the node where there is one.
void check_input(const Shape& input);
// That `node` may be added to the network: its settings, and that its shape is what it computes.
void check_node(const Network& network, const Node& node);
// What is trained and kept of each node: only of tensors that there are.
void check_tensors(const Network& network, const std::vector<TensorOptions>& tensors);
// That images with the zeros around them, and those that a strided convolution makes, fit too.
void check_images(const Network& network, const Structure& structure);

}  // namespace fedlean
