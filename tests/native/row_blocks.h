// What the drivers of the row kernels share: random blocks of rows in buffers of exactly the size
// that is needed, and the functions in double that results are compared with.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "isa.h"

using namespace slimkern;

inline std::mt19937_64 rng;

inline int64_t pick(int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(rng);
}

inline int64_t size() {
  static const int64_t kSizes[] = {0, 1, 2, 7, 8, 9, 15, 16, 17, 31, 63, 64, 65, 96, 130, 307};
  return kSizes[pick(0, 15)];
}

enum class Special { kNone, kNan, kNanAndInf, kAll };

inline float draw(double scale, Special special) {
  static std::normal_distribution<double> normal;
  constexpr float kInf = INFINITY;
  static const float kOdd[] = {NAN, NAN, kInf, -kInf, 1e-40f, -1e-45f, 3.4e38f, -3.4e38f, -0.0f, 90};
  const int last = special == Special::kNan ? 1 : special == Special::kNanAndInf ? 3 : 9;
  if (special != Special::kNone && pick(0, 59) == 0) return kOdd[pick(0, last)];
  return static_cast<float>(normal(rng) * scale);
}

// rows x cols of float32 or bfloat16, at a random stride and distance from the buffer's beginning.
struct Block {
  DType dtype;
  int64_t rows, cols, stride, start;
  std::vector<char> bytes;

  Block(DType type, int64_t r, int64_t c, double scale = 1, Special special = Special::kNone)
      : dtype(type), rows(r), cols(c), stride(c), start(pick(0, 3)) {
    if (pick(0, 1)) stride += pick(0, 20);
    const int64_t count = rows == 0 ? 0 : (rows - 1) * stride + cols;
    bytes.resize((start + count) * item());
    for (int64_t i = 0; i < start + count; ++i) put(i, draw(scale, special));
  }
  int64_t item() const { return dtype == DType::kBFloat16 ? 2 : 4; }
  void* data() { return bytes.data() + start * item(); }
  float* floats() { return static_cast<float*>(data()); }
  void put(int64_t i, float v) {
    const bf16_t half = to_bf16(v);
    const void* from = item() == 2 ? static_cast<const void*>(&half) : &v;
    std::memcpy(bytes.data() + i * item(), from, item());
  }
  void set(int64_t i, int64_t j, float v) { put(start + i * stride + j, v); }
  float get(int64_t i, int64_t j) const {
    const char* at = bytes.data() + (start + i * stride + j) * item();
    bf16_t half;
    float v;
    std::memcpy(&half, at, 2);
    if (item() == 2) return widen(half);
    std::memcpy(&v, at, 4);
    return v;
  }
  // Whether something beside the elements differs.
  bool strayed(const Block& before) const {
    std::vector<char> inside(bytes.size(), 0);
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < cols * item(); ++j) inside[(start + i * stride) * item() + j] = 1;
    }
    for (size_t i = 0; i < bytes.size(); ++i) {
      if (!inside[i] && bytes[i] != before.bytes[i]) return true;
    }
    return false;
  }
};

inline const char* activation_name(Activation a) {
  static const char* kNames[kActivationCount] = {"none",      "relu",       "squared_relu", "gelu",
                                                 "gelu_tanh", "quick_gelu", "silu"};
  return kNames[static_cast<int>(a)];
}

// In double, infinities as torch has them: a(inf) = inf, a(-inf) is NaN but for the ReLUs.
inline double activation_exact(Activation a, double x) {
  switch (a) {
    case Activation::kNone:
      return x;
    case Activation::kRelu:
      return x < 0 ? 0 : x;
    case Activation::kSquaredRelu:
      return x < 0 ? 0 : x * x;
    case Activation::kGelu:
      return x * 0.5 * std::erfc(-x / std::sqrt(2.0));
    case Activation::kGeluTanh:
      return x / (1 + std::exp(-2 * std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
    case Activation::kQuickGelu:
      return x / (1 + std::exp(-1.702 * x));
    case Activation::kSilu:
      return x / (1 + std::exp(-x));
  }
  return NAN;
}

// The distance of neighbouring floats around v.
inline double ulp(double v) {
  if (std::fabs(v) < 0x1p-126) return 0x1p-149;
  int exponent;
  std::frexp(v, &exponent);
  return std::ldexp(1.0, exponent - 24);
}

// The promised error of an activation: in ulp of the result for x >= 0, absolute for x < 0. The
// scalar path rounds twice where the others have a fused multiply-add.
struct ActivationBound {
  double ulps, below;
};

inline ActivationBound activation_bound(Activation a, Isa isa) {
  switch (a) {
    case Activation::kNone:
    case Activation::kRelu:
      return {0, 0};
    case Activation::kSquaredRelu:
      return {0.5, 0};
    case Activation::kGelu:
      return isa == Isa::kScalar ? ActivationBound{1.6, 4.2e-8} : ActivationBound{1.2, 3e-8};
    default:
      return {2, 6e-8};
  }
}

// Equal classes (NaN, an infinity), or no further apart than `bound`. Beyond float's range lies inf.
inline bool agrees(double got, double want, double bound) {
  if (std::isnan(want)) return std::isnan(got);
  const float rounded = static_cast<float>(want);
  if (std::isinf(rounded)) return got == rounded;
  return std::fabs(got - want) <= bound;
}
