// Sparse convolutions: patterns against their description, every table against the reference.
#include "buffers.h"

namespace fedlean {
namespace {

// A convolution of stride 1 with random kept weights, and all its arrays.
struct Case {
  ConvShape shape;
  int groups, group_in, group_out, kernel, in_plane, chunk_channels, origin;
  std::vector<Tap> taps;
  std::vector<std::uint32_t> position;
  GatherPattern pattern;

  int channels() const { return groups * group_in; }
  int outputs() const { return groups * group_out; }
  std::uint32_t chunk_pixels() const { return std::uint32_t(chunk_channels) * in_plane; }
  std::size_t in_floats() const { return std::size_t(channels()) * in_plane * shape.lanes; }
  std::size_t out_floats() const { return std::size_t(outputs()) * shape.out_plane * shape.lanes; }

  // Whether float i of the output array is an interior pixel of channels [begin, end).
  bool interior(std::size_t i, int begin, int end) const {
    const int pixel = int(i / shape.lanes), channel = pixel / shape.out_plane;
    const int inside = pixel % shape.out_plane - origin;
    return channel >= begin && channel < end && inside >= 0 &&
           inside / shape.out_row < shape.height && inside % shape.out_row < shape.width;
  }
};

Case random_case(int lanes, int height, int width, Random& random) {
  Case c;
  c.kernel = pick(random, 1, 5);
  c.groups = toss(random, 0.7) ? 1 : pick(random, 2, 3);
  c.group_in = pick(random, 1, c.groups > 1 ? 2 : 5);
  c.group_out = pick(random, 1, c.groups > 1 ? 2 : 6);
  const int in_row = width + c.kernel - 1 + pick(random, 0, 2);
  const int halo = pick(random, 0, 2), out_row = width + 2 * halo;
  c.in_plane = in_row * (height + c.kernel - 1 + pick(random, 0, 2));
  c.origin = halo * out_row + halo;
  c.shape = {lanes, height, width, in_row, out_row, out_row * (height + 2 * halo)};
  c.chunk_channels = pick(random, 1, c.channels());
  const double densities[] = {0, 0.05, 0.3, 0.6, 1};
  const double density = densities[pick(random, 0, 4)];
  for (int o = 0; o < c.outputs(); ++o) {
    const bool empty = toss(random, 0.15);
    const int first = o / c.group_out * c.group_in;
    for (int i = first; i < first + c.group_in; ++i)
      for (int y = 0; y < c.kernel; ++y)
        for (int x = 0; x < c.kernel; ++x)
          if (!empty && toss(random, density))
            c.taps.push_back({std::uint32_t(o), std::uint32_t(i * c.in_plane + y * in_row + x)});
  }
  c.pattern =
      build_gather(cut_chunks(c.channels(), c.in_plane, c.chunk_channels, c.outputs(), c.groups),
                   c.chunk_pixels(), c.outputs(), c.taps, c.position);
  check_context = "lanes " + std::to_string(lanes) + ", " + std::to_string(height) + " x " +
                  std::to_string(width) + ", kernel " + std::to_string(c.kernel) + ", groups " +
                  std::to_string(c.groups) + ", chunk of " + std::to_string(c.chunk_channels) +
                  ", taps " + std::to_string(c.taps.size());
  return c;
}

// Every tap is there once, in its chunk's and output's row, in the order given.
void check_pattern(const Case& c) {
  const GatherPattern& p = c.pattern;
  CHECK(p.nonzeros() == c.taps.size());
  CHECK(p.row_start.size() == p.row_first.size() + 1);
  CHECK(p.row_start.front() == 0 && p.row_start.back() == c.taps.size());
  std::vector<int> times_seen(c.outputs(), 0), times_first(c.outputs(), 0);
  std::uint32_t row = 0, k = 0;
  for (std::uint32_t j = 0; j < p.chunks.size(); ++j) {
    const Chunk& chunk = p.chunks[j];
    CHECK(chunk.in_pixel == j * c.chunk_pixels());
    CHECK(chunk.first_row == row);
    CHECK(chunk.out_begin < chunk.out_end && chunk.out_end <= std::uint32_t(c.outputs()));
    for (std::uint32_t o = chunk.out_begin; o < chunk.out_end; ++o, ++row) {
      CHECK(p.row_start[row] == k);
      CHECK(p.row_first[row] == (times_seen[o] == 0));
      ++times_seen[o];
      times_first[o] += p.row_first[row];
      for (std::size_t i = 0; i < c.taps.size(); ++i) {
        if (c.taps[i].out != o || c.taps[i].in_pixel / c.chunk_pixels() != j) continue;
        CHECK(c.position[i] == k);
        CHECK(chunk.in_pixel + p.offset[k] == c.taps[i].in_pixel);
        ++k;
      }
    }
  }
  CHECK(row == p.row_first.size());
  CHECK(k == c.taps.size());
  for (int o = 0; o < c.outputs(); ++o) CHECK(times_first[o] == 1);
}

void check_gather(const Case& c, Random& random) {
  const Floats value = random_floats(c.taps.size(), random);
  const Floats in = random_floats(c.in_floats(), random);
  const Floats bias = random_floats(c.outputs(), random);
  const Floats before = random_floats(c.out_floats(), random);
  const bool accumulate = toss(random);
  const bool biased = !accumulate && toss(random);
  const int begin = toss(random) ? 0 : pick(random, 0, c.outputs());
  const int end = toss(random) ? c.outputs() : pick(random, begin, c.outputs());
  const std::vector<int> cuts = random_cuts(begin, end, random);
  auto run = [&](const Kernels& kernels, Floats& out, int from, int to) {
    kernels.gather({c.shape, &c.pattern, value.data(), in.data(),
                    out.data() + c.origin * c.shape.lanes, biased ? bias.data() : nullptr,
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

void check_sample(const Case& c, Random& random) {
  const Floats in = random_floats(c.in_floats(), random);
  const Floats grad = random_floats(c.out_floats(), random);
  const Floats before = random_floats(c.taps.size(), random);
  // Each chunk's rows, in one call or in several.
  std::vector<std::vector<int>> cuts;
  for (const Chunk& chunk : c.pattern.chunks) {
    const int rows = int(chunk.out_end - chunk.out_begin), first = int(chunk.first_row);
    cuts.push_back(random_cuts(first, first + rows, random));
  }
  auto run = [&](const Kernels& kernels, Floats& sums, bool whole) {
    for (std::size_t j = 0; j < cuts.size(); ++j) {
      const std::vector<int> ends =
          whole ? std::vector<int>{cuts[j].front(), cuts[j].back()} : cuts[j];
      for (std::size_t i = 1; i < ends.size(); ++i)
        kernels.sample({c.shape, &c.pattern, in.data(), grad.data() + c.origin * c.shape.lanes,
                        int(j), std::uint32_t(ends[i - 1]), std::uint32_t(ends[i]),
                        sums.data() + c.pattern.row_start[ends[i - 1]]});
    }
  };
  Floats want = before;
  run(reference_kernels(), want, true);
  for (const Kernels* kernels : available_kernels()) {
    Floats whole = before, parts = before;
    run(*kernels, whole, true);
    run(*kernels, parts, false);
    check_result(whole, want, before, [](std::size_t) { return true; });
    CHECK(whole.same_bits(parts));
    CHECK(whole.intact() && parts.intact());
  }
}

// Only the given rows of a chunk are added to.
void check_sample_range(const Case& c, Random& random) {
  const int j = pick(random, 0, int(c.pattern.chunks.size()) - 1);
  const Chunk& chunk = c.pattern.chunks[j];
  const int rows = int(chunk.out_end - chunk.out_begin);
  const std::uint32_t begin = chunk.first_row + pick(random, 0, rows);
  const std::uint32_t end = pick(random, int(begin), int(chunk.first_row) + rows);
  const std::size_t first = c.pattern.row_start[begin], last = c.pattern.row_start[end];
  const Floats in = random_floats(c.in_floats(), random);
  const Floats grad = random_floats(c.out_floats(), random);
  const Floats before = random_floats(c.taps.size(), random);
  for (const Kernels* kernels : available_kernels()) {
    Floats sums = before;
    kernels->sample({c.shape, &c.pattern, in.data(), grad.data() + c.origin * c.shape.lanes, j,
                     begin, end, sums.data() + first});
    for (std::size_t i = 0; i < sums.size(); ++i)
      if (i < first || i >= last) CHECK(sums[i] == before[i]);
    CHECK(sums.intact());
  }
}

// Two inputs of 1 x 3 pixels, one output of 1 x 2, a kernel of 1 x 2, four lanes that differ by
// factors 1, 10, 100, 1000.  Kept: input 0 tap 1 (weight 2), input 1 tap 0 (weight -3).
void check_by_hand() {
  check_context = "by hand";
  const float pixels[] = {1, 2, 3, 4, 5, 6}, factor[] = {1, 10, 100, 1000};
  Floats in(24), out(8), value(2), bias(1), sums(2);
  for (int i = 0; i < 24; ++i) in[i] = pixels[i / 4] * factor[i % 4];
  const ConvShape shape = {4, 1, 2, 3, 2, 2};
  std::vector<std::uint32_t> position;
  const GatherPattern pattern =
      build_gather(cut_chunks(2, 3, 1, 1, 1), 3, 1, {{0, 1}, {0, 3}}, position);
  value[position[0]] = 2;
  value[position[1]] = -3;
  bias[0] = 0.5f;
  for (const Kernels* kernels : available_kernels()) {
    kernels->gather(
        {shape, &pattern, value.data(), in.data(), out.data(), bias.data(), false, 0, 1});
    for (int lane = 0; lane < 4; ++lane) {
      CHECK(out[lane] == (2 * 2 - 3 * 4) * factor[lane] + 0.5f);
      CHECK(out[4 + lane] == (2 * 3 - 3 * 5) * factor[lane] + 0.5f);
    }
    // The gradient of the output is the pixel's number, in every lane.
    for (int i = 0; i < 8; ++i) out[i] = float(i / 4 + 1);
    sums[0] = sums[1] = 0;
    for (int chunk = 0; chunk < 2; ++chunk)
      kernels->sample({shape, &pattern, in.data(), out.data(), chunk, std::uint32_t(chunk),
                       std::uint32_t(chunk) + 1, sums.data() + chunk});
    CHECK(sums[0] == (1 * 2 + 2 * 3) * 1111);
    CHECK(sums[1] == (1 * 4 + 2 * 5) * 1111);
  }
}

// A chunk of exactly 65536 pixels: offsets use all 16 bits.
void check_largest_chunk() {
  check_context = "largest chunk";
  std::vector<std::uint32_t> position;
  const GatherPattern pattern = build_gather(cut_chunks(4, 32768, 2, 1, 1), 65536, 1,
                                             {{0, 131071}, {0, 65535}, {0, 0}}, position);
  CHECK((position == std::vector<std::uint32_t>{2, 0, 1}));
  CHECK((pattern.offset == std::vector<std::uint16_t>{65535, 0, 65535}));
  Random random(7);
  const Floats in = random_floats(131072 * 4, random), value = random_floats(3, random);
  for (const Kernels* kernels : available_kernels()) {
    Floats out(4);
    kernels->gather(
        {{4, 1, 1, 1, 1, 1}, &pattern, value.data(), in.data(), out.data(), nullptr, false, 0, 1});
    for (int lane = 0; lane < 4; ++lane)
      CHECK_CLOSE(out[lane],
                  double(value[0]) * in[65535 * 4 + lane] + double(value[1]) * in[lane] +
                      double(value[2]) * in[131071 * 4 + lane],
                  1e-6);
  }
}

}  // namespace
}  // namespace fedlean

int main() {
  using namespace fedlean;
  check_by_hand();
  check_largest_chunk();
  Random random(1);
  for (int lanes = kLaneStep; lanes <= kPanelLanes; lanes += kLaneStep) {
    for (int height = 1; height <= 18; ++height) {
      for (int width = 1; width <= 18; ++width) {
        const Case c =
            random_case(lanes, height == 18 ? 28 : height, width == 18 ? 28 : width, random);
        check_pattern(c);
        check_gather(c, random);
        check_sample(c, random);
        check_sample_range(c, random);
      }
    }
  }
  return finish();
}
