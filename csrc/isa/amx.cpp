#include "simd/amx.h"
#include "simd/avx512_bf16_rows.h"
#include "simd/scalar.h"

#include "kernels/column_sum.inl.h"
#include "kernels/gemm.inl.h"
#include "kernels/linear.inl.h"
#include "kernels/linear_tiles.inl.h"
#include "kernels/row_kernel.inl.h"

namespace slimkern {

const KernelTable kAmx = {
    gemm_kernel<Scalar<double>>(),
    {column_sum<float>, column_sum<bf16_t>, column_sum<double>},
    {linear_kernel<FloatWords<Avx512>>(), tiled_linear_kernel<Avx512Bf16, AmxTiles, 1>(),
     tiled_linear_kernel<Avx512Bf16, AmxTiles, 2>(),
     tiled_linear_kernel<Avx512Bf16, AmxTiles, 3>()},
    row_kernel<Avx512Bf16Rows>(),
};

}  // namespace slimkern
