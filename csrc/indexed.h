// The operations behind the bindings: arguments checked once, work split over threads.
#pragma once

#include <cstdint>

#include "arena.h"
#include "kernel_table.h"

namespace slimkern {

// How long each gathered dimension of a view is, to check its index against.
struct Extent {
  int64_t rows = 0, cols = 0;
};

struct GemmExtents {
  Extent a, b, c;
  int64_t bias = 0;
};

// Throw std::out_of_range where an index is not strictly increasing within its extent: then it is in
// bounds, and no two threads write to one place.
void check_index(const int64_t* index, int64_t length, int64_t extent);
void check_view(const MatView& view, int64_t rows, int64_t cols, const Extent& extent);

// Doubles that `gemm` needs as scratch.
int64_t gemm_scratch(int64_t M, int64_t N, int64_t K, int threads);

// In double. Throws as check_view does, and std::invalid_argument where `scratch_size` is less than
// gemm_scratch() asks for.
void gemm(const GemmArgs& args, const GemmExtents& extents, int threads, double* scratch,
          int64_t scratch_size);

// out[j] = sum over i of a[i, j], a [rows, cols]. Throws as check_index does.
void column_sum(DType dtype, const MatView& a, int64_t rows, int64_t cols, const VecView& out,
                int64_t out_size, int threads);

}  // namespace slimkern
