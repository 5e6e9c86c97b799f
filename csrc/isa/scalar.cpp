#include "simd/scalar.h"

#include "kernels/column_sum.inl.h"
#include "kernels/gemm.inl.h"

namespace slimkern {

const KernelTable kScalar = {
    {gemm_kernel<Scalar<float>, float>(), gemm_kernel<Scalar<float>, bf16_t>(), gemm_kernel<Scalar<double>, double>()},
    {column_sum<float>, column_sum<bf16_t>, column_sum<double>},
    {},
    {},
};

}  // namespace slimkern
