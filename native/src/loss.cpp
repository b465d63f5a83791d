#include "fedlean/loss.h"

#include <algorithm>
#include <cmath>

namespace fedlean {

namespace {

// Logit (gradient) of class c of one example.
struct Example {
  float* at;
  int lanes;
  float& operator[](int c) const { return at[std::size_t(c) * lanes]; }
};

double cross_entropy(const Example& x, int classes, int label, const Example* grad, float share) {
  float top = x[0];
  for (int c = 1; c < classes; ++c) top = std::max(top, x[c]);
  double sum = 0;
  for (int c = 0; c < classes; ++c) {
    const float e = std::exp(x[c] - top);  // in float: it is most of a small network's loss
    sum += e;
    if (grad) (*grad)[c] = e;
  }
  if (grad) {
    const double scale = share / sum;
    for (int c = 0; c < classes; ++c) (*grad)[c] = float((*grad)[c] * scale);
    // Not p - 1, which would round p first.
    (*grad)[label] = float((std::exp(x[label] - top) - sum) * scale);
  }
  return std::log(sum) - (double(x[label]) - top);
}

double binary_cross_entropy(const Example& x, int classes, int label, const Example* grad,
                            float share) {
  double sum = 0;
  for (int c = 0; c < classes; ++c) {
    const double z = x[c], target = c == label;
    sum += std::max(z, 0.0) - z * target + std::log1p(std::exp(-std::fabs(z)));
    if (grad) (*grad)[c] = float((1 / (1 + std::exp(-z)) - target) * share / classes);
  }
  return sum / classes;
}

}  // namespace

double evaluate_loss(Loss loss, const View& logits, const std::int64_t* labels, Batch batch,
                     const View& grad) {
  auto* const one = loss == Loss::kCrossEntropy ? cross_entropy : binary_cross_entropy;
  const int classes = logits.layout.shape.channels;
  const float share = 1.0f / float(batch.examples);
  double sum = 0;
  for (int p = 0; p < batch.panels(); ++p) {
    const int lanes = batch.lanes(p);
    for (int l = 0; l < lanes; ++l) {
      const Example x{logits.panel(p) + l, lanes};
      const Example g{grad ? grad.panel(p) + l : nullptr, lanes};
      if (l < batch.used(p)) {
        sum += one(x, classes, int(labels[p * kPanelLanes + l]), grad ? &g : nullptr, share);
      } else if (grad) {
        for (int c = 0; c < classes; ++c) g[c] = 0;
      }
    }
  }
  return sum / batch.examples;
}

}  // namespace fedlean
