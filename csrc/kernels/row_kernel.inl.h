// The row kernels of one instruction set.
#pragma once

#include "kernel_table.h"
#include "kernels/activations.inl.h"
#include "kernels/norms.inl.h"
#include "kernels/rows.inl.h"
#include "kernels/softmax.inl.h"

namespace slimkern {
namespace {

template <class Simd>
constexpr RowKernel row_kernel() {
  return {activate<Simd>,      gate<Simd>,       add_norm<Simd>,
          softmax_block<Simd>, scale_rows<Simd>, convert<Simd>,
          keep<Simd>};
}

}  // namespace
}  // namespace slimkern
