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

// lanes[i][j] = data[column j, k i]; zero where there is no such column or no such k.
template <int kWidth, class T>
[[gnu::noinline]] void gather_block(const T* data, const MatView& w, int count, int depth,
                                    float (&lanes)[kBlock][kWidth]) {
  for (int i = 0; i < kBlock; ++i) {
    for (int j = 0; j < kWidth; ++j) {
      const bool there = i < depth && j < count;
      lanes[i][j] = there ? widen(data[j * w.row_stride + i * w.col_stride]) : 0.f;
    }
  }
}

// block[i] = w[n .. n + count, k + i]; zero where there is no such column (count < kWidth) or no
// such k (depth < kBlock). Whole blocks whose columns or k are neighbours are the fast ones.
template <class Simd, class T>
void load_block(const MatView& w, int64_t n, int count, int64_t k, int depth,
                typename Simd::Vec (&block)[kBlock]) {
  constexpr int kWidth = Simd::kWidth;
  const T* data = static_cast<const T*>(w.data) + n * w.row_stride + k * w.col_stride;
  const bool whole = count == kWidth && depth == kBlock;
  if (whole && w.row_stride == 1) {
#pragma GCC unroll 16
    for (int i = 0; i < kBlock; ++i) block[i] = Simd::load(data + i * w.col_stride);
  } else if (whole && w.col_stride == 1) {
#pragma GCC unroll 2
    for (int part = 0; part < kBlock; part += kWidth) {
      typename Simd::Vec rows[kWidth];
#pragma GCC unroll 16
      for (int j = 0; j < kWidth; ++j) rows[j] = Simd::load(data + j * w.row_stride + part);
      Simd::transpose(rows);
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; ++i) block[part + i] = rows[i];
    }
  } else {
    float lanes[kBlock][kWidth];
    gather_block(data, w, count, depth, lanes);
#pragma GCC unroll 16
    for (int i = 0; i < kBlock; ++i) block[i] = Simd::load(lanes[i]);
  }
}

// The first `count` columns of rows.
template <class Simd>
void copy_rows(const float* from, int64_t from_stride, float* to, int64_t to_stride, int rows,
               int count) {
  constexpr int kWidth = Simd::kWidth;
  for (int i = 0; i < rows; ++i, from += from_stride, to += to_stride) {
    for (int j = 0; j < count; j += kWidth) {
      const int left = clamp_count(count - j, kWidth);
      if (left == kWidth) {
        Simd::store(to + j, Simd::load(from + j));
      } else {
        Simd::store_first(to + j, Simd::load_first(from + j, left), left);
      }
    }
  }
}

// How the tiles multiply words and add.
template <class S>
struct FloatProducts {
  using Simd = S;
  static constexpr int kRun = 192;  // words that are summed one after the other
  static typename S::Vec add(typename S::Vec a, typename S::Vec b, typename S::Vec c) {
    return S::fmadd(a, b, c);
  }
};
template <class S>
struct PairProducts {
  using Simd = S;
  static constexpr int kRun = 768;
  static typename S::Vec add(typename S::Vec a, typename S::Vec b, typename S::Vec c) {
    return S::dot(a, b, c);
  }
};

// Floats as they are. Rows of x are read in place.
template <class S>
struct FloatWords {
  using Simd = S;
  using Products = FloatProducts<S>;
  using Vec = typename Simd::Vec;
  static constexpr int kPerWord = 1;
  static constexpr bool kRowsInPlace = true;

  static void store_block(const Vec (&block)[kBlock], int depth, float* out, int64_t pitch) {
    for (int i = 0; i < depth; ++i) Simd::store(out + i * pitch, block[i]);
  }
};

// Floats that were rounded to bfloat16: the products of a processor without a unit for them.
template <class S>
struct RoundedWords {
  using Simd = S;
  using Products = FloatProducts<S>;
  using Vec = typename Simd::Vec;
  static constexpr int kPerWord = 1;
  static constexpr bool kRowsInPlace = false;

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
  using Products = PairProducts<S>;
  using Vec = typename Simd::Vec;
  static constexpr int kPerWord = 2;
  static constexpr bool kRowsInPlace = false;

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
