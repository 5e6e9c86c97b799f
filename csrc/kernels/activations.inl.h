// Activations, and their product with a gate's other half, in place.
#pragma once

#include <cstdint>

#include "kernel_table.h"
#include "kernels/elementary.inl.h"
#include "kernels/rows.inl.h"

namespace slimkern {
namespace {

template <class Simd, Activation kActivation>
inline typename Simd::Vec activation(typename Simd::Vec x) {
  using Vec = typename Simd::Vec;
  if constexpr (kActivation == Activation::kRelu) {
    return Simd::max(Simd::zero(), x);
  } else if constexpr (kActivation == Activation::kSquaredRelu) {
    const Vec y = Simd::max(Simd::zero(), x);
    return Simd::mul(y, y);
  } else if constexpr (kActivation == Activation::kGelu) {
    return times_normal<Simd>(x);
  } else if constexpr (kActivation == Activation::kGeluTanh) {
    // (1 + tanh(u)) / 2 = 1 / (1 + exp(-2 u)) with -2 u = -2 sqrt(2 / pi) (x + 0.044715 x^3)
    constexpr double kSlope = -1.5957691216057307117597842397375;
    const Vec square = Simd::mul(x, x);
    const Vec slope = Simd::fmadd(square, Simd::set(static_cast<float>(kSlope * 0.044715)),
                                  Simd::set(static_cast<float>(kSlope)));
    return logistic<Simd>(x, Simd::mul(x, slope));
  } else if constexpr (kActivation == Activation::kQuickGelu) {
    return logistic<Simd>(x, Simd::mul(x, Simd::set(-1.702f)));
  } else if constexpr (kActivation == Activation::kSilu) {
    return logistic<Simd>(x, Simd::sub(Simd::zero(), x));
  } else {
    return x;
  }
}

// x = a(x), times `up` where kGated.
template <class Simd, Activation kActivation, bool kGated>
void activate_rows(float* x, const float* up, int64_t stride, int64_t rows, int64_t cols) {
  if (stride == cols) {  // one long row
    cols *= rows;
    rows = 1;
  }
  for (int64_t i = 0; i < rows; ++i) {
    float* row = x + i * stride;
    for_columns<Simd>(cols, [&](int64_t j, auto lanes, int) {
      typename Simd::Vec y = activation<Simd, kActivation>(lanes.load(row + j));
      if constexpr (kGated) y = Simd::mul(y, lanes.load(up + i * stride + j));
      lanes.store(row + j, y);
    });
  }
}

template <class Simd, bool kGated>
void activate_any(Activation a, float* x, const float* up, int64_t stride, int64_t rows,
                  int64_t cols) {
  using Run = void (*)(float*, const float*, int64_t, int64_t, int64_t);
  static constexpr Run kRuns[kActivationCount] = {
      activate_rows<Simd, Activation::kNone, kGated>,
      activate_rows<Simd, Activation::kRelu, kGated>,
      activate_rows<Simd, Activation::kSquaredRelu, kGated>,
      activate_rows<Simd, Activation::kGelu, kGated>,
      activate_rows<Simd, Activation::kGeluTanh, kGated>,
      activate_rows<Simd, Activation::kQuickGelu, kGated>,
      activate_rows<Simd, Activation::kSilu, kGated>,
  };
  kRuns[static_cast<int>(a)](x, up, stride, rows, cols);
}

template <class Simd>
void activate(Activation a, float* x, int64_t stride, int64_t rows, int64_t cols) {
  if (a != Activation::kNone) activate_any<Simd, false>(a, x, nullptr, stride, rows, cols);
}

template <class Simd>
void gate(Activation a, float* gate, const float* up, int64_t stride, int64_t rows, int64_t cols) {
  activate_any<Simd, true>(a, gate, up, stride, rows, cols);
}

}  // namespace
}  // namespace slimkern
