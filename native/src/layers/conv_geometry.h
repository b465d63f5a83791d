// A convolution of any stride as one of stride 1: see pattern.h.
#pragma once

#include <cstdint>
#include <vector>

#include "fedlean/kernels.h"
#include "fedlean/layer.h"

namespace fedlean {

struct ConvGeometry {
  ConvGeometry(const Node& node, const Shape& in, int in_halo, int grad_halo);

  bool split() const { return stride > 1; }
  int phases() const { return int(phase_of.size()); }

  Shape in, out;
  int kernel, stride, padding, groups;
  int in_halo, grad_halo;
  // Strided: used phases as (y, x) in row-major order, and the size of one phase's image.
  struct Phase {
    int y, x;
  };
  std::vector<Phase> phase_of;
  int phase_height = 0, phase_width = 0;

  // Forward: reads `in_channels() * in_plane()` pixels with rows of `in_row()`.
  int in_channels() const { return in.channels * phases(); }
  int in_row() const { return split() ? phase_width : in.width + 2 * in_halo; }
  int in_plane() const;
  // Pixels from the panel's start to where tap offsets count from.
  int in_start() const { return split() ? 0 : (in_halo - padding) * (in_row() + 1); }
  // Backward: reads the gradient's panel from `grad_start()` on; writes phase (or input) images.
  int grad_row() const { return out.width + 2 * grad_halo; }
  int grad_plane() const { return grad_row() * (out.height + 2 * grad_halo); }
  int grad_start() const {
    return (grad_halo + (split() ? 0 : padding) - reach()) * (grad_row() + 1);
  }

  // Tap (ky, kx): which phase it reads (0 when not split), and its offsets forward (phase included)
  // and backward.
  int tap_phase(int ky, int kx) const;
  int tap_offset(int ky, int kx) const;
  int tap_offset_backward(int ky, int kx) const;

  ConvShape forward_shape(int lanes, int out_row, int out_plane) const;

private:
  // The furthest that a tap of the stride-1 convolution reaches.
  int reach() const { return split() ? (kernel - 1) / stride : kernel - 1; }
};

}  // namespace fedlean
