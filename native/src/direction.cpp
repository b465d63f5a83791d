#include "fedlean/direction.h"

#include <algorithm>
#include <cstring>

namespace fedlean {

namespace {

constexpr std::uint64_t kMultiplier[2] = {0xD2E7470EE14C6C93u, 0xCA5A826395121157u};
constexpr std::uint64_t kWeyl[2] = {0x9E3779B97F4A7C15u, 0xBB67AE8584CAA73Bu};
constexpr int kRounds = 10;

struct Product {
  std::uint64_t high, low;
};

inline Product multiply(std::uint64_t a, std::uint64_t b) {
  __extension__ using Wide = unsigned __int128;
  const Wide product = Wide(a) * b;
  return {std::uint64_t(product >> 64), std::uint64_t(product)};
}

}  // namespace

void philox(std::uint64_t key, std::uint64_t first, int blocks, std::uint64_t* words) {
  for (int b = 0; b < blocks; ++b, words += 4) {
    std::uint64_t c0 = first + std::uint64_t(b), c1 = 0, c2 = 0, c3 = 0, k0 = key, k1 = 0;
    for (int round = 0; round < kRounds; ++round) {
      const Product p = multiply(kMultiplier[0], c0), q = multiply(kMultiplier[1], c2);
      c0 = q.high ^ c1 ^ k0;
      c1 = q.low;
      c2 = p.high ^ c3 ^ k1;
      c3 = p.low;
      k0 += kWeyl[0];
      k1 += kWeyl[1];
    }
    words[0] = c0;
    words[1] = c1;
    words[2] = c2;
    words[3] = c3;
  }
}

namespace {

// By four bits, the lowest first: 0 is -1.
constexpr float kFourSigns[16][4] = {
    {-1, -1, -1, -1}, {1, -1, -1, -1}, {-1, 1, -1, -1}, {1, 1, -1, -1},
    {-1, -1, 1, -1},  {1, -1, 1, -1},  {-1, 1, 1, -1},  {1, 1, 1, -1},
    {-1, -1, -1, 1},  {1, -1, -1, 1},  {-1, 1, -1, 1},  {1, 1, -1, 1},
    {-1, -1, 1, 1},   {1, -1, 1, 1},   {-1, 1, 1, 1},   {1, 1, 1, 1},
};

}  // namespace

void Numbers::fill() {
  constexpr int word_normals = 4, word_signs = 64;
  std::uint64_t words[kBuffer / word_normals];
  const int count = int(kBuffer) / (normals_ ? word_normals : word_signs);
  philox(key_, counter_, count / 4, words);
  counter_ += count / 4;
  at_ = 0;
  float* to = buffer_;
  for (int w = 0; w < count; ++w) {
    if (normals_) {
      for (int i = 0; i < word_normals; ++i) *to++ = normals_[words[w] >> (16 * i) & 0xffff];
    } else {
      for (int i = 0; i < word_signs; i += 4, to += 4)
        std::memcpy(to, kFourSigns[words[w] >> i & 0xf], sizeof kFourSigns[0]);
    }
  }
}

namespace {

// moved[i] = w[i] + sigma z[i]; z may be `moved`
inline void add(const float* w, const float* z, float sigma, float* moved, std::size_t n) {
  for (std::size_t i = 0; i < n; ++i) moved[i] = w[i] + sigma * z[i];
}

// moved[i] for the stored values [begin, end): one number for each that is kept.
void add_numbers(const Weight& weight, std::size_t begin, std::size_t end, float sigma,
                 Numbers& numbers, float* moved) {
  const float* const w = weight.value.data() + begin;
  if (weight.kept.empty()) {
    numbers.take(end - begin, [&](const float* z, std::size_t i, std::size_t n) {
      add(w + i, z, sigma, moved + i, n);
    });
    return;
  }
  const std::uint8_t* const kept = weight.kept.data() + begin;
  for (std::size_t i = 0; i < end - begin; ++i)
    moved[i] = kept[i] ? w[i] + sigma * numbers.next() : w[i];
}

// The same for numbers that are in `moved`.
void add_here(const Weight& weight, std::size_t begin, std::size_t end, float sigma, float* moved) {
  const float* const w = weight.value.data() + begin;
  if (weight.kept.empty()) return add(w, moved, sigma, moved, end - begin);
  const std::uint8_t* const kept = weight.kept.data() + begin;
  for (std::size_t i = 0; i < end - begin; ++i) moved[i] = kept[i] ? w[i] + sigma * moved[i] : w[i];
}

struct Sizes {
  std::size_t weight, bias, columns;  // floats, whole cache lines but the last
};

Sizes sizes_of(const Layer& layer) {
  auto lines = [](std::size_t floats) { return (floats + 15) / 16 * 16; };
  Sizes sizes = {};
  if (layer.tensors[kWeight].trainable && layer.stored(kWeight) > 0) {
    sizes.weight = lines(layer.block_floats());
    sizes.columns = layer.columns();
  }
  if (layer.tensors[kBias].trainable) sizes.bias = lines(layer.stored(kBias));
  return sizes;
}

}  // namespace

std::size_t MovedLayer::floats(const Layer& layer) {
  const Sizes sizes = sizes_of(layer);
  return sizes.weight + sizes.bias + sizes.columns;
}

MovedLayer::MovedLayer(const Layer& layer, const Direction& direction, int node, float* memory)
    : layer_(layer),
      sigma_(direction.sigma),
      weight_(direction.keys_of(node)[Direction::kWeightKey], direction.numbers()),
      bias_(direction.keys_of(node)[Direction::kBiasKey], direction.numbers()) {
  const Sizes sizes = sizes_of(layer);
  values_ = sizes.weight ? memory : nullptr;
  bias_values_ = sizes.bias ? memory + sizes.weight : nullptr;
  columns_ = memory + sizes.weight + sizes.bias;
  rank_one_ = direction.kind == Direction::kRankOne && sizes.columns > 0;
  if (rank_one_)
    Numbers(direction.keys_of(node)[Direction::kColumnsKey], direction.normals)
        .take(sizes.columns, [&](const float* z, std::size_t i, std::size_t n) {
          std::copy(z, z + n, columns_ + i);
        });
  if (bias_values_)
    add_numbers(layer.tensors[kBias], 0, layer.stored(kBias), sigma_, bias_, bias_values_);
}

int MovedLayer::make(int begin, const float* moved[2]) {
  moved[kWeight] = values_;
  moved[kBias] = bias_values_;
  if (!values_) return layer_.node.shape.channels;
  const int end = layer_.block_end(begin);
  move_weights(begin, end);
  return end;
}

void MovedLayer::move_weights(int begin, int end) {
  const Weight& weight = layer_.tensors[kWeight];
  const std::size_t columns = std::max<std::size_t>(1, layer_.columns());
  if (!rank_one_ && !layer_.sparse())  // one stretch of memory
    return add_numbers(weight, begin * columns, end * columns, sigma_, weight_, values_);
  layer_.for_runs(begin, end, [&](const Run& run) {
    if (!rank_one_)
      return add_numbers(weight, run.begin, run.end, sigma_, weight_, values_ + run.at);
    for (; row_ < run.output; ++row_) u_ = weight_.next();
    layer_.outer(run, u_, columns_, values_ + run.at);
    add_here(weight, run.begin, run.end, sigma_, values_ + run.at);
  });
}

}  // namespace fedlean
