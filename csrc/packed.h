// The weights of a block in the form that the kernels read, in one piece of memory.
//
// It begins with its description, a PackSpec; what follows is laid out by `layout` alone, so that
// nothing but the sizes in the description has to be checked before the rest is used. It holds no
// addresses: copies of it are as good as the original.
#pragma once

#include <cstdint>

#include "isa.h"
#include "kernel_table.h"

namespace slimkern {

enum class PackKind : int64_t { kLinear, kFfn, kAttention, kEncoderLayer };
constexpr int kPackKinds = 4;

// Linears of a block; a plain packed linear is kLinear.
enum class Slot : int64_t { kLinear, kQkv, kProjection, kGate, kUp, kDown };
constexpr int kSlots = 6;

enum class NormSlot : int64_t { kAttentionPre, kAttentionPost, kFfnPre, kFfnPost };
constexpr int kNormSlots = 4;

// A part that its kind lacks has zeros here.
struct PackSpec {
  int64_t magic = 0;
  int64_t isa = 0, math = 0;  // whose layout, and of which Math
  int64_t kind = 0;
  int64_t in = 0, out = 0;                               // kLinear: W [out, in]
  int64_t hidden = 0;                                    // else: of the rows that go in and out
  int64_t heads = 0, kv_heads = 0, head_dim = 0;         // attention; heads: of the queries
  int64_t causal = 0, attention_residual = 0;
  int64_t channels = 0, gated = 0, activation = 0;       // ffn
  int64_t ffn_residual = 0;
  int64_t norm[kNormSlots] = {};                         // Norm
  double eps[kNormSlots] = {};
  double scale = 0;                                      // of the scores
};

// W [N, K]. Where `chunk` is less than K, the weight is a sequence of weights [N, chunk], each
// `chunk_bytes` long, the last one with what is left.
struct PackedLinear {
  char* weight = nullptr;
  float* bias = nullptr;
  int64_t N = 0, K = 0;
  int64_t chunk = 0, chunk_bytes = 0;
};

// gamma and beta are null where there is no norm.
struct PackedNorm {
  Norm kind = Norm::kNone;
  float *gamma = nullptr, *beta = nullptr;
  float eps = 0;
};

struct Pack {
  PackSpec spec;
  const LinearKernel* linear_kernel = nullptr;
  const RowKernel* rows = nullptr;
  PackedLinear linear[kSlots];
  PackedNorm norm[kNormSlots];
  int64_t bytes = 0;

  const PackedLinear& at(Slot slot) const { return linear[static_cast<int>(slot)]; }
  const PackedNorm& at(NormSlot slot) const { return norm[static_cast<int>(slot)]; }
};

// Whether an instruction set's table has kernels of a Math.
bool has_math(const KernelTable& table, int64_t math);

// Completes `spec` for the active instruction set and returns the bytes of its pack.
// Throws std::invalid_argument where a size is out of range or does not fit the others.
int64_t pack_bytes(PackSpec& spec);

// Writes the description, zero biases, and norms that scale by one and shift by zero.
// Throws std::invalid_argument as pack_bytes does, and where `bytes` is not what it returned.
void pack_begin(PackSpec spec, void* data, int64_t bytes);

// Packs W [N, K], view `w`, and its bias of the same dtype (data null: none) in a slot.
// Throws std::invalid_argument where the pack has no such slot or its sizes differ.
void pack_linear(void* data, int64_t bytes, Slot slot, DType dtype, const MatView& w,
                 const VecView& bias, int64_t N, int64_t K);

// gamma, beta [hidden] of one dtype (data null: one, zero). Throws as pack_linear does.
void pack_norm(void* data, int64_t bytes, NormSlot slot, DType dtype, const VecView& gamma,
               const VecView& beta, int64_t hidden);

// What lies in a pack. Throws std::invalid_argument where it is none, is damaged, or was made for
// another instruction set than the active one.
Pack open_pack(const void* data, int64_t bytes);
// ... and where it is of another kind than one of these.
Pack open_pack(const void* data, int64_t bytes, PackKind kind);

}  // namespace slimkern
