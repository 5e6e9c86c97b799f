#include <stdexcept>
#include <string>

#include "block_rows.h"
#include "parallel.h"

namespace slimkern {
namespace {

// Columns of the first linear that are activated together: while they are in the first-level cache.
constexpr int64_t kStep = 64;

int64_t mid_stride(const Pack& pack) {
  return row_stride((pack.spec.gated ? 2 : 1) * round_up(pack.at(Slot::kDown).chunk, 16));
}

// mid = a(fc1(x)), or a(gate(x)) * up(x), for channels n.
void first_linears(const Pack& pack, const Rows& x, int64_t rows, Range n, float* mid,
                   int64_t stride) {
  const LinearKernel& kernel = *pack.linear_kernel;
  const PackedLinear& gate = pack.at(Slot::kGate);
  const PackedLinear& up = pack.at(Slot::kUp);
  const Activation activation = static_cast<Activation>(pack.spec.activation);
  const int64_t step = round_up(kStep, kernel.nr);
  const int64_t second = round_up(pack.at(Slot::kDown).chunk, 16);
  for (int64_t j = n.begin; j < n.end; j += step) {
    const Range part{j, min(j + step, n.end)};
    float* at = mid + (j - n.begin);
    kernel.multiply(x.data, x.stride, rows, gate.K, gate.weight, part, gate.bias, false, at,
                    stride);
    if (pack.spec.gated) {
      kernel.multiply(x.data, x.stride, rows, up.K, up.weight, part, up.bias, false, at + second,
                      stride);
      pack.rows->gate(activation, at, at + second, stride, rows, part.size());
    } else if (activation != Activation::kNone) {
      pack.rows->activate(activation, at, stride, rows, part.size());
    }
  }
}

struct Plan {
  Parts blocks;
  WorkerMemory memory;
};

// Blocks of M rows for `threads` workers, each of which takes its memory with `take`.
template <class Take>
Plan make_plan(const Pack& pack, int64_t M, int threads, const Take& take) {
  Plan plan;
  plan.blocks = parts(M, kBlockRows, pack.linear_kernel->rows, threads);
  plan.memory.workers = static_cast<int>(max(1, min(threads, plan.blocks.count)));
  Arena arena;
  take(arena, pack, plan.blocks.size);
  plan.memory.each = arena.used();
  return plan;
}

struct LinearScratch {
  float *x, *y;
  char* operand;
};

LinearScratch take_linear(Arena& arena, const Pack& pack, int64_t rows) {
  const PackSpec& s = pack.spec;
  LinearScratch at;
  at.x = arena.take<float>(rows * row_stride(s.in));
  at.y = arena.take<float>(rows * row_stride(s.out));
  at.operand = arena.take<char>(pack.linear_kernel->operand_bytes(rows, s.in));
  return at;
}

}  // namespace

BlockScratch take_block(Arena& arena, const Pack& pack, int64_t rows) {
  const PackSpec& s = pack.spec;
  const LinearKernel& kernel = *pack.linear_kernel;
  const int64_t floats = rows * row_stride(s.hidden);
  BlockScratch at;
  at.x = arena.take<float>(floats);
  at.normed = arena.take<float>(floats);
  at.y = arena.take<float>(floats);
  at.h = arena.take<float>(floats);
  at.mid = arena.take<float>(rows * mid_stride(pack));
  at.operand = arena.take<char>(max(kernel.operand_bytes(rows, s.hidden),
                                    kernel.operand_bytes(rows, s.heads * s.head_dim)));
  at.mid_operand = arena.take<char>(kernel.operand_bytes(rows, pack.at(Slot::kDown).chunk));
  return at;
}

Rows normed(const RowKernel& kernel, const PackedNorm& norm, const Rows& x, int64_t rows,
            int64_t hidden, float* buffer) {
  if (norm.kind == Norm::kNone) return x;
  const int64_t stride = row_stride(hidden);
  kernel.add_norm(norm.kind, x.floats(), x.stride, nullptr, 0, norm.gamma, norm.beta, norm.eps,
                  DType::kFloat32, buffer, stride, nullptr, 0, rows, hidden);
  return {buffer, stride};
}

void add_norm(const RowKernel& kernel, const PackedNorm& norm, const OutRows& x,
              const Rows& residual, int64_t rows, int64_t hidden, const OutRows& out) {
  kernel.add_norm(norm.kind, x.data, x.stride, residual.data, residual.stride, norm.gamma,
                  norm.beta, norm.eps, DType::kFloat32, out.data, out.stride, nullptr, 0, rows,
                  hidden);
}

void ffn_rows(const Pack& pack, const Rows& h, int64_t rows, const BlockScratch& scratch,
              const OutRows& out) {
  const LinearKernel& kernel = *pack.linear_kernel;
  const PackedLinear& down = pack.at(Slot::kDown);
  const PackedNorm& post = pack.at(NormSlot::kFfnPost);
  const int64_t hidden = pack.spec.hidden, channels = pack.spec.channels;
  const bool finish = pack.spec.ffn_residual || post.kind != Norm::kNone;
  const OutRows y = finish ? OutRows{scratch.y, row_stride(hidden)} : out;
  const Rows pre =
      normed(*pack.rows, pack.at(NormSlot::kFfnPre), h, rows, hidden, scratch.normed);
  const Rows x = operand(kernel, pre, rows, hidden, scratch.operand);
  const int64_t stride = mid_stride(pack);
  const char* weight = down.weight;
  for (int64_t c = 0; c == 0 || c < channels; c += down.chunk, weight += down.chunk_bytes) {
    const Range n{c, min(c + down.chunk, channels)};
    first_linears(pack, x, rows, n, scratch.mid, stride);
    const Rows mid = operand(kernel, {scratch.mid, stride}, rows, n.size(), scratch.mid_operand);
    kernel.multiply(mid.data, mid.stride, rows, n.size(), weight, {0, hidden},
                    c == 0 ? down.bias : nullptr, c > 0, y.data, y.stride);
    if (channels == 0) break;
  }
  if (!finish) return;
  const Rows residual = pack.spec.ffn_residual ? h : Rows{nullptr, 0};
  add_norm(*pack.rows, post, y, residual, rows, hidden, out);
}

int64_t packed_linear_scratch(const PackView& pack, int64_t M, int threads) {
  const Pack open = open_pack(pack.data, pack.bytes, PackKind::kLinear);
  return make_plan(open, M, threads, take_linear).memory.bytes();
}

void packed_linear(const PackView& pack, const Hidden& rows, int64_t N, int threads,
                   const Scratch& scratch) {
  const Pack open = open_pack(pack.data, pack.bytes, PackKind::kLinear);
  check_hidden(rows, open.spec.in);
  if (N != open.spec.out) {
    throw std::invalid_argument("the result has rows of " + std::to_string(N) + "; accepted: " +
                                std::to_string(open.spec.out));
  }
  const Tokens from = all_tokens(rows);
  Tokens to = from;
  to.at.hidden = N;
  const LinearKernel& kernel = *open.linear_kernel;
  const Plan plan = make_plan(open, from.count(), threads, take_linear);
  check_scratch(scratch, plan.memory.bytes());
  parallel_for(plan.blocks.count, plan.memory.workers, [&](int64_t task, int worker) {
    Arena arena = plan.memory.of(scratch, worker);
    const LinearScratch at = take_linear(arena, open, plan.blocks.size);
    const Range range = plan.blocks.at(task, {0, from.count()});
    const Rows x = token_operand(kernel, *open.rows, from, range, at.x, at.operand);
    const OutRows y = results(to, range, at.y);
    multiply(kernel, open.at(Slot::kLinear), x, range.size(), y);
    scatter(*open.rows, to, range, y);
  });
}

int64_t ffn_scratch(const PackView& pack, int64_t M, int threads) {
  const Pack open = open_pack(pack.data, pack.bytes, PackKind::kFfn);
  return make_plan(open, M, threads, take_block).memory.bytes();
}

void ffn(const PackView& pack, const Hidden& rows, int threads, const Scratch& scratch) {
  const Pack open = open_pack(pack.data, pack.bytes, PackKind::kFfn);
  check_hidden(rows, open.spec.hidden);
  const Tokens tokens = all_tokens(rows);
  const Plan plan = make_plan(open, tokens.count(), threads, take_block);
  check_scratch(scratch, plan.memory.bytes());
  parallel_for(plan.blocks.count, plan.memory.workers, [&](int64_t task, int worker) {
    Arena arena = plan.memory.of(scratch, worker);
    const BlockScratch at = take_block(arena, open, plan.blocks.size);
    const Range range = plan.blocks.at(task, {0, tokens.count()});
    const Rows x = gather(*open.rows, tokens, range, at.x);
    const OutRows out = results(tokens, range, at.h);
    ffn_rows(open, x, range.size(), at, out);
    scatter(*open.rows, tokens, range, out);
  });
}

}  // namespace slimkern
