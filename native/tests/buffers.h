// Arrays as the engine has them, with canaries around them, and how results are compared.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "fedlean/kernels.h"

// The address sanitizer has its own canaries, right behind an exact allocation; reads trip them
// too.
#if defined(__SANITIZE_ADDRESS__)
#define TEST_GUARD_BYTES 0
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define TEST_GUARD_BYTES 0
#endif
#endif
#ifndef TEST_GUARD_BYTES
#define TEST_GUARD_BYTES 256
#endif

namespace fedlean {

using Random = std::mt19937;

inline int pick(Random& random, int low, int high) {
  return std::uniform_int_distribution<int>(low, high)(random);
}
inline bool toss(Random& random, double probability = 0.5) {
  return std::bernoulli_distribution(probability)(random);
}

// n values of T, 64-byte aligned like the engine's arrays.
template <typename T>
class Buffer {
public:
  explicit Buffer(std::size_t n) : n_(n) {
    void* bytes = nullptr;
    if (posix_memalign(&bytes, 64, std::max<std::size_t>(1, n * sizeof(T) + 2 * kGuard)))
      std::abort();
    bytes_.reset(static_cast<unsigned char*>(bytes));
    std::memset(bytes, kCanary, n * sizeof(T) + 2 * kGuard);
  }
  Buffer(const Buffer& other) : Buffer(other.n_) {
    if (n_) std::memcpy(data(), other.data(), n_ * sizeof(T));
  }

  T* data() { return reinterpret_cast<T*>(bytes_.get() + kGuard); }
  const T* data() const { return reinterpret_cast<const T*>(bytes_.get() + kGuard); }
  T& operator[](std::size_t i) { return data()[i]; }
  const T& operator[](std::size_t i) const { return data()[i]; }
  std::size_t size() const { return n_; }

  bool intact() const {  // nothing was written before or behind it
    for (std::size_t i = 0; i < kGuard; ++i)
      if (bytes_[i] != kCanary || bytes_[kGuard + n_ * sizeof(T) + i] != kCanary) return false;
    return true;
  }
  bool same_bits(const Buffer& other) const {
    return n_ == other.n_ && (n_ == 0 || !std::memcmp(data(), other.data(), n_ * sizeof(T)));
  }

private:
  static constexpr std::size_t kGuard = TEST_GUARD_BYTES;
  static constexpr unsigned char kCanary = 0xff;  // NaN, so that what reads it shows

  struct Free {
    void operator()(unsigned char* bytes) const { std::free(bytes); }
  };
  std::size_t n_;
  std::unique_ptr<unsigned char[], Free> bytes_;
};

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr float kInf = std::numeric_limits<float>::infinity();

using Floats = Buffer<float>;
using Bytes = Buffer<std::uint8_t>;

inline Floats random_floats(std::size_t n, Random& random) {
  Floats values(n);
  for (std::size_t i = 0; i < n; ++i)
    values[i] = std::uniform_real_distribution<float>(-1, 1)(random);
  return values;
}

// Values at and around every kink, ties, both zeros and what is not finite.
inline Floats awkward_floats(std::size_t n, Random& random) {
  const float special[] = {-0.0f, 0.0f, -3, 3, -1, 1, -4, 6, 100, -100, kNaN, kInf, -kInf};
  Floats values = random_floats(n, random);
  for (std::size_t i = 0; i < n; ++i)
    values[i] = toss(random, 0.3) ? special[pick(random, 0, 12)] : 5 * values[i];
  return values;
}

constexpr auto everywhere = [](std::size_t) { return true; };

// Checks `got` (initially `before`): within 1e-5 of `want`'s largest magnitude where `written(i)`,
// and untouched, to the bit, everywhere else.  `terms`: what the summands reach, where the results
// may all cancel to less.
template <typename Written>
void check_result(const Floats& got, const Floats& want, const Floats& before, Written written,
                  double terms = 0) {
  double largest = terms;
  for (std::size_t i = 0; i < want.size(); ++i)
    if (written(i) && std::isfinite(want[i])) largest = std::fmax(largest, std::fabs(want[i]));
  std::size_t wrong = 0, touched = 0;
  for (std::size_t i = 0; i < want.size(); ++i) {
    if (!written(i)) {
      touched += std::memcmp(&got[i], &before[i], sizeof(float)) != 0;
    } else if (std::isfinite(want[i])) {
      wrong += !(std::fabs(double(got[i]) - want[i]) <= 1e-5 * largest);
    } else {
      wrong += !is_close(got[i], want[i], 0);
    }
  }
  CHECK(wrong == 0);
  CHECK(touched == 0);
  CHECK(got.intact());
}

// Random cut of [begin, end) into ranges, for what must not depend on it.
inline std::vector<int> random_cuts(int begin, int end, Random& random) {
  std::vector<int> cuts = {begin};
  while (cuts.back() < end) cuts.push_back(pick(random, cuts.back() + 1, end));
  return cuts;
}

}  // namespace fedlean
