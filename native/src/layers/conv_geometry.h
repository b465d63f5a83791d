// A convolution of any stride as one of stride 1: see pattern.h.
#pragma once

#include <cstdint>
#include <vector>

#include "fedlean/kernels.h"
#include "fedlean/layer.h"

namespace fedlean {

struct ConvGeometry {
  ConvGeometry(const Node& node, const Shape& in, Sides in_halo, Sides grad_halo);

  bool split() const;
  int phases() const { return int(phase_of.size()); }

  Shape in, out;
  Sides kernel, stride, padding, dilation;
  int groups;
  Sides in_halo, grad_halo;
  // Strided: how many phases of each side have a tap, where each is in the padded input, and the
  // size of one phase's image.
  Sides used;
  std::vector<Sides> phase_of;
  int phase_height = 0, phase_width = 0;

  // Forward: reads `in_channels() * in_plane()` pixels with rows of `in_row()`.
  int in_channels() const { return in.channels * phases(); }
  int in_row() const { return split() ? phase_width : in.width + 2 * in_halo.x; }
  int in_plane() const;
  // Pixels from the panel's start to where tap offsets count from.
  int in_start() const;
  // Backward: reads the gradient's panel from `grad_start()` on; writes phase (or input) images.
  int grad_row() const { return out.width + 2 * grad_halo.x; }
  int grad_plane() const { return grad_row() * (out.height + 2 * grad_halo.y); }
  int grad_start() const;

  // Tap (ky, kx): which phase it reads (0 when not split), and its offsets forward (phase included)
  // and backward.
  int tap_phase(int ky, int kx) const;
  int tap_offset(int ky, int kx) const;
  int tap_offset_backward(int ky, int kx) const;

  ConvShape forward_shape(int lanes, int out_row, int out_plane) const;

private:
  // Of the stride-1 convolution: where a tap reads, and the furthest that one does.
  Sides tap_pixel(int ky, int kx) const {
    return {ky * dilation.y / stride.y, kx * dilation.x / stride.x};
  }
  Sides reach() const { return tap_pixel(kernel.y - 1, kernel.x - 1); }
};

}  // namespace fedlean
