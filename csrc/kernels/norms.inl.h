// Residual and norm of a row: one read of the row per pass, two passes for RMSNorm, three for
// LayerNorm. The second gives, besides the variance, what rounding left out of the mean.
#pragma once

#include <cstdint>

#include "kernel_table.h"
#include "kernels/rows.inl.h"

namespace slimkern {
namespace {

// The elements of a row: x + residual.
template <class Simd, class T, bool kResidual>
struct Terms {
  using Vec = typename Simd::Vec;
  const float* x;
  const T* residual;

  template <class Lanes>
  Vec at(int64_t j, Lanes lanes) const {
    const Vec v = lanes.load(x + j);
    if constexpr (kResidual) return Simd::add(v, lanes.load(residual + j));
    return v;
  }
};

constexpr int kChains = 4;

// A sum in parts that do not wait for each other.
template <class Simd>
struct Chains {
  typename Simd::Vec v[kChains] = {Simd::zero(), Simd::zero(), Simd::zero(), Simd::zero()};
  float total() const { return Simd::sum(Simd::add(Simd::add(v[0], v[1]), Simd::add(v[2], v[3]))); }
};

// (s - center) * scale + offset
struct Normaliser {
  float center, scale, offset;
};

// From the sum of the row (LayerNorm) or of its squares (RMSNorm).
template <class Simd, Norm kNorm, class Row>
Normaliser normaliser(const Row& row, float total, float eps, int64_t cols) {
  using Vec = typename Simd::Vec;
  const float n = static_cast<float>(cols);
  if constexpr (kNorm == Norm::kRms) return {0.0f, 1.0f / __builtin_sqrtf(total / n + eps), 0.0f};
  const float mean = total / n;
  const Vec center = Simd::set(mean);
  Chains<Simd> sums, squares;
  for_columns<Simd, kChains>(cols, [&](int64_t j, auto lanes, int chain) {
    const Vec d = lanes.pick(Simd::sub(row.at(j, lanes), center), Simd::zero());
    sums.v[chain] = Simd::add(sums.v[chain], d);
    squares.v[chain] = Simd::fmadd(d, d, squares.v[chain]);
  });
  const float rest = sums.total() / n;
  const float variance = squares.total() / n - rest * rest;
  const float scale = 1.0f / __builtin_sqrtf((variance > 0.0f ? variance : 0.0f * variance) + eps);
  return {mean, scale, -rest * scale};
}

struct NormArgs {
  const float* gamma;
  const float* beta;
  float eps;
  int64_t cols;
};

template <class Simd, Norm kNorm, class Row, class T>
void write_normal(const Row& row, const Normaliser& by, const NormArgs& args, T* out) {
  using Vec = typename Simd::Vec;
  const Vec center = Simd::set(by.center), scale = Simd::set(by.scale);
  const Vec offset = Simd::set(by.offset);
  for_columns<Simd>(args.cols, [&](int64_t j, auto lanes, int) {
    Vec y = row.at(j, lanes);
    if constexpr (kNorm == Norm::kRms) y = Simd::mul(y, scale);
    if constexpr (kNorm == Norm::kLayer) y = Simd::fmadd(Simd::sub(y, center), scale, offset);
    const Vec beta = args.beta != nullptr ? lanes.load(args.beta + j) : Simd::zero();
    if (args.gamma != nullptr) {
      y = Simd::fmadd(y, lanes.load(args.gamma + j), beta);
    } else if (args.beta != nullptr) {
      y = Simd::add(y, beta);
    }
    lanes.store(out + j, y);
  });
}

// The first pass: the sum that the norm begins with, and the row itself to `sum` where that is set.
template <class Simd, Norm kNorm, class Row>
float first_pass(const Row& row, float* sum, int64_t cols) {
  using Vec = typename Simd::Vec;
  Chains<Simd> sums;
  for_columns<Simd, kChains>(cols, [&](int64_t j, auto lanes, int chain) {
    const Vec v = row.at(j, lanes);
    if (sum != nullptr) lanes.store(sum + j, v);
    Vec& total = sums.v[chain];
    total = kNorm == Norm::kRms ? Simd::fmadd(v, v, total) : Simd::add(total, v);
  });
  return sums.total();
}

template <class Simd, Norm kNorm, class T, bool kResidual>
void norm_row(const Terms<Simd, T, kResidual>& row, const NormArgs& args, T* out, float* sum) {
  float total = 0.0f;
  if (kNorm != Norm::kNone || sum != nullptr) {
    total = first_pass<Simd, kNorm>(row, sum, args.cols);
  }
  const auto finish = [&](const auto& terms) {
    Normaliser by{};
    if constexpr (kNorm != Norm::kNone) {
      by = normaliser<Simd, kNorm>(terms, total, args.eps, args.cols);
    }
    write_normal<Simd, kNorm>(terms, by, args, out);
  };
  // x or residual may lie where `sum` does: they are not read again.
  if (sum != nullptr) return finish(Terms<Simd, T, false>{sum, nullptr});
  finish(row);
}

template <class Simd, class T, bool kResidual>
void add_norm_rows(Norm norm, const float* x, int64_t x_stride, const T* residual,
                   int64_t residual_stride, const NormArgs& args, T* out, int64_t out_stride,
                   float* sum, int64_t sum_stride, int64_t rows) {
  const auto run = norm == Norm::kLayer ? norm_row<Simd, Norm::kLayer, T, kResidual>
                   : norm == Norm::kRms ? norm_row<Simd, Norm::kRms, T, kResidual>
                                        : norm_row<Simd, Norm::kNone, T, kResidual>;
  for (int64_t i = 0; i < rows; ++i) {
    const T* added = kResidual ? residual + i * residual_stride : nullptr;
    run({x + i * x_stride, added}, args, out + i * out_stride,
        sum != nullptr ? sum + i * sum_stride : nullptr);
  }
}

template <class Simd>
void add_norm(Norm norm, const float* x, int64_t x_stride, const void* residual,
              int64_t residual_stride, const float* gamma, const float* beta, float eps,
              DType dtype, void* out, int64_t out_stride, float* sum, int64_t sum_stride,
              int64_t rows, int64_t cols) {
  const NormArgs args{gamma, beta, eps, cols};
  const auto run = [&]<class T>(T* to) {
    const T* added = static_cast<const T*>(residual);
    const auto body =
        added != nullptr ? add_norm_rows<Simd, T, true> : add_norm_rows<Simd, T, false>;
    body(norm, x, x_stride, added, residual_stride, args, to, out_stride, sum, sum_stride, rows);
  };
  if (dtype == DType::kBFloat16) return run(static_cast<bf16_t*>(out));
  run(static_cast<float*>(out));
}

}  // namespace
}  // namespace slimkern
