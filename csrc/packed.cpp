#include "packed.h"

#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>

#include "arena.h"

namespace slimkern {
namespace {

constexpr int64_t kMagic = 0x31306d696c73;  // "slim01"
// Channels of an FFN that are computed at a time: with the rows of a block they stay in the
// second-level cache, however many there are in all.
constexpr int64_t kChannels = 768;
constexpr int64_t kMaxSize = int64_t{1} << 24;

void refuse(const std::string& what) { throw std::invalid_argument(what); }

void check_range(const char* name, int64_t value, int64_t low, int64_t high) {
  if (value < low || value > high) {
    refuse(std::string(name) + " is " + std::to_string(value) + "; accepted: " +
           std::to_string(low) + " to " + std::to_string(high));
  }
}

bool has_attention(int64_t kind) {
  return kind == static_cast<int64_t>(PackKind::kAttention) ||
         kind == static_cast<int64_t>(PackKind::kEncoderLayer);
}
bool has_ffn(int64_t kind) {
  return kind == static_cast<int64_t>(PackKind::kFfn) ||
         kind == static_cast<int64_t>(PackKind::kEncoderLayer);
}

// `most`, or 0 where the part of a block that a field belongs to is absent.
int64_t most_if(bool present, int64_t most) { return present ? most : 0; }

void check_attention(const PackSpec& s) {
  const bool has = has_attention(s.kind);
  check_range("heads", s.heads, 0, most_if(has, 1 << 16));
  check_range("kv_heads", s.kv_heads, s.heads > 0 ? 1 : 0, s.heads);
  check_range("head_dim", s.head_dim, has ? 1 : 0, most_if(has, 256));
  check_range("causal", s.causal, 0, most_if(has, 1));
  check_range("attention_residual", s.attention_residual, 0, most_if(has, 1));
  if (s.kv_heads > 0 && s.heads % s.kv_heads != 0) {
    refuse("heads is " + std::to_string(s.heads) + "; accepted: a multiple of kv_heads, " +
           std::to_string(s.kv_heads));
  }
  if (!std::isfinite(s.scale)) refuse("scale is not finite");
}

void check_ffn(const PackSpec& s) {
  const bool has = has_ffn(s.kind);
  check_range("channels", s.channels, 0, most_if(has, kMaxSize));
  check_range("gated", s.gated, 0, most_if(has, 1));
  check_range("activation", s.activation, 0, most_if(has, kActivationCount - 1));
  check_range("ffn_residual", s.ffn_residual, 0, most_if(has, 1));
}

void check_spec(const PackSpec& s) {
  check_range("isa", s.isa, 0, kIsaCount - 1);
  check_range("kind", s.kind, 0, kPackKinds - 1);
  check_range("math", s.math, 0, kMathCount - 1);
  const bool linear = s.kind == static_cast<int64_t>(PackKind::kLinear);
  check_range("in", s.in, 0, most_if(linear, kMaxSize));
  check_range("out", s.out, 0, most_if(linear, kMaxSize));
  check_range("hidden", s.hidden, linear ? 0 : 1, most_if(!linear, kMaxSize));
  check_attention(s);
  check_ffn(s);
  for (int i = 0; i < kNormSlots; ++i) {
    const bool has = i < static_cast<int>(NormSlot::kFfnPre) ? has_attention(s.kind)
                                                             : has_ffn(s.kind);
    check_range("norm", s.norm[i], 0, most_if(has, static_cast<int64_t>(Norm::kRms)));
  }
}

PackedLinear place_linear(Arena& arena, const LinearKernel& kernel, int64_t N, int64_t K,
                          int64_t chunk) {
  PackedLinear p;
  p.N = N;
  p.K = K;
  p.chunk = chunk;
  const int64_t pieces = chunk > 0 ? ceil_div(K, chunk) : 1;
  p.chunk_bytes = round_up(kernel.packed_bytes(N, chunk), kLinearAlignment);
  p.weight = arena.take<char>(pieces * p.chunk_bytes);
  p.bias = arena.take<float>(N);
  return p;
}

PackedNorm place_norm(Arena& arena, const PackSpec& s, NormSlot slot) {
  const int i = static_cast<int>(slot);
  PackedNorm p;
  p.kind = static_cast<Norm>(s.norm[i]);
  p.eps = static_cast<float>(s.eps[i]);
  if (p.kind == Norm::kNone) return p;
  p.gamma = arena.take<float>(s.hidden);
  p.beta = arena.take<float>(s.hidden);
  return p;
}

// Where everything lies, behind the description at `data` (null: only the sizes are right).
Pack layout(const PackSpec& s, const KernelTable& table, void* data) {
  Pack pack;
  pack.spec = s;
  pack.linear_kernel = &table.linear[s.math];
  pack.rows = &table.rows;
  const LinearKernel& kernel = *pack.linear_kernel;
  Arena arena(data);
  arena.take<PackSpec>(1);
  const auto linear = [&](Slot slot, int64_t N, int64_t K, int64_t chunk) {
    pack.linear[static_cast<int>(slot)] = place_linear(arena, kernel, N, K, chunk);
  };
  const auto norm = [&](NormSlot slot) {
    pack.norm[static_cast<int>(slot)] = place_norm(arena, s, slot);
  };
  if (s.kind == static_cast<int64_t>(PackKind::kLinear)) linear(Slot::kLinear, s.out, s.in, s.in);
  if (has_attention(s.kind)) {
    const int64_t context = s.heads * s.head_dim;
    norm(NormSlot::kAttentionPre);
    linear(Slot::kQkv, context + 2 * s.kv_heads * s.head_dim, s.hidden, s.hidden);
    linear(Slot::kProjection, s.hidden, context, context);
    norm(NormSlot::kAttentionPost);
  }
  if (has_ffn(s.kind)) {
    const int64_t pieces = max(1, ceil_div(s.channels, kChannels));
    const int64_t chunk = min(s.channels, round_up(ceil_div(s.channels, pieces), kernel.nr));
    norm(NormSlot::kFfnPre);
    linear(Slot::kGate, s.channels, s.hidden, s.hidden);
    if (s.gated) linear(Slot::kUp, s.channels, s.hidden, s.hidden);
    linear(Slot::kDown, s.hidden, s.channels, chunk);
    norm(NormSlot::kFfnPost);
  }
  pack.bytes = arena.used();
  return pack;
}

const KernelTable& table_of(const PackSpec& s) { return *isa_table(static_cast<Isa>(s.isa)); }

void check_memory(const void* data, int64_t bytes, int64_t needed) {
  if (bytes != needed) {
    refuse("packed holds " + std::to_string(bytes) + " bytes; accepted: " +
           std::to_string(needed));
  }
  if (reinterpret_cast<uintptr_t>(data) % kLinearAlignment != 0) {
    refuse("packed does not begin at a multiple of " + std::to_string(kLinearAlignment) +
           " bytes");
  }
}

void read_vector(DType dtype, const VecView& v, int64_t size, float* out) {
  if (v.data == nullptr) return;
  for (int64_t i = 0; i < size; ++i) {
    const int64_t at = i * v.stride;
    out[i] = dtype == DType::kFloat32 ? static_cast<const float*>(v.data)[at]
                                      : widen(static_cast<const bf16_t*>(v.data)[at]);
  }
}

void check_dtype(DType dtype) {
  if (dtype != DType::kFloat32 && dtype != DType::kBFloat16) {
    refuse("weights have another dtype; accepted: float32, bfloat16");
  }
}

}  // namespace

bool has_math(const KernelTable& table, int64_t math) {
  return math >= 0 && math < kMathCount && table.linear[math].multiply != nullptr;
}

int64_t pack_bytes(PackSpec& spec) {
  spec.magic = kMagic;
  spec.isa = static_cast<int64_t>(active_isa());
  check_spec(spec);
  if (!has_math(table_of(spec), spec.math)) {
    refuse("math " + std::to_string(spec.math) + " has no kernels on " +
           isa_name(static_cast<Isa>(spec.isa)));
  }
  return layout(spec, table_of(spec), nullptr).bytes;
}

void pack_begin(PackSpec spec, void* data, int64_t bytes) {
  check_memory(data, bytes, pack_bytes(spec));
  std::memset(data, 0, static_cast<size_t>(bytes));
  std::memcpy(data, &spec, sizeof(spec));
  const Pack pack = layout(spec, table_of(spec), data);
  for (const PackedNorm& norm : pack.norm) {
    for (int64_t i = 0; norm.gamma != nullptr && i < spec.hidden; ++i) norm.gamma[i] = 1.0f;
  }
}

void pack_linear(void* data, int64_t bytes, Slot slot, DType dtype, const MatView& w,
                 const VecView& bias, int64_t N, int64_t K) {
  const Pack pack = open_pack(data, bytes);
  check_dtype(dtype);
  check_range("slot", static_cast<int64_t>(slot), 0, kSlots - 1);
  const PackedLinear& to = pack.at(slot);
  if (to.weight == nullptr) refuse("this kind of pack has no such slot");
  if (to.N != N || to.K != K) {
    refuse("weight is [" + std::to_string(N) + ", " + std::to_string(K) + "]; accepted: [" +
           std::to_string(to.N) + ", " + std::to_string(to.K) + "]");
  }
  const int64_t item = dtype == DType::kFloat32 ? 4 : 2;
  char* place = to.weight;
  for (int64_t k = 0; k < K; k += to.chunk, place += to.chunk_bytes) {
    MatView part = w;
    part.data = static_cast<char*>(w.data) + k * w.col_stride * item;
    pack.linear_kernel->pack(part, dtype, N, min(to.chunk, K - k), place);
  }
  read_vector(dtype, bias, N, to.bias);
}

void pack_norm(void* data, int64_t bytes, NormSlot slot, DType dtype, const VecView& gamma,
               const VecView& beta, int64_t hidden) {
  const Pack pack = open_pack(data, bytes);
  check_dtype(dtype);
  check_range("slot", static_cast<int64_t>(slot), 0, kNormSlots - 1);
  const PackedNorm& to = pack.at(slot);
  if (to.kind == Norm::kNone) refuse("this pack has no norm in that place");
  check_range("the norm's size", hidden, pack.spec.hidden, pack.spec.hidden);
  read_vector(dtype, gamma, hidden, to.gamma);
  read_vector(dtype, beta, hidden, to.beta);
}

Pack open_pack(const void* data, int64_t bytes) {
  PackSpec spec;
  if (data == nullptr || bytes < static_cast<int64_t>(sizeof(spec))) {
    refuse("packed holds " + std::to_string(bytes) + " bytes, not the weights of a block");
  }
  std::memcpy(&spec, data, sizeof(spec));
  if (spec.magic != kMagic) refuse("packed was not made by one of the pack functions");
  check_spec(spec);
  const Isa isa = static_cast<Isa>(spec.isa);
  if (isa != active_isa()) {
    refuse(std::string("packed was made for instruction set ") + isa_name(isa) + ", and " +
           isa_name(active_isa()) + " is in use: pack the weights again");
  }
  if (!has_math(table_of(spec), spec.math)) refuse("packed has a math without kernels");
  // What is laid out is only read, except by the functions that fill a pack.
  const Pack pack = layout(spec, table_of(spec), const_cast<void*>(data));
  check_memory(data, bytes, pack.bytes);
  return pack;
}

Pack open_pack(const void* data, int64_t bytes, PackKind kind) {
  constexpr const char* kNames[kPackKinds] = {"a linear", "an ffn", "an attention block",
                                              "an encoder layer"};
  const Pack pack = open_pack(data, bytes);
  if (pack.spec.kind != static_cast<int64_t>(kind)) {
    refuse(std::string("packed holds ") + kNames[pack.spec.kind] + "; accepted: " +
           kNames[static_cast<int>(kind)]);
  }
  return pack;
}

}  // namespace slimkern
