// Weights and rows of x as tiles of bfloat16, float32 split into kParts of them.
//
// A tile of an operand is 16 rows of 32 k; a tile of the weight 16 pairs of k by 16 columns. Both
// are stored whole, 1 KiB, zero beyond K and N: an operand as [row tile][k][part], a weight as
// [panel][k][part][column tile], where a panel is two column tiles (the last one: as many as it
// needs). Rows beyond the operand's are neither stored nor computed: the tiles are configured.
#pragma once

#include <cstdint>

#include "kernel_table.h"
#include "kernels/linear_pack.inl.h"

namespace slimkern {
namespace {

constexpr int kTileRows = 16, kTileColumns = 16, kTileDepth = 32;
constexpr int kTileWords = 256;
constexpr int kTilePanel = 2 * kTileColumns;

inline int64_t tiles_of(int64_t size, int tile) { return (size + tile - 1) / tile; }

template <int kParts>
int64_t tiled_packed_bytes(int64_t N, int64_t K) {
  return tiles_of(N, kTileColumns) * tiles_of(K, kTileDepth) * kParts * kTileWords * 4;
}

template <int kParts>
int64_t tiled_operand_bytes(int64_t rows, int64_t K) {
  return tiles_of(rows, kTileRows) * tiles_of(K, kTileDepth) * kParts * kTileWords * 4;
}

// One tile of the weight per part, the tiles of the parts `pitch` words apart.
template <class Simd, int kParts, class T>
void pack_tile(const MatView& w, int64_t n, int64_t N, int64_t k, int64_t K, float* out,
               int64_t pitch) {
  constexpr int kWidth = Simd::kWidth;
  for (int j = 0; j < kTileColumns; j += kWidth) {
    for (int i = 0; i < kTileDepth; i += kBlock) {
      typename Simd::Vec block[kBlock];
      load_block<Simd, T>(w, n + j, clamp_count(N - n - j, kWidth), k + i,
                          clamp_count(K - k - i, kBlock), block);
      for (int pair = 0; pair < kBlock / 2; ++pair) {
        float* word = out + (i / 2 + pair) * kTileColumns + j;
        for (int part = 0; part < kParts; ++part, word += pitch) {
          auto &even = block[2 * pair], &odd = block[2 * pair + 1];
          const bool last = part + 1 == kParts;
          const auto low = last ? Simd::round_bf16(even) : Simd::split_bf16(even);
          const auto high = last ? Simd::round_bf16(odd) : Simd::split_bf16(odd);
          Simd::store(word, Simd::pair(low, high));
        }
      }
    }
  }
}

template <class Simd, int kParts, class T>
void pack_tiles(const MatView& w, int64_t N, int64_t K, float* out) {
  for (int64_t n0 = 0; n0 < N; n0 += kTilePanel) {
    const int columns = N - n0 > kTileColumns ? 2 : 1;
    for (int64_t k = 0; k < K; k += kTileDepth, out += kParts * columns * kTileWords) {
      for (int j = 0; j < columns; ++j) {
        pack_tile<Simd, kParts, T>(w, n0 + j * kTileColumns, N, k, K, out + j * kTileWords,
                                   columns * kTileWords);
      }
    }
  }
}

template <class Simd, int kParts>
void tiled_pack(const MatView& w, DType dtype, int64_t N, int64_t K, void* packed) {
  if (dtype == DType::kBFloat16) {
    pack_tiles<Simd, kParts, bf16_t>(w, N, K, static_cast<float*>(packed));
  } else {
    pack_tiles<Simd, kParts, float>(w, N, K, static_cast<float*>(packed));
  }
}

// `count` (at most 32) numbers in a row -> 16 words per part.
template <class Simd, int kParts, class T>
void load_words(const T* x, int count, float* out) {
  constexpr int kWidth = Simd::kWidth;
  for (int k = 0; k < kTileDepth; k += 2 * kWidth, out += kWidth) {
    typename Simd::Vec v[2];
    for (int half = 0; half < 2; ++half) {
      const int at = k + half * kWidth, left = clamp_count(count - at, kWidth);
      v[half] = left == kWidth ? Simd::load(x + at)
                : left > 0     ? Simd::load_first(x + at, left)
                               : Simd::zero();
    }
    for (int part = 0; part < kParts; ++part) {
      const bool last = part + 1 == kParts;
      const auto words = last ? Simd::round_pairs(v[0], v[1]) : Simd::split_pairs(v[0], v[1]);
      Simd::store(out + part * kTileWords, words);
    }
  }
}

template <class Simd, int kParts>
void tiled_load(const void* x, DType dtype, int64_t stride, int64_t rows, int64_t K,
                void* operand) {
  const int64_t depth = tiles_of(K, kTileDepth);
  for (int64_t i = 0; i < rows; ++i) {
    float* out = static_cast<float*>(operand) + i / kTileRows * depth * kParts * kTileWords +
                 i % kTileRows * (kTileDepth / 2);
    for (int64_t k = 0; k < K; k += kTileDepth, out += kParts * kTileWords) {
      const int count = clamp_count(K - k, kTileDepth);
      if (dtype == DType::kBFloat16) {
        load_words<Simd, kParts>(static_cast<const bf16_t*>(x) + i * stride + k, count, out);
      } else {
        load_words<Simd, kParts>(static_cast<const float*>(x) + i * stride + k, count, out);
      }
    }
  }
}

}  // namespace
}  // namespace slimkern
