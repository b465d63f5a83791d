// How activations lie in memory: batch-innermost panels.
//
// A batch of B examples is cut into panels of 16 lanes (one lane per example); the last panel has
// as many lanes as are left, rounded up to 4.  Each panel is its own array
//     [channel][row][column][lane]   of float,
// with `halo` zero pixels around every image, so that a convolution never asks whether a pixel is
// inside: as many above and below, and as many on the left and on the right.  Lanes beyond B are
// idle: they repeat the last example, so that they overflow only if it does, and their gradients
// are 0, so that sums over all lanes are right.  A vector (F,) is an image of F channels and one
// pixel, a signal (C, L) one of a single row.
#pragma once

#include <cstddef>

namespace fedlean {

constexpr int kPanelLanes = 16;
constexpr int kLaneStep = 4;  // a panel's lanes are a multiple: one 128-bit vector

// Along the columns and the rows of an image: the sides of a window, its steps, zeros around it.
struct Sides {
  int y = 0, x = 0;
  int area() const { return y * x; }
  bool operator==(const Sides& o) const { return y == o.y && x == o.x; }
  bool operator!=(const Sides& o) const { return !(*this == o); }
};
inline Sides larger(Sides a, Sides b) { return {a.y > b.y ? a.y : b.y, a.x > b.x ? a.x : b.x}; }

struct Shape {
  int channels = 0, height = 1, width = 1;
  int rank = 3;  // 3 of an image, 2 of a signal; 1 of a vector, around which no zeros are ever kept
  std::size_t size() const { return std::size_t(channels) * height * width; }
  bool operator==(const Shape& o) const {
    return channels == o.channels && height == o.height && width == o.width && rank == o.rank;
  }
};

// One panel's geometry, in pixels; multiply by the panel's lanes to get floats.
struct Layout {
  Shape shape;
  Sides halo;
  bool bare() const { return halo == Sides{}; }  // all channels are one stretch of memory
  int row() const { return shape.width + 2 * halo.x; }
  int plane() const { return row() * (shape.height + 2 * halo.y); }
  int origin() const { return halo.y * row() + halo.x; }
  std::size_t pixels() const { return std::size_t(shape.channels) * plane(); }
};

struct Batch {
  int examples = 0;
  int panels() const { return (examples + kPanelLanes - 1) / kPanelLanes; }
  // Lanes that hold examples, and lanes that are stored.
  int used(int panel) const {
    int left = examples - panel * kPanelLanes;
    return left < kPanelLanes ? left : kPanelLanes;
  }
  int lanes(int panel) const { return (used(panel) + kLaneStep - 1) / kLaneStep * kLaneStep; }
  int padded() const { return (examples + kLaneStep - 1) / kLaneStep * kLaneStep; }
};

}  // namespace fedlean
