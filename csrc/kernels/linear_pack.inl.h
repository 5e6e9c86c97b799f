// The words of a packed linear: how weights and rows of x become what the tiles multiply.
//
// A word is 32 bits: a float (one k), or two bfloat16 (two k). Weights lie in panels of up to
// kVectors vectors of columns, k-major; columns are padded with zeros to whole vectors.
#pragma once

#include <cstdint>

#include "kernel_table.h"

namespace slimkern {
namespace {

constexpr int kBlock = 16;  // depth (k) of the blocks that are packed at once

inline int64_t words_of(int64_t K, int per_word) { return (K + per_word - 1) / per_word; }

inline int clamp_count(int64_t left, int most) {
  return left < most ? static_cast<int>(left < 0 ? 0 : left) : most;
}

// block[i] = w[n .. n + count, k + i]; zero where there is no such column (count < kWidth) or no
// such k (depth < kBlock).
template <class Simd, class T>
void load_block(const MatView& w, int64_t n, int count, int64_t k, int depth,
                typename Simd::Vec (&block)[kBlock]) {
  constexpr int kWidth = Simd::kWidth;
  const T* data = static_cast<const T*>(w.data) + n * w.row_stride + k * w.col_stride;
  if (kWidth > 1 && w.col_stride == 1) {
#pragma GCC unroll 2
    for (int part = 0; part < kBlock; part += kWidth) {
      typename Simd::Vec rows[kWidth];
      const int length = clamp_count(depth - part, kWidth);
      for (int j = 0; j < kWidth; ++j) {
        const T* row = data + j * w.row_stride + part;
        rows[j] = j >= count            ? Simd::zero()
                  : length == kWidth ? Simd::load(row)
                                     : Simd::load_first(row, length);
      }
      Simd::transpose(rows);
      for (int i = 0; i < kWidth; ++i) block[part + i] = rows[i];
    }
    return;
  }
  for (int i = 0; i < kBlock; ++i) {
    const T* column = data + i * w.col_stride;
    if (i >= depth) {
      block[i] = Simd::zero();
    } else if (w.row_stride == 1) {
      block[i] = count == kWidth ? Simd::load(column) : Simd::load_first(column, count);
    } else {
      float lanes[kWidth];
      for (int j = 0; j < kWidth; ++j) lanes[j] = j < count ? widen(column[j * w.row_stride]) : 0.f;
      block[i] = Simd::load(lanes);
    }
  }
}

// Floats as they are. Rows of x are read in place.
template <class S>
struct FloatWords {
  using Simd = S;
  using Vec = typename Simd::Vec;
  static constexpr int kPerWord = 1;
  static constexpr bool kRowsInPlace = true;

  static Vec multiply(Vec a, Vec b, Vec c) { return Simd::fmadd(a, b, c); }
  static void store_block(const Vec (&block)[kBlock], int depth, float* out, int64_t pitch) {
    for (int i = 0; i < depth; ++i) Simd::store(out + i * pitch, block[i]);
  }
};

// Floats that were rounded to bfloat16: the products of a processor without a unit for them.
template <class S>
struct RoundedWords {
  using Simd = S;
  using Vec = typename Simd::Vec;
  static constexpr int kPerWord = 1;
  static constexpr bool kRowsInPlace = false;

  static Vec multiply(Vec a, Vec b, Vec c) { return Simd::fmadd(a, b, c); }
  static void store_block(const Vec (&block)[kBlock], int depth, float* out, int64_t pitch) {
    for (int i = 0; i < depth; ++i) Simd::store(out + i * pitch, Simd::round_bf16(block[i]));
  }
  template <class T>
  static void load_row(const T* x, int64_t K, float* out) {
    int64_t k = 0;
    for (; k + Simd::kWidth <= K; k += Simd::kWidth) {
      Simd::store(out + k, Simd::round_bf16(Simd::load(x + k)));
    }
    const int rest = static_cast<int>(K - k);
    Simd::store_first(out + k, Simd::round_bf16(Simd::load_first(x + k, rest)), rest);
  }
};

// Pairs of bfloat16, for a unit that multiplies both and adds. An odd K is padded with a zero.
template <class S>
struct PairWords {
  using Simd = S;
  using Vec = typename Simd::Vec;
  static constexpr int kPerWord = 2;
  static constexpr bool kRowsInPlace = false;

  static Vec multiply(Vec a, Vec b, Vec c) { return Simd::dot(a, b, c); }
  static void store_block(const Vec (&block)[kBlock], int depth, float* out, int64_t pitch) {
    for (int i = 0; i < depth; i += 2, out += pitch) {
      Simd::store(out, Simd::pair(Simd::round_bf16(block[i]), Simd::round_bf16(block[i + 1])));
    }
  }
  template <class T>
  static void load_row(const T* x, int64_t K, float* out) {
    constexpr int kWidth = Simd::kWidth;
    int64_t k = 0;
    for (; k + 2 * kWidth <= K; k += 2 * kWidth) {
      Simd::store(out + k / 2, Simd::round_pairs(Simd::load(x + k), Simd::load(x + k + kWidth)));
    }
    const int low = clamp_count(K - k, kWidth), high = clamp_count(K - k - kWidth, kWidth);
    const Vec first = Simd::load_first(x + k, low);
    const Vec second = high > 0 ? Simd::load_first(x + k + kWidth, high) : Simd::zero();
    const int rest = static_cast<int>((K - k + 1) / 2);
    Simd::store_first(out + k / 2, Simd::round_pairs(first, second), rest);
  }
};

}  // namespace
}  // namespace slimkern
