// Elementwise functions and the optimiser: every table against the reference, and all of them
// against values by hand.
#include <iterator>

#include "buffers.h"

namespace fedlean {
namespace {

constexpr Curve kCurves[] = {{Curve::kHardswish},
                             {Curve::kHardsigmoid},
                             {Curve::kLeakyReLU, 0.25f},
                             {Curve::kHardtanh, -1, 3},
                             {Curve::kSigmoid},
                             {Curve::kTanh},
                             {Curve::kSiLU},
                             {Curve::kGELU},
                             {Curve::kGELUTanh}};

void value_of(const Kernels& kernels, const Curve* curve, const float* x, float* y, std::size_t n) {
  curve ? kernels.curve(*curve, x, y, n) : kernels.relu(x, y, n);
}
void slope_of(const Kernels& kernels, const Curve* curve, const float* x, const float* grad,
              float* grad_x, std::size_t n) {
  curve ? kernels.curve_backward(*curve, x, grad, grad_x, n)
        : kernels.relu_backward(x, grad, grad_x, n);
}

// To the bit; NaNs may differ in sign.
bool alike(float a, float b) {
  return std::isnan(a) ? std::isnan(b) : std::memcmp(&a, &b, sizeof a) == 0;
}

void check_activation(const Curve* curve, std::size_t n, Random& random) {
  check_context =
      "activation " + std::to_string(curve ? curve->name : -1) + " of " + std::to_string(n);
  const Floats x = awkward_floats(n, random), grad = random_floats(n, random), before(n);
  Floats want = before, want_grad = before;
  value_of(reference_kernels(), curve, x.data(), want.data(), n);
  slope_of(reference_kernels(), curve, x.data(), grad.data(), want_grad.data(), n);
  for (const Kernels* kernels : available_kernels()) {
    Floats y = before, grad_x = before, y_in_place = x, grad_in_place = grad;
    value_of(*kernels, curve, x.data(), y.data(), n);
    value_of(*kernels, curve, y_in_place.data(), y_in_place.data(), n);
    slope_of(*kernels, curve, x.data(), grad.data(), grad_x.data(), n);
    slope_of(*kernels, curve, x.data(), grad_in_place.data(), grad_in_place.data(), n);
    check_result(y, want, before, everywhere, 1);  // 1 + tanh, for one, cancels
    check_result(grad_x, want_grad, before, everywhere, 1);
    CHECK(y.same_bits(y_in_place) && grad_x.same_bits(grad_in_place));
    Floats parts = before, grad_parts = before;  // results do not depend on how a range is cut
    const std::vector<int> cuts = random_cuts(0, int(n), random);
    for (std::size_t i = 1; i < cuts.size(); ++i) {
      const int at = cuts[i - 1], count = cuts[i] - at;
      value_of(*kernels, curve, x.data() + at, parts.data() + at, count);
      slope_of(*kernels, curve, x.data() + at, grad.data() + at, grad_parts.data() + at, count);
    }
    for (std::size_t i = 0; i < n; ++i)
      CHECK(alike(y[i], parts[i]) && alike(grad_x[i], grad_parts[i]));
  }
}

// Each table is near the exact function everywhere, also where it is small.
void check_accuracy() {
  constexpr int n = 40000;
  Floats x(n), ones(n), results[2] = {Floats(n), Floats(n)};
  for (int i = 0; i < n; ++i) x[i] = (i - n / 2) * 5e-4f, ones[i] = 1;
  for (const Curve& curve : kCurves) {
    for (const Kernels* kernels : available_kernels()) {
      check_context = kernels->name + std::string(": accuracy of ") + std::to_string(curve.name);
      double error = 0, relative = 0;
      for (bool backward : {false, true}) {
        for (int exact : {0, 1}) {
          const Kernels& table = exact ? reference_kernels() : *kernels;
          float* const to = results[exact].data();
          backward ? table.curve_backward(curve, x.data(), ones.data(), to, n)
                   : table.curve(curve, x.data(), to, n);
        }
        const Floats &got = results[0], &want = results[1];
        for (int i = 0; i < n; ++i) {
          error = std::fmax(error, std::fabs(double(got[i]) - want[i]));
          if (curve.name == Curve::kTanh && !backward && want[i] != 0)
            relative = std::fmax(relative, std::fabs(double(got[i]) / want[i] - 1));
        }
      }
      CHECK(error < 2e-6);
      CHECK(relative < 5e-7);
    }
  }
}

// What each activation and its derivative are at single points.
void check_activation_values() {
  struct Point {
    int function;  // of kCurves; -1 of ReLU
    float x, y, slope;
  };
  const Point points[] = {{-1, -2, 0, 0},
                          {-1, 0, 0, 0},
                          {-1, 2, 2, 1},
                          {-1, kInf, kInf, 1},
                          {-1, -0.0f, 0, 0},
                          {-1, -kInf, 0, 0},
                          {0, -4, 0, 0},
                          {0, -3, 0, 0},
                          {0, 0, 0, 0.5f},
                          {0, 1.5f, 1.125f, 1},
                          {0, -1.5f, -0.375f, 0},
                          {0, 3, 3, 1},
                          {0, 50, 50, 1},
                          {0, kInf, kInf, 1},
                          {1, -4, 0, 0},
                          {1, -3, 0, 0},
                          {1, 0, 0.5f, 1 / 6.0f},
                          {1, 1.5f, 0.75f, 1 / 6.0f},
                          {1, 3, 1, 0},
                          {1, kInf, 1, 0},
                          {2, -4, -1, 0.25f},
                          {2, 0, 0, 0.25f},
                          {2, 3, 3, 1},
                          {3, -2, -1, 0},
                          {3, -1, -1, 0},
                          {3, 0.5f, 0.5f, 1},
                          {3, 3, 3, 0},
                          {3, kInf, 3, 0},
                          {4, 0, 0.5f, 0.25f},
                          {4, -100, 0, 0},
                          {4, kInf, 1, 0},
                          {5, 0, 0, 1},
                          {5, 100, 1, 0},
                          {5, -kInf, -1, 0},
                          {6, 0, 0, 0.5f},
                          {6, 100, 100, 1},
                          {6, 1, 0.7310586f, 0.9276705f},
                          {7, 0, 0, 0.5f},
                          {7, 1, 0.8413447f, 1.0833155f},
                          {7, -1, -0.1586553f, -0.0833155f},
                          {7, 50, 50, 1},
                          {8, 0, 0, 0.5f},
                          {8, 1, 0.8411920f, 1.0829641f}};
  for (const Kernels* kernels : available_kernels()) {
    for (const Point& point : points) {
      check_context = kernels->name + std::string(": activation ") +
                      std::to_string(point.function) + " at " + std::to_string(point.x);
      const Curve* const curve = point.function < 0 ? nullptr : &kCurves[point.function];
      float x[16], y[16], grad[16], grad_x[16];
      for (int i = 0; i < 16; ++i) x[i] = point.x, grad[i] = -2;
      value_of(*kernels, curve, x, y, 16);
      slope_of(*kernels, curve, x, grad, grad_x, 16);
      CHECK_CLOSE(y[7], point.y, 1e-6);
      CHECK_CLOSE(grad_x[7], -2 * point.slope, 1e-6);
    }
    check_context = kernels->name + std::string(": NaN through activations");
    float x[16], y[16];
    std::fill_n(x, 16, kNaN);
    for (int f = -1; f < int(std::size(kCurves)); ++f) {
      value_of(*kernels, f < 0 ? nullptr : &kCurves[f], x, y, 16);
      CHECK(std::isnan(y[0]) && std::isnan(y[15]));
    }
  }
}

void check_sums(std::size_t n, Random& random) {
  check_context = "add, squares, products of " + std::to_string(n);
  const Floats x = random_floats(n, random);
  const Floats before = random_floats(n, random);
  Floats want_add = before, want_squares = before;
  reference_kernels().add(x.data(), want_add.data(), n);
  reference_kernels().add_squares(want_squares.data(), x.data(), n);
  for (const Kernels* kernels : available_kernels()) {
    Floats add = before, squares = before;
    kernels->add(x.data(), add.data(), n);
    kernels->add_squares(squares.data(), x.data(), n);
    check_result(add, want_add, before, everywhere);
    check_result(squares, want_squares, before, everywhere);
    for (bool accumulate : {false, true}) {
      Floats want = before, product = before, in_place = x;
      reference_kernels().multiply(x.data(), -1.75f, want.data(), n, accumulate);
      kernels->multiply(x.data(), -1.75f, product.data(), n, accumulate);
      kernels->multiply(in_place.data(), -1.75f, in_place.data(), n, accumulate);
      check_result(product, want, before, everywhere);
      for (std::size_t i = 0; i < n; ++i) {
        CHECK_CLOSE(want[i], (accumulate ? before[i] : 0) + -1.75f * x[i], 1e-6);
        CHECK_CLOSE(in_place[i], (accumulate ? x[i] : 0) + -1.75f * x[i], 1e-6);
      }
    }
  }
}

void check_update(std::size_t n, Random& random) {
  const bool moving = toss(random), proximal = toss(random), masked = toss(random);
  const Update options = {0.1f, moving ? 0.9f : 0.0f, toss(random) ? 0.01f : 0.0f,
                          proximal ? 0.3f : 0.0f};
  check_context = "update of " + std::to_string(n) + (moving ? ", momentum" : "") +
                  (proximal ? ", proximal" : "") + (masked ? ", masked" : "") +
                  (options.weight_decay != 0 ? ", decay" : "");
  Bytes kept(n);
  for (std::size_t i = 0; i < n; ++i) kept[i] = toss(random);
  const Floats w = random_floats(n, random), loaded = random_floats(n, random);
  const Floats velocity = random_floats(n, random), grad = random_floats(n, random);
  auto run = [&](const Kernels& kernels, Floats& to, Floats& v, int begin, int end) {
    kernels.update(to.data() + begin, moving ? v.data() + begin : nullptr,
                   proximal ? loaded.data() + begin : nullptr, grad.data() + begin,
                   masked ? kept.data() + begin : nullptr, end - begin, options);
  };
  Floats want_w = w, want_v = velocity;
  run(reference_kernels(), want_w, want_v, 0, int(n));
  for (const Kernels* kernels : available_kernels()) {
    Floats got_w = w, got_v = velocity, parts_w = w, parts_v = velocity;
    run(*kernels, got_w, got_v, 0, int(n));
    check_result(got_w, want_w, w, [&](std::size_t i) { return !masked || kept[i]; }, 1);
    check_result(got_v, want_v, velocity, [&](std::size_t) { return moving; }, 1);
    for (std::size_t i = 0; masked && moving && i < n; ++i) CHECK(kept[i] || got_v[i] == 0);
    const std::vector<int> cuts = random_cuts(0, int(n), random);
    for (std::size_t i = 1; i < cuts.size(); ++i)
      run(*kernels, parts_w, parts_v, cuts[i - 1], cuts[i]);
    CHECK(got_w.same_bits(parts_w) && got_v.same_bits(parts_v));
  }
}

// w = 2, w_loaded = 1, g = 3, v = 4; lr 0.5, momentum 0.25, decay 0.125, proximal 0.5.
void check_update_by_hand() {
  for (const Kernels* kernels : available_kernels()) {
    check_context = kernels->name + std::string(": update by hand");
    const float grad = 3, loaded = 1;
    float w = 2, v = 4;
    kernels->update(&w, &v, &loaded, &grad, nullptr, 1, {0.5f, 0.25f, 0.125f, 0.5f});
    CHECK(v == 0.25f * 4 + (3 + 0.125f * 2 + 0.5f * (2 - 1)));
    CHECK(w == 2 - 0.5f * 4.75f);
    w = 2, v = 4;
    kernels->update(&w, &v, nullptr, &grad, nullptr, 1, {0.5f, 0.25f, 0, 0});
    CHECK(v == 4 && w == 0);
    kernels->update(&w, nullptr, nullptr, &grad, nullptr, 1, {0.5f, 0, 0, 0});
    CHECK(w == -1.5f);
  }
}

}  // namespace
}  // namespace fedlean

int main() {
  using namespace fedlean;
  Random random(4);
  check_activation_values();
  check_accuracy();
  check_update_by_hand();
  for (int n = 0; n <= 70; ++n) {
    check_activation(nullptr, n, random);
    for (const Curve& curve : kCurves) check_activation(&curve, n, random);
    check_sums(n, random);
    for (int i = 0; i < 16; ++i) check_update(n, random);
  }
  return finish();
}
