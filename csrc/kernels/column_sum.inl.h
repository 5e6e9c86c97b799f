// Sums over the rows of a matrix, in two levels: the error grows with the block, not with the rows.
#pragma once

#include <cstdint>

#include "kernel_table.h"

namespace slimkern {
namespace {

template <class T>
void column_sum(const MatView& a, int64_t rows, Range n, const VecView& out) {
  using Acc = typename Storage<T>::Acc;
  constexpr int kColumns = 64;
  constexpr int64_t kBlock = 128;
  const T* data = static_cast<const T*>(a.data);
  T* sums = static_cast<T*>(out.data);
  for (int64_t j0 = n.begin; j0 < n.end; j0 += kColumns) {
    const int width = n.end - j0 < kColumns ? static_cast<int>(n.end - j0) : kColumns;
    Acc total[kColumns] = {};
    for (int64_t i0 = 0; i0 < rows; i0 += kBlock) {
      const int64_t i_end = rows - i0 < kBlock ? rows : i0 + kBlock;
      Acc block[kColumns] = {};
      for (int64_t i = i0; i < i_end; ++i) {
        const T* row = data + i * a.row_stride + j0 * a.col_stride;
        for (int j = 0; j < width; ++j) block[j] += widen(row[j * a.col_stride]);
      }
      for (int j = 0; j < width; ++j) total[j] += block[j];
    }
    for (int j = 0; j < width; ++j) {
      const int64_t at = out.index != nullptr ? out.index[j0 + j] : j0 + j;
      sums[at * out.stride] = Storage<T>::narrow(total[j]);
    }
  }
}

}  // namespace
}  // namespace slimkern
