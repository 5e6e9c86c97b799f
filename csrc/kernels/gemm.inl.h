// The blocks of a matrix product in double, which serves checks, not speed.
//
// Gathering happens in `pack_panels`, scattering in `gemm_store`; in between everything is dense,
// and in register tiles of kMr rows by kNr columns.
#pragma once

#include <cstdint>

#include "kernel_table.h"

namespace slimkern {
namespace {

template <class Simd>
constexpr int kNr = Simd::kWidth * Simd::kVectors;

inline int64_t at(const int64_t* index, int64_t i) { return index != nullptr ? index[i] : i; }

// Columns n of v, rows k, as panels of `kWidth` columns; the last panel is padded with zeros.
template <int kWidth, class Acc>
void pack_panels(const MatView& v, Range n, Range k, Acc* out) {
  const Acc* data = static_cast<const Acc*>(v.data);
  const bool unit = v.col_stride == 1 && v.col_index == nullptr;
  for (int64_t j0 = n.begin; j0 < n.end; j0 += kWidth) {
    const int valid = n.end - j0 < kWidth ? static_cast<int>(n.end - j0) : kWidth;
    int64_t offset[kWidth];
    for (int j = 0; j < valid; ++j) offset[j] = at(v.col_index, j0 + j) * v.col_stride;
    for (int64_t i = k.begin; i < k.end; ++i, out += kWidth) {
      const Acc* row = data + at(v.row_index, i) * v.row_stride;
      if (unit && valid == kWidth) {
        for (int j = 0; j < kWidth; ++j) out[j] = row[j0 + j];
      } else {
        for (int j = 0; j < valid; ++j) out[j] = row[offset[j]];
        for (int j = valid; j < kWidth; ++j) out[j] = Acc(0);
      }
    }
  }
}

template <class Simd>
void gemm_pack_b(const GemmArgs& args, Range n, Range k, void* packed) {
  pack_panels<kNr<Simd>>(args.b, n, k, static_cast<typename Simd::Acc*>(packed));
}

template <class Simd>
void gemm_pack_a(const GemmArgs& args, Range m, Range k, void* packed) {
  const MatView& a = args.a;
  const MatView transposed{a.data, a.col_stride, a.row_stride, a.col_index, a.row_index};
  pack_panels<Simd::kMr>(transposed, m, k, static_cast<typename Simd::Acc*>(packed));
}

// One register tile: tile (kMr x kNr) = or += a panel * b panel.
template <class Simd>
void multiply_tile(const typename Simd::Acc* a, const typename Simd::Acc* b, int64_t k_size,
                   bool accumulate, typename Simd::Acc* tile) {
  using Vec = typename Simd::Vec;
  constexpr int kMr = Simd::kMr, kVectors = Simd::kVectors, kWidth = Simd::kWidth;
  Vec acc[kMr][kVectors];
#pragma GCC unroll 16
  for (int i = 0; i < kMr; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const typename Simd::Acc* p = tile + i * kNr<Simd> + v * kWidth;
      acc[i][v] = accumulate ? Simd::load(p) : Simd::zero();
    }
  }
  for (int64_t k = 0; k < k_size; ++k, a += kMr, b += kNr<Simd>) {
    Vec column[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) column[v] = Simd::load(b + v * kWidth);
#pragma GCC unroll 16
    for (int i = 0; i < kMr; ++i) {
      const Vec row = Simd::broadcast(a + i);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) acc[i][v] = Simd::fmadd(row, column[v], acc[i][v]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kMr; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      Simd::store(tile + i * kNr<Simd> + v * kWidth, acc[i][v]);
    }
  }
}

// Panels of b outermost: one of them stays in the first-level cache while those of a stream by.
template <class Simd>
void gemm_multiply(const void* packed_a, const void* packed_b, int64_t m_panels, int64_t n_panels,
                   int64_t k_size, bool accumulate, void* tiles) {
  using Acc = typename Simd::Acc;
  const Acc* a = static_cast<const Acc*>(packed_a);
  const Acc* b = static_cast<const Acc*>(packed_b);
  Acc* tile = static_cast<Acc*>(tiles);
  for (int64_t j = 0; j < n_panels; ++j) {
    for (int64_t i = 0; i < m_panels; ++i, tile += Simd::kMr * kNr<Simd>) {
      multiply_tile<Simd>(a + i * Simd::kMr * k_size, b + j * kNr<Simd> * k_size, k_size,
                          accumulate, tile);
    }
  }
}

template <class Simd>
void gemm_store(const GemmArgs& args, Range m, Range n, const void* tiles) {
  using Acc = typename Simd::Acc;
  constexpr int kMr = Simd::kMr;
  const MatView& c = args.c;
  Acc* data = static_cast<Acc*>(c.data);
  const Acc* bias = static_cast<const Acc*>(args.bias.data);
  const Acc* tile = static_cast<const Acc*>(tiles);
  const bool unit = c.col_stride == 1 && c.col_index == nullptr;
  for (int64_t j0 = n.begin; j0 < n.end; j0 += kNr<Simd>) {
    const int width = n.end - j0 < kNr<Simd> ? static_cast<int>(n.end - j0) : kNr<Simd>;
    Acc shift[kNr<Simd>] = {};
    int64_t offset[kNr<Simd>];
    for (int j = 0; j < width; ++j) {
      offset[j] = at(c.col_index, j0 + j) * c.col_stride;
      if (bias != nullptr) shift[j] = bias[at(args.bias.index, j0 + j) * args.bias.stride];
    }
    for (int64_t i0 = m.begin; i0 < m.end; i0 += kMr, tile += kMr * kNr<Simd>) {
      const int height = m.end - i0 < kMr ? static_cast<int>(m.end - i0) : kMr;
      for (int i = 0; i < height; ++i) {
        Acc* row = data + at(c.row_index, i0 + i) * c.row_stride;
        const Acc* value = tile + i * kNr<Simd>;
        if (unit && width == kNr<Simd>) {
          for (int j = 0; j < kNr<Simd>; ++j) row[j0 + j] = value[j] + shift[j];
        } else {
          for (int j = 0; j < width; ++j) row[offset[j]] = value[j] + shift[j];
        }
      }
    }
  }
}

template <class Simd>
constexpr GemmKernel gemm_kernel() {
  return {Simd::kMr,         kNr<Simd>,           gemm_pack_b<Simd>,
          gemm_pack_a<Simd>, gemm_multiply<Simd>, gemm_store<Simd>};
}

}  // namespace
}  // namespace slimkern
