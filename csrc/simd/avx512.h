// Sixteen float lanes, thirty-two registers: a 12 x 2 tile uses twenty-four as accumulators.
#pragma once

// GCC 12 takes the undefined lanes of its own intrinsics for a mistake.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>

#include <cstdint>

#include "dtypes.h"

namespace slimkern {
namespace {

struct Avx512 {
  using Acc = float;
  using Vec = __m512;
  static constexpr int kWidth = 16;
  static constexpr int kRegisters = 32;
  static constexpr int kMr = 12;
  static constexpr int kVectors = 2;

  static Vec zero() { return _mm512_setzero_ps(); }
  static Vec load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
  // In a register from here on: not read again by each instruction that uses it.
  static void keep(Vec& v) { __asm__("" : "+v"(v)); }
  static Vec broadcast(const float* p) { return _mm512_set1_ps(*p); }
  static Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
  static Vec fmadd(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }

  static __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1); }
  // The first n of the lanes, 0 <= n <= kWidth; the others are zero, and are not touched.
  static Vec load_first(const float* p, int n) { return _mm512_maskz_loadu_ps(first(n), p); }
  static void store_first(float* p, Vec v, int n) { _mm512_mask_storeu_ps(p, first(n), v); }
  // The lanes of set bits; the others are zero, and are not touched.
  static Vec load_bits(const float* p, uint32_t bits) {
    return _mm512_maskz_loadu_ps(static_cast<__mmask16>(bits), p);
  }
  static Vec load_bits(const bf16_t* p, uint32_t bits) {
    return widen(_mm256_maskz_loadu_epi16(static_cast<__mmask16>(bits), p));
  }
  static Vec load(const bf16_t* p) { return widen(_mm256_loadu_si256((const __m256i*)p)); }
  static Vec load_first(const bf16_t* p, int n) {
    return widen(_mm256_maskz_loadu_epi16(first(n), p));
  }
  static Vec widen(__m256i v) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
  }

  // Rounded to bfloat16, nearest even; a NaN stays a NaN.
  static Vec round_bf16(Vec v) {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i half = _mm512_add_epi32(_mm512_set1_epi32(0x7fff), odd);
    const __m512i rounded = _mm512_and_si512(_mm512_add_epi32(bits, half),
                                             _mm512_set1_epi32(static_cast<int>(0xffff0000u)));
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    return _mm512_castsi512_ps(_mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000)));
  }

  // Takes the leading bfloat16 off v. Infinities and NaNs leave nothing behind; a finite number has
  // a finite leading part.
  static Vec split_bf16(Vec& v) {
    const __m512i most = _mm512_set1_epi32(0x7fffffff), infinity = _mm512_set1_epi32(0x7f800000);
    const __m512i size = _mm512_and_si512(_mm512_castps_si512(v), most);
    const __mmask16 finite = _mm512_cmplt_epi32_mask(size, infinity);
    const __m512i lead = _mm512_castps_si512(round_bf16(v));
    const __mmask16 over =
        _mm512_mask_cmpeq_epi32_mask(finite, _mm512_and_si512(lead, most), infinity);
    const Vec part = _mm512_castsi512_ps(
        _mm512_mask_sub_epi32(lead, over, lead, _mm512_set1_epi32(0x10000)));
    v = _mm512_maskz_sub_ps(finite, v, part);
    return part;
  }

  // Lanes of two rounded vectors, as the even and the odd half of a pair.
  static Vec pair(Vec even, Vec odd) {
    const __m512i low = _mm512_srli_epi32(_mm512_castps_si512(even), 16);
    return _mm512_castsi512_ps(_mm512_or_si512(low, _mm512_castps_si512(odd)));
  }
  // Lanes of a rounded vector and of the one after it, in pairs of neighbours.
  static Vec neighbours(Vec first, Vec second) {
    const __m512i low = _mm512_srli_epi32(_mm512_castps_si512(first), 16);
    const __m512i high = _mm512_srli_epi32(_mm512_castps_si512(second), 16);
    const __m512i lower = _mm512_castsi256_si512(_mm512_cvtepi32_epi16(low));
    return _mm512_castsi512_ps(_mm512_inserti64x4(lower, _mm512_cvtepi32_epi16(high), 1));
  }

  // Rows become columns.
  static void transpose(Vec (&v)[kWidth]) {
    Vec a[kWidth], b[kWidth];
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; i += 2) {
      a[i] = _mm512_unpacklo_ps(v[i], v[i + 1]);
      a[i + 1] = _mm512_unpackhi_ps(v[i], v[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < kWidth; i += 4) {
      b[i] = unpack_pairs<false>(a[i], a[i + 2]);
      b[i + 1] = unpack_pairs<true>(a[i], a[i + 2]);
      b[i + 2] = unpack_pairs<false>(a[i + 1], a[i + 3]);
      b[i + 3] = unpack_pairs<true>(a[i + 1], a[i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const Vec even_low = _mm512_shuffle_f32x4(b[i], b[i + 4], 0x88);
      const Vec odd_low = _mm512_shuffle_f32x4(b[i], b[i + 4], 0xdd);
      const Vec even_high = _mm512_shuffle_f32x4(b[i + 8], b[i + 12], 0x88);
      const Vec odd_high = _mm512_shuffle_f32x4(b[i + 8], b[i + 12], 0xdd);
      v[i] = _mm512_shuffle_f32x4(even_low, even_high, 0x88);
      v[i + 4] = _mm512_shuffle_f32x4(odd_low, odd_high, 0x88);
      v[i + 8] = _mm512_shuffle_f32x4(even_low, even_high, 0xdd);
      v[i + 12] = _mm512_shuffle_f32x4(odd_low, odd_high, 0xdd);
    }
  }

 private:
  template <bool kHigh>
  static Vec unpack_pairs(Vec a, Vec b) {
    const __m512d x = _mm512_castps_pd(a), y = _mm512_castps_pd(b);
    return _mm512_castpd_ps(kHigh ? _mm512_unpackhi_pd(x, y) : _mm512_unpacklo_pd(x, y));
  }
};

}  // namespace
}  // namespace slimkern
