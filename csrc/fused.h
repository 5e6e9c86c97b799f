// Whole blocks of a transformer on packed weights: arguments checked once, work dealt to threads.
//
// All of it is plain C++ over the kernels of the active instruction set. Rows are computed in
// float between the linears; only what goes in and out is of the storage type. A result does not
// depend on the number of threads. Every function throws std::invalid_argument, before anything
// is read or written, where the pack is not one of its kind or a size does not fit.
#pragma once

#include <cstdint>

#include "kernel_table.h"

namespace slimkern {

// A pack's memory; see packed.h.
struct PackView {
  const void* data = nullptr;
  int64_t bytes = 0;
};

struct Scratch {
  void* data = nullptr;
  int64_t bytes = 0;
};

// Hidden states x [B, T, hidden] of unit last stride, and where the result goes, without gaps.
struct Hidden {
  DType dtype = DType::kFloat32;  // float32 or bfloat16
  const void* x = nullptr;
  int64_t batch_stride = 0, row_stride = 0;  // of x, in elements
  int64_t B = 0, T = 0, hidden = 0;
  void* out = nullptr;
};

// Which keys count. kLengths: int64 [B], the first so many. kKeep: bool [B, T]. kAdded: float
// [B, T], added to the scores; a value of at most kRemoved takes the key out, as -inf would.
enum class MaskKind { kNone, kLengths, kKeep, kAdded };
constexpr float kRemoved = -1e30f;

// Strides in elements; that of kLengths is row_stride.
struct Mask {
  MaskKind kind = MaskKind::kNone;
  const void* data = nullptr;
  int64_t row_stride = 0, col_stride = 0;
};

// Added to the scores of every sequence: float [heads, T, T] of unit last stride; or no data.
struct HeadBias {
  const float* data = nullptr;
  int64_t head_stride = 0, row_stride = 0;
  int64_t heads = 0;
};

// y [M, N] = x Wt + b. Hidden of B = 1, T = M, hidden = K.
int64_t packed_linear_scratch(const PackView& pack, int64_t M, int threads);
void packed_linear(const PackView& pack, const Hidden& rows, int64_t N, int threads,
                   const Scratch& scratch);

// y = post(x + fc2(a(fc1(pre(x))))), a gated by a second first linear where the pack has one.
// Hidden of B = 1, T = M.
int64_t ffn_scratch(const PackView& pack, int64_t M, int threads);
void ffn(const PackView& pack, const Hidden& rows, int threads, const Scratch& scratch);

// Attention, for kinds kAttention and kEncoderLayer, and the ffn behind it for the latter.
// Keys at the end that the mask removes for a whole sequence are skipped; the rows there are not
// computed: zeros are written.
int64_t layer_scratch(const PackView& pack, int64_t B, int64_t T, int threads);
void layer(const PackView& pack, const Hidden& rows, const Mask& mask, const HeadBias& bias,
           int threads, const Scratch& scratch);

// Packs of one or more such layers.
struct PackList {
  const PackView* data = nullptr;
  int64_t count = 0;
};

// One layer after the other, each on what the one before it has written.
int64_t layers_scratch(const PackList& packs, const Hidden& rows, int threads);
void layers(const PackList& packs, const Hidden& rows, const Mask& mask, const HeadBias& bias,
            int threads, const Scratch& scratch);

}  // namespace slimkern
