// Sixteen float lanes, thirty-two registers: a 12 x 2 tile uses twenty-four as accumulators.
#pragma once

#include <immintrin.h>

namespace slimkern {
namespace {

struct Avx512 {
  using Acc = float;
  using Vec = __m512;
  static constexpr int kWidth = 16;
  static constexpr int kMr = 12;
  static constexpr int kVectors = 2;

  static Vec zero() { return _mm512_setzero_ps(); }
  static Vec load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
  static Vec broadcast(const float* p) { return _mm512_set1_ps(*p); }
  static Vec fmadd(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
};

}  // namespace
}  // namespace slimkern
