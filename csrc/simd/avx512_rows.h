// What passes over rows need beyond the products; the meaning is said in scalar_rows.h.
#pragma once

#include <immintrin.h>

#include "simd/avx512.h"

namespace slimkern {
namespace {

struct Avx512Rows : Avx512 {
  using Mask = __mmask16;
  using Avx512::store;
  using Avx512::store_first;

  static Vec set(float v) { return _mm512_set1_ps(v); }
  static void store(bf16_t* p, Vec v) { _mm256_storeu_epi16(p, narrow(v)); }
  static void store_first(bf16_t* p, Vec v, int n) {
    _mm256_mask_storeu_epi16(p, first(n), narrow(v));
  }
  static Mask first_lanes(int n) { return first(n); }

  static Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
  static Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
  static Vec div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
  static Vec fnmadd(Vec a, Vec b, Vec c) { return _mm512_fnmadd_ps(a, b, c); }
  static Vec min(Vec a, Vec b) { return _mm512_min_ps(a, b); }
  static Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
  static Vec abs(Vec a) { return _mm512_abs_ps(a); }
  static Mask less(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
  static Mask equal(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
  static Vec select(Mask m, Vec a, Vec b) { return _mm512_mask_blend_ps(m, b, a); }
  static float sum(Vec a) {
    const __m256 w = _mm256_add_ps(lower(a), upper(a));
    __m128 v = _mm_add_ps(_mm256_castps256_ps128(w), _mm256_extractf128_ps(w, 1));
    v = _mm_add_ps(v, _mm_movehl_ps(v, v));
    return _mm_cvtss_f32(_mm_add_ss(v, _mm_movehdup_ps(v)));
  }
  static float largest(Vec a) {
    const __m256 w = _mm256_max_ps(lower(a), upper(a));
    __m128 v = _mm_max_ps(_mm256_castps256_ps128(w), _mm256_extractf128_ps(w, 1));
    v = _mm_max_ps(v, _mm_movehl_ps(v, v));
    return _mm_cvtss_f32(_mm_max_ss(v, _mm_movehdup_ps(v)));
  }
  static Vec exponent(Vec a) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(a), 23));
  }
  static Vec lookup(const float (&table)[16], Vec a) {
    return _mm512_permutexvar_ps(_mm512_castps_si512(a), _mm512_loadu_ps(table));
  }

 private:
  static __m256 lower(Vec a) { return __builtin_shufflevector(a, a, 0, 1, 2, 3, 4, 5, 6, 7); }
  static __m256 upper(Vec a) { return __builtin_shufflevector(a, a, 8, 9, 10, 11, 12, 13, 14, 15); }
  static __m256i narrow(Vec v) {
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(round_bf16(v)), 16));
  }
};

}  // namespace
}  // namespace slimkern
