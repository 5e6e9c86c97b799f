// The row kernels of one instruction set.
#pragma once

#include "kernel_table.h"
#include "kernels/activation_grad.inl.h"
#include "kernels/activations.inl.h"
#include "kernels/dropout.inl.h"
#include "kernels/norm_grad.inl.h"
#include "kernels/norms.inl.h"
#include "kernels/rows.inl.h"
#include "kernels/softmax.inl.h"

namespace slimkern {
namespace {

template <class Simd>
constexpr RowKernel row_kernel() {
  return {activate<Simd>,      gate<Simd>,       add_norm<Simd>,
          softmax_block<Simd>, scale_rows<Simd>, convert<Simd>,
          keep<Simd>,
          activate_to<Simd>,   activation_grad<Simd>,
          norm_forward<Simd>,  norm_grad<Simd>,  drop};
}

}  // namespace
}  // namespace slimkern
