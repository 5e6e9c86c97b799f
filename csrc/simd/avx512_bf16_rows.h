// Rows on a processor that rounds to bfloat16 in one instruction. It stores denormals as zeros.
#pragma once

#include <immintrin.h>

#include "simd/avx512_rows.h"

namespace slimkern {
namespace {

struct Avx512Bf16Rows : Avx512Rows {
  using Avx512Rows::store;
  using Avx512Rows::store_first;

  static void store(bf16_t* p, Vec v) {
    _mm256_storeu_epi16(p, (__m256i)_mm512_cvtneps_pbh(v));
  }
  static void store_first(bf16_t* p, Vec v, int n) {
    _mm256_mask_storeu_epi16(p, first(n), (__m256i)_mm512_cvtneps_pbh(v));
  }
};

}  // namespace
}  // namespace slimkern
