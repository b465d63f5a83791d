#include "conv_geometry.h"

#include <algorithm>

namespace fedlean {

ConvGeometry::ConvGeometry(const Node& node, const Shape& in, int in_halo, int grad_halo)
    : in(in),
      out(node.shape),
      kernel(node.kernel),
      stride(node.stride),
      padding(node.padding),
      groups(node.groups),
      in_halo(in_halo),
      grad_halo(grad_halo) {
  const int used = split() ? std::min(stride, kernel) : 1;  // a phase beyond the kernel has no tap
  for (int y = 0; y < used; ++y)
    for (int x = 0; x < used; ++x) phase_of.push_back({y, x});
  phase_height = (in.height + 2 * padding + stride - 1) / stride;
  phase_width = (in.width + 2 * padding + stride - 1) / stride;
}

int ConvGeometry::in_plane() const {
  return split() ? phase_height * phase_width : in_row() * (in.height + 2 * in_halo);
}

int ConvGeometry::tap_phase(int ky, int kx) const {
  return split() ? (ky % stride) * std::min(stride, kernel) + kx % stride : 0;
}

int ConvGeometry::tap_offset(int ky, int kx) const {
  if (!split()) return ky * in_row() + kx;
  return tap_phase(ky, kx) * in_plane() + (ky / stride) * in_row() + kx / stride;
}

int ConvGeometry::tap_offset_backward(int ky, int kx) const {
  const int y = split() ? ky / stride : ky, x = split() ? kx / stride : kx;
  return (reach() - y) * grad_row() + (reach() - x);
}

ConvShape ConvGeometry::forward_shape(int lanes, int out_row, int out_plane) const {
  ConvShape shape{lanes, out.height, out.width, in_row(), out_row, out_plane};
  if (kernel == 1 && in_row() == out.width && out_row == out.width) {  // one long row
    shape.width = out.height * out.width;
    shape.height = 1;
  }
  return shape;
}

int input_halo(const Node& conv) { return conv.stride > 1 ? 0 : conv.padding; }

int gradient_halo(const Node& conv, const Shape& in) {
  if (conv.stride == 1) return std::max(0, conv.kernel - 1 - conv.padding);
  const int height = (in.height + 2 * conv.padding + conv.stride - 1) / conv.stride;
  const int width = (in.width + 2 * conv.padding + conv.stride - 1) / conv.stride;
  return std::max(
      {(conv.kernel - 1) / conv.stride, height - conv.shape.height, width - conv.shape.width});
}

}  // namespace fedlean
