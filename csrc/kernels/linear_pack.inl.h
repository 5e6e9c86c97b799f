// The words of a packed linear: how weights and rows of x become what the tiles multiply.
//
// A word is 32 bits: a float (one k), or two bfloat16 (two k). Weights lie in panels of up to
// kVectors vectors of columns, k-major; columns are padded with zeros to whole vectors.
#pragma once

#include <cstdint>

#include "kernel_table.h"
#include "kernels/view_blocks.inl.h"

namespace slimkern {
namespace {

inline int64_t words_of(int64_t K, int per_word) { return (K + per_word - 1) / per_word; }

// bfloat16 that is stored as such needs no rounding.
template <class T>
constexpr bool kRounded = false;
template <>
constexpr bool kRounded<bf16_t> = true;

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

  // Word i of a block of elements that were stored as T.
  template <class T>
  static Vec word(const Vec (&block)[kBlock], int i) {
    return block[i];
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

  template <class T>
  static Vec word(const Vec (&block)[kBlock], int i) {
    return kRounded<T> ? block[i] : Simd::round_bf16(block[i]);
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

  template <class T>
  static Vec word(const Vec (&block)[kBlock], int i) {
    const Vec &even = block[2 * i], &odd = block[2 * i + 1];
    if constexpr (kRounded<T>) return Simd::pair(even, odd);
    return Simd::pair(Simd::round_bf16(even), Simd::round_bf16(odd));
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
