#include "fedlean/limits.h"

#include <stdexcept>

namespace fedlean {

namespace {

using Inputs = std::vector<Shape>;

[[noreturn]] void refuse(const Node& node, const std::string& why) {
  throw std::invalid_argument("layer '" + node.name + "': " + why);
}
void expect(bool holds, const Node& node, const char* why) {
  if (!holds) refuse(node, why);
}

// -1 where it is more than kMostPixels.
std::int64_t pixels(std::int64_t channels, std::int64_t height, std::int64_t width) {
  if (channels > kMostPixels || height > kMostPixels || width > kMostPixels) return -1;
  const std::int64_t plane = height * width;  // below 2^54
  if (plane > kMostPixels || channels * plane > kMostPixels) return -1;
  return channels * plane;
}

bool valid(const Shape& s) {
  return s.channels > 0 && s.height > 0 && s.width > 0 &&
         (s.rank == 3 || (s.rank == 1 && s.height == 1 && s.width == 1)) &&
         pixels(s.channels, s.height, s.width) > 0;
}

void check_settings(const Node& node) {
  auto in = [](int value, int low) { return value >= low && value <= kMostSide; };
  expect(in(node.kernel, 1) && in(node.stride, 1) && in(node.padding, 0), node,
         "kernel and stride must be 1 to 1024, padding 0 to 1024");
  expect(node.groups >= 1, node, "groups must be at least 1");
  const bool conv = node.kind == Kind::kConv2d;
  const bool window = conv || node.kind == Kind::kMaxPool || node.kind == Kind::kAvgPool;
  expect(window || (node.kernel == 1 && node.stride == 1 && node.padding == 0), node,
         "has no window");
  expect(conv || node.kind == Kind::kGroupNorm || node.groups == 1, node, "has no groups");
  expect(node.eps > 0 && node.eps < 1e30f, node, "eps must be positive");
  expect(node.momentum >= 0 && node.momentum <= 1, node, "momentum must be from 0 to 1");
  expect(node.factor >= 1e-3f && node.factor <= 1e3f, node, "factor must be from 0.001 to 1000");
  expect(node.kind == Kind::kScaler || node.factor == 1, node, "has no factor");
}

int windows(const Node& node, int side) {
  const int padded = side + 2 * node.padding;
  expect(node.kernel <= padded, node, "the window does not fit the input");
  return (padded - node.kernel) / node.stride + 1;
}

Shape windowed(const Node& node, const Inputs& in, int channels) {
  expect(in.size() == 1 && in[0].rank == 3, node, "takes one image");
  return {channels, windows(node, in[0].height), windows(node, in[0].width), 3};
}

Shape conv_shape(const Node& node, const Inputs& in) {
  const Shape out = windowed(node, in, node.shape.channels);
  expect(in[0].channels % node.groups == 0 && node.shape.channels % node.groups == 0, node,
         "groups must divide both channel counts");
  return out;
}

Shape pool_shape(const Node& node, const Inputs& in) {
  expect(in.size() == 1, node, "takes one image");
  expect(2 * node.padding <= node.kernel, node, "padding must be at most half of kernel");
  expect(node.kind != Kind::kMaxPool || node.kernel <= kMostPoolSide, node,
         "kernel of max pooling must be at most 16");
  return windowed(node, in, in[0].channels);
}

Shape norm_shape(const Node& node, const Inputs& in) {
  expect(in.size() == 1, node, "takes one input");
  expect(node.kind == Kind::kBatchNorm || in[0].channels % node.groups == 0, node,
         "groups must divide the channels");
  return in[0];
}

Shape output_shape(const Node& node, const Inputs& in) {
  switch (node.kind) {
    case Kind::kConv2d:
      return conv_shape(node, in);
    case Kind::kMaxPool:
    case Kind::kAvgPool:
      return pool_shape(node, in);
    case Kind::kGroupNorm:
    case Kind::kBatchNorm:
      return norm_shape(node, in);
    case Kind::kLinear:
      expect(in.size() == 1 && in[0].rank == 1, node, "takes one vector");
      return {node.shape.channels, 1, 1, 1};
    case Kind::kGlobalAvgPool:
      expect(in.size() == 1 && in[0].rank == 3, node, "takes one image");
      return {in[0].channels, 1, 1, 1};
    case Kind::kFlatten:
      expect(in.size() == 1, node, "takes one input");
      return {int(in[0].size()), 1, 1, 1};
    case Kind::kAdd:
      expect(in.size() >= 2, node, "takes two inputs or more");
      for (const Shape& shape : in) expect(shape == in[0], node, "takes inputs of equal shape");
      return in[0];
    case Kind::kScale:
      expect(
          in.size() == 2 && in[0].rank == 3 && in[1].rank == 1 && in[0].channels == in[1].channels,
          node, "takes an image and a gate");
      return in[0];
    default:
      expect(in.size() == 1, node, "takes one input");
      return in[0];
  }
}

// Of the dense tensor; 0 where there is none.
std::int64_t tensor_size(const Network& network, const Node& node, int slot) {
  const Shape& in = network.shape_of(node.inputs[0]);
  const std::int64_t outputs = node.shape.channels;
  switch (node.kind) {
    case Kind::kConv2d:
      if (slot == kWeight) return outputs * (in.channels / node.groups) * node.kernel * node.kernel;
      return slot == kBias && node.bias ? outputs : 0;
    case Kind::kLinear:
      if (slot == kWeight) return outputs * in.channels;
      return slot == kBias && node.bias ? outputs : 0;
    case Kind::kGroupNorm:
      return slot == kWeight || slot == kBias ? outputs : 0;
    case Kind::kBatchNorm:
      return outputs;
    default:
      return 0;
  }
}

// Both sides are bounded, so that no product before the last exceeds 64 bits.
bool weights_fit(const Network& network, const Node& node) {
  if (node.kind != Kind::kConv2d && node.kind != Kind::kLinear) return true;
  const std::int64_t inputs = network.shape_of(node.inputs[0]).channels / node.groups;
  const std::int64_t window = std::int64_t(node.kernel) * node.kernel;
  return inputs * window <= kMostWeights && node.shape.channels * inputs <= kMostWeights / window;
}

// The phases of a strided convolution's padded input (see pattern.h).
std::int64_t phase_pixels(const Node& node, const Shape& in) {
  const std::int64_t used = node.stride < node.kernel ? node.stride : node.kernel;
  auto side = [&](int size) {
    return used * ((size + 2 * node.padding + node.stride - 1) / node.stride);
  };
  return pixels(in.channels, side(in.height), side(in.width));
}

}  // namespace

void check_input(const Shape& input) {
  if (!valid(input)) throw std::invalid_argument("the input's shape is empty or too large");
}

void check_node(const Network& network, const Node& node) {
  expect(int(network.nodes.size()) < kMostNodes, node, "a network has at most 4096 layers");
  expect(!node.inputs.empty() && int(node.inputs.size()) <= kMostInputs, node,
         "takes 1 to 256 inputs");
  Inputs inputs;
  for (int input : node.inputs) {
    expect(input >= kModelInput && input < int(network.nodes.size()), node,
           "inputs must be earlier nodes");
    inputs.push_back(network.shape_of(input));
  }
  check_settings(node);
  expect(valid(node.shape), node, "its shape is empty or too large");
  expect(output_shape(node, inputs) == node.shape, node, "its shape is not what it computes");
  expect(weights_fit(network, node), node, "its weight is too large");
}

void check_tensors(const Network& network, const std::vector<TensorOptions>& tensors) {
  if (network.nodes.empty()) throw std::invalid_argument("a network needs a layer");
  if (tensors.size() != network.nodes.size())
    throw std::invalid_argument("trainable and kept must be given for every layer");
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    const Node& node = network.nodes[i];
    for (int slot = 0; slot < kSlots; ++slot) {
      const std::int64_t size = tensor_size(network, node, slot), kept = tensors[i].kept[slot];
      expect(size > 0 || !tensors[i].trainable[slot], node, "there is no such tensor to train");
      expect(kept >= -1 && kept <= (size > 0 ? size : -1), node,
             "kept must be -1 or at most the tensor's size");
    }
  }
}

void check_images(const Network& network, const Structure& structure) {
  for (std::size_t i = 0; i < network.nodes.size(); ++i) {
    const Node& node = network.nodes[i];
    bool fit = node.kind != Kind::kConv2d || node.stride == 1 ||
               phase_pixels(node, network.shape_of(node.inputs[0])) > 0;
    auto fits = [&](int tensor, int halo) {
      const Shape& s = network.shape_of(tensor - 1);
      return pixels(s.channels, s.height + 2 * std::int64_t(halo),
                    s.width + 2 * std::int64_t(halo)) > 0;
    };
    for (int tensor : {node.inputs[0] + 1, int(i) + 1})
      fit = fit && fits(tensor, structure.value_halo[tensor]) &&
            fits(tensor, structure.grad_halo[tensor]);
    expect(fit, node, "images with the zeros around them are too large for the native engine");
  }
}

}  // namespace fedlean
