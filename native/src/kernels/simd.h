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

// Sums lanes until four are left.  (Given the halves' shuffles, GCC shuffles whole vectors.)
KERNEL_INLINE Vec<4> to_four(Vec<4> v) { return v; }
KERNEL_INLINE Vec<4> to_four(Vec<8> v) {
#if defined(__AVX__)
  return Vec<4>(_mm256_castps256_ps128(__m256(v))) + Vec<4>(_mm256_extractf128_ps(__m256(v), 1));
#else
  return __builtin_shufflevector(v, v, 0, 1, 2, 3) + __builtin_shufflevector(v, v, 4, 5, 6, 7);
#endif
}
KERNEL_INLINE Vec<4> to_four(Vec<16> v) {
#if defined(__AVX512F__)
  const __m512d wide = _mm512_castps_pd(__m512(v));
  return to_four(Vec<8>(_mm512_castps512_ps256(__m512(v))) +
                 Vec<8>(_mm256_castpd_ps(_mm512_extractf64x4_pd(wide, 1))));
#else
  return to_four(__builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
                 __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15));
#endif
}
KERNEL_INLINE float to_one(Vec<4> v) { return (v[0] + v[2]) + (v[1] + v[3]); }

// Shuffles of a and b within every four lanes; `low_halves`, for one, is a0 b0 a1 b1.
#define KERNEL_AT(N, G, I) ((I) < 4 ? 4 * (G) + (I) : (N) + 4 * (G) + (I) - 4)
#define KERNEL_FOUR(N, G, I, J, K, L) \
  KERNEL_AT(N, G, I), KERNEL_AT(N, G, J), KERNEL_AT(N, G, K), KERNEL_AT(N, G, L)
#define KERNEL_INDICES_4(...) KERNEL_FOUR(4, 0, __VA_ARGS__)
#define KERNEL_INDICES_8(...) KERNEL_FOUR(8, 0, __VA_ARGS__), KERNEL_FOUR(8, 1, __VA_ARGS__)
#define KERNEL_INDICES_16(...)                                      \
  KERNEL_FOUR(16, 0, __VA_ARGS__), KERNEL_FOUR(16, 1, __VA_ARGS__), \
      KERNEL_FOUR(16, 2, __VA_ARGS__), KERNEL_FOUR(16, 3, __VA_ARGS__)
#define KERNEL_SHUFFLES(N)                                                \
  KERNEL_INLINE Vec<N> low_halves(Vec<N> a, Vec<N> b) {                   \
    return __builtin_shufflevector(a, b, KERNEL_INDICES_##N(0, 4, 1, 5)); \
  }                                                                       \
  KERNEL_INLINE Vec<N> high_halves(Vec<N> a, Vec<N> b) {                  \
    return __builtin_shufflevector(a, b, KERNEL_INDICES_##N(2, 6, 3, 7)); \
  }                                                                       \
  KERNEL_INLINE Vec<N> low_pairs(Vec<N> a, Vec<N> b) {                    \
    return __builtin_shufflevector(a, b, KERNEL_INDICES_##N(0, 1, 4, 5)); \
  }                                                                       \
  KERNEL_INLINE Vec<N> high_pairs(Vec<N> a, Vec<N> b) {                   \
    return __builtin_shufflevector(a, b, KERNEL_INDICES_##N(2, 3, 6, 7)); \
  }
KERNEL_SHUFFLES(4)
#if KERNEL_LANES >= 8
KERNEL_SHUFFLES(8)
#endif
#if KERNEL_LANES >= 16
KERNEL_SHUFFLES(16)
#endif
#undef KERNEL_SHUFFLES
#undef KERNEL_INDICES_4
#undef KERNEL_INDICES_8
#undef KERNEL_INDICES_16
#undef KERNEL_FOUR
#undef KERNEL_AT

// Four vectors -> the four sums of their lanes.
template <typename V>
KERNEL_INLINE Vec<4> sums_of(V a, V b, V c, V d) {
  const V ab = low_halves(a, b) + high_halves(a, b);
  const V cd = low_halves(c, d) + high_halves(c, d);
  return to_four(low_pairs(ab, cd) + high_pairs(ab, cd));
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
