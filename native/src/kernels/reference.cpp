// The oracle of the other tables: every function in plain scalar code, straight from the contract
// in kernels.h, sharing nothing with the vector kernels.  Sums are taken in double.

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "fedlean/kernels.h"

namespace fedlean {
namespace {

void gather(const GatherArgs& a) {
  const ConvShape& s = a.shape;
  const GatherPattern& pattern = *a.pattern;
  for (int o = a.out_begin; o < a.out_end; ++o) {
    for (int y = 0; y < s.height; ++y) {
      for (int x = 0; x < s.width; ++x) {
        const std::ptrdiff_t pixel = std::ptrdiff_t(o) * s.out_plane + y * s.out_row + x;
        float* const out = a.out + pixel * s.lanes;
        double sum[kPanelLanes];
        for (int lane = 0; lane < s.lanes; ++lane)
          sum[lane] = a.accumulate ? out[lane] : a.bias ? a.bias[o] : 0.0f;
        for (const Chunk& chunk : pattern.chunks) {
          if (o < int(chunk.out_begin) || o >= int(chunk.out_end)) continue;
          const std::size_t row = chunk.first_row + (o - chunk.out_begin);
          for (std::uint32_t k = pattern.row_start[row]; k < pattern.row_start[row + 1]; ++k) {
            const std::size_t from =
                std::size_t(chunk.in_pixel) + pattern.offset[k] + std::size_t(y) * s.in_row + x;
            for (int lane = 0; lane < s.lanes; ++lane)
              sum[lane] += double(a.value[k]) * a.in[from * s.lanes + lane];
          }
        }
        for (int lane = 0; lane < s.lanes; ++lane) out[lane] = float(sum[lane]);
      }
    }
  }
}

void sample(const SampleArgs& a) {
  const ConvShape& s = a.shape;
  const GatherPattern& pattern = *a.pattern;
  const Chunk& chunk = pattern.chunks[a.chunk];
  for (std::uint32_t row = a.row_begin; row < a.row_end; ++row) {
    const std::size_t o = chunk.out_begin + (row - chunk.first_row);
    for (std::uint32_t k = pattern.row_start[row]; k < pattern.row_start[row + 1]; ++k) {
      double sum = 0;
      for (int y = 0; y < s.height; ++y) {
        for (int x = 0; x < s.width; ++x) {
          const std::size_t from =
              std::size_t(chunk.in_pixel) + pattern.offset[k] + std::size_t(y) * s.in_row + x;
          const std::size_t to = o * s.out_plane + std::size_t(y) * s.out_row + x;
          for (int lane = 0; lane < s.lanes; ++lane)
            sum += double(a.grad[to * s.lanes + lane]) * a.in[from * s.lanes + lane];
        }
      }
      float& to = a.sums[k - pattern.row_start[a.row_begin]];
      to = float(to + sum);
    }
  }
}

// Pixel of the input that tap t of input channel c reads for output pixel (y, x).
std::ptrdiff_t input_pixel(const DenseConv& conv, const ConvShape& s, int c, int t, int y, int x) {
  return std::ptrdiff_t(c) * conv.in_plane + conv.tap_offset[t] + std::ptrdiff_t(y) * s.in_row + x;
}

std::ptrdiff_t weight_index(const DenseConv& conv, int o, int c, int t) {
  return o * conv.weight_out + c * conv.weight_in + conv.tap_weight[t];
}

void dense_conv(const DenseConvArgs& a) {
  const ConvShape& s = a.shape;
  for (int o = a.out_begin; o < a.out_end; ++o) {
    for (int y = 0; y < s.height; ++y) {
      for (int x = 0; x < s.width; ++x) {
        const std::ptrdiff_t pixel = std::ptrdiff_t(o) * s.out_plane + y * s.out_row + x;
        float* const out = a.out + pixel * s.lanes;
        double sum[kPanelLanes];
        for (int lane = 0; lane < s.lanes; ++lane)
          sum[lane] = a.accumulate ? out[lane] : a.bias ? a.bias[o] : 0.0f;
        for (int c = 0; c < a.conv.in_channels; ++c) {
          for (int t = 0; t < a.conv.taps; ++t) {
            const double w = a.weight[weight_index(a.conv, o, c, t)];
            const float* const in = a.in + input_pixel(a.conv, s, c, t, y, x) * s.lanes;
            for (int lane = 0; lane < s.lanes; ++lane) sum[lane] += w * in[lane];
          }
        }
        for (int lane = 0; lane < s.lanes; ++lane) out[lane] = float(sum[lane]);
      }
    }
  }
}

void dense_conv_grad(const DenseGradArgs& a) {
  const ConvShape& s = a.shape;
  for (int o = a.out_begin; o < a.out_end; ++o) {
    for (int c = 0; c < a.conv.in_channels; ++c) {
      for (int t = 0; t < a.conv.taps; ++t) {
        double sum = 0;
        for (int y = 0; y < s.height; ++y) {
          for (int x = 0; x < s.width; ++x) {
            const float* const in = a.in + input_pixel(a.conv, s, c, t, y, x) * s.lanes;
            const std::ptrdiff_t pixel = std::ptrdiff_t(o) * s.out_plane + y * s.out_row + x;
            const float* const grad = a.grad + pixel * s.lanes;
            for (int lane = 0; lane < s.lanes; ++lane) sum += double(grad[lane]) * in[lane];
          }
        }
        float& to = a.grad_weight[weight_index(a.conv, o, c, t)];
        to = float(to + sum);
      }
    }
  }
}

void scatter(const ColumnArgs& a, int block) {
  const ColumnPattern& pattern = *a.pattern;
  const int first = block * pattern.block_rows;
  const int rows =
      pattern.rows - first < pattern.block_rows ? pattern.rows - first : pattern.block_rows;
  for (int panel = 0; panel < a.panels; ++panel) {
    const std::size_t lanes = a.lanes[panel];
    std::vector<double> sums(rows * lanes, 0.0);
    for (int i = 0; i < pattern.columns; ++i) {
      const std::size_t cell = std::size_t(block) * pattern.columns + i;
      for (std::uint32_t k = pattern.start[cell]; k < pattern.start[cell + 1]; ++k)
        for (std::size_t lane = 0; lane < lanes; ++lane)
          sums[pattern.row[k] * lanes + lane] +=
              double(a.value[k]) * a.columns[panel][i * lanes + lane];
    }
    float* const out = a.out[panel] + first * lanes;
    for (std::size_t i = 0; i < sums.size(); ++i) out[i] = float(out[i] + sums[i]);
  }
}

void collect(const ColumnArgs& a, int block, int begin, int end) {
  const ColumnPattern& pattern = *a.pattern;
  const std::size_t cells = std::size_t(block) * pattern.columns;
  const std::size_t first = std::size_t(block) * pattern.block_rows;
  for (int panel = 0; panel < a.panels; ++panel) {
    const std::size_t lanes = a.lanes[panel];
    for (int c = begin; c < end; ++c) {
      for (std::size_t lane = 0; lane < lanes; ++lane) {
        double sum = a.out[panel][c * lanes + lane];
        for (std::uint32_t k = pattern.start[cells + c]; k < pattern.start[cells + c + 1]; ++k)
          sum += double(a.value[k]) * a.rows[panel][(first + pattern.row[k]) * lanes + lane];
        a.out[panel][c * lanes + lane] = float(sum);
      }
    }
  }
}

void column_backward(const ColumnArgs& a, int block, int begin, int end, float* grad_value) {
  const ColumnPattern& pattern = *a.pattern;
  const std::size_t cells = std::size_t(block) * pattern.columns;
  const std::size_t first = std::size_t(block) * pattern.block_rows;
  for (int c = begin; c < end; ++c) {
    for (std::uint32_t k = pattern.start[cells + c]; k < pattern.start[cells + c + 1]; ++k) {
      double sum = 0;
      for (int panel = 0; panel < a.panels; ++panel) {
        const std::size_t lanes = a.lanes[panel];
        const float* const row = a.rows[panel] + (first + pattern.row[k]) * lanes;
        for (std::size_t lane = 0; lane < lanes; ++lane)
          sum += double(row[lane]) * a.columns[panel][c * lanes + lane];
      }
      float& to = grad_value[k - pattern.start[cells + begin]];
      to = float(to + sum);
    }
  }
  if (a.out[0]) collect(a, block, begin, end);
}

void dense_forward(const float* x, const float* w, const float* bias, float* y, int batch,
                   int inputs, int outputs, int begin, int end) {
  for (std::size_t b = 0; b < std::size_t(batch); ++b) {
    for (std::size_t o = begin; o < std::size_t(end); ++o) {
      double sum = bias ? bias[o] : 0.0f;
      for (int i = 0; i < inputs; ++i) sum += double(x[b * inputs + i]) * w[o * inputs + i];
      y[b * outputs + o] = float(sum);
    }
  }
}

// Rounds after every row, so that the result does not depend on how the rows are cut.
void dense_backward(const float* grad, const float* w, float* grad_x, int batch, int inputs,
                    int row_begin, int row_end, int begin, int end) {
  for (std::size_t b = 0; b < std::size_t(batch); ++b) {
    for (std::size_t i = begin; i < std::size_t(end); ++i) {
      float sum = grad_x[b * inputs + i];
      for (std::size_t o = row_begin; o < std::size_t(row_end); ++o)
        sum = float(sum + double(grad[o * batch + b]) * w[o * inputs + i]);
      grad_x[b * inputs + i] = sum;
    }
  }
}

void dense_grad(const float* grad, const float* x, float* out, int batch, int inputs, int row,
                int rows, int begin, int end) {
  const std::size_t width = end - begin;
  for (std::size_t r = 0; r < std::size_t(rows); ++r) {
    for (std::size_t i = 0; i < width; ++i) {
      double sum = 0;
      for (std::size_t b = 0; b < std::size_t(batch); ++b)
        sum += double(grad[(row + r) * batch + b]) * x[b * inputs + begin + i];
      out[r * width + i] = float(sum);
    }
  }
}

void update(float* w, float* velocity, const float* reference, const float* grad,
            const std::uint8_t* kept, std::size_t n, const Update& u) {
  for (std::size_t i = 0; i < n; ++i) {
    if (kept && !kept[i]) {
      if (velocity) velocity[i] = 0;
      continue;
    }
    double v = grad[i] + double(u.weight_decay) * w[i];
    if (reference) v += double(u.proximal) * (double(w[i]) - reference[i]);
    if (velocity) {
      v += double(u.momentum) * velocity[i];
      velocity[i] = float(v);
    }
    w[i] = float(w[i] - u.lr * v);
  }
}

void add_squares(float* sum, const float* grad, std::size_t n) {
  for (std::size_t i = 0; i < n; ++i) sum[i] = float(sum[i] + double(grad[i]) * grad[i]);
}

// min(max(x + 3, 0), 6); NaN stays NaN.
double gate(double x) { return x < -3 ? 0.0 : x > 3 ? 6.0 : x + 3; }

void relu(const float* x, float* y, std::size_t n) {
  for (std::size_t i = 0; i < n; ++i) y[i] = x[i] < 0 ? 0.0f : x[i];
}
void relu_backward(const float* y, const float* grad, float* grad_x, std::size_t n) {
  for (std::size_t i = 0; i < n; ++i) grad_x[i] = y[i] > 0 ? grad[i] : 0.0f;
}
// What a curve and its derivative are at x, in double.
struct Point {
  double value, slope;
};
Point curve_at(const Curve& curve, double x) {
  constexpr double root = 0.70710678118654752440;  // of 1/2
  constexpr double inner = 0.79788456080286535588;  // the root of 2/pi
  const double sigmoid = 1 / (1 + std::exp(-x));
  switch (curve.name) {
    case Curve::kHardswish:
      return {x * gate(x) / 6, x <= -3 ? 0.0 : x < 3 ? x / 3 + 0.5 : 1.0};
    case Curve::kHardsigmoid:
      return {gate(x) / 6, x > -3 && x < 3 ? 1.0 / 6 : 0.0};
    case Curve::kLeakyReLU:
      return {x > 0 ? x : x * curve.low, x > 0 ? 1.0 : curve.low};
    case Curve::kHardtanh:
      return {x < curve.low    ? curve.low
              : x > curve.high ? curve.high
                               : x,
              x > curve.low && x < curve.high ? 1.0 : 0.0};
    case Curve::kSigmoid:
      return {sigmoid, sigmoid * (1 - sigmoid)};
    case Curve::kTanh:
      return {std::tanh(x), 1 - std::tanh(x) * std::tanh(x)};
    case Curve::kSiLU:
      return {x * sigmoid, sigmoid * (1 + x * (1 - sigmoid))};
    case Curve::kGELU: {
      const double below = 0.5 * (1 + std::erf(x * root));
      return {x * below, below + 0.5 * inner * x * std::exp(-0.5 * x * x)};
    }
    case Curve::kGELUTanh: {
      const double t = std::tanh(inner * (x + 0.044715 * x * x * x));
      const double rise = inner * (1 + 3 * 0.044715 * x * x);
      return {0.5 * x * (1 + t), 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * rise};
    }
  }
  return {};
}
void curve(const Curve& of, const float* x, float* y, std::size_t n) {
  for (std::size_t i = 0; i < n; ++i) y[i] = float(curve_at(of, x[i]).value);
}
void curve_backward(const Curve& of, const float* x, const float* grad, float* grad_x,
                    std::size_t n) {
  for (std::size_t i = 0; i < n; ++i) grad_x[i] = float(grad[i] * curve_at(of, x[i]).slope);
}
void add(const float* x, float* y, std::size_t n) {
  for (std::size_t i = 0; i < n; ++i) y[i] += x[i];
}
void multiply(const float* x, float factor, float* y, std::size_t n, bool accumulate) {
  for (std::size_t i = 0; i < n; ++i) y[i] = (accumulate ? y[i] : 0.0f) + x[i] * factor;
}

void affine(const float* x, const float* center, const float* scale, const float* shift, float* y,
            int lanes, int pixels, bool accumulate) {
  for (std::size_t i = 0; i < std::size_t(pixels) * lanes; ++i) {
    const int lane = int(i % lanes);
    const double moved = (double(x[i]) - center[lane]) * scale[lane] + shift[lane];
    y[i] = float(accumulate ? y[i] + moved : moved);
  }
}

void blend(const float* a, const float* scale_a, const float* b, const float* center,
           const float* scale_b, const float* shift, float* y, int lanes, int pixels,
           bool accumulate) {
  for (std::size_t i = 0; i < std::size_t(pixels) * lanes; ++i) {
    const int lane = int(i % lanes);
    const double mixed =
        double(a[i]) * scale_a[lane] + (double(b[i]) - center[lane]) * scale_b[lane] + shift[lane];
    y[i] = float(accumulate ? y[i] + mixed : mixed);
  }
}

void lane_sums(const float* x, const float* z, const float* center, float* sums, float* products,
               int lanes, int pixels) {
  for (int lane = 0; lane < lanes; ++lane) {
    double sum = sums[lane], product = products[lane];
    for (std::size_t i = 0; i < std::size_t(pixels); ++i) {
      sum += x[i * lanes + lane];
      product += x[i * lanes + lane] * (double(z[i * lanes + lane]) - center[lane]);
    }
    sums[lane] = float(sum);
    products[lane] = float(product);
  }
}

void sum_channels(const float* x, std::size_t n, int rows, std::size_t step, int channels,
                  std::size_t channel_step, float* sums) {
  for (int c = 0; c < channels; ++c) {
    double sum = sums[c];
    for (int row = 0; row < rows; ++row)
      for (std::size_t i = 0; i < n; ++i) sum += x[c * channel_step + row * step + i];
    sums[c] = float(sum);
  }
}

bool all_finite(const float* x, std::size_t n) {
  for (std::size_t i = 0; i < n; ++i)
    if (!std::isfinite(x[i])) return false;
  return true;
}

void interleave(const float* const* rows, float* to, int lanes, int n) {
  for (int i = 0; i < n; ++i)
    for (int lane = 0; lane < lanes; ++lane) to[std::size_t(i) * lanes + lane] = rows[lane][i];
}

void fill_channels(const float* values, float* to, int lanes, int channels) {
  for (int c = 0; c < channels; ++c)
    std::fill_n(to + std::size_t(c) * lanes, lanes, values ? values[c] : 0.0f);
}

// sums[lane] += the sum of term(x - center[lane])
template <typename F>
void sum_images(const Images& x, const float* center, float* sums, int lanes, F&& term) {
  for (int lane = 0; lane < lanes; ++lane) {
    double sum = sums[lane];
    for (int c = 0; c < x.channels; ++c)
      for (int r = 0; r < x.rows; ++r)
        for (int i = 0; i < x.width; ++i) {
          const std::size_t pixel = c * x.channel_step + r * x.row_step + i;
          sum += term(double(x.first[pixel * lanes + lane]) - center[lane]);
        }
    sums[lane] = float(sum);
  }
}
void lane_differences(const Images& x, const float* center, float* sums, int lanes) {
  sum_images(x, center, sums, lanes, [](double d) { return d; });
}
void lane_squares(const Images& x, const float* center, float* squares, int lanes) {
  sum_images(x, center, squares, lanes, [](double d) { return d * d; });
}

// Of equal pixels the first wins; of NaNs, which win over all others, the last (as in PyTorch).
void max_pool_row(const float* in, float* out, std::uint8_t* winner, int lanes, int in_row,
                  int out_width, Sides kernel, int stride) {
  for (int x = 0; x < out_width; ++x) {
    for (int lane = 0; lane < lanes; ++lane) {
      float best = in[std::size_t(x) * stride * lanes + lane];
      int which = 0;
      for (int ky = 0; ky < kernel.y; ++ky) {
        for (int kx = 0; kx < kernel.x; ++kx) {
          const std::size_t pixel = std::size_t(ky) * in_row + x * stride + kx;
          const float value = in[pixel * lanes + lane];
          if (value > best || value != value) {
            best = value;
            which = ky * kernel.x + kx;
          }
        }
      }
      out[std::size_t(x) * lanes + lane] = best;
      if (winner) winner[std::size_t(x) * lanes + lane] = std::uint8_t(which);
    }
  }
}

void max_unpool_row(const float* grad, const std::uint8_t* winner, float* grad_in, int lanes,
                    int in_row, int out_width, Sides kernel, int stride) {
  for (int x = 0; x < out_width; ++x) {
    for (int ky = 0; ky < kernel.y; ++ky) {
      for (int kx = 0; kx < kernel.x; ++kx) {
        const std::size_t pixel = std::size_t(ky) * in_row + x * stride + kx;
        for (int lane = 0; lane < lanes; ++lane) {
          const std::size_t from = std::size_t(x) * lanes + lane;
          grad_in[pixel * lanes + lane] = winner[from] == ky * kernel.x + kx ? grad[from] : 0.0f;
        }
      }
    }
  }
}

}  // namespace

extern const Kernels reference_table;
const Kernels reference_table = {
    "reference",
    gather,
    sample,
    dense_conv,
    dense_conv_grad,
    scatter,
    collect,
    column_backward,
    dense_forward,
    dense_backward,
    dense_grad,
    update,
    add_squares,
    relu,
    relu_backward,
    curve,
    curve_backward,
    add,
    multiply,
    affine,
    blend,
    lane_sums,
    sum_channels,
    all_finite,
    interleave,
    fill_channels,
    lane_differences,
    lane_squares,
    max_pool_row,
    max_unpool_row,
};

}  // namespace fedlean
