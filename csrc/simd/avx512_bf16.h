// AVX-512 with the dot product of bfloat16 pairs. It reads and leaves denormals as zeros.
#pragma once

#include <immintrin.h>

#include "simd/avx512.h"

namespace slimkern {
namespace {

struct Avx512Bf16 : Avx512 {
  // c + a.even * b.even + a.odd * b.odd, per pair.
  static Vec dot(Vec a, Vec b, Vec c) { return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b); }

  static Vec round_bf16(Vec v) { return widen((__m256i)_mm512_cvtneps_pbh(v)); }
  static Vec split_bf16(Vec& v) {
    const Vec part = round_bf16(v), rest = _mm512_sub_ps(v, part);
    if (any_special(rest)) return Avx512::split_bf16(v);
    v = rest;
    return part;
  }

  // 32 floats in a row, rounded to 16 pairs.
  static Vec round_pairs(Vec first, Vec second) {
    return (Vec)_mm512_cvtne2ps_pbh(second, first);
  }
  // Takes the leading bfloat16 of each off 32 floats in a row, and returns them as pairs.
  static Vec split_pairs(Vec& first, Vec& second) {
    const Vec parts = round_pairs(first, second);
    const __m512i bits = _mm512_castps_si512(parts);
    const Vec rest = _mm512_sub_ps(first, widen(_mm512_castsi512_si256(bits)));
    const Vec other = _mm512_sub_ps(second, widen(_mm512_extracti64x4_epi64(bits, 1)));
    if (any_special(rest) || any_special(other)) {
      const Vec low = Avx512::split_bf16(first);
      return neighbours(low, Avx512::split_bf16(second));
    }
    first = rest;
    second = other;
    return parts;
  }

 private:
  // A NaN or an infinity in any lane: what is left of one, or of a number that was rounded to one.
  static bool any_special(Vec v) { return _mm512_fpclass_ps_mask(v, 0x99) != 0; }
};

}  // namespace
}  // namespace slimkern
