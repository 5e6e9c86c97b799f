// What passes over rows need beyond the products: the portable lane, and what each function means.
#pragma once

#include "simd/scalar.h"

namespace slimkern {
namespace {

struct ScalarRows : Scalar<float> {
  using Mask = bool;
  using Scalar<float>::store;
  using Scalar<float>::store_first;

  static Vec set(float v) { return v; }
  // Rounded to nearest, ties to even; a NaN stays a NaN.
  static void store(bf16_t* p, Vec v) { *p = to_bf16(v); }
  static void store_first(bf16_t* p, Vec v, int n) {
    if (n > 0) *p = to_bf16(v);
  }
  // The first n lanes: true.
  static Mask first_lanes(int n) { return n > 0; }

  static Vec sub(Vec a, Vec b) { return a - b; }
  static Vec mul(Vec a, Vec b) { return a * b; }
  static Vec div(Vec a, Vec b) { return a / b; }
  static Vec fnmadd(Vec a, Vec b, Vec c) { return c - a * b; }
  // b where one of the two is a NaN.
  static Vec min(Vec a, Vec b) { return a < b ? a : b; }
  static Vec max(Vec a, Vec b) { return a > b ? a : b; }
  static Vec abs(Vec a) { return __builtin_fabsf(a); }
  // False where one of the two is a NaN.
  static Mask less(Vec a, Vec b) { return a < b; }
  static Mask equal(Vec a, Vec b) { return a == b; }
  static Vec select(Mask m, Vec a, Vec b) { return m ? a : b; }
  // Over the lanes; the largest of NaNs is any of the lanes.
  static float sum(Vec a) { return a; }
  static float largest(Vec a) { return a; }
  // The number whose bits are those of a, moved up to the place of the exponent.
  static Vec exponent(Vec a) {
    return __builtin_bit_cast(float, __builtin_bit_cast(uint32_t, a) << 23);
  }
  // table[the low four bits of a]
  static Vec lookup(const float (&table)[16], Vec a) {
    return table[__builtin_bit_cast(uint32_t, a) & 15u];
  }
};

}  // namespace
}  // namespace slimkern
