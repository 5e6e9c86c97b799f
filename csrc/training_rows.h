// Passes over rows that training needs: activations, LayerNorm of a sum, and their gradients.
#pragma once

#include <cstdint>

#include "kernel_table.h"

namespace slimkern {

// out = a(x), [rows, cols], both of storage type dtype (float32 or bfloat16).
void activate(DType dtype, Activation a, const RowsOf& x, const RowsOf& out, int64_t rows,
              int64_t cols, int threads);

// Floats of scratch for the sums over rows of `kinds` rows of `cols` columns.
int64_t row_sums_scratch(int64_t rows, int64_t cols, int64_t kinds);

// dx = grad * a'(x) and value = a(x), [rows, cols], of storage type dtype; sums [cols] of dx over
// the rows, before it is rounded. `at.sums` is not read. Throws std::invalid_argument where the
// scratch is less than row_sums_scratch(rows, cols, 1).
void activation_grad(DType dtype, Activation a, const ActivationGrad& at, float* sums, int64_t rows,
                     int64_t cols, int threads, float* scratch, int64_t scratch_size);

// As NormForward says; x of storage type x_type, residual and out of dtype.
void norm_forward(DType x_type, DType dtype, const NormForward& at, int64_t rows, int64_t cols,
                  int threads);

// As NormGrad says; `sums` [3, cols] gets those over rows, `at`'s own pointers to sums are not
// read. Throws std::invalid_argument where the scratch is less than row_sums_scratch(rows, cols, 3).
void norm_grad(DType x_type, DType dtype, const NormGrad& at, float* sums, int64_t rows,
               int64_t cols, int threads, float* scratch, int64_t scratch_size);

// out = x with some elements zero and the others scaled; `count` neighbours of storage type dtype
// (float32, bfloat16). The same seed drops the same elements, whatever the threads.
void drop(DType dtype, const Dropout& by, const void* x, void* out, int64_t count, int threads);

// Sets the columns j of w [rows, cols] with dead[j] = ~0 to zero, where dead[j] is 0 or ~0 and has
// as many bits as an element (16, 32, 64). Rows that are zero there already are only read. Returns
// whether any was not.
bool zero_columns(int bits, void* w, int64_t row_stride, int64_t rows, int64_t cols,
                  const void* dead, int threads);

}  // namespace slimkern
