#include "simd/avx512.h"
#include "simd/avx512_rows.h"
#include "simd/scalar.h"

#include "kernels/column_sum.inl.h"
#include "kernels/gemm.inl.h"
#include "kernels/linear.inl.h"
#include "kernels/row_kernel.inl.h"

namespace slimkern {

const KernelTable kAvx512 = {
    gemm_kernel<Scalar<double>>(),
    {column_sum<float>, column_sum<bf16_t>, column_sum<double>},
    {linear_kernel<FloatWords<Avx512>>(), linear_kernel<RoundedWords<Avx512>>(), {}, {}},
    row_kernel<Avx512Rows>(),
};

}  // namespace slimkern
