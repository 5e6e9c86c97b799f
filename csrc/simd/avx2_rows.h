// What passes over rows need beyond the products; the meaning is said in scalar_rows.h.
#pragma once

#include <immintrin.h>

#include "simd/avx2.h"

namespace slimkern {
namespace {

struct Avx2Rows : Avx2 {
  using Mask = __m256;
  using Avx2::store;
  using Avx2::store_first;

  static Vec set(float v) { return _mm256_set1_ps(v); }
  static void store(bf16_t* p, Vec v) {
    const __m256i bits = _mm256_srli_epi32(_mm256_castps_si256(round_bf16(v)), 16);
    const __m128i high = _mm256_extracti128_si256(bits, 1);
    _mm_storeu_si128((__m128i*)p, _mm_packus_epi32(_mm256_castsi256_si128(bits), high));
  }
  static void store_first(bf16_t* p, Vec v, int n) {
    alignas(16) bf16_t lanes[kWidth];
    store(lanes, v);
    for (int i = 0; i < n; ++i) p[i] = lanes[i];
  }
  static Mask first_lanes(int n) { return _mm256_castsi256_ps(first(n)); }

  static Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
  static Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
  static Vec div(Vec a, Vec b) { return _mm256_div_ps(a, b); }
  static Vec fnmadd(Vec a, Vec b, Vec c) { return _mm256_fnmadd_ps(a, b, c); }
  static Vec min(Vec a, Vec b) { return _mm256_min_ps(a, b); }
  static Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
  static Vec abs(Vec a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
  static Mask less(Vec a, Vec b) { return _mm256_cmp_ps(a, b, _CMP_LT_OQ); }
  static Mask equal(Vec a, Vec b) { return _mm256_cmp_ps(a, b, _CMP_EQ_OQ); }
  static Vec select(Mask m, Vec a, Vec b) { return _mm256_blendv_ps(b, a, m); }
  static float sum(Vec a) {
    __m128 v = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    v = _mm_add_ps(v, _mm_movehl_ps(v, v));
    return _mm_cvtss_f32(_mm_add_ss(v, _mm_movehdup_ps(v)));
  }
  static float largest(Vec a) {
    __m128 v = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    v = _mm_max_ps(v, _mm_movehl_ps(v, v));
    return _mm_cvtss_f32(_mm_max_ss(v, _mm_movehdup_ps(v)));
  }
  static Vec exponent(Vec a) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(a), 23));
  }
  static Vec lookup(const float (&table)[16], Vec a) {
    const __m256i index = _mm256_castps_si256(a);
    const Vec low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), index);
    const Vec high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), index);
    return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
  }
};

}  // namespace
}  // namespace slimkern
