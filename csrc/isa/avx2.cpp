#include "simd/avx2.h"
#include "simd/avx2_rows.h"
#include "simd/scalar.h"

#include "kernels/column_sum.inl.h"
#include "kernels/gemm.inl.h"
#include "kernels/linear.inl.h"
#include "kernels/row_kernel.inl.h"

namespace slimkern {

const KernelTable kAvx2 = {
    gemm_kernel<Scalar<double>>(),
    {column_sum<float>, column_sum<bf16_t>, column_sum<double>},
    {linear_kernel<FloatWords<Avx2>>(), linear_kernel<RoundedWords<Avx2>>(), {}, {}},
    row_kernel<Avx2Rows>(),
};

}  // namespace slimkern
