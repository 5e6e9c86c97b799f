// AVX-512 with the dot product of bfloat16 pairs. It reads and leaves denormals as zeros.
#pragma once

#include <immintrin.h>

#include "simd/avx512.h"

namespace slimkern {
namespace {

struct Avx512Bf16 : Avx512 {
  // c + a.even * b.even + a.odd * b.odd, per pair.
  static Vec dot(Vec a, Vec b, Vec c) { return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b); }

  // Lanes of two rounded vectors, as the even and the odd half of a pair.
  static Vec pair(Vec even, Vec odd) {
    const __m512i low = _mm512_srli_epi32(_mm512_castps_si512(even), 16);
    return _mm512_castsi512_ps(_mm512_or_si512(low, _mm512_castps_si512(odd)));
  }

  // 32 floats in a row, rounded to 16 pairs.
  static Vec round_pairs(Vec first, Vec second) {
    return (Vec)_mm512_cvtne2ps_pbh(second, first);
  }
};

}  // namespace
}  // namespace slimkern
