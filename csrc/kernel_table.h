// What an instruction set's file exports: one table of function pointers, over plain data.
#pragma once

#include <cstdint>

#include "dtypes.h"

namespace slimkern {

// A matrix whose rows and columns may be gathered: element (i, j) lies at
// data[row(i) * row_stride + col(j) * col_stride], where row(i) is row_index[i], or i without one.
// Strides count elements. Transposing is swapping the two halves.
struct MatView {
  void* data = nullptr;
  int64_t row_stride = 0, col_stride = 0;
  const int64_t* row_index = nullptr;
  const int64_t* col_index = nullptr;
};

struct VecView {
  void* data = nullptr;
  int64_t stride = 0;
  const int64_t* index = nullptr;
};

// c[m, n] = sum over k of a[m, k] * b[k, n], plus bias[n] where bias.data is set.
// Only the selected elements of c are written.
struct GemmArgs {
  MatView a, b, c;
  VecView bias;
  int64_t M = 0, N = 0, K = 0;
};

// Half-open range of indices.
struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

// Panels are stored in the compute type (double for double, else float), zero-padded to whole
// mr and nr: a panel of b is nr columns, k-major; a panel of a is mr rows, k-major.
struct GemmKernel {
  int mr, nr;  // the register tile
  // Packs columns n of b, rows k, into `packed` (n rounded up to whole panels of nr).
  void (*pack_b)(const GemmArgs& args, Range n, Range k, void* packed);
  // Packs rows m of a, columns k, into `packed` (m rounded up to whole panels of mr).
  void (*pack_a)(const GemmArgs& args, Range m, Range k, void* packed);
  // tiles (m_panels x n_panels register tiles) = or += packed_a * packed_b over k_size.
  void (*multiply)(const void* packed_a, const void* packed_b, int64_t m_panels, int64_t n_panels,
                   int64_t k_size, bool accumulate, void* tiles);
  // Rounds tiles, with the bias added, to the storage type and scatters them to c.
  void (*store)(const GemmArgs& args, Range m, Range n, const void* tiles);
};

// out[j] = sum over i of a[i, j], for columns n; out is gathered by its index.
using ColumnSum = void (*)(const MatView& a, int64_t rows, Range n, const VecView& out);

struct KernelTable {
  GemmKernel gemm[3];      // indexed by DType
  ColumnSum column_sum[3];
};

extern const KernelTable kScalar;
extern const KernelTable kAvx2;
extern const KernelTable kAvx512;

}  // namespace slimkern
