// GroupNorm and BatchNorm: statistics in two passes (mean, then squares around it), then one scale
// and shift of x - mean per channel and lane.
//
// Where all inputs are one value, as in a channel without weights, 1 / sqrt(eps) would amplify a
// rounding of the mean, and what is noise would pass a ReLU.  So the mean is summed as differences
// to one of the inputs: it is then that value exactly, and the output exactly the bias.

#include <cmath>
#include <cstring>

#include "fedlean/layer.h"

namespace fedlean {

namespace {

struct Lanes {
  float v[kPanelLanes] = {};
  operator float*() { return v; }
};

Lanes filled(float value) {
  Lanes lanes;
  for (float& v : lanes.v) v = value;
  return lanes;
}

class Norm : public Layer {
public:
  Norm(const Node& node, const Shape& in) : Layer(node), shape_(in) {}

  std::size_t stored(Slot slot) const override {
    return slot == kWeight || slot == kBias ? shape_.channels : 0;
  }

protected:
  int pixels() const { return shape_.height * shape_.width; }

  // Row y of channel c.
  static float* row(const View& v, int p, int lanes, int c, int y) {
    return v.interior(p, lanes) +
           (std::size_t(c) * v.layout.plane() + std::size_t(y) * v.layout.row()) * lanes;
  }
  // The channels [begin, end) of the input.
  static Images images(const Pass& pass, int p, int begin, int end) {
    const Layout& in = pass.in[0].layout;
    return {row(pass.in[0], p, pass.lanes(p), begin, 0),
            end - begin,
            in.shape.height,
            in.shape.width,
            std::size_t(in.row()),
            std::size_t(in.plane())};
  }
  // sums += dY, products += dY * (x - center)
  static void add_products(const Pass& pass, int p, int c, Lanes& center, Lanes& sums,
                           Lanes& products) {
    const int lanes = pass.lanes(p);
    for_rows(pass.grad_out, pass.in[0], p, lanes, c, c + 1,
             [&](const float* g, const float* x, std::size_t n) {
               pass.kernels.lane_sums(g, x, center, sums, products, lanes, int(n / lanes));
             });
  }
  // to (+)= (from - center) * scale + shift, all per lane
  static void scale_channel(const Pass& pass, const View& from, const View& to, int p, int c,
                            Lanes& center, Lanes& scale, Lanes& shift, bool accumulate) {
    const int lanes = pass.lanes(p);
    for_rows(from, to, p, lanes, c, c + 1, [&](const float* x, float* y, std::size_t n) {
      pass.kernels.affine(x, center, scale, shift, y, lanes, int(n / lanes), accumulate);
    });
  }
  // dX (+)= dY * scale_grad + (x - mean) * scale_in + shift, all per lane
  static void blend_channel(const Pass& pass, int p, int c, Lanes& scale_grad, Lanes& mean,
                            Lanes& scale_in, Lanes& shift) {
    const int lanes = pass.lanes(p);
    const View &grad = pass.grad_out, &in = pass.in[0], &to = pass.grad_in[0];
    const int height = in.layout.shape.height, width = in.layout.shape.width;
    for (int y = 0; y < height; ++y)
      pass.kernels.blend(row(grad, p, lanes, c, y), scale_grad, row(in, p, lanes, c, y), mean,
                         scale_in, shift, row(to, p, lanes, c, y), lanes, width,
                         pass.accumulate[0]);
  }
  // One channel's gradients of scale and shift.
  void take(Pass& pass, int c, float weight_grad, float bias_grad) {
    for (Slot slot : {kWeight, kBias}) {
      const float g = slot == kWeight ? weight_grad : bias_grad;
      tensors[slot].take_all(pass.kernels, pass.sink, c, &g, 1);
      tensors[slot].take(pass.kernels, pass.sink, c, &g, 1);
    }
  }

  const Shape shape_;
};

class GroupNorm : public Norm {
public:
  GroupNorm(const Node& node, const Shape& in) : Norm(node, in) {}

  bool reads_input() const override { return true; }

  Needs needs(const Situation& s) const override {
    Needs needs;
    if (s.training) needs.saved = std::size_t(2) * node.groups * s.panels * kPanelLanes;
    needs.backward_scratch = std::size_t(2) * s.threads * (shape_.channels / node.groups);
    return needs;
  }

  void forward(Pass& pass) override {
    const int per_group = shape_.channels / node.groups;
    const float count = float(per_group) * float(pixels());
    const float *const weight = value(pass, kWeight), *const bias = value(pass, kBias);
    pass.split(node.groups, [&](int, int begin, int end) {
      for (int group = begin; group < end; ++group) {
        for (int p = pass.panel_begin; p < pass.panel_end; ++p) {
          const int first = group * per_group;
          const Images x = images(pass, p, first, first + per_group);
          Lanes mean = means(pass, x, pass.lanes(p), count), squares, inverse;
          pass.kernels.lane_squares(x, mean, squares, pass.lanes(p));
          for (int l = 0; l < kPanelLanes; ++l)
            inverse[l] = 1.0f / std::sqrt(squares[l] / count + node.eps);
          for (int c = first; c < first + per_group; ++c) {
            Lanes scale, shift;
            for (int l = 0; l < kPanelLanes; ++l) {
              scale[l] = inverse[l] * weight[c];
              shift[l] = bias[c];
            }
            scale_channel(pass, pass.in[0], pass.out, p, c, mean, scale, shift, false);
          }
          if (!pass.saved) continue;
          float* const at = saved(pass, group, p);
          std::memcpy(at, mean.v, sizeof mean.v);
          std::memcpy(at + kPanelLanes, inverse.v, sizeof inverse.v);
        }
      }
    });
  }

  void backward(Pass& pass) override {
    const int per_group = shape_.channels / node.groups;
    const float count = float(per_group) * float(pixels());
    pass.split(node.groups, [&](int thread, int begin, int end) {
      float* const weight_grad = pass.scratch + std::size_t(2) * thread * per_group;
      float* const bias_grad = weight_grad + per_group;
      for (int group = begin; group < end; ++group) {
        const int first = group * per_group;
        std::memset(weight_grad, 0, 2 * per_group * sizeof(float));
        for (int p = pass.panel_begin; p < pass.panel_end; ++p) {
          Lanes mean, inverse, sum, product;
          std::memcpy(mean.v, saved(pass, group, p), sizeof mean.v);
          std::memcpy(inverse.v, saved(pass, group, p) + kPanelLanes, sizeof inverse.v);
          for (int i = 0; i < per_group; ++i) {
            Lanes sums, products;
            add_products(pass, p, first + i, mean, sums, products);
            const float weight = tensors[kWeight].value[first + i];
            for (int l = 0; l < pass.batch.used(p); ++l) {
              weight_grad[i] += products[l] * inverse[l];
              bias_grad[i] += sums[l];
              sum[l] += weight * sums[l];
              product[l] += weight * products[l];
            }
          }
          if (!pass.grad_in[0]) continue;
          for (int i = 0; i < per_group; ++i)
            input_gradient(pass, p, first + i, count, mean, inverse, sum, product);
        }
        for (int i = 0; i < per_group; ++i) take(pass, first + i, weight_grad[i], bias_grad[i]);
      }
    });
  }

private:
  // Of the `count` values of each lane.
  static Lanes means(const Pass& pass, const Images& x, int lanes, float count) {
    Lanes reference, sums, mean;
    std::memcpy(reference.v, x.first, lanes * sizeof(float));
    pass.kernels.lane_differences(x, reference, sums, lanes);
    for (int l = 0; l < lanes; ++l) mean[l] = reference[l] + sums[l] / count;
    return mean;
  }
  void input_gradient(Pass& pass, int p, int c, float count, Lanes& mean, Lanes& inverse,
                      Lanes& sum, Lanes& product) {
    Lanes scale_grad, scale_in, shift;
    for (int l = 0; l < pass.batch.used(p); ++l) {  // idle lanes get no gradient
      const float i = inverse[l];
      scale_grad[l] = i * tensors[kWeight].value[c];
      scale_in[l] = -i * i * i * product[l] / count;
      shift[l] = -i * sum[l] / count;
    }
    blend_channel(pass, p, c, scale_grad, mean, scale_in, shift);
  }
  float* saved(const Pass& pass, int group, int p) const {
    return pass.saved +
           std::size_t(2 * kPanelLanes) * (std::size_t(group) * pass.batch.panels() + p);
  }
};

class BatchNorm : public Norm {
public:
  BatchNorm(const Node& node, const Shape& in) : Norm(node, in) {}

  std::size_t stored(Slot) const override { return shape_.channels; }

  bool reads_input() const override { return tensors[kWeight].trainable || mixes_examples(); }
  bool mixes_examples() const override { return tensors[kRunningMean].trainable; }

  Needs needs(const Situation& s) const override {
    Needs needs;
    if (s.training) needs.saved = std::size_t(2) * shape_.channels;
    return needs;
  }

  void forward(Pass& pass) override {
    const bool batch = pass.training && mixes_examples();
    const float *const weight = value(pass, kWeight), *const bias = value(pass, kBias);
    pass.split(shape_.channels, [&](int, int begin, int end) {
      for (int c = begin; c < end; ++c) {
        float mean = tensors[kRunningMean].value[c], var = tensors[kRunningVar].value[c];
        if (batch) statistics(pass, c, mean, var);
        const float inverse = 1.0f / std::sqrt(var + node.eps);
        if (pass.saved) {
          pass.saved[2 * c] = mean;
          pass.saved[2 * c + 1] = inverse;
        }
        Lanes center = filled(mean), scale = filled(inverse * weight[c]), shift = filled(bias[c]);
        for (int p = pass.panel_begin; p < pass.panel_end; ++p)
          scale_channel(pass, pass.in[0], pass.out, p, c, center, scale, shift, false);
      }
    });
  }

  void backward(Pass& pass) override {
    const bool batch = mixes_examples();
    const float count = float(pass.batch.examples) * float(pixels());
    pass.split(shape_.channels, [&](int, int begin, int end) {
      for (int c = begin; c < end; ++c) {
        const float mean = pass.saved[2 * c], inverse = pass.saved[2 * c + 1];
        float sum = 0, product = 0;
        if (batch || any_trainable()) products_of(pass, c, mean, sum, product);
        if (pass.grad_in[0])
          input_gradient(pass, c, mean, inverse, batch ? sum / count : 0,
                         batch ? product / count : 0);
        take(pass, c, product * inverse, sum);
      }
    });
  }

private:
  void statistics(Pass& pass, int c, float& mean, float& var) {
    const double count = double(pass.batch.examples) * pixels();
    double sum = 0, square = 0;
    const float reference = *images(pass, pass.panel_begin, c, c + 1).first;
    Lanes center = filled(reference);
    for (int p = pass.panel_begin; p < pass.panel_end; ++p) {
      Lanes sums;
      pass.kernels.lane_differences(images(pass, p, c, c + 1), center, sums, pass.lanes(p));
      for (int l = 0; l < pass.batch.used(p); ++l) sum += sums[l];
    }
    mean = float(reference + sum / count);
    center = filled(mean);
    for (int p = pass.panel_begin; p < pass.panel_end; ++p) {
      Lanes squares;
      pass.kernels.lane_squares(images(pass, p, c, c + 1), center, squares, pass.lanes(p));
      for (int l = 0; l < pass.batch.used(p); ++l) square += squares[l];
    }
    var = float(square / count);
    float& running_mean = tensors[kRunningMean].value[c];
    float& running_var = tensors[kRunningVar].value[c];
    running_mean += node.momentum * (mean - running_mean);
    running_var += node.momentum * (float(square / (count - 1)) - running_var);
  }

  static void products_of(const Pass& pass, int c, float mean, float& sum, float& product) {
    Lanes center = filled(mean);
    for (int p = pass.panel_begin; p < pass.panel_end; ++p) {
      Lanes sums, products;
      add_products(pass, p, c, center, sums, products);
      for (int l = 0; l < pass.batch.used(p); ++l) sum += sums[l], product += products[l];
    }
  }

  void input_gradient(Pass& pass, int c, float mean, float inverse, float mean_grad,
                      float mean_product) {
    const float weight = inverse * tensors[kWeight].value[c];
    for (int p = pass.panel_begin; p < pass.panel_end; ++p) {
      Lanes scale_grad, center, scale_in, shift;
      for (int l = 0; l < pass.batch.used(p); ++l) {
        scale_grad[l] = weight;
        center[l] = mean;
        scale_in[l] = -weight * inverse * inverse * mean_product;
        shift[l] = -weight * mean_grad;
      }
      if (mixes_examples()) {
        blend_channel(pass, p, c, scale_grad, center, scale_in, shift);
      } else {
        Lanes zero;
        scale_channel(pass, pass.grad_out, pass.grad_in[0], p, c, zero, scale_grad, shift,
                      pass.accumulate[0]);
      }
    }
  }
};

}  // namespace

std::unique_ptr<Layer> make_norm(const Node& node, const Shape& in) {
  if (node.kind == Kind::kGroupNorm) return std::make_unique<GroupNorm>(node, in);
  return std::make_unique<BatchNorm>(node, in);
}

}  // namespace fedlean
