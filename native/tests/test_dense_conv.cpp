// Dense convolutions on panels: every table against the reference.
#include "buffers.h"

namespace fedlean {
namespace {

// A dense convolution with random geometry, taps and order of the weights.
struct Case {
  ConvShape shape;
  DenseConv conv;
  int outputs, in_origin, out_origin;
  std::vector<std::int32_t> tap_offset, tap_weight;
  std::size_t weights;

  std::size_t in_floats() const {
    return std::size_t(conv.in_channels) * conv.in_plane * shape.lanes;
  }
  std::size_t out_floats() const { return std::size_t(outputs) * shape.out_plane * shape.lanes; }
  // Whether float i of the output array is an interior pixel of channels [begin, end).
  bool interior(std::size_t i, int begin, int end) const {
    const int pixel = int(i / shape.lanes), channel = pixel / shape.out_plane;
    const int inside = pixel % shape.out_plane - out_origin;
    return channel >= begin && channel < end && inside >= 0 &&
           inside / shape.out_row < shape.height && inside % shape.out_row < shape.width;
  }
  std::size_t weight_index(int o, int c, int t) const {
    return o * conv.weight_out + c * conv.weight_in + tap_weight[t];
  }
};

Case random_case(int lanes, int height, int width, Random& random) {
  Case c;
  const bool large = height * width > 64;  // then less of the rest, to save time
  const int kernel = pick(random, 1, large ? 3 : 5), area = kernel * kernel;
  const int channels = pick(random, 1, large ? 2 : 4),
            phases = toss(random, 0.8) ? 1 : pick(random, 2, 4);
  c.outputs = pick(random, 1, large ? 7 : 27);
  const int in_row = width + kernel - 1 + pick(random, 0, 2);
  const int halo = pick(random, 0, 2), out_row = width + 2 * halo;
  const int phase_plane = in_row * (height + kernel - 1 + pick(random, 0, 2));
  c.out_origin = halo * out_row + halo;
  c.shape = {lanes, height, width, in_row, out_row, out_row * (height + 2 * halo)};
  // Offsets count from any pixel of the window, so that some are negative.
  const int anchor_y = pick(random, 0, kernel - 1), anchor_x = pick(random, 0, kernel - 1);
  c.in_origin = anchor_y * in_row + anchor_x;
  const bool flipped = toss(random), all_taps = toss(random, 0.7);
  for (int t = 0; t < area; ++t) {
    if (!all_taps && toss(random)) continue;
    c.tap_offset.push_back(pick(random, 0, phases - 1) * phase_plane +
                           (t / kernel - anchor_y) * in_row + t % kernel - anchor_x);
    c.tap_weight.push_back(flipped ? area - 1 - t : t);
  }
  const bool transposed = toss(random);
  c.conv = {channels,
            phases * phase_plane,
            int(c.tap_offset.size()),
            c.tap_offset.data(),
            c.tap_weight.data(),
            transposed ? area : channels * area,
            transposed ? c.outputs * area : area};
  c.weights = std::size_t(c.outputs) * channels * area;
  check_context = "lanes " + std::to_string(lanes) + ", " + std::to_string(height) + " x " +
                  std::to_string(width) + ", taps " + std::to_string(c.conv.taps) + ", " +
                  std::to_string(channels) + " -> " + std::to_string(c.outputs);
  return c;
}

void check_forward(const Case& c, Random& random) {
  const Floats weight = random_floats(c.weights, random);
  const Floats in = random_floats(c.in_floats(), random);
  const Floats bias = random_floats(c.outputs, random);
  const Floats before = random_floats(c.out_floats(), random);
  const bool accumulate = toss(random);
  const bool biased = !accumulate && toss(random);
  const int begin = toss(random) ? 0 : pick(random, 0, c.outputs);
  const int end = toss(random) ? c.outputs : pick(random, begin, c.outputs);
  const std::vector<int> cuts = random_cuts(begin, end, random);
  auto run = [&](const Kernels& kernels, Floats& out, int from, int to) {
    kernels.dense_conv({c.shape, c.conv, weight.data(), in.data() + c.in_origin * c.shape.lanes,
                        out.data() + c.out_origin * c.shape.lanes, biased ? bias.data() : nullptr,
                        accumulate, from, to});
  };
  Floats want = before;
  run(reference_kernels(), want, begin, end);
  for (const Kernels* kernels : available_kernels()) {
    Floats whole = before, parts = before;
    run(*kernels, whole, begin, end);
    for (std::size_t i = 1; i < cuts.size(); ++i) run(*kernels, parts, cuts[i - 1], cuts[i]);
    check_result(whole, want, before, [&](std::size_t i) { return c.interior(i, begin, end); });
    CHECK(whole.same_bits(parts));
  }
}

void check_grad(const Case& c, Random& random) {
  const Floats in = random_floats(c.in_floats(), random);
  const Floats grad = random_floats(c.out_floats(), random);
  const Floats before = random_floats(c.weights, random);
  const int begin = toss(random) ? 0 : pick(random, 0, c.outputs);
  const int end = toss(random) ? c.outputs : pick(random, begin, c.outputs);
  const std::vector<int> cuts = random_cuts(begin, end, random);
  std::vector<bool> written(c.weights, false);
  for (int o = begin; o < end; ++o)
    for (int i = 0; i < c.conv.in_channels; ++i)
      for (int t = 0; t < c.conv.taps; ++t) written[c.weight_index(o, i, t)] = true;
  auto run = [&](const Kernels& kernels, Floats& grad_weight, int from, int to) {
    kernels.dense_conv_grad({c.shape, c.conv, in.data() + c.in_origin * c.shape.lanes,
                             grad.data() + c.out_origin * c.shape.lanes, grad_weight.data(), from,
                             to});
  };
  Floats want = before;
  run(reference_kernels(), want, begin, end);
  for (const Kernels* kernels : available_kernels()) {
    Floats whole = before, parts = before;
    run(*kernels, whole, begin, end);
    for (std::size_t i = 1; i < cuts.size(); ++i) run(*kernels, parts, cuts[i - 1], cuts[i]);
    check_result(whole, want, before, [&](std::size_t i) { return written[i]; });
    CHECK(whole.same_bits(parts));
  }
}

// Two inputs of 1 x 3 pixels, two outputs of 1 x 2, a kernel of 1 x 2; lanes differ by factors.
void check_by_hand() {
  check_context = "by hand";
  const float pixels[] = {1, 2, 3, 4, 5, 6}, factor[] = {1, 10, 100, 1000};
  const std::int32_t offset[] = {0, 1}, index[] = {0, 1};
  Floats in(24), out(16), weight(8), bias(2), grad_weight(8);
  for (int i = 0; i < 24; ++i) in[i] = pixels[i / 4] * factor[i % 4];
  for (int i = 0; i < 8; ++i) weight[i] = float(i + 1);  // 1 2 | 3 4 to output 0, then 5 6 | 7 8
  bias[0] = 0.5f;
  bias[1] = -1;
  const ConvShape shape = {4, 1, 2, 3, 2, 2};
  const DenseConv conv = {2, 3, 2, offset, index, 4, 2};
  for (const Kernels* kernels : available_kernels()) {
    kernels->dense_conv(
        {shape, conv, weight.data(), in.data(), out.data(), bias.data(), false, 0, 2});
    for (int lane = 0; lane < 4; ++lane) {
      CHECK(out[lane] == (1 * 1 + 2 * 2 + 3 * 4 + 4 * 5) * factor[lane] + 0.5f);
      CHECK(out[4 + lane] == (1 * 2 + 2 * 3 + 3 * 5 + 4 * 6) * factor[lane] + 0.5f);
      CHECK(out[8 + lane] == (5 * 1 + 6 * 2 + 7 * 4 + 8 * 5) * factor[lane] - 1);
      CHECK(out[12 + lane] == (5 * 2 + 6 * 3 + 7 * 5 + 8 * 6) * factor[lane] - 1);
    }
    // The gradient of the output is the pixel's number, 1 to 4, in every lane.
    for (int i = 0; i < 16; ++i) out[i] = float(i / 4 + 1);
    for (int i = 0; i < 8; ++i) grad_weight[i] = 0;
    kernels->dense_conv_grad({shape, conv, in.data(), out.data(), grad_weight.data(), 0, 2});
    const int want[] = {1 * 1 + 2 * 2, 1 * 2 + 2 * 3, 1 * 4 + 2 * 5, 1 * 5 + 2 * 6,
                        3 * 1 + 4 * 2, 3 * 2 + 4 * 3, 3 * 4 + 4 * 5, 3 * 5 + 4 * 6};
    for (int i = 0; i < 8; ++i) CHECK(grad_weight[i] == want[i] * 1111);
  }
}

}  // namespace
}  // namespace fedlean

int main() {
  using namespace fedlean;
  check_by_hand();
  Random random(2);
  for (int lanes = kLaneStep; lanes <= kPanelLanes; lanes += kLaneStep) {
    for (int height = 1; height <= 18; ++height) {
      for (int width = 1; width <= 18; ++width) {
        const Case c =
            random_case(lanes, height == 18 ? 28 : height, width == 18 ? 28 : width, random);
        check_forward(c, random);
        check_grad(c, random);
      }
    }
  }
  return finish();
}
