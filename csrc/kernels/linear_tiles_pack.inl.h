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

// The pair of elements 2 i and 2 i + 1 of a block: its leading part, which is taken off, or all of
// it, rounded, where it is the last part.
template <class Simd>
typename Simd::Vec take_pair(typename Simd::Vec (&block)[kBlock], int i, bool last) {
  auto &even = block[2 * i], &odd = block[2 * i + 1];
  const auto low = last ? Simd::round_bf16(even) : Simd::split_bf16(even);
  const auto high = last ? Simd::round_bf16(odd) : Simd::split_bf16(odd);
  return Simd::pair(low, high);
}

// One tile of the weight per part, the tiles of the parts `pitch` words apart.
template <class Simd, int kParts, class T, bool kMasked = false>
void pack_tile(const MatView& w, const BitView& kept, Range n, int64_t k, int64_t K, float* out,
               int64_t pitch) {
  constexpr int kWidth = Simd::kWidth;
  for (int j = 0; j < kTileColumns; j += kWidth) {
    for (int i = 0; i < kTileDepth; i += kBlock) {
      typename Simd::Vec block[kBlock];
      const BlockPlace at{n.begin + j, clamp_count(n.size() - j, kWidth), k + i,
                          clamp_count(K - k - i, kBlock)};
      load_block<Simd, T, kMasked>(w, kept, at, block);
      for (int pair = 0; pair < kBlock / 2; ++pair) {
        float* word = out + (i / 2 + pair) * kTileColumns + j;
        for (int part = 0; part < kParts; ++part, word += pitch) {
          Simd::store(word, take_pair<Simd>(block, pair, part + 1 == kParts));
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
        pack_tile<Simd, kParts, T>(w, {}, {n0 + j * kTileColumns, N}, k, K, out + j * kTileWords,
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

// Tiles that are listed, of one panel.
template <class Simd, int kParts, class T>
void pack_listed_tiles(const MatView& w, const BitView& kept, Range n, int64_t K,
                       const int32_t* steps, int64_t count, float* out) {
  const int columns = n.size() > kTileColumns ? 2 : 1;
  for (int64_t s = 0; s < count; ++s, out += kParts * columns * kTileWords) {
    for (int j = 0; j < columns; ++j) {
      pack_tile<Simd, kParts, T, true>(w, kept, {n.begin + j * kTileColumns, n.end},
                                       int64_t{steps[s]} * kTileDepth, K, out + j * kTileWords,
                                       columns * kTileWords);
    }
  }
}

template <class Simd, int kParts>
void tiled_pack_steps(const MatView& w, const BitView& kept, DType dtype, Range n, int64_t K,
                      const int32_t* steps, int64_t count, void* panel) {
  if (dtype == DType::kBFloat16) {
    pack_listed_tiles<Simd, kParts, bf16_t>(w, kept, n, K, steps, count,
                                            static_cast<float*>(panel));
  } else {
    pack_listed_tiles<Simd, kParts, float>(w, kept, n, K, steps, count,
                                           static_cast<float*>(panel));
  }
}

// Up to kWidth rows of one tile per part, from the columns of a view.
template <class Simd, int kParts, class T>
void turn_tile(const MatView& x, const BlockPlace& at, int64_t K, float* out) {
  constexpr int kWidth = Simd::kWidth, kPairs = kBlock / 2;
  typename Simd::Vec block[2][kBlock];
  for (int half = 0; half < 2; ++half) {
    const int64_t k = at.k + half * kBlock;
    load_block<Simd, T>(x, {}, {at.n, at.count, k, clamp_count(K - k, kBlock)}, block[half]);
  }
  for (int part = 0; part < kParts; ++part, out += kTileWords) {
    typename Simd::Vec words[kBlock];
    for (int i = 0; i < kBlock; ++i) {
      words[i] = take_pair<Simd>(block[i / kPairs], i % kPairs, part + 1 == kParts);
    }
    for (int from = 0; from < kBlock; from += kWidth) {
      typename Simd::Vec turned[kWidth];
      for (int j = 0; j < kWidth; ++j) turned[j] = words[from + j];
      Simd::transpose(turned);
      for (int j = 0; j < at.count; ++j) {
        Simd::store(out + j * (kTileDepth / 2) + from, turned[j]);
      }
    }
  }
}

template <class Simd, int kParts>
void tiled_turn(const MatView& x, DType dtype, int64_t rows, int64_t K, void* operand) {
  constexpr int kWidth = Simd::kWidth;
  const int64_t depth = tiles_of(K, kTileDepth);
  for (int64_t i = 0; i < rows; i += kWidth) {
    float* out = static_cast<float*>(operand) + i / kTileRows * depth * kParts * kTileWords +
                 i % kTileRows * (kTileDepth / 2);
    for (int64_t k = 0; k < K; k += kTileDepth, out += kParts * kTileWords) {
      const BlockPlace at{i, clamp_count(rows - i, kWidth), k, kBlock};
      if (dtype == DType::kBFloat16) {
        turn_tile<Simd, kParts, bf16_t>(x, at, K, out);
      } else {
        turn_tile<Simd, kParts, float>(x, at, K, out);
      }
    }
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
