// What works on panels lane by lane (affine maps, sums, pooling rows): every table against the
// reference, and all of them against values by hand.
#include "buffers.h"

namespace fedlean {
namespace {

void check_lanes(int lanes, int pixels, Random& random) {
  check_context = "lanes " + std::to_string(lanes) + ", pixels " + std::to_string(pixels);
  const std::size_t n = std::size_t(lanes) * pixels;
  const Floats x = random_floats(n, random), z = random_floats(n, random);
  const Floats s = random_floats(lanes, random), t = random_floats(lanes, random);
  const Floats u = random_floats(lanes, random), v = random_floats(lanes, random);
  const Floats before = random_floats(n, random);
  const bool accumulate = toss(random), same = toss(random, 0.3);
  const float* const other = same ? x.data() : z.data();
  struct Results {
    Floats affine, blend, sums, products;
  };
  const Results start = {before, before, u, v};
  auto run = [&](const Kernels& k, Results& r) {
    k.affine(x.data(), v.data(), s.data(), t.data(), r.affine.data(), lanes, pixels, accumulate);
    k.blend(x.data(), s.data(), other, v.data(), t.data(), u.data(), r.blend.data(), lanes, pixels,
            accumulate);
    k.lane_sums(x.data(), other, s.data(), r.sums.data(), r.products.data(), lanes, pixels);
  };
  Results want = start;
  run(reference_kernels(), want);
  for (const Kernels* kernels : available_kernels()) {
    Results got = start;
    run(*kernels, got);
    check_result(got.affine, want.affine, start.affine, everywhere);
    check_result(got.blend, want.blend, start.blend, everywhere);
    check_result(got.sums, want.sums, start.sums, everywhere);
    check_result(got.products, want.products, start.products, everywhere);
    Floats in_place = x;
    Floats apart = x;
    kernels->affine(in_place.data(), v.data(), s.data(), t.data(), in_place.data(), lanes, pixels,
                    false);
    kernels->affine(x.data(), v.data(), s.data(), t.data(), apart.data(), lanes, pixels, false);
    CHECK(in_place.same_bits(apart));
  }
}

// Two pixels (1, 2) and one lane that matters: scale 3, shift 4, centre 0.5.
void check_lanes_by_hand() {
  for (const Kernels* kernels : available_kernels()) {
    check_context = kernels->name + std::string(": lanes by hand");
    const float x[8] = {0, 1, 0, 0, 0, 2, 0, 0}, b[8] = {0, 10, 0, 0, 0, 20, 0, 0};
    const float scale[4] = {9, 3, 9, 9}, shift[4] = {9, 4, 9, 9}, half[4] = {9, 0.5f, 9, 9};
    float y[8] = {}, sums[4] = {0, 100}, products[4] = {0, 200}, squares[4] = {0, 300};
    float differences[4] = {0, 400};
    kernels->affine(x, half, scale, shift, y, 4, 2, false);
    CHECK(y[1] == 5.5f && y[5] == 8.5f);
    kernels->blend(x, scale, b, half, half, shift, y, 4, 2, true);
    CHECK(y[1] == 5.5f + 3 + 4.75f + 4 && y[5] == 8.5f + 6 + 9.75f + 4);
    kernels->lane_sums(x, b, half, sums, products, 4, 2);
    CHECK(sums[1] == 103 && products[1] == 200 + 9.5f + 39);
    const Images images = {x, 1, 1, 2, 2, 2};
    kernels->lane_differences(images, half, differences, 4);
    CHECK(differences[1] == 402);
    kernels->lane_squares(images, half, squares, 4);
    CHECK(squares[1] == 300 + 0.25f + 2.25f);
  }
}

// Where every input is the center nothing is left of it, however large the scale: the differences
// are 0 and the output is the shift, to the bit.
void check_constant_lanes(float constant, int lanes, int pixels, Random& random) {
  check_context = "constant " + std::to_string(constant) + ", lanes " + std::to_string(lanes) +
                  ", pixels " + std::to_string(pixels);
  const std::size_t n = std::size_t(lanes) * pixels;
  const Floats shift = random_floats(lanes, random);
  Floats x(n), center(lanes), scale = random_floats(lanes, random);
  for (std::size_t i = 0; i < n; ++i) x[i] = constant;
  for (int lane = 0; lane < lanes; ++lane) center[lane] = constant, scale[lane] *= 1000;
  for (const Kernels* kernels : available_kernels()) {
    Floats y(n), differences(lanes), squares(lanes);
    for (int lane = 0; lane < lanes; ++lane) differences[lane] = squares[lane] = 0;
    kernels->affine(x.data(), center.data(), scale.data(), shift.data(), y.data(), lanes, pixels,
                    false);
    const Images images = {x.data(), 1, pixels, 1, 1, 0};
    kernels->lane_differences(images, center.data(), differences.data(), lanes);
    kernels->lane_squares(images, center.data(), squares.data(), lanes);
    bool exact = true;
    for (std::size_t i = 0; i < n; ++i) exact &= y[i] == shift[i % lanes];
    for (int lane = 0; lane < lanes; ++lane) exact &= differences[lane] == 0 && squares[lane] == 0;
    CHECK(exact);
  }
}

// Sums over images without their halo: `rows` rows of n floats, `step` apart.
void check_sum_channels(int n, Random& random) {
  const int channels = pick(random, 0, 9), rows = pick(random, 1, 9);
  const int step = n + 4 * pick(random, 0, 5), channel_step = rows * step + 4 * pick(random, 0, 3);
  check_context = std::to_string(channels) + " channels of " + std::to_string(rows) + " rows of " +
                  std::to_string(n);
  Floats x(std::size_t(channels) * channel_step);  // between the rows: NaN
  std::vector<double> want(channels, 0.25), largest(channels, 1.0);
  for (int c = 0; c < channels; ++c) {
    for (int row = 0; row < rows; ++row) {
      for (int i = 0; i < n; ++i) {
        float& to = x[c * channel_step + row * step + i];
        to = float(pick(random, -1000, 1000)) / 512;
        want[c] += to;
        largest[c] += 2;
      }
    }
  }
  for (const Kernels* kernels : available_kernels()) {
    std::vector<float> sums(channels, 0.25f), parts(channels, 0.25f);
    kernels->sum_channels(x.data(), n, rows, step, channels, channel_step, sums.data());
    const int cut = pick(random, 0, channels);  // results do not depend on cuts
    kernels->sum_channels(x.data(), n, rows, step, cut, channel_step, parts.data());
    kernels->sum_channels(x.data() + cut * channel_step, n, rows, step, channels - cut,
                          channel_step, parts.data() + cut);
    CHECK(sums == parts);
    for (int c = 0; c < channels; ++c) CHECK(std::fabs(sums[c] - want[c]) <= 1e-6 * largest[c]);
  }
}

// Differences and squares over images without their halo.
void check_images(int lanes, int width, Random& random) {
  const int channels = pick(random, 0, 5), rows = pick(random, 1, 9);
  const std::size_t row_step = width + pick(random, 0, 3);
  const std::size_t channel_step = rows * row_step + pick(random, 0, 3);
  check_context = "images, lanes " + std::to_string(lanes) + ", " + std::to_string(channels) +
                  " channels of " + std::to_string(rows) + " rows of " + std::to_string(width);
  const Floats center = random_floats(lanes, random), before = random_floats(lanes, random);
  Floats x(channels * channel_step * lanes);  // between the rows: NaN
  for (int c = 0; c < channels; ++c)
    for (int r = 0; r < rows; ++r)
      for (int i = 0; i < width * lanes; ++i)
        x[(c * channel_step + r * row_step) * lanes + i] = float(pick(random, -1000, 1000)) / 512;
  const Images images = {x.data(), channels, rows, width, row_step, channel_step};
  Floats want_sums = before, want_squares = before;
  reference_kernels().lane_differences(images, center.data(), want_sums.data(), lanes);
  reference_kernels().lane_squares(images, center.data(), want_squares.data(), lanes);
  for (const Kernels* kernels : available_kernels()) {
    Floats sums = before, squares = before;
    kernels->lane_differences(images, center.data(), sums.data(), lanes);
    kernels->lane_squares(images, center.data(), squares.data(), lanes);
    check_result(sums, want_sums, before, everywhere, 1);
    check_result(squares, want_squares, before, everywhere);
  }
}

// One running sum of equal terms would drift by more than this.
void check_equal_terms() {
  const int side = 64;
  Floats x(std::size_t(side) * side * 4), center(4);
  for (std::size_t i = 0; i < x.size(); ++i) x[i] = 0.3f;
  for (int lane = 0; lane < 4; ++lane) center[lane] = 0;
  const Images images = {x.data(), 1, side, side, side, side * side};
  for (const Kernels* kernels : available_kernels()) {
    check_context = kernels->name + std::string(": equal terms");
    float sums[4] = {}, squares[4] = {};
    kernels->lane_differences(images, center.data(), sums, 4);
    kernels->lane_squares(images, center.data(), squares, 4);
    const double count = side * side, term = 0.3f;
    CHECK_CLOSE(sums[0], count * term, 2e-6 * count * term);
    CHECK_CLOSE(squares[0], count * term * term, 2e-6 * count * term * term);
  }
}

// Examples, one after the other, to a panel; idle lanes repeat the last.
void check_interleave(int lanes, int n, Random& random) {
  check_context = "interleave, lanes " + std::to_string(lanes) + ", " + std::to_string(n);
  std::vector<Floats> examples;
  const float* rows[kPanelLanes] = {};
  for (int lane = 0; lane < lanes; ++lane) examples.push_back(random_floats(n, random));
  const int used = pick(random, 1, lanes);
  for (int lane = 0; lane < lanes; ++lane) rows[lane] = examples[std::min(lane, used - 1)].data();
  for (const Kernels* kernels : available_kernels()) {
    Floats panel(std::size_t(n) * lanes);
    kernels->interleave(rows, panel.data(), lanes, n);
    bool same = true;
    for (int i = 0; i < n; ++i)
      for (int lane = 0; lane < lanes; ++lane) same &= panel[i * lanes + lane] == rows[lane][i];
    CHECK(same && panel.intact());
  }
}

void check_fill(int lanes, int channels, Random& random) {
  check_context = "fill, lanes " + std::to_string(lanes) + ", " + std::to_string(channels);
  const Floats values = random_floats(channels, random);
  const bool zeros = toss(random, 0.3);
  for (const Kernels* kernels : available_kernels()) {
    Floats panel(std::size_t(channels) * lanes);
    kernels->fill_channels(zeros ? nullptr : values.data(), panel.data(), lanes, channels);
    bool same = true;
    for (int i = 0; i < channels * lanes; ++i)
      same &= panel[i] == (zeros ? 0.0f : values[i / lanes]);
    CHECK(same && panel.intact());
  }
}

// Pooling picks and moves values: the same bits everywhere.
void check_pool(int lanes, int out_width, Random& random) {
  const Sides kernel = {pick(random, 1, 5), pick(random, 1, 5)};
  const int stride = pick(random, 1, 4);
  const int width = (out_width - 1) * stride + kernel.x, in_row = width + pick(random, 0, 3);
  check_context = "pool, lanes " + std::to_string(lanes) + ", width " + std::to_string(out_width) +
                  ", kernel " + std::to_string(kernel.y) + " x " + std::to_string(kernel.x) +
                  ", stride " + std::to_string(stride);
  const std::size_t in_size = (std::size_t(kernel.y - 1) * in_row + width) * lanes;
  const std::size_t out_size = std::size_t(out_width) * lanes;
  const Floats in = awkward_floats(in_size, random), grad = random_floats(out_size, random);
  const Floats before = random_floats(out_size, random);
  const Floats before_in = random_floats(in_size, random);
  Floats want = before, want_in = before_in;
  Bytes want_winner(out_size);
  reference_kernels().max_pool_row(in.data(), want.data(), want_winner.data(), lanes, in_row,
                                   out_width, kernel, stride);
  if (stride >= kernel.x)  // windows do not overlap
    reference_kernels().max_unpool_row(grad.data(), want_winner.data(), want_in.data(), lanes,
                                       in_row, out_width, kernel, stride);
  for (const Kernels* kernels : available_kernels()) {
    Floats out = before, out_alone = before, grad_in = before_in;
    Bytes winner(out_size);
    kernels->max_pool_row(in.data(), out.data(), winner.data(), lanes, in_row, out_width, kernel,
                          stride);
    kernels->max_pool_row(in.data(), out_alone.data(), nullptr, lanes, in_row, out_width, kernel,
                          stride);
    CHECK(out.same_bits(want) && out_alone.same_bits(want) && winner.same_bits(want_winner));
    CHECK(out.intact() && winner.intact());
    if (stride < kernel.x) continue;
    kernels->max_unpool_row(grad.data(), winner.data(), grad_in.data(), lanes, in_row, out_width,
                            kernel, stride);
    CHECK(grad_in.same_bits(want_in) && grad_in.intact());
    for (std::size_t i = 0; i < in_size; ++i) {  // between the windows nothing changes
      const int column = int(i / lanes) % in_row;
      if (column >= width || column % stride >= kernel.x) CHECK(grad_in[i] == before_in[i]);
    }
  }
}

// One window of 2 x 2 per lane: a tie, a NaN, two NaNs, zeros of both signs.
void check_pool_by_hand() {
  const float in[16] = {1, 5, kNaN, -0.0f, 7, kNaN, 5, 0, 7, 9, kNaN, -0.0f, 2, 1, 3, -1};
  const int want[] = {1, 1, 2, 0};
  for (const Kernels* kernels : available_kernels()) {
    check_context = kernels->name + std::string(": pool by hand");
    const float grad[4] = {10, 20, 30, 40};
    float out[4], grad_in[16];
    std::uint8_t winner[4];
    kernels->max_pool_row(in, out, winner, 4, 2, 1, {2, 2}, 2);
    kernels->max_unpool_row(grad, winner, grad_in, 4, 2, 1, {2, 2}, 2);
    for (int lane = 0; lane < 4; ++lane) CHECK(winner[lane] == want[lane]);
    CHECK(out[0] == 7 && std::isnan(out[1]) && std::isnan(out[2]) && out[3] == 0);
    for (int i = 0; i < 16; ++i) CHECK(grad_in[i] == (want[i % 4] == i / 4 ? grad[i % 4] : 0));
  }
}

}  // namespace
}  // namespace fedlean

int main() {
  using namespace fedlean;
  Random random(5);
  check_lanes_by_hand();
  check_equal_terms();
  check_pool_by_hand();
  for (int n = 0; n <= 120; n += 4) check_sum_channels(n, random);
  for (int lanes = kLaneStep; lanes <= kPanelLanes; lanes += kLaneStep) {
    for (int pixels = 1; pixels <= 40; ++pixels) {
      check_lanes(lanes, pixels, random);
      for (float constant : {0.3f, -0.1f, 1e-3f, 1e4f + 0.1f})
        check_constant_lanes(constant, lanes, pixels, random);
      check_images(lanes, pixels, random);
      check_interleave(lanes, pixels, random);
      check_fill(lanes, pixels, random);
    }
    for (int width = 1; width <= 28; ++width)
      for (int i = 0; i < 5; ++i) check_pool(lanes, width, random);
  }
  return finish();
}
