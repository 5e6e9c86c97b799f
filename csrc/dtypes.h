// Storage types and their conversions to the type that is computed in.
#pragma once

#include <cstdint>

namespace slimkern {

enum class DType { kFloat32 = 0, kBFloat16 = 1, kFloat64 = 2 };

struct bf16_t {
  uint16_t bits;
};

namespace {

inline float widen(float v) { return v; }
inline double widen(double v) { return v; }
inline float widen(bf16_t v) {
  return __builtin_bit_cast(float, static_cast<uint32_t>(v.bits) << 16);
}

// Round to nearest, ties to even; a NaN stays a NaN (its payload could round to infinity).
inline bf16_t to_bf16(float v) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, v);
  const uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return {static_cast<uint16_t>(nan ? 0x7fc0u : rounded >> 16)};
}

template <class T>
struct Storage;
template <>
struct Storage<float> {
  using Acc = float;
  static float narrow(float v) { return v; }
};
template <>
struct Storage<double> {
  using Acc = double;
  static double narrow(double v) { return v; }
};
template <>
struct Storage<bf16_t> {
  using Acc = float;
  static bf16_t narrow(float v) { return to_bf16(v); }
};

}  // namespace
}  // namespace slimkern
