#include "conv_geometry.h"

#include <algorithm>
#include <numeric>

namespace fedlean {

namespace {

bool is_split(Sides stride) { return stride.y > 1 || stride.x > 1; }

// Tap i of a side is read at the padded input's pixel i * dilation, of phase (i * dilation) %
// stride: so many phases have a tap.
int used_phases(int kernel, int stride, int dilation) {
  return std::min(kernel, stride / std::gcd(stride, dilation));
}

int phase_side(int side, int padding, int stride) {
  return (side + 2 * padding + stride - 1) / stride;
}

}  // namespace

ConvGeometry::ConvGeometry(const Node& node, const Shape& in, Sides in_halo, Sides grad_halo)
    : in(in),
      out(node.shape),
      kernel(node.kernel),
      stride(node.stride),
      padding(node.padding),
      dilation(node.dilation),
      groups(node.groups),
      in_halo(in_halo),
      grad_halo(grad_halo),
      used{used_phases(kernel.y, stride.y, dilation.y),
           used_phases(kernel.x, stride.x, dilation.x)} {
  for (int y = 0; y < used.y; ++y)
    for (int x = 0; x < used.x; ++x)
      phase_of.push_back({y * dilation.y % stride.y, x * dilation.x % stride.x});
  phase_height = phase_side(in.height, padding.y, stride.y);
  phase_width = phase_side(in.width, padding.x, stride.x);
}

bool ConvGeometry::split() const { return is_split(stride); }

int ConvGeometry::in_plane() const {
  return split() ? phase_height * phase_width : in_row() * (in.height + 2 * in_halo.y);
}

int ConvGeometry::in_start() const {
  return split() ? 0 : (in_halo.y - padding.y) * in_row() + in_halo.x - padding.x;
}

int ConvGeometry::grad_start() const {
  const Sides zeros = split() ? Sides{} : padding;
  return (grad_halo.y + zeros.y - reach().y) * grad_row() + grad_halo.x + zeros.x - reach().x;
}

// Phases follow one another as the taps first read them.
int ConvGeometry::tap_phase(int ky, int kx) const { return ky % used.y * used.x + kx % used.x; }

int ConvGeometry::tap_offset(int ky, int kx) const {
  const Sides at = tap_pixel(ky, kx);
  return tap_phase(ky, kx) * in_plane() + at.y * in_row() + at.x;
}

int ConvGeometry::tap_offset_backward(int ky, int kx) const {
  const Sides at = tap_pixel(ky, kx);
  return (reach().y - at.y) * grad_row() + (reach().x - at.x);
}

ConvShape ConvGeometry::forward_shape(int lanes, int out_row, int out_plane) const {
  ConvShape shape{lanes, out.height, out.width, in_row(), out_row, out_plane};
  if (kernel.area() == 1 && in_row() == out.width && out_row == out.width) {  // one long row
    shape.width = out.height * out.width;
    shape.height = 1;
  }
  return shape;
}

Sides input_halo(const Node& conv) { return is_split(conv.stride) ? Sides{} : conv.padding; }

Sides gradient_halo(const Node& conv, const Shape& in) {
  auto side = [&](int size, int out, int kernel, int stride, int padding, int dilation) {
    const int reach = (kernel - 1) * dilation / stride;
    if (!is_split(conv.stride)) return std::max(0, reach - padding);
    return std::max(reach, phase_side(size, padding, stride) - out);
  };
  return {side(in.height, conv.shape.height, conv.kernel.y, conv.stride.y, conv.padding.y,
               conv.dilation.y),
          side(in.width, conv.shape.width, conv.kernel.x, conv.stride.x, conv.padding.x,
               conv.dilation.x)};
}

}  // namespace fedlean
