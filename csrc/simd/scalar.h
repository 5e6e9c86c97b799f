// The portable trait: one lane. The baseline of every target, and the path for double.
#pragma once

#include <cstdint>

#include "dtypes.h"

namespace slimkern {
namespace {

template <class T>
struct Scalar {
  using Acc = T;
  using Vec = T;
  static constexpr int kWidth = 1;
  static constexpr int kRegisters = 16;
  static constexpr int kMr = 4;       // register tile: kMr rows ...
  static constexpr int kVectors = 4;  // ... of kVectors vectors

  static Vec zero() { return T(0); }
  static Vec load(const T* p) { return *p; }
  static void store(T* p, Vec v) { *p = v; }
  static void keep(Vec&) {}
  static Vec broadcast(const T* p) { return *p; }
  static Vec add(Vec a, Vec b) { return a + b; }
  static Vec fmadd(Vec a, Vec b, Vec c) { return a * b + c; }

  // The first n of the lanes, 0 <= n <= kWidth; the others are zero, and are not touched.
  static Vec load_first(const T* p, int n) { return n > 0 ? *p : T(0); }
  static void store_first(T* p, Vec v, int n) {
    if (n > 0) *p = v;
  }
  // The lanes of set bits; the others are zero, and are not touched.
  template <class S>
  static Vec load_bits(const S* p, uint32_t bits) {
    return bits & 1u ? Vec(widen(*p)) : T(0);
  }
  static Vec load(const bf16_t* p) { return widen(*p); }
  static Vec load_first(const bf16_t* p, int n) { return n > 0 ? widen(*p) : T(0); }

  // Rounded to bfloat16, nearest even; a NaN stays a NaN.
  static Vec round_bf16(Vec v) { return widen(to_bf16(static_cast<float>(v))); }
  // Takes the leading bfloat16 off v. Infinities and NaNs leave nothing behind; a finite number has
  // a finite leading part.
  static Vec split_bf16(Vec& v) {
    const uint32_t size = __builtin_bit_cast(uint32_t, v) & 0x7fffffffu;
    bf16_t part = to_bf16(v);
    if (size >= 0x7f800000u) {
      v = 0;
      return widen(part);
    }
    if ((part.bits & 0x7fffu) == 0x7f80u) part.bits -= 1;
    v -= widen(part);
    return widen(part);
  }
  // Two rounded numbers as the halves of a pair.
  static Vec pair(Vec even, Vec odd) {
    const uint32_t low = __builtin_bit_cast(uint32_t, even) >> 16;
    return __builtin_bit_cast(float, low | __builtin_bit_cast(uint32_t, odd));
  }
  // The leading bfloat16 of the numbers of two vectors, in pairs of neighbours.
  static Vec round_pairs(Vec first, Vec second) {
    return pair(round_bf16(first), round_bf16(second));
  }
  static Vec split_pairs(Vec& first, Vec& second) {
    const Vec even = split_bf16(first);
    return pair(even, split_bf16(second));
  }
  // Rows become columns.
  static void transpose(Vec (&)[kWidth]) {}
};

}  // namespace
}  // namespace slimkern
