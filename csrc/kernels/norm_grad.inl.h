// LayerNorm of a sum in training: the forward keeps what the gradient needs, which is the sum and
// how it was normalised. Two passes over a row each way, beside those of the mean and the variance.
#pragma once

#include <cstdint>

#include "kernel_table.h"
#include "kernels/norms.inl.h"
#include "kernels/rows.inl.h"

namespace slimkern {
namespace {

// The elements of a row: x + residual, of two storage types.
template <class Simd, class X, class T>
struct MixedTerms {
  const X* x;
  const T* residual;

  template <class Lanes>
  typename Simd::Vec at(int64_t j, Lanes lanes) const {
    return Simd::add(lanes.load(x + j), lanes.load(residual + j));
  }
};

template <class Simd, class X, class T>
void norm_forward_rows(const NormForward& at, int64_t rows, int64_t cols) {
  const NormArgs args{at.gamma, at.beta, at.eps, cols};
  for (int64_t i = 0; i < rows; ++i) {
    const X* x = static_cast<const X*>(at.x.data) + i * at.x.stride;
    const T* residual = static_cast<const T*>(at.residual.data) + i * at.residual.stride;
    float* sum = static_cast<float*>(at.sum.data) + i * at.sum.stride;
    const MixedTerms<Simd, X, T> row{x, residual};
    const float total = first_pass<Simd, Norm::kLayer>(row, sum, cols);
    const Terms<Simd, T, false> terms{sum, nullptr};
    const Normaliser by = normaliser<Simd, Norm::kLayer>(terms, total, at.eps, cols);
    write_normal<Simd, Norm::kLayer>(terms, by, args, static_cast<T*>(at.out.data) + i * at.out.stride);
    at.stats[3 * i] = by.center, at.stats[3 * i + 1] = by.scale, at.stats[3 * i + 2] = by.offset;
  }
}

// With z the normalised row and g = grad * gamma: d_sum = scale (g - mean(g) - z mean(g z)).
template <class Simd, class X, class T>
void norm_grad_rows(const NormGrad& at, int64_t rows, int64_t cols) {
  using Vec = typename Simd::Vec;
  for (int64_t i = 0; i < rows; ++i) {
    const T* grad = static_cast<const T*>(at.grad.data) + i * at.grad.stride;
    const float* sum = static_cast<const float*>(at.sum.data) + i * at.sum.stride;
    T* to_residual = static_cast<T*>(at.to_residual.data) + i * at.to_residual.stride;
    X* to_x = at.to_x.data ? static_cast<X*>(at.to_x.data) + i * at.to_x.stride : nullptr;
    const Vec center = Simd::set(at.stats[3 * i]), scale = Simd::set(at.stats[3 * i + 1]);
    const Vec offset = Simd::set(at.stats[3 * i + 2]);
    Chains<Simd> first, second;
    for_columns<Simd, kChains>(cols, [&](int64_t j, auto lanes, int chain) {
      const Vec d = lanes.load(grad + j), g = Simd::mul(d, lanes.load(at.gamma + j));
      // Lanes behind the last column: g is zero there, and z finite.
      const Vec z = Simd::fmadd(Simd::sub(lanes.load(sum + j), center), scale, offset);
      first.v[chain] = Simd::add(first.v[chain], g);
      second.v[chain] = Simd::fmadd(g, lanes.pick(z, Simd::zero()), second.v[chain]);
      lanes.store(at.d_gamma + j, Simd::fmadd(d, z, lanes.load(at.d_gamma + j)));
      lanes.store(at.d_beta + j, Simd::add(d, lanes.load(at.d_beta + j)));
    });
    const float n = static_cast<float>(cols);
    const Vec mean = Simd::set(first.total() / n), slope = Simd::set(second.total() / n);
    for_columns<Simd>(cols, [&](int64_t j, auto lanes, int) {
      const Vec g = Simd::mul(lanes.load(grad + j), lanes.load(at.gamma + j));
      const Vec z = Simd::fmadd(Simd::sub(lanes.load(sum + j), center), scale, offset);
      const Vec d = Simd::mul(scale, Simd::fnmadd(z, slope, Simd::sub(g, mean)));
      lanes.store(to_residual + j, d);
      if (to_x != nullptr) lanes.store(to_x + j, d);
      lanes.store(at.d_bias + j, Simd::add(d, lanes.load(at.d_bias + j)));
    });
  }
}

template <class Simd>
void norm_forward(DType x_type, DType dtype, const NormForward& at, int64_t rows, int64_t cols) {
  const bool x_narrow = x_type == DType::kBFloat16, narrow = dtype == DType::kBFloat16;
  const auto run = x_narrow ? (narrow ? norm_forward_rows<Simd, bf16_t, bf16_t>
                                      : norm_forward_rows<Simd, bf16_t, float>)
                            : (narrow ? norm_forward_rows<Simd, float, bf16_t>
                                      : norm_forward_rows<Simd, float, float>);
  run(at, rows, cols);
}

template <class Simd>
void norm_grad(DType x_type, DType dtype, const NormGrad& at, int64_t rows, int64_t cols) {
  const bool x_narrow = x_type == DType::kBFloat16, narrow = dtype == DType::kBFloat16;
  const auto run = x_narrow ? (narrow ? norm_grad_rows<Simd, bf16_t, bf16_t>
                                      : norm_grad_rows<Simd, bf16_t, float>)
                            : (narrow ? norm_grad_rows<Simd, float, bf16_t>
                                      : norm_grad_rows<Simd, float, float>);
  run(at, rows, cols);
}

}  // namespace
}  // namespace slimkern
