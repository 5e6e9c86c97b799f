#include "simd/scalar.h"
#include "simd/scalar_rows.h"

#include "kernels/column_sum.inl.h"
#include "kernels/gemm.inl.h"
#include "kernels/linear.inl.h"
#include "kernels/row_kernel.inl.h"

namespace slimkern {

const KernelTable kScalar = {
    gemm_kernel<Scalar<double>>(),
    {column_sum<float>, column_sum<bf16_t>, column_sum<double>},
    {linear_kernel<FloatWords<Scalar<float>>>(), linear_kernel<RoundedWords<Scalar<float>>>(), {},
     {}},
    row_kernel<ScalarRows>(),
};

}  // namespace slimkern
