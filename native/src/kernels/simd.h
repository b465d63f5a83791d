// Vectors of N floats by the compiler's vector extensions: one source for every instruction set.
// Included inside a kernel file, which defines KERNEL_LANES (floats of the widest vector) and
// KERNEL_TILE (accumulators that fit the registers).
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define KERNEL_INLINE inline __attribute__((always_inline))
#define KERNEL_LAMBDA __attribute__((always_inline))

namespace fedlean {
namespace {

template <int N>
struct VecOf {
  typedef float type __attribute__((vector_size(N * 4)));
  typedef float loose __attribute__((vector_size(N * 4), aligned(4), may_alias));
};
template <int N>
using Vec = typename VecOf<N>::type;

template <int N>
KERNEL_INLINE Vec<N> load(const float* p) {
  return *reinterpret_cast<const typename VecOf<N>::loose*>(p);
}
template <int N>
KERNEL_INLINE void store(float* p, Vec<N> v) {
  *reinterpret_cast<typename VecOf<N>::loose*>(p) = v;
}
template <int N>
KERNEL_INLINE Vec<N> splat(float v) {
  return v - Vec<N>{};  // exact, also for -0
}

// c + a*b, rounded once.  Where several pieces of code compute the same output (blocks of other
// sizes, tails), they say so, and tails say __builtin_fmaf: whether the compiler fuses a*b + c
// depends on what surrounds it, and then results would depend on how callers cut ranges.
template <int N>
KERNEL_INLINE Vec<N> multiply_add(Vec<N> a, Vec<N> b, Vec<N> c) {
#if defined(__x86_64__)
  if constexpr (N == 16) return _mm512_fmadd_ps(a, b, c);
  if constexpr (N == 8) return _mm256_fmadd_ps(a, b, c);
  if constexpr (N == 4) return _mm_fmadd_ps(a, b, c);
#else
  return vfmaq_f32(c, a, b);
#endif
}

// Sums lanes until four are left.
KERNEL_INLINE Vec<4> to_four(Vec<4> v) { return v; }
KERNEL_INLINE Vec<4> to_four(Vec<8> v) {
  return __builtin_shufflevector(v, v, 0, 1, 2, 3) + __builtin_shufflevector(v, v, 4, 5, 6, 7);
}
KERNEL_INLINE Vec<4> to_four(Vec<16> v) {
  return to_four(__builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
                 __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15));
}
KERNEL_INLINE float to_one(Vec<4> v) { return (v[0] + v[1]) + (v[2] + v[3]); }

// Four vectors -> the four sums of their lanes, each in the order of `to_one`.
KERNEL_INLINE Vec<4> sums_of(Vec<4> a, Vec<4> b, Vec<4> c, Vec<4> d) {
  Vec<4> ab = __builtin_shufflevector(a, b, 0, 4, 2, 6) + __builtin_shufflevector(a, b, 1, 5, 3, 7);
  Vec<4> cd = __builtin_shufflevector(c, d, 0, 4, 2, 6) + __builtin_shufflevector(c, d, 1, 5, 3, 7);
  return __builtin_shufflevector(ab, cd, 0, 1, 4, 5) + __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
}

// How to cut n into the fewest parts of at most `most`, as evenly as possible: part i is
// [begin(i), begin(i + 1)).
struct Cut {
  int n, parts;
  Cut(int n, int most) : n(n), parts((n + most - 1) / most) {}
  int begin(int i) const { return int(std::int64_t(n) * i / parts); }
};

// The widest vector, of KERNEL_LANES or less, that divides a row of `floats`.
#define KERNEL_WITH_WIDTH(floats, CALL)                  \
  do {                                                   \
    if (KERNEL_LANES >= 16 && (floats) % 16 == 0) {      \
      CALL((KERNEL_LANES >= 16 ? 16 : 4));               \
    } else if (KERNEL_LANES >= 8 && (floats) % 8 == 0) { \
      CALL((KERNEL_LANES >= 8 ? 8 : 4));                 \
    } else {                                             \
      CALL(4);                                           \
    }                                                    \
  } while (0)

}  // namespace
}  // namespace fedlean
