// Activations from one place to another, and their gradients, in float32 or bfloat16.
#pragma once

#include <cstdint>

#include "kernel_table.h"
#include "kernels/activations.inl.h"
#include "kernels/elementary.inl.h"
#include "kernels/rows.inl.h"

namespace slimkern {
namespace {

// a(x) and its derivative.
template <class Simd>
struct Slope {
  typename Simd::Vec value, derivative;
};

// Of x s(v) with s the logistic function and v = v(x), from v and dv/dx: s + x s (1 - s) dv/dx.
// 1 - s is computed as exp(-v) s, where nothing cancels.
template <class Simd>
inline Slope<Simd> logistic_slope(typename Simd::Vec x, typename Simd::Vec v,
                                  typename Simd::Vec slope) {
  using Vec = typename Simd::Vec;
  constexpr float kHighest = 88;  // of a finite exponential
  const Vec e = exponential<Simd>(Simd::min(Simd::set(kHighest), Simd::sub(Simd::zero(), v)));
  const Vec s = Simd::div(Simd::set(1.0f), Simd::add(Simd::set(1.0f), e));
  const Vec rest = Simd::mul(e, s);
  const Vec inner = Simd::mul(Simd::mul(x, slope), rest);
  // Beyond the highest exponential s is zero, however large x is.
  const auto none = Simd::less(v, Simd::set(-kHighest));
  return {Simd::select(none, Simd::zero(), Simd::mul(x, s)),
          Simd::select(none, Simd::zero(), Simd::fmadd(inner, s, s))};
}

// Of x P(z <= x): P + x p(x), p the density of the standard normal distribution.
template <class Simd>
inline Slope<Simd> normal_slope(typename Simd::Vec x) {
  using Vec = typename Simd::Vec;
  constexpr float kDensity = 0.3989422804014327f;  // 1 / sqrt(2 pi)
  const Vec tail = normal_tail<Simd>(x);
  const auto below = Simd::less(x, Simd::zero());
  const Vec p = Simd::select(below, tail, Simd::sub(Simd::set(1.0f), tail));
  const Vec half = Simd::mul(Simd::mul(x, x), Simd::set(-0.5f));
  const Vec density = Simd::mul(exponential<Simd>(half), Simd::set(kDensity));
  return {times_tail<Simd>(x, tail), Simd::fmadd(x, density, p)};
}

// A ReLU has no slope at zero, as torch has it; NaN keeps one, so that it is not lost.
template <class Simd, Activation kActivation>
inline Slope<Simd> activation_slope(typename Simd::Vec x) {
  using Vec = typename Simd::Vec;
  const Vec one = Simd::set(1.0f);
  if constexpr (kActivation == Activation::kRelu) {
    const Vec rest = Simd::select(Simd::equal(x, Simd::zero()), Simd::zero(), one);
    return {Simd::max(Simd::zero(), x),
            Simd::select(Simd::less(x, Simd::zero()), Simd::zero(), rest)};
  } else if constexpr (kActivation == Activation::kSquaredRelu) {
    const Vec y = Simd::max(Simd::zero(), x);
    return {Simd::mul(y, y), Simd::add(y, y)};
  } else if constexpr (kActivation == Activation::kGelu) {
    return normal_slope<Simd>(x);
  } else if constexpr (kActivation == Activation::kGeluTanh) {
    // v = 2 sqrt(2 / pi) (x + 0.044715 x^3)
    constexpr double kScale = 1.5957691216057307117597822397375;
    const Vec square = Simd::mul(x, x), first = Simd::set(static_cast<float>(kScale));
    const Vec by = Simd::fmadd(square, Simd::set(static_cast<float>(kScale * 0.044715)), first);
    const Vec slope =
        Simd::fmadd(square, Simd::set(static_cast<float>(kScale * 3 * 0.044715)), first);
    return logistic_slope<Simd>(x, Simd::mul(x, by), slope);
  } else if constexpr (kActivation == Activation::kQuickGelu) {
    const Vec by = Simd::set(1.702f);
    return logistic_slope<Simd>(x, Simd::mul(x, by), by);
  } else if constexpr (kActivation == Activation::kSilu) {
    return logistic_slope<Simd>(x, x, one);
  } else {
    return {x, one};
  }
}

template <class Simd, Activation kActivation, class T>
void activate_to_rows(const RowsOf& x, const RowsOf& out, int64_t rows, int64_t cols) {
  const T* from = static_cast<const T*>(x.data);
  T* to = static_cast<T*>(out.data);
  for (int64_t i = 0; i < rows; ++i, from += x.stride, to += out.stride) {
    for_columns<Simd>(cols, [&](int64_t j, auto lanes, int) {
      lanes.store(to + j, activation<Simd, kActivation>(lanes.load(from + j)));
    });
  }
}

template <class Simd, Activation kActivation, class T>
void activation_grad_rows(const ActivationGrad& at, int64_t rows, int64_t cols) {
  const T* grad = static_cast<const T*>(at.grad.data);
  const T* x = static_cast<const T*>(at.x.data);
  T* dx = static_cast<T*>(at.dx.data);
  T* value = static_cast<T*>(at.value.data);
  for (int64_t i = 0; i < rows; ++i) {
    for_columns<Simd>(cols, [&](int64_t j, auto lanes, int) {
      const Slope<Simd> slope = activation_slope<Simd, kActivation>(lanes.load(x + j));
      const typename Simd::Vec d = Simd::mul(lanes.load(grad + j), slope.derivative);
      lanes.store(dx + j, d);
      lanes.store(value + j, slope.value);
      lanes.store(at.sums + j, Simd::add(lanes.load(at.sums + j), d));
    });
    grad += at.grad.stride, x += at.x.stride, dx += at.dx.stride, value += at.value.stride;
  }
}

template <class Simd, class T>
void activate_to_as(Activation a, const RowsOf& x, const RowsOf& out, int64_t rows, int64_t cols) {
  using Run = void (*)(const RowsOf&, const RowsOf&, int64_t, int64_t);
  static constexpr Run kRuns[kActivationCount] = {
      activate_to_rows<Simd, Activation::kNone, T>,
      activate_to_rows<Simd, Activation::kRelu, T>,
      activate_to_rows<Simd, Activation::kSquaredRelu, T>,
      activate_to_rows<Simd, Activation::kGelu, T>,
      activate_to_rows<Simd, Activation::kGeluTanh, T>,
      activate_to_rows<Simd, Activation::kQuickGelu, T>,
      activate_to_rows<Simd, Activation::kSilu, T>,
  };
  kRuns[static_cast<int>(a)](x, out, rows, cols);
}

template <class Simd, class T>
void activation_grad_as(Activation a, const ActivationGrad& at, int64_t rows, int64_t cols) {
  using Run = void (*)(const ActivationGrad&, int64_t, int64_t);
  static constexpr Run kRuns[kActivationCount] = {
      activation_grad_rows<Simd, Activation::kNone, T>,
      activation_grad_rows<Simd, Activation::kRelu, T>,
      activation_grad_rows<Simd, Activation::kSquaredRelu, T>,
      activation_grad_rows<Simd, Activation::kGelu, T>,
      activation_grad_rows<Simd, Activation::kGeluTanh, T>,
      activation_grad_rows<Simd, Activation::kQuickGelu, T>,
      activation_grad_rows<Simd, Activation::kSilu, T>,
  };
  kRuns[static_cast<int>(a)](at, rows, cols);
}

template <class Simd>
void activate_to(Activation a, DType dtype, const RowsOf& x, const RowsOf& out, int64_t rows,
                 int64_t cols) {
  const auto run = dtype == DType::kBFloat16 ? activate_to_as<Simd, bf16_t>
                                             : activate_to_as<Simd, float>;
  run(a, x, out, rows, cols);
}

template <class Simd>
void activation_grad(Activation a, DType dtype, const ActivationGrad& at, int64_t rows,
                     int64_t cols) {
  const auto run = dtype == DType::kBFloat16 ? activation_grad_as<Simd, bf16_t>
                                             : activation_grad_as<Simd, float>;
  run(a, at, rows, cols);
}

}  // namespace
}  // namespace slimkern
