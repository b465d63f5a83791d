// Random directions: the counter-based words against published ones, and the perturbed weights of
// layers of every form against a plain loop over the dense tensor.
#include "buffers.h"
#include "fedlean/direction.h"

namespace fedlean {
namespace {

// Of Random123's known answers, counter 0 and key 0; of NumPy's Philox(key=7), counters 1 and 2.
void check_philox() {
  check_context = "philox";
  std::uint64_t words[8];
  philox(0, 0, 1, words);
  CHECK(words[0] == 0x16554d9eca36314c && words[1] == 0xdb20fe9d672d0fdc);
  CHECK(words[2] == 0xd7e772cee186176b && words[3] == 0x7e68b68aec7ba23b);
  philox(7, 1, 2, words);
  const std::uint64_t want[8] = {0xdf4034b829e9fba4, 0x4b9d10cdf8e64087, 0x6b8b857e506aac98,
                                 0x67c7c945b1ba6e52, 0x15352da77ecee8e6, 0xb256888327f72bcc,
                                 0x4bde1757d950a392, 0x9edd26e855c94201};
  for (int i = 0; i < 8; ++i) CHECK(words[i] == want[i]);
}

// The table's entries name themselves, so that a number that is drawn wrongly shows.
std::vector<float> table() {
  std::vector<float> values(65536);
  for (int i = 0; i < 65536; ++i) values[i] = float(i - 32768) / 4096;
  return values;
}

std::vector<float> numbers(Direction::Kind kind, std::uint64_t key, std::size_t n) {
  const std::size_t per_word = kind == Direction::kSign ? 64 : 4;
  std::vector<std::uint64_t> words((n / per_word / 4 + 1) * 4);
  philox(key, 1, int(words.size() / 4), words.data());
  const std::vector<float> normals = table();
  std::vector<float> z(n);
  for (std::size_t i = 0; i < n; ++i) {
    const std::uint64_t word = words[i / per_word];
    z[i] = kind == Direction::kSign ? (word >> (i % 64) & 1 ? 1.0f : -1.0f)
                                    : normals[word >> (16 * (i % 4)) & 0xffff];
  }
  return z;
}

// A layer with the weights 1, 2, 3, ... (0 where pruned), moved in the dense order by hand.
void check_layer(std::unique_ptr<Layer> layer, std::size_t outputs, std::size_t columns,
                 const std::vector<std::uint8_t>& kept, Direction::Kind kind) {
  const std::size_t n = outputs * columns;
  const float sigma = -0.37f;
  const std::uint64_t keys[] = {11, 12, 13};
  const std::vector<float> normals = table(), rows = numbers(Direction::kRankOne, 11, outputs),
                           across = numbers(Direction::kRankOne, 12, columns),
                           z = numbers(kind, 11, n), bias_z = numbers(kind, 13, outputs);
  std::vector<float> dense(n), want(n);
  for (std::size_t i = 0, drawn = 0; i < n; ++i) {
    if (!kept[i]) continue;
    dense[i] = float(i + 1);
    const float number =
        kind == Direction::kRankOne ? rows[i / columns] * across[i % columns] : z[drawn++];
    want[i] = dense[i] + sigma * number;
  }
  if (layer->sparse()) layer->build(kept.data());
  Weight& weight = layer->tensors[kWeight];
  weight.trainable = layer->tensors[kBias].trainable = true;
  std::vector<std::uint32_t> positions = layer->weight_positions();
  if (!layer->sparse()) {
    for (std::size_t i = 0; i < n; ++i) positions.push_back(std::uint32_t(i));
    weight.kept = kept;
  }
  for (std::uint32_t at : positions) weight.value.push_back(dense[at]);
  layer->tensors[kBias].value.assign(outputs, 2.5f);

  Floats memory(MovedLayer::floats(*layer));
  MovedLayer moved_layer(*layer, {kind, sigma, normals.data(), keys}, 0, memory.data());
  for (int begin = 0, end; begin < int(outputs); begin = end) {
    const float* moved[2] = {};
    end = moved_layer.make(begin, moved);
    CHECK(end > begin && end <= int(outputs));
    std::size_t seen = 0;
    layer->for_runs(begin, end, [&](const Run& run) {
      CHECK(begin <= run.output && run.output < end);
      CHECK(run.at + (run.end - run.begin) <= layer->block_floats());
      for (std::uint32_t k = run.begin; k < run.end; ++k, ++seen)
        CHECK(moved[kWeight][run.at + (k - run.begin)] == want[positions[k]]);
    });
    std::size_t expected = 0;
    for (std::size_t i = begin * columns; i < end * columns; ++i)
      expected += kept[i] || !layer->sparse();
    CHECK(seen == expected);
    for (std::size_t o = 0; o < outputs; ++o) CHECK(moved[kBias][o] == 2.5f + sigma * bias_z[o]);
  }
}

std::vector<std::uint8_t> random_mask(std::size_t n, double density, Random& random) {
  std::vector<std::uint8_t> kept(n);
  for (auto& k : kept) k = toss(random, density);
  return kept;
}

void check_layers(Random& random) {
  for (Direction::Kind kind : {Direction::kGaussian, Direction::kSign, Direction::kRankOne}) {
    for (double density : {1.0, 0.9, 0.5, 0.2, 0.01, 0.0}) {
      const std::string about =
          "kind " + std::to_string(kind) + ", density " + std::to_string(density);
      check_context = "linear, " + about;
      Node linear{"fc", Kind::kLinear, {kModelInput}, {370, 1, 1}};
      linear.bias = true;
      auto kept = random_mask(370 * 601, density, random);  // blocks of 256 and 1024 inputs
      std::size_t count = count_kept(kept.data(), kept.size());
      check_layer(make_linear(linear, {601, 1, 1}, count, false), 370, 601, kept, kind);
      using Geometry = std::tuple<int, int, int>;  // kernel, stride, groups
      for (auto [kernel, stride, groups] : {Geometry{3, 1, 1}, {5, 2, 1}, {3, 2, 4}, {1, 1, 2}}) {
        check_context = "conv " + std::to_string(kernel) + "/" + std::to_string(stride) +
                        " groups " + std::to_string(groups) + ", " + about;
        const Shape in{148, 9, 8};
        Node conv{"conv", Kind::kConv2d, {kModelInput}, {60, 9, 8}};
        conv.kernel = {kernel, kernel};
        conv.stride = {stride, stride};
        conv.groups = groups;
        conv.padding = {kernel / 2, kernel / 2};
        conv.bias = true;
        conv.shape.height = (9 + 2 * conv.padding.y - kernel) / stride + 1;
        conv.shape.width = (8 + 2 * conv.padding.y - kernel) / stride + 1;
        const std::size_t columns = std::size_t(148 / groups) * kernel * kernel;
        kept = random_mask(60 * columns, density, random);
        count = count_kept(kept.data(), kept.size());
        check_layer(make_conv(conv, in, input_halo(conv), {}, count, false), 60, columns, kept,
                    kind);
      }
    }
  }
}

}  // namespace
}  // namespace fedlean

int main() {
  fedlean::Random random(0);
  fedlean::check_philox();
  fedlean::check_layers(random);
  return fedlean::finish();
}
