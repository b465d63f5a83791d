// The arithmetic of one thread on one panel, as a table of functions per instruction set.
//
// Everything above (layers, plans, threads) is the same for all tables.  `reference` is written
// naively, in plain scalar code, and is the oracle of the others.  Results of one table do not
// depend on how callers cut ranges of channels, rows or non-zeros: every output is computed whole,
// in one order.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "fedlean/layout.h"
#include "fedlean/pattern.h"

namespace fedlean {

// Output geometry of a convolution of stride 1 and where its operands are.  All in pixels but
// `lanes`.  Output pixel (y, x) of channel o is out[(o*out_plane + y*out_row + x) * lanes]; a
// non-zero with offset f reads in[(chunk + f + y*in_row + x) * lanes].
struct ConvShape {
  int lanes, height, width;
  int in_row, out_row, out_plane;
};

struct GatherArgs {
  ConvShape shape;
  const GatherPattern* pattern;
  const float* value;  // per non-zero
  const float* in;
  float* out;  // interior pixel (0, 0) of channel 0
  const float* bias;  // per output channel, or null
  bool accumulate;  // add to what `out` holds (bias must be null)
  int out_begin, out_end;  // output channels to compute
};

struct SampleArgs {
  ConvShape shape;
  const GatherPattern* pattern;
  const float* in;
  const float* grad;  // of the output; interior pixel (0, 0) of channel 0
  int chunk;
  std::uint32_t row_begin, row_end;  // rows of `row_start`, all within the chunk
  float* sums;  // one per non-zero from row_start[row_begin] on; added to
};

// A dense convolution as one of stride 1: `taps` reads per input channel, tap t at pixel
// tap_offset[t] with the weight at out*weight_out + in*weight_in + tap_weight[t].
struct DenseConv {
  int in_channels, in_plane, taps;
  const std::int32_t* tap_offset;
  const std::int32_t* tap_weight;
  std::ptrdiff_t weight_out, weight_in;
};

struct DenseConvArgs {
  ConvShape shape;
  DenseConv conv;
  const float* weight;
  const float* in;
  float* out;
  const float* bias;
  bool accumulate;
  int out_begin, out_end;
};

struct DenseGradArgs {
  ConvShape shape;
  DenseConv conv;
  const float* in;
  const float* grad;
  float* grad_weight;  // indexed like the weight; added to
  int out_begin, out_end;
};

// Sparse Linear on up to two panels at once (the second may be absent; if it is there, the first
// has 16 lanes).  Which arrays are per column and which per row: see the functions.
struct ColumnArgs {
  const ColumnPattern* pattern;
  const float* value;
  int panels;  // 1 or 2
  int lanes[2];
  const float* columns[2];
  const float* rows[2];
  float* out[2];
};

// Channels of a panel without their halo.  All in pixels: `rows` rows of `width`, `row_step` apart,
// and channels `channel_step` apart.
struct Images {
  const float* first;
  int channels, rows, width;
  std::size_t row_step, channel_step;
};

// Elementwise functions with their settings: the bounds of Hardtanh, in `low` the slope of
// LeakyReLU.
struct Curve {
  enum Name {
    kHardswish,
    kHardsigmoid,
    kLeakyReLU,
    kHardtanh,
    kSigmoid,
    kTanh,
    kSiLU,
    kGELU,
    kGELUTanh
  };
  Name name = kHardswish;
  float low = 0, high = 0;
};

struct Update {  // see fedlean.engine.protocol.SGD
  float lr, momentum, weight_decay, proximal;
};

struct Kernels {
  const char* name;

  // Convolutions.
  void (*gather)(const GatherArgs&);
  void (*sample)(const SampleArgs&);
  void (*dense_conv)(const DenseConvArgs&);
  void (*dense_conv_grad)(const DenseGradArgs&);

  // Linear, sparse; of block `block` and the columns [begin, end) where they are given.
  // out[row] += value * columns[column]
  void (*scatter)(const ColumnArgs&, int block);
  // out[column] += value * rows[row]
  void (*collect)(const ColumnArgs&, int block, int begin, int end);
  // `collect`, unless out is null, and grad_value[k] += <columns[column], rows[row]> over the
  // lanes; grad_value's first element is the first non-zero of (block, begin).
  void (*column_backward)(const ColumnArgs&, int block, int begin, int end, float* grad_value);

  // Linear, dense, on row-major matrices (not panels): X (B, I), Y (B, O), W (O, I), and the
  // gradient of Y transposed (O, B).
  // Y[:, begin:end] = X W[begin:end]^T + bias
  void (*dense_forward)(const float* x, const float* w, const float* bias, float* y, int batch,
                        int inputs, int outputs, int begin, int end);
  // dX[:, begin:end] += dY[row_begin:row_end]^T W[row_begin:row_end, begin:end]
  void (*dense_backward)(const float* grad, const float* w, float* grad_x, int batch, int inputs,
                         int row_begin, int row_end, int begin, int end);
  // out (rows, end - begin) = dY[row:row+rows] X[:, begin:end]
  void (*dense_grad)(const float* grad, const float* x, float* out, int batch, int inputs, int row,
                     int rows, int begin, int end);

  // Optimiser.  velocity (no momentum) and reference (no proximal term) may be null; kept: 0 or 1
  // per weight, or null: where it is 0, velocity becomes 0 and w stays.
  void (*update)(float* w, float* velocity, const float* reference, const float* grad,
                 const std::uint8_t* kept, std::size_t n, const Update&);
  void (*add_squares)(float* sum, const float* grad, std::size_t n);

  // Elementwise on n floats (callers pass whole rows).
  void (*relu)(const float* x, float* y, std::size_t n);
  void (*relu_backward)(const float* y, const float* grad, float* grad_x, std::size_t n);
  void (*curve)(const Curve&, const float* x, float* y, std::size_t n);
  void (*curve_backward)(const Curve&, const float* x, const float* grad, float* grad_x,
                         std::size_t n);
  void (*add)(const float* x, float* y, std::size_t n);  // y += x
  // y (+)= x * factor; y may be x
  void (*multiply)(const float* x, float factor, float* y, std::size_t n, bool accumulate);

  // y[lane + i*lanes] (+)= (x - center[lane]) * scale[lane] + shift[lane] for n pixels; exactly
  // `shift` where x is `center`
  void (*affine)(const float* x, const float* center, const float* scale, const float* shift,
                 float* y, int lanes, int pixels, bool accumulate);
  // y[lane + i*lanes] (+)= a * scale_a[lane] + (b - center[lane]) * scale_b[lane] + shift[lane]
  void (*blend)(const float* a, const float* scale_a, const float* b, const float* center,
                const float* scale_b, const float* shift, float* y, int lanes, int pixels,
                bool accumulate);
  // sums[lane] += sum_i x; products[lane] += sum_i x * (z - center[lane]), over n pixels
  void (*lane_sums)(const float* x, const float* z, const float* center, float* sums,
                    float* products, int lanes, int pixels);
  // sums[c] += the sum of channel c: `rows` rows of n floats (a multiple of 4), `step` apart.
  void (*sum_channels)(const float* x, std::size_t n, int rows, std::size_t step, int channels,
                       std::size_t channel_step, float* sums);
  bool (*all_finite)(const float* x, std::size_t n);
  // to[i*lanes + l] = rows[l][i] for i < n, l < lanes
  void (*interleave)(const float* const* rows, float* to, int lanes, int n);
  // to[c*lanes + l] = values[c], or 0 where values is null
  void (*fill_channels)(const float* values, float* to, int lanes, int channels);
  // sums[lane] += the sum of x - center[lane] over the images
  void (*lane_differences)(const Images& x, const float* center, float* sums, int lanes);
  // squares[lane] += the sum of (x - center[lane])^2 over the images
  void (*lane_squares)(const Images& x, const float* center, float* squares, int lanes);

  // One output row of a pooling window without padding: see pooling.cpp for the general case.
  void (*max_pool_row)(const float* in, float* out, std::uint8_t* winner, int lanes, int in_row,
                       int out_width, Sides kernel, int stride);
  void (*max_unpool_row)(const float* grad, const std::uint8_t* winner, float* grad_in, int lanes,
                         int in_row, int out_width, Sides kernel, int stride);
};

const Kernels& reference_kernels();
// The tables that this processor can run, slowest first; `reference` is always the first.
std::vector<const Kernels*> available_kernels();
// The best table that this processor can run; FEDLEAN_INSTRUCTION_SET forces one.
// Throws std::runtime_error naming the value when there is no such table here.
const Kernels& best_kernels();

}  // namespace fedlean
