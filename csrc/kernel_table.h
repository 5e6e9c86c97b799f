// What an instruction set's file exports: one table of function pointers, over plain data.
#pragma once

#include <cstdint>

#include "dtypes.h"

namespace slimkern {

// A matrix whose rows and columns may be gathered: element (i, j) lies at
// data[row(i) * row_stride + col(j) * col_stride], where row(i) is row_index[i], or i without one.
// Strides count elements. Transposing is swapping the two halves.
struct MatView {
  void* data = nullptr;
  int64_t row_stride = 0, col_stride = 0;
  const int64_t* row_index = nullptr;
  const int64_t* col_index = nullptr;
};

// Which elements of a view (i, j) take part: bit j of row i, or bit i of row j where `turned`. Bit b
// of byte c of a row is number 8 c + b; 7 bytes more than it needs can be read behind each row.
struct BitView {
  const uint8_t* bits = nullptr;
  int64_t row_bytes = 0;
  bool turned = false;
};

struct VecView {
  void* data = nullptr;
  int64_t stride = 0;
  const int64_t* index = nullptr;
};

// c[m, n] = sum over k of a[m, k] * b[k, n], plus bias[n] where bias.data is set.
// Only the selected elements of c are written.
struct GemmArgs {
  MatView a, b, c;
  VecView bias;
  int64_t M = 0, N = 0, K = 0;
};

// Half-open range of indices.
struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

// For double. Panels are zero-padded to whole mr and nr: a panel of b is nr columns, k-major; a
// panel of a is mr rows, k-major.
struct GemmKernel {
  int mr, nr;  // the register tile
  // Packs columns n of b, rows k, into `packed` (n rounded up to whole panels of nr).
  void (*pack_b)(const GemmArgs& args, Range n, Range k, void* packed);
  // Packs rows m of a, columns k, into `packed` (m rounded up to whole panels of mr).
  void (*pack_a)(const GemmArgs& args, Range m, Range k, void* packed);
  // tiles (m_panels x n_panels register tiles) = or += packed_a * packed_b over k_size.
  void (*multiply)(const void* packed_a, const void* packed_b, int64_t m_panels, int64_t n_panels,
                   int64_t k_size, bool accumulate, void* tiles);
  // Scatters tiles, with the bias added, to c.
  void (*store)(const GemmArgs& args, Range m, Range n, const void* tiles);
};

// out[j] = sum over i of a[i, j], for columns n; out is gathered by its index.
using ColumnSum = void (*)(const MatView& a, int64_t rows, Range n, const VecView& out);

// How the products of a packed linear are computed; sums are always float. bfloat16 units read
// denormals as zeros. Sums of parts: a finite number, however large, has finite parts; a NaN gives
// NaN, an infinity an infinity or NaN (its product with a part that is zero).
enum class Math {
  kFp32 = 0,    // float products
  kBf16 = 1,    // both operands rounded to bfloat16
  kBf16x3 = 2,  // both operands as the sum of two bfloat16: hi*hi + hi*lo + lo*hi
  kBf16x6 = 3,  // ... of three: the six products of at least 2^-16
};
constexpr int kMathCount = 4;

// Packed weights and operands (those that are loaded) begin at a multiple of so many bytes.
constexpr int64_t kLinearAlignment = 64;

// y = x Wt (+ bias) with W [N, K] packed once. An operand is a block of rows of x in the form that
// multiply reads; its layout, like that of a packed weight, is the kernel's own business.
// Null functions: this instruction set has no such Math.
struct LinearKernel {
  int rows;    // blocks of x are best a multiple of it, around a hundred rows
  int nr;      // columns of a panel: ranges begin at a multiple of it, and end at one or at N
  int narrow;  // columns of the narrowest panel that wastes nothing
  int step;    // k that are packed or left out together
  int64_t (*packed_bytes)(int64_t N, int64_t K);
  // The view w [N, K], of storage type dtype (float32, bfloat16).
  void (*pack)(const MatView& w, DType dtype, int64_t N, int64_t K, void* packed);
  // Bytes of an operand of `rows` rows; 0: float rows with any row stride are read as they are, and
  // load is null. (Strides that are a multiple of 4 KiB are the slowest.)
  int64_t (*operand_bytes)(int64_t rows, int64_t K);
  void (*load)(const void* x, DType dtype, int64_t stride, int64_t rows, int64_t K, void* operand);
  // The same from the view x [rows, K], which may be turned: its columns are the fast way. Always an
  // operand of its own; float rows that are read in place are turned_bytes / rows apart there.
  int64_t (*turned_bytes)(int64_t rows, int64_t K);
  void (*turn)(const MatView& x, DType dtype, int64_t rows, int64_t K, void* operand);
  // out[i, n - n.begin] (float, row stride out_stride) for the columns n of the weight;
  // = bias[n] + sum (bias may be null), or += sum where `accumulate`.
  // operand_stride: elements between rows, where operand_bytes is 0; else ignored.
  void (*multiply)(const void* operand, int64_t operand_stride, int64_t rows, int64_t K,
                   const void* packed, Range n, const float* bias, bool accumulate, float* out,
                   int64_t out_stride);
  // One panel (columns n: at most nr) of which only some steps of k are there: `count` of them, in
  // rising order; what `kept` leaves out is zero. It takes no more than packed_bytes(n.size(), K).
  void (*pack_steps)(const MatView& w, const BitView& kept, DType dtype, Range n, int64_t K,
                     const int32_t* steps, int64_t count, void* panel);
  // multiply with such a panel of `columns` columns; `bias` is that of the first.
  void (*multiply_steps)(const void* operand, int64_t operand_stride, int64_t rows, int64_t K,
                         const void* panel, const int32_t* steps, int64_t count, int columns,
                         const float* bias, float* out, int64_t out_stride);
};

enum class Activation { kNone = 0, kRelu, kSquaredRelu, kGelu, kGeluTanh, kQuickGelu, kSilu };
constexpr int kActivationCount = 7;

enum class Norm { kNone = 0, kLayer, kRms };

// Rows of a matrix whose columns are neighbours; the stride counts elements.
struct RowsOf {
  void* data = nullptr;
  int64_t stride = 0;
};

// dx = grad * a'(x) and value = a(x); sums[j] += dx over the rows, before dx is rounded.
struct ActivationGrad {
  RowsOf grad, x, dx, value;
  float* sums = nullptr;
};

// A LayerNorm in training: sum = x + residual (float), out = ((sum - center) scale + offset) gamma
// + beta; center, scale and offset of a row, three floats, go to `stats`.
struct NormForward {
  RowsOf x, residual, out, sum;
  float* stats = nullptr;
  const float *gamma = nullptr, *beta = nullptr;
  float eps = 0;
};

// Its gradient: d_sum to `to_residual`, and rounded to x's type to `to_x` where that has data;
// += the sums over rows of grad * normalised row, of grad, and of d_sum before it is rounded.
struct NormGrad {
  RowsOf grad, sum, to_residual, to_x;
  const float *stats = nullptr, *gamma = nullptr;
  float *d_gamma = nullptr, *d_beta = nullptr, *d_bias = nullptr;
};

// What is dropped: elements whose number, mixed with the seed, is below the threshold (2^32 p). The
// others are scaled.
struct Dropout {
  uint64_t seed = 0;
  uint32_t threshold = 0;
  float scale = 1;
};

// Passes over rows of a block that lies in the cache; strides count elements.
struct RowKernel {
  // x = a(x)
  void (*activate)(Activation a, float* x, int64_t stride, int64_t rows, int64_t cols);
  // gate = a(gate) * up
  void (*gate)(Activation a, float* gate, const float* up, int64_t stride, int64_t rows,
               int64_t cols);
  // s = x + residual (may be null); out = norm(s) * gamma + beta (either may be null); where `sum`
  // is not null, s is stored there too (pre-norm blocks go on with it). residual and out are of
  // storage type dtype, x and sum float.
  void (*add_norm)(Norm norm, const float* x, int64_t x_stride, const void* residual,
                   int64_t residual_stride, const float* gamma, const float* beta, float eps,
                   DType dtype, void* out, int64_t out_stride, float* sum, int64_t sum_stride,
                   int64_t rows, int64_t cols);
  // One step of a streaming softmax over a block of keys: s = scale * s + bias (may be null; row
  // stride bias_stride, 0 repeats one row); with m' = max(m, max s): s = exp(s - m'),
  // l = l exp(m - m') + sum s, and the factor exp(m - m') goes to `rescale`. m starts at -inf and
  // l at 0; a row that has seen only -inf keeps m = -inf, s = 0, rescale = 1.
  void (*softmax_block)(float* s, int64_t stride, const float* bias, int64_t bias_stride,
                        float scale, float* m, float* l, float* rescale, int64_t rows,
                        int64_t keys);
  // x *= factor[row], per row.
  void (*scale_rows)(float* x, int64_t stride, const float* factor, int64_t rows, int64_t cols);
  // Conversions of rows between storage types (float32, bfloat16).
  void (*convert)(const void* x, DType from, int64_t x_stride, void* out, DType to,
                  int64_t out_stride, int64_t rows, int64_t cols);
  // out = x where its bit is set, else zero, whatever x is there.
  void (*keep)(const float* x, int64_t x_stride, const uint8_t* bits, int64_t row_bytes, DType to,
               void* out, int64_t out_stride, int64_t rows, int64_t cols);
  // out = a(x), both of storage type dtype (float32, bfloat16).
  void (*activate_to)(Activation a, DType dtype, const RowsOf& x, const RowsOf& out, int64_t rows,
                      int64_t cols);
  // As ActivationGrad says; all but the sums of storage type dtype. dx may be grad, value may be x.
  void (*activation_grad)(Activation a, DType dtype, const ActivationGrad& at, int64_t rows,
                          int64_t cols);
  // x (and to_x) of storage type x_type; residual, out, grad and to_residual of type dtype.
  void (*norm_forward)(DType x_type, DType dtype, const NormForward& at, int64_t rows,
                       int64_t cols);
  void (*norm_grad)(DType x_type, DType dtype, const NormGrad& at, int64_t rows, int64_t cols);
  // `count` neighbours x and out of storage type dtype, the first of which is element `first`.
  void (*drop)(DType dtype, const Dropout& by, const void* x, void* out, int64_t first,
               int64_t count);
};

struct KernelTable {
  GemmKernel gemm;
  ColumnSum column_sum[3];  // indexed by DType
  LinearKernel linear[kMathCount];
  RowKernel rows;
};

extern const KernelTable kScalar;
extern const KernelTable kAvx2;
extern const KernelTable kAvx512;
extern const KernelTable kAvx512Bf16;
extern const KernelTable kAmx;

}  // namespace slimkern
