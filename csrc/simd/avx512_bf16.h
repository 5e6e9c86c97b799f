// AVX-512 with the dot product of bfloat16 pairs. It reads and leaves denormals as zeros.
#pragma once

#include <immintrin.h>

#include "simd/avx512.h"

namespace slimkern {
namespace {

struct Avx512Bf16 : Avx512 {
  // c + a.even * b.even + a.odd * b.odd, per pair.
  static Vec dot(Vec a, Vec b, Vec c) { return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b); }

  // 32 floats in a row, rounded to 16 pairs.
  static Vec round_pairs(Vec first, Vec second) {
    return (Vec)_mm512_cvtne2ps_pbh(second, first);
  }
};

}  // namespace
}  // namespace slimkern
