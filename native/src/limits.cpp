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
         (s.rank == 3 || (s.rank <= 2 && s.rank >= 1 && s.height == 1)) &&
         (s.rank > 1 || s.width == 1) && pixels(s.channels, s.height, s.width) > 0;
}

void check_settings(const Node& node) {
  auto in = [](Sides s, int low) {
    return s.y >= low && s.x >= low && s.y <= kMostSide && s.x <= kMostSide;
  };
  expect(in(node.kernel, 1) && in(node.stride, 1) && in(node.padding, 0) && in(node.dilation, 1),
         node, "kernel, stride and dilation must be 1 to 1024, padding 0 to 1024");
  expect(node.groups >= 1, node, "groups must be at least 1");
  const bool conv = node.kind == Kind::kConv2d;
  const bool window = conv || node.kind == Kind::kMaxPool || node.kind == Kind::kAvgPool;
  constexpr Sides one{1, 1};
  expect(window || (node.kernel == one && node.stride == one && node.padding == Sides{}), node,
         "has no window");
  expect(conv || node.dilation == one, node, "has no dilation");
  expect(conv || node.kind == Kind::kGroupNorm || node.groups == 1, node, "has no groups");
  expect(node.eps > 0 && node.eps < 1e30f, node, "eps must be positive");
  expect(node.momentum >= 0 && node.momentum <= 1, node, "momentum must be from 0 to 1");
  expect(node.factor >= 1e-3f && node.factor <= 1e3f, node, "factor must be from 0.001 to 1000");
  expect(node.kind == Kind::kScaler || node.factor == 1, node, "has no factor");
  expect(node.p >= 0 && node.p < 1, node, "p must be at least 0 and below 1");
  expect(node.kind == Kind::kDropout || node.p == 0, node, "has no p");
  const Curve& curve = node.curve;
  auto bounded = [](float x) { return x >= -1e3f && x <= 1e3f; };
  expect(bounded(curve.low) && bounded(curve.high), node, "low and high must be -1000 to 1000");
  expect(curve.name != Curve::kHardtanh || curve.low < curve.high, node, "low must be below high");
}

int windows(const Node& node, int side, int kernel, int stride, int padding, int dilation) {
  const int padded = side + 2 * padding, reach = (kernel - 1) * dilation + 1;
  expect(reach <= padded, node, "the window does not fit the input");
  return (padded - reach) / stride + 1;
}

Shape windowed(const Node& node, const Inputs& in, int channels) {
  expect(in.size() == 1 && in[0].rank > 1, node, "takes one image or signal");
  const Sides k = node.kernel, s = node.stride, p = node.padding, d = node.dilation;
  return {channels, windows(node, in[0].height, k.y, s.y, p.y, d.y),
          windows(node, in[0].width, k.x, s.x, p.x, d.x), in[0].rank};
}

Shape conv_shape(const Node& node, const Inputs& in) {
  const Shape out = windowed(node, in, node.shape.channels);
  expect(in[0].channels % node.groups == 0 && node.shape.channels % node.groups == 0, node,
         "groups must divide both channel counts");
  return out;
}

Shape pool_shape(const Node& node, const Inputs& in) {
  expect(in.size() == 1, node, "takes one image");
  expect(2 * node.padding.y <= node.kernel.y && 2 * node.padding.x <= node.kernel.x, node,
         "padding must be at most half of kernel");
  expect(node.kind != Kind::kMaxPool || node.kernel.area() <= kMostPoolArea, node,
         "a window of max pooling must have at most 256 pixels");
  return windowed(node, in, in[0].channels);
}

Shape norm_shape(const Node& node, const Inputs& in) {
  expect(in.size() == 1, node, "takes one input");
  expect(node.kind == Kind::kBatchNorm || in[0].channels % node.groups == 0, node,
         "groups must divide the channels");
  return in[0];
}

Shape concat_shape(const Node& node, const Inputs& in) {
  expect(in.size() >= 2, node, "takes two inputs or more");
  Shape out = in[0];
  std::int64_t channels = 0;
  for (const Shape& shape : in) {
    channels += shape.channels;
    out.channels = shape.channels;
    expect(shape == out, node, "takes inputs that differ in channels only");
  }
  expect(channels <= kMostPixels, node, "its shape is too large");
  out.channels = int(channels);
  return out;
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
      expect(in.size() == 1 && in[0].rank > 1, node, "takes one image or signal");
      return {in[0].channels, 1, 1, 1};
    case Kind::kFlatten:
      expect(in.size() == 1, node, "takes one input");
      return {int(in[0].size()), 1, 1, 1};
    case Kind::kAdd:
      expect(in.size() >= 2, node, "takes two inputs or more");
      for (const Shape& shape : in) expect(shape == in[0], node, "takes inputs of equal shape");
      return in[0];
    case Kind::kConcat:
      return concat_shape(node, in);
    case Kind::kScale:
      expect(
          in.size() == 2 && in[0].rank > 1 && in[1].rank == 1 && in[0].channels == in[1].channels,
          node, "takes an image or signal and a gate");
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
      if (slot == kWeight) return outputs * (in.channels / node.groups) * node.kernel.area();
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
  const std::int64_t window = node.kernel.area();
  return inputs * window <= kMostWeights && node.shape.channels * inputs <= kMostWeights / window;
}

// The phases of a strided convolution's padded input (see pattern.h).
std::int64_t phase_pixels(const Node& node, const Shape& in) {
  auto side = [](int size, int kernel, int stride, int padding) {
    const std::int64_t used = stride < kernel ? stride : kernel;  // at most, where it is dilated
    return used * ((size + 2 * padding + stride - 1) / stride);
  };
  return pixels(in.channels, side(in.height, node.kernel.y, node.stride.y, node.padding.y),
                side(in.width, node.kernel.x, node.stride.x, node.padding.x));
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
    bool fit = node.kind != Kind::kConv2d || node.stride == Sides{1, 1} ||
               phase_pixels(node, network.shape_of(node.inputs[0])) > 0;
    auto fits = [&](int tensor, Sides halo) {
      const Shape& s = network.shape_of(tensor - 1);
      return pixels(s.channels, s.height + 2 * std::int64_t(halo.y),
                    s.width + 2 * std::int64_t(halo.x)) > 0;
    };
    for (int tensor : {node.inputs[0] + 1, int(i) + 1})
      fit = fit && fits(tensor, structure.value_halo[tensor]) &&
            fits(tensor, structure.grad_halo[tensor]);
    expect(fit, node, "images with the zeros around them are too large for the native engine");
  }
}

}  // namespace fedlean
