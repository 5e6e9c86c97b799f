// Loops over the columns of a row, whole vectors and the rest; conversions, and scaling of rows.
#pragma once

#include <cstdint>

#include "kernel_table.h"

namespace slimkern {
namespace {

// The lanes of one step: all of them ...
template <class Simd>
struct AllLanes {
  using Vec = typename Simd::Vec;
  template <class T>
  Vec load(const T* p) const { return Simd::load(p); }
  template <class T>
  void store(T* p, Vec v) const { Simd::store(p, v); }
  static uint32_t bits() { return (1u << Simd::kWidth) - 1; }
  // v in these lanes, `other` elsewhere
  Vec pick(Vec v, Vec /* other */) const { return v; }
};

// ... or the first few: the others are loaded as zero and not stored.
template <class Simd>
struct FirstLanes {
  using Vec = typename Simd::Vec;
  int count;
  template <class T>
  Vec load(const T* p) const { return Simd::load_first(p, count); }
  template <class T>
  void store(T* p, Vec v) const { Simd::store_first(p, v, count); }
  uint32_t bits() const { return (1u << count) - 1; }
  Vec pick(Vec v, Vec other) const { return Simd::select(Simd::first_lanes(count), v, other); }
};

// Lane i of the result: all lanes of v[i], joined.
template <class Simd, class Join>
[[gnu::always_inline]] inline typename Simd::Vec join_lanes(
    typename Simd::Vec (&v)[Simd::kWidth], Join join) {
  Simd::transpose(v);
#pragma GCC unroll 4
  for (int half = Simd::kWidth / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i) v[i] = join(v[i], v[i + half]);
  }
  return v[0];
}

// f(column, lanes, chain) from the first to the last column. Neighbouring steps have different
// chains, 0 to kChains - 1: sums that are kept per chain do not wait for each other.
template <class Simd, int kChains = 1, class F>
[[gnu::always_inline]] inline void for_columns(int64_t cols, F f) {
  constexpr int kWidth = Simd::kWidth;
  int64_t j = 0;
  for (; j + kChains * kWidth <= cols; j += kChains * kWidth) {
#pragma GCC unroll 4
    for (int chain = 0; chain < kChains; ++chain) f(j + chain * kWidth, AllLanes<Simd>{}, chain);
  }
  if constexpr (kChains > 1) {
    for (; j + kWidth <= cols; j += kWidth) f(j, AllLanes<Simd>{}, 0);
  }
  if constexpr (kWidth > 1) {
    if (j < cols) f(j, FirstLanes<Simd>{static_cast<int>(cols - j)}, 0);
  }
}

template <class Simd>
void scale_rows(float* x, int64_t stride, const float* factor, int64_t rows, int64_t cols) {
  for (int64_t i = 0; i < rows; ++i, x += stride) {
    if (factor[i] == 1.0f) continue;
    const typename Simd::Vec by = Simd::set(factor[i]);
    for_columns<Simd>(cols, [&](int64_t j, auto lanes, int) {
      lanes.store(x + j, Simd::mul(lanes.load(x + j), by));
    });
  }
}

template <class Simd, class From, class To>
void convert_rows(const void* x, int64_t x_stride, void* out, int64_t out_stride, int64_t rows,
                  int64_t cols) {
  const From* from = static_cast<const From*>(x);
  To* to = static_cast<To*>(out);
  for (int64_t i = 0; i < rows; ++i, from += x_stride, to += out_stride) {
    for_columns<Simd>(cols, [&](int64_t j, auto lanes, int) {
      lanes.store(to + j, lanes.load(from + j));
    });
  }
}

template <class Simd>
void convert(const void* x, DType from, int64_t x_stride, void* out, DType to, int64_t out_stride,
             int64_t rows, int64_t cols) {
  const bool narrow_from = from == DType::kBFloat16, narrow_to = to == DType::kBFloat16;
  const auto run = narrow_from ? (narrow_to ? convert_rows<Simd, bf16_t, bf16_t>
                                            : convert_rows<Simd, bf16_t, float>)
                               : (narrow_to ? convert_rows<Simd, float, bf16_t>
                                            : convert_rows<Simd, float, float>);
  run(x, x_stride, out, out_stride, rows, cols);
}

template <class Simd, class To>
void keep_rows(const float* x, int64_t x_stride, const uint8_t* bits, int64_t row_bytes, To* out,
               int64_t out_stride, int64_t rows, int64_t cols) {
  for (int64_t i = 0; i < rows; ++i, x += x_stride, bits += row_bytes, out += out_stride) {
    for_columns<Simd>(cols, [&](int64_t j, auto lanes, int) {
      uint32_t here;
      __builtin_memcpy(&here, bits + (j >> 3), 4);
      lanes.store(out + j, Simd::load_bits(x + j, here >> (j & 7) & lanes.bits()));
    });
  }
}

template <class Simd>
void keep(const float* x, int64_t x_stride, const uint8_t* bits, int64_t row_bytes, DType to,
          void* out, int64_t out_stride, int64_t rows, int64_t cols) {
  if (to == DType::kBFloat16) {
    keep_rows<Simd>(x, x_stride, bits, row_bytes, static_cast<bf16_t*>(out), out_stride, rows,
                    cols);
  } else {
    keep_rows<Simd>(x, x_stride, bits, row_bytes, static_cast<float*>(out), out_stride, rows,
                    cols);
  }
}

}  // namespace
}  // namespace slimkern
