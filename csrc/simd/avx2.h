// Eight float lanes, sixteen registers: a 6 x 2 tile uses twelve of them as accumulators.
#pragma once

#include <immintrin.h>

namespace slimkern {
namespace {

struct Avx2 {
  using Acc = float;
  using Vec = __m256;
  static constexpr int kWidth = 8;
  static constexpr int kMr = 6;
  static constexpr int kVectors = 2;

  static Vec zero() { return _mm256_setzero_ps(); }
  static Vec load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
  static Vec broadcast(const float* p) { return _mm256_broadcast_ss(p); }
  static Vec fmadd(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
};

}  // namespace
}  // namespace slimkern
