// Linears on weights as they are, packed anew on every call: what training needs.
//
// Rows and columns are gathered, and blocks masked, while the weight is packed; steps of the
// reduction that a panel of it has nothing in are neither packed nor multiplied. Every function
// throws, before anything is read or written: std::out_of_range where an index is not strictly
// increasing within its extent, std::invalid_argument where something else does not fit. A result
// does not depend on the number of threads.
#pragma once

#include <cstdint>

#include "fused.h"
#include "indexed.h"
#include "keep_bits.h"
#include "kernel_table.h"

namespace slimkern {

// y [M, N] = x [M, K] wt (+ bias), all of one storage type, float32 or bfloat16.
struct PlainLinear {
  DType dtype = DType::kFloat32;
  Math math = Math::kFp32;
  int64_t M = 0, N = 0, K = 0;
  const void* x = nullptr;  // unit last stride
  int64_t x_stride = 0;
  MatView w;  // [N, K]
  Extent w_extent;
  VecView bias;  // [N], or no data
  int64_t bias_extent = 0;
  BlockBits kept;       // of the weight as it is stored; then w gathers nothing
  bool turned = false;  // w is the stored weight with rows and columns exchanged
  void* y = nullptr;    // without gaps
};

int64_t plain_linear_scratch(const PlainLinear& call, int threads);
void plain_linear(const PlainLinear& call, int threads, const Scratch& scratch);

// dw [N, K] = dyt x with dy [M, N] and x [M, K]: of the stored weight's gradient only what the view
// dw selects is written. With `kept` dw selects all of it, and what is left out becomes zero.
struct PlainGradient {
  DType dtype = DType::kFloat32;
  Math math = Math::kFp32;
  int64_t M = 0, N = 0, K = 0;
  const void* dy = nullptr;  // unit last stride, as x
  int64_t dy_stride = 0;
  const void* x = nullptr;
  int64_t x_stride = 0;
  MatView dw;  // unit column stride
  Extent dw_extent;
  BlockBits kept;
};

int64_t plain_gradient_scratch(const PlainGradient& call, int threads);
void plain_gradient(const PlainGradient& call, int threads, const Scratch& scratch);

// What both share: the kernel of a math, or an error.
const LinearKernel& plain_kernel(DType dtype, Math math);
inline int64_t plain_item(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// Rows that share a pass over the packed panels, and columns of them whose results stay in the
// second-level cache until they are stored.
constexpr int64_t kPlainRows = 96, kPlainColumns = 256;

}  // namespace slimkern
