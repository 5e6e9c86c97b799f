// Weights and rows of x as words, whole: in panels, and as operands.
#pragma once

#include <cstdint>

#include "kernel_table.h"
#include "kernels/linear_pack.inl.h"

namespace slimkern {
namespace {

template <class Words>
constexpr int kPanel = Words::Simd::kWidth * Words::Simd::kVectors;

// Words between rows of an operand: whole cache lines, and an odd number of them, so that the rows
// of a tile do not compete for the same sets of the cache.
template <class Words>
int64_t row_words(int64_t K) {
  const int64_t lines = (words_of(K, Words::kPerWord) + 15) / 16;
  return 16 * (lines | 1);
}

template <class Words>
int64_t linear_packed_bytes(int64_t N, int64_t K) {
  const int64_t vectors = (N + Words::Simd::kWidth - 1) / Words::Simd::kWidth;
  return vectors * Words::Simd::kWidth * words_of(K, Words::kPerWord) * 4;
}

// Vectors of the panel that begins `left` columns before the end.
template <class Words>
int panel_vectors(int64_t left) {
  constexpr int kWidth = Words::Simd::kWidth;
  const int64_t vectors = (left + kWidth - 1) / kWidth;
  return clamp_count(vectors, Words::Simd::kVectors);
}

// One vector of columns, k in [k, end).
template <class Words, class T>
void pack_columns(const MatView& w, int64_t n, int count, int64_t k, int64_t end, float* out,
                  int64_t pitch) {
  for (; k < end; k += kBlock, out += kBlock / Words::kPerWord * pitch) {
    typename Words::Vec block[kBlock];
    const int depth = clamp_count(end - k, kBlock);
    load_block<typename Words::Simd, T>(w, {}, {n, count, k, depth}, block);
    const int words = static_cast<int>(words_of(depth, Words::kPerWord));
    for (int i = 0; i < words; ++i) {
      Words::Simd::store(out + i * pitch, Words::template word<T>(block, i));
    }
  }
}

template <class Words, class T>
void pack_weight(const MatView& w, int64_t N, int64_t K, float* packed) {
  constexpr int kWidth = Words::Simd::kWidth;
  const int64_t words = words_of(K, Words::kPerWord), at_once = depth_at_once(w, K);
  for (int64_t k = 0; k < K; k += at_once) {
    const int64_t end = K - k < at_once ? K : k + at_once;
    for (int64_t n0 = 0; n0 < N; n0 += kPanel<Words>) {
      const int vectors = panel_vectors<Words>(N - n0);
      const int64_t pitch = vectors * kWidth;
      float* out = packed + n0 * words + k / Words::kPerWord * pitch;
      for (int v = 0; v < vectors; ++v) {
        const int64_t n = n0 + v * kWidth;
        pack_columns<Words, T>(w, n, clamp_count(N - n, kWidth), k, end, out + v * kWidth, pitch);
      }
    }
  }
}

template <class Words>
void linear_pack(const MatView& w, DType dtype, int64_t N, int64_t K, void* packed) {
  if (dtype == DType::kBFloat16) {
    pack_weight<Words, bf16_t>(w, N, K, static_cast<float*>(packed));
  } else {
    pack_weight<Words, float>(w, N, K, static_cast<float*>(packed));
  }
}

template <class Words>
int64_t linear_operand_bytes(int64_t rows, int64_t K) {
  return Words::kRowsInPlace ? 0 : rows * row_words<Words>(K) * 4;
}

template <class Words>
void linear_load(const void* x, DType dtype, int64_t stride, int64_t rows, int64_t K,
                 void* operand) {
  if constexpr (!Words::kRowsInPlace) {
    float* out = static_cast<float*>(operand);
    for (int64_t i = 0; i < rows; ++i, out += row_words<Words>(K)) {
      if (dtype == DType::kBFloat16) {
        Words::load_row(static_cast<const bf16_t*>(x) + i * stride, K, out);
      } else {
        Words::load_row(static_cast<const float*>(x) + i * stride, K, out);
      }
    }
  }
}

// Words that are listed, of one panel: blocks without one of them are not even loaded.
template <class Words, class T>
void pack_words(const MatView& w, const BitView& kept, Range n, int64_t K, const int32_t* steps,
                int64_t count, float* panel) {
  using Simd = typename Words::Simd;
  constexpr int kWidth = Simd::kWidth, kWords = kBlock / Words::kPerWord;
  const int vectors = panel_vectors<Words>(n.size());
  const int64_t pitch = vectors * kWidth;
  for (int v = 0; v < vectors; ++v) {
    const int64_t first = n.begin + v * kWidth;
    float* out = panel + v * kWidth;
    for (int64_t s = 0; s < count;) {
      const int64_t word = steps[s] / kWords * kWords, k = word * Words::kPerWord;
      typename Words::Vec block[kBlock];
      const BlockPlace at{first, clamp_count(n.end - first, kWidth), k, clamp_count(K - k, kBlock)};
      load_block<Simd, T, true>(w, kept, at, block);
      for (; s < count && steps[s] < word + kWords; ++s, out += pitch) {
        Simd::store(out, Words::template word<T>(block, static_cast<int>(steps[s] - word)));
      }
    }
  }
}

template <class Words>
void linear_pack_steps(const MatView& w, const BitView& kept, DType dtype, Range n, int64_t K,
                       const int32_t* steps, int64_t count, void* panel) {
  if (dtype == DType::kBFloat16) {
    pack_words<Words, bf16_t>(w, kept, n, K, steps, count, static_cast<float*>(panel));
  } else {
    pack_words<Words, float>(w, kept, n, K, steps, count, static_cast<float*>(panel));
  }
}

template <class Words>
int64_t linear_turned_bytes(int64_t rows, int64_t K) {
  return rows * row_words<Words>(K) * 4;
}

// 16 words of up to kWidth rows: blocks as of a weight, whose columns then become rows.
template <class Words, class T>
void turn_block(const MatView& x, int64_t i, int count, int64_t k, int64_t K, float* out,
                int64_t stride) {
  using Simd = typename Words::Simd;
  constexpr int kWidth = Simd::kWidth, kWords = kBlock / Words::kPerWord;
  typename Words::Vec words[kBlock];
  for (int part = 0; part < Words::kPerWord; ++part) {
    typename Words::Vec block[kBlock];
    const int64_t from = k + part * kBlock;
    load_block<Simd, T>(x, {}, {i, count, from, clamp_count(K - from, kBlock)}, block);
    for (int j = 0; j < kWords; ++j) words[part * kWords + j] = Words::template word<T>(block, j);
  }
  for (int part = 0; part < kBlock; part += kWidth) {
    typename Words::Vec turned[kWidth];
    for (int j = 0; j < kWidth; ++j) turned[j] = words[part + j];
    Simd::transpose(turned);
    for (int j = 0; j < count; ++j) Simd::store(out + part + j * stride, turned[j]);
  }
}

template <class Words, class T>
void turn_rows(const MatView& x, int64_t rows, int64_t K, float* operand) {
  constexpr int kWidth = Words::Simd::kWidth, kPerWord = Words::kPerWord;
  const int64_t stride = row_words<Words>(K), at_once = depth_at_once(x, K);
  for (int64_t first = 0; first < K; first += at_once) {
    const int64_t end = K - first < at_once ? K : first + at_once;
    for (int64_t i = 0; i < rows; i += kWidth) {
      const int count = clamp_count(rows - i, kWidth);
      for (int64_t k = first; k < end; k += kBlock * kPerWord) {
        turn_block<Words, T>(x, i, count, k, K, operand + i * stride + k / kPerWord, stride);
      }
    }
  }
}

template <class Words>
void linear_turn(const MatView& x, DType dtype, int64_t rows, int64_t K, void* operand) {
  if (dtype == DType::kBFloat16) {
    turn_rows<Words, bf16_t>(x, rows, K, static_cast<float*>(operand));
  } else {
    turn_rows<Words, float>(x, rows, K, static_cast<float*>(operand));
  }
}

}  // namespace
}  // namespace slimkern
