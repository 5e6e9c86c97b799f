// Eight float lanes, sixteen registers: a 6 x 2 tile uses twelve of them as accumulators.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "dtypes.h"

namespace slimkern {
namespace {

struct Avx2 {
  using Acc = float;
  using Vec = __m256;
  static constexpr int kWidth = 8;
  static constexpr int kRegisters = 16;
  static constexpr int kMr = 6;
  static constexpr int kVectors = 2;

  static Vec zero() { return _mm256_setzero_ps(); }
  static Vec load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
  // In a register from here on: not read again by each instruction that uses it.
  static void keep(Vec& v) { __asm__("" : "+x"(v)); }
  static Vec broadcast(const float* p) { return _mm256_broadcast_ss(p); }
  static Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
  static Vec fmadd(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }

  static __m256i first(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  // The first n of the lanes, 0 <= n <= kWidth; the others are zero, and are not touched.
  static Vec load_first(const float* p, int n) { return _mm256_maskload_ps(p, first(n)); }
  static void store_first(float* p, Vec v, int n) { _mm256_maskstore_ps(p, first(n), v); }
  // The lanes of set bits; the others are zero, and are not touched.
  static Vec load_bits(const float* p, uint32_t bits) {
    const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i set = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), lane);
    return _mm256_maskload_ps(p, _mm256_cmpeq_epi32(set, lane));
  }
  static Vec load_bits(const bf16_t* p, uint32_t bits) {
    alignas(16) bf16_t lanes[kWidth] = {};
    for (int i = 0; i < kWidth; ++i) {
      if (bits >> i & 1u) lanes[i] = p[i];
    }
    return load(lanes);
  }
  static Vec load(const bf16_t* p) { return widen(_mm_loadu_si128((const __m128i*)p)); }
  static Vec load_first(const bf16_t* p, int n) {
    alignas(16) bf16_t lanes[kWidth] = {};
    for (int i = 0; i < n; ++i) lanes[i] = p[i];
    return load(lanes);
  }
  static Vec widen(__m128i v) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16));
  }

  // Rounded to bfloat16, nearest even; a NaN stays a NaN.
  static Vec round_bf16(Vec v) {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i half = _mm256_add_epi32(_mm256_set1_epi32(0x7fff), odd);
    const __m256i rounded = _mm256_and_si256(_mm256_add_epi32(bits, half),
                                             _mm256_set1_epi32(static_cast<int>(0xffff0000u)));
    const Vec quiet = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc00000));
    return _mm256_blendv_ps(_mm256_castsi256_ps(rounded), quiet, _mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  }

  // Rows become columns.
  static void transpose(Vec (&v)[kWidth]) {
    Vec a[kWidth], b[kWidth];
#pragma GCC unroll 8
    for (int i = 0; i < kWidth; i += 2) {
      a[i] = _mm256_unpacklo_ps(v[i], v[i + 1]);
      a[i + 1] = _mm256_unpackhi_ps(v[i], v[i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < kWidth; i += 4) {
      b[i] = _mm256_shuffle_ps(a[i], a[i + 2], 0x44);
      b[i + 1] = _mm256_shuffle_ps(a[i], a[i + 2], 0xee);
      b[i + 2] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0x44);
      b[i + 3] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0xee);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      v[i] = _mm256_permute2f128_ps(b[i], b[i + 4], 0x20);
      v[i + 4] = _mm256_permute2f128_ps(b[i], b[i + 4], 0x31);
    }
  }
};

}  // namespace
}  // namespace slimkern
