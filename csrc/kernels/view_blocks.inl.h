// Blocks of a gathered, strided and masked view as vectors: what all packing begins with.
#pragma once

#include <cstdint>

#include "kernel_table.h"

namespace slimkern {
namespace {

constexpr int kBlock = 16;  // depth (k) of the blocks that are packed at once

// Where columns are neighbours, as many k are read at a time as there are pages that can be kept in
// sight: each k lies on another one.
constexpr int64_t kPages = 64;
inline int64_t depth_at_once(const MatView& w, int64_t K) {
  return w.row_stride == 1 && w.row_index == nullptr ? kPages : K;
}

inline int clamp_count(int64_t left, int most) {
  return left < most ? static_cast<int>(left < 0 ? 0 : left) : most;
}

inline int64_t place(const int64_t* index, int64_t i) { return index != nullptr ? index[i] : i; }

inline uint32_t first_bits(int count) { return (1u << count) - 1; }  // of at most 16

// Bits minor, minor + 1, ... of row `major`: 16 of them count.
inline uint32_t kept_bits(const BitView& kept, int64_t major, int64_t minor) {
  uint32_t bits;
  __builtin_memcpy(&bits, kept.bits + major * kept.row_bytes + (minor >> 3), 4);
  return bits >> (minor & 7);
}

// A block of a view: columns [n, n + count), k [k, k + depth).
struct BlockPlace {
  int64_t n;
  int count;
  int64_t k;
  int depth;
};

// k are neighbours: rows are loaded, and become columns.
template <class Simd, class T, bool kMasked, bool kWhole>
void load_rows(const MatView& w, const BitView& kept, const BlockPlace& at,
               typename Simd::Vec (&block)[kBlock]) {
  constexpr int kWidth = Simd::kWidth;
  const T* data = static_cast<const T*>(w.data) + at.k;
#pragma GCC unroll 2
  for (int part = 0; part < kBlock; part += kWidth) {
    const uint32_t there = first_bits(clamp_count(at.depth - part, kWidth));
    typename Simd::Vec rows[kWidth];
#pragma GCC unroll 16
    for (int j = 0; j < kWidth; ++j) {
      if (!kWhole && j >= at.count) {
        rows[j] = Simd::zero();
        continue;
      }
      const T* row = data + place(w.row_index, at.n + j) * w.row_stride + part;
      if constexpr (kWhole && !kMasked) {
        rows[j] = Simd::load(row);
      } else {
        rows[j] = Simd::load_bits(
            row, kMasked ? there & kept_bits(kept, at.n + j, at.k + part) : there);
      }
    }
    Simd::transpose(rows);
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i) block[part + i] = rows[i];
  }
}

// Columns are neighbours.
template <class Simd, class T, bool kMasked>
void load_columns(const MatView& w, const BitView& kept, const BlockPlace& at,
                  typename Simd::Vec (&block)[kBlock]) {
  const T* data = static_cast<const T*>(w.data) + at.n;
  const uint32_t there = first_bits(at.count);
  for (int i = 0; i < kBlock; ++i) {
    if (i >= at.depth) {
      block[i] = Simd::zero();
      continue;
    }
    const T* column = data + place(w.col_index, at.k + i) * w.col_stride;
    // What is read when this k range is done: a processor does not foresee steps of whole rows.
    __builtin_prefetch(column + kPages * w.col_stride, 0, 2);
    const uint32_t bits = kMasked ? there & kept_bits(kept, at.k + i, at.n) : there;
    block[i] = at.count == Simd::kWidth && !kMasked ? Simd::load(column)
                                                    : Simd::load_bits(column, bits);
  }
}

template <bool kMasked>
bool is_kept(const BitView& kept, int64_t n, int64_t k) {
  if (!kMasked) return true;
  return (kept.turned ? kept_bits(kept, k, n) : kept_bits(kept, n, k)) & 1u;
}

// Any view, element by element.
template <class Simd, class T, bool kMasked>
[[gnu::noinline]] void load_elements(const MatView& w, const BitView& kept, const BlockPlace& at,
                                     typename Simd::Vec (&block)[kBlock]) {
  constexpr int kWidth = Simd::kWidth;
  const T* data = static_cast<const T*>(w.data);
  int64_t offset[kWidth];
  if (!kMasked && at.count == kWidth && at.depth == kBlock) {
    float lanes[kBlock][kWidth];
    for (int j = 0; j < kWidth; ++j) offset[j] = place(w.row_index, at.n + j) * w.row_stride;
    for (int i = 0; i < kBlock; ++i) {
      const T* column = data + place(w.col_index, at.k + i) * w.col_stride;
#pragma GCC unroll 16
      for (int j = 0; j < kWidth; ++j) {
        // Through a register each: a compiler that puts vectors together here halves the speed.
        uint32_t bits = __builtin_bit_cast(uint32_t, widen(column[offset[j]]));
        __asm__("" : "+r"(bits));
        lanes[i][j] = __builtin_bit_cast(float, bits);
      }
    }
    for (int i = 0; i < kBlock; ++i) block[i] = Simd::load(lanes[i]);
    return;
  }
  float lanes[kBlock][kWidth] = {};
  for (int j = 0; j < at.count; ++j) offset[j] = place(w.row_index, at.n + j) * w.row_stride;
  for (int i = 0; i < at.depth; ++i) {
    const T* column = data + place(w.col_index, at.k + i) * w.col_stride;
    for (int j = 0; j < at.count; ++j) {
      if (is_kept<kMasked>(kept, at.n + j, at.k + i)) lanes[i][j] = widen(column[offset[j]]);
    }
  }
  for (int i = 0; i < kBlock; ++i) block[i] = Simd::load(lanes[i]);
}

// block[i] = w[n .. n + count, k + i]; zero where there is no such column (count < kWidth), no such
// k (depth < kBlock), or where `kept` (read if kMasked) leaves it out: that is not even looked at.
template <class Simd, class T, bool kMasked = false>
void load_block(const MatView& w, const BitView& kept, const BlockPlace& at,
                typename Simd::Vec (&block)[kBlock]) {
  if (w.col_stride == 1 && w.col_index == nullptr && !(kMasked && kept.turned)) {
    if (at.count == Simd::kWidth && at.depth == kBlock) {
      load_rows<Simd, T, kMasked, true>(w, kept, at, block);
    } else {
      load_rows<Simd, T, kMasked, false>(w, kept, at, block);
    }
  } else if (w.row_stride == 1 && w.row_index == nullptr && (!kMasked || kept.turned)) {
    load_columns<Simd, T, kMasked>(w, kept, at, block);
  } else {
    load_elements<Simd, T, kMasked>(w, kept, at, block);
  }
}

}  // namespace
}  // namespace slimkern
