// Random directions in weight space, bit for bit those of fedlean.engine.directions: numbers come
// from a counter, one after the other for the kept coordinates in row-major order, so that the
// perturbed weights of a layer can be made anew whenever they are needed.
#pragma once

#include <cstddef>
#include <cstdint>

#include "fedlean/layer.h"

namespace fedlean {

// `blocks` blocks of four words of Philox4x64-10 (Salmon et al., SC 2011) under the key (key, 0),
// those of the counters first, first + 1, ...
void philox(std::uint64_t key, std::uint64_t first, int blocks, std::uint64_t* words);

struct Direction {
  enum Kind { kGaussian, kSign, kRankOne };
  // Per node: the weight (of rank one: its rows), the weight's columns, the bias.
  enum Key { kWeightKey, kColumnsKey, kBiasKey, kKeys };

  Kind kind;
  float sigma;
  const float* normals;  // 65,536 values, each as likely
  const std::uint64_t* keys;  // kKeys per node

  const float* numbers() const { return kind == kSign ? nullptr : normals; }
  const std::uint64_t* keys_of(int node) const { return keys + std::size_t(kKeys) * node; }
};

// The numbers of one tensor (or one factor of it), one after the other.
class Numbers {
public:
  // `normals` is null for signs.
  Numbers(std::uint64_t key, const float* normals) : key_(key), normals_(normals) {}

  float next() {
    if (at_ == kBuffer) fill();
    return buffer_[at_++];
  }
  // f(numbers, index of the first, how many) for the next n.
  template <typename F>
  void take(std::size_t n, F&& f) {
    for (std::size_t i = 0; i < n;) {
      if (at_ == kBuffer) fill();
      const std::size_t m = n - i < kBuffer - at_ ? n - i : kBuffer - at_;
      f(buffer_ + at_, i, m);
      at_ += m;
      i += m;
    }
  }

private:
  static constexpr std::size_t kBuffer = 256;  // whole blocks of either kind
  void fill();

  std::uint64_t key_;
  const float* normals_;
  std::uint64_t counter_ = 1;
  std::size_t at_ = kBuffer;
  float buffer_[kBuffer];
};

// The perturbed tensors of one layer for one pass: w + sigma z, product and sum each rounded.
class MovedLayer {
public:
  // Of the memory that is needed.
  static std::size_t floats(const Layer& layer);

  MovedLayer(const Layer& layer, const Direction& direction, int node, float* memory);
  // Those of the block that starts at output `begin`, where the last one ended: points `moved` to
  // them where they are trainable.  Returns where the block ends.
  int make(int begin, const float* moved[2]);

private:
  void move_weights(int begin, int end);

  const Layer& layer_;
  const float sigma_;
  Numbers weight_, bias_;  // the weight's are its rows' with rank one
  bool rank_one_ = false;
  int row_ = -1;
  float u_ = 0;  // of that row
  float *values_, *bias_values_, *columns_;
};

}  // namespace fedlean
