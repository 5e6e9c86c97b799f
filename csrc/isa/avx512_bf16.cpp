#include "simd/avx512_bf16.h"
#include "simd/avx512_rows.h"
#include "simd/scalar.h"

#include "kernels/column_sum.inl.h"
#include "kernels/gemm.inl.h"
#include "kernels/linear.inl.h"
#include "kernels/row_kernel.inl.h"

namespace slimkern {

const KernelTable kAvx512Bf16 = {
    {gemm_kernel<Avx512, float>(), gemm_kernel<Avx512, bf16_t>(),
     gemm_kernel<Scalar<double>, double>()},
    {column_sum<float>, column_sum<bf16_t>, column_sum<double>},
    {linear_kernel<FloatWords<Avx512>>(), linear_kernel<PairWords<Avx512Bf16>>(), {}, {}},
    row_kernel<Avx512Rows>(),
};

}  // namespace slimkern
