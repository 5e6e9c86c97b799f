#include <stdexcept>

#include "attention_heads.h"
#include "block_rows.h"
#include "masked_tokens.h"
#include "parallel.h"

namespace slimkern {
namespace {

// Tokens whose attention and blocks a worker computes in one go: what it hands on stays in the
// second-level cache. A longer sequence is a group of its own.
constexpr int64_t kGroupTokens = 128;

// Memory that all workers see.
struct Shared {
  MaskedKeys keys;
  int64_t* group_first;  // [B + 1]
  float *qkv, *context;  // where all workers go through a phase together
};

// A worker's memory: of a block, and, at the same place, of attention.
struct Worker {
  float *qkv, *context;
  BlockScratch block;
  HeadScratch heads;
};

struct Plan {
  bool by_group;  // each worker has groups of its own; else all share each phase
  int64_t block_rows;
  WorkerMemory memory;
};

int64_t qkv_stride(const Pack& pack) { return row_stride(pack.at(Slot::kQkv).N); }
int64_t context_stride(const Pack& pack) { return row_stride(pack.at(Slot::kProjection).K); }

Shared take_shared(Arena& arena, const Pack& pack, const Plan& plan, int64_t B, int64_t T) {
  const int64_t rows = plan.by_group ? 0 : B * T;
  Shared at;
  at.keys = take_keys(arena, B, T);
  at.group_first = arena.take<int64_t>(B + 1);
  at.qkv = arena.take<float>(rows * qkv_stride(pack));
  at.context = arena.take<float>(rows * context_stride(pack));
  return at;
}

Worker take_worker(Arena& arena, const Pack& pack, const Plan& plan, int64_t B, int64_t T) {
  const int64_t rows = plan.by_group ? min(max(T, kGroupTokens), B * T) : 0;
  Worker at;
  at.qkv = arena.take<float>(rows * qkv_stride(pack));
  at.context = arena.take<float>(rows * context_stride(pack));
  Arena same = arena;
  at.block = take_block(arena, pack, plan.block_rows);
  at.heads = take_heads(same, pack, T);
  if (same.used() > arena.used()) arena = same;
  return at;
}

Plan make_plan(const Pack& pack, int64_t B, int64_t T, int threads) {
  Plan plan;
  threads = threads < 1 ? 1 : threads;
  const int64_t groups = ceil_div(B, max(1, kGroupTokens / max(T, 1)));
  // Each worker for itself, unless more than a seventh of their time were spent waiting.
  plan.by_group = ceil_div(groups, threads) * threads * 7 <= groups * 8;
  plan.block_rows = round_up(min(B * T, kBlockRows), pack.linear_kernel->rows);
  plan.memory.workers = static_cast<int>(plan.by_group ? min(threads, max(groups, 1)) : threads);
  Arena shared, each;
  take_shared(shared, pack, plan, B, T);
  take_worker(each, pack, plan, B, T);
  plan.memory.shared = shared.used();
  plan.memory.each = each.used();
  return plan;
}

struct Job {
  const Pack& pack;
  const Tokens& tokens;
  const HeadBias& bias;
  const Shared& shared;
};

// qkv = projections of (normed) x; qkv is that of the first token of the range.
void project(const Job& job, Range range, const BlockScratch& scratch, float* qkv) {
  const Pack& pack = job.pack;
  const LinearKernel& kernel = *pack.linear_kernel;
  const PackedNorm& norm = pack.at(NormSlot::kAttentionPre);
  const int64_t rows = range.size(), hidden = pack.spec.hidden;
  Rows x;
  if (norm.kind == Norm::kNone) {
    x = token_operand(kernel, *pack.rows, job.tokens, range, scratch.x, scratch.operand);
  } else {
    x = gather(*pack.rows, job.tokens, range, scratch.x);
    x = normed(*pack.rows, norm, x, rows, hidden, scratch.normed);
    x = operand(kernel, x, rows, hidden, scratch.operand);
  }
  multiply(kernel, pack.at(Slot::kQkv), x, rows, {qkv, qkv_stride(pack)});
}

// The rest of the layer for a block; context is that of the first token of the range.
void finish(const Job& job, Range range, const BlockScratch& scratch, const float* context) {
  const Pack& pack = job.pack;
  const PackSpec& s = pack.spec;
  const int64_t rows = range.size(), stride = row_stride(s.hidden);
  const bool with_ffn = s.kind == static_cast<int64_t>(PackKind::kEncoderLayer);
  const PackedNorm& post = pack.at(NormSlot::kAttentionPost);
  const bool more = s.attention_residual || post.kind != Norm::kNone;
  const Rows x = s.attention_residual ? gather(*pack.rows, job.tokens, range, scratch.x)
                                      : Rows{nullptr, 0};
  // x is done with when the ffn writes its result.
  const OutRows out = results(job.tokens, range, with_ffn ? scratch.x : scratch.h);
  const OutRows h = with_ffn ? OutRows{scratch.h, stride} : out;
  const OutRows y = more ? OutRows{scratch.y, stride} : h;
  const Rows from = operand(*pack.linear_kernel, {context, context_stride(pack)}, rows,
                            s.heads * s.head_dim, scratch.operand);
  multiply(*pack.linear_kernel, pack.at(Slot::kProjection), from, rows, y);
  if (more) add_norm(*pack.rows, post, y, x, rows, s.hidden, h);
  if (with_ffn) ffn_rows(pack, {h.data, h.stride}, rows, scratch, out);
  scatter(*pack.rows, job.tokens, range, out);
}

// Attention of one key head for queries of a sequence; qkv and context are those of its first
// token.
void attend_head(const Job& job, int64_t sequence, int64_t kv_head, Range queries,
                 const HeadScratch& scratch, const float* qkv, float* context) {
  const Shared& shared = job.shared;
  HeadTask task;
  task.qkv = qkv;
  task.qkv_stride = qkv_stride(job.pack);
  task.length = job.tokens.length(sequence);
  task.kv_head = kv_head;
  task.queries = {queries.begin, min(queries.end, task.length)};
  task.key_mask = shared.keys.of(sequence, job.tokens.at.T);
  task.bias = job.bias;
  task.context = context;
  task.context_stride = context_stride(job.pack);
  if (task.queries.begin < task.queries.end) attend(job.pack, task, scratch);
}

void run_group(const Job& job, Range sequences, const Worker& worker) {
  const Pack& pack = job.pack;
  const Range range{job.tokens.begin(sequences.begin), job.tokens.begin(sequences.end)};
  const Parts blocks = parts(range.size(), kBlockRows, pack.linear_kernel->rows);
  for (int64_t i = 0; i < blocks.count; ++i) {
    const Range block = blocks.at(i, range);
    project(job, block, worker.block,
            worker.qkv + (block.begin - range.begin) * qkv_stride(pack));
  }
  const int64_t step = most_queries(pack.spec);
  for (int64_t s = sequences.begin; s < sequences.end; ++s) {
    const int64_t row = job.tokens.begin(s) - range.begin, length = job.tokens.length(s);
    for (int64_t head = 0; head < pack.spec.kv_heads; ++head) {
      for (int64_t q = 0; q < length; q += step) {
        attend_head(job, s, head, {q, q + step}, worker.heads,
                    worker.qkv + row * qkv_stride(pack),
                    worker.context + row * context_stride(pack));
      }
    }
    zero_padding(job.tokens, s);
  }
  for (int64_t i = 0; i < blocks.count; ++i) {
    const Range block = blocks.at(i, range);
    finish(job, block, worker.block,
           worker.context + (block.begin - range.begin) * context_stride(pack));
  }
}

// All workers: the projections of every block; then every head; then the rest of every block.
template <class WorkerOf>
void run_phases(const Job& job, int threads, const WorkerOf& worker_of) {
  const Pack& pack = job.pack;
  const Shared& shared = job.shared;
  const Range all{0, job.tokens.count()};
  const int64_t least = round_up(ceil_div(all.size(), kBlockRows), threads);
  const Parts blocks = parts(all.size(), kBlockRows, pack.linear_kernel->rows, least);
  parallel_for(blocks.count, threads, [&](int64_t task, int worker) {
    const Range block = blocks.at(task, all);
    project(job, block, worker_of(worker).block, shared.qkv + block.begin * qkv_stride(pack));
  });

  const int64_t B = job.tokens.at.B, T = job.tokens.at.T, heads = pack.spec.kv_heads;
  constexpr int64_t kFewest = 48;  // queries for which the keys are worth packing
  const int64_t wanted = ceil_div(2 * threads, max(B * heads, 1));
  const int64_t step =
      min(most_queries(pack.spec), max(kFewest, ceil_div(T, max(wanted, 1))));
  const int64_t steps = ceil_div(T, step);
  parallel_for(B * heads * steps, threads, [&](int64_t task, int worker) {
    const int64_t q = task % steps * step, head = task / steps % heads;
    const int64_t sequence = task / steps / heads, row = job.tokens.begin(sequence);
    attend_head(job, sequence, head, {q, q + step}, worker_of(worker).heads,
                shared.qkv + row * qkv_stride(pack), shared.context + row * context_stride(pack));
  });

  parallel_for(blocks.count, threads, [&](int64_t task, int worker) {
    const Range block = blocks.at(task, all);
    finish(job, block, worker_of(worker).block,
           shared.context + block.begin * context_stride(pack));
  });
  for (int64_t s = 0; s < B; ++s) zero_padding(job.tokens, s);
}

Pack open_layer(const PackView& pack) {
  const Pack open = open_pack(pack.data, pack.bytes);
  if (open.spec.kind != static_cast<int64_t>(PackKind::kEncoderLayer)) {
    return open_pack(pack.data, pack.bytes, PackKind::kAttention);
  }
  return open;
}

}  // namespace

int64_t layer_scratch(const PackView& pack, int64_t B, int64_t T, int threads) {
  return make_plan(open_layer(pack), B, T, threads).memory.bytes();
}

void layer(const PackView& pack, const Hidden& rows, const Mask& mask, const HeadBias& bias,
           int threads, const Scratch& scratch) {
  const Pack open = open_layer(pack);
  check_hidden(rows, open.spec.hidden);
  const int64_t B = rows.B, T = rows.T;
  const Plan plan = make_plan(open, B, T, threads);
  check_scratch(scratch, plan.memory.bytes());
  if (B == 0 || T == 0) return;
  check_mask(mask);
  check_bias(bias, open.spec.heads);
  Arena all = plan.memory.all(scratch);
  const Shared shared = take_shared(all, open, plan, B, T);
  const Tokens tokens = read_tokens(rows, mask, shared.keys);
  const Job job{open, tokens, bias, shared};
  const auto worker_of = [&](int worker) {
    Arena arena = plan.memory.of(scratch, worker);
    return take_worker(arena, open, plan, B, T);
  };
  if (!plan.by_group) return run_phases(job, plan.memory.workers, worker_of);
  const int64_t groups = make_groups(tokens, kGroupTokens, shared.group_first);
  parallel_for(groups, plan.memory.workers, [&](int64_t group, int worker) {
    run_group(job, {shared.group_first[group], shared.group_first[group + 1]}, worker_of(worker));
  });
}

namespace {

// The rows between two layers, without gaps, and the memory of one layer.
WorkerMemory layers_memory(const PackList& packs, const Hidden& rows, int threads) {
  WorkerMemory memory;
  const int64_t item = rows.dtype == DType::kBFloat16 ? 2 : 4;
  const int64_t between = packs.count > 1 ? rows.B * rows.T * rows.hidden * item : 0;
  memory.shared = round_up(between, kLinearAlignment);
  for (int64_t i = 0; i < packs.count; ++i) {
    memory.each = max(memory.each, layer_scratch(packs.data[i], rows.B, rows.T, threads));
  }
  return memory;
}

}  // namespace

int64_t layers_scratch(const PackList& packs, const Hidden& rows, int threads) {
  return layers_memory(packs, rows, threads).bytes();
}

void layers(const PackList& packs, const Hidden& rows, const Mask& mask, const HeadBias& bias,
            int threads, const Scratch& scratch) {
  if (packs.count < 1) throw std::invalid_argument("no pack is given; accepted: one or more");
  for (int64_t i = 0; i < packs.count; ++i) {
    const PackSpec spec = open_layer(packs.data[i]).spec;
    check_hidden(rows, spec.hidden);
    if (rows.B > 0 && rows.T > 0) check_bias(bias, spec.heads);
  }
  const WorkerMemory memory = layers_memory(packs, rows, threads);
  check_scratch(scratch, memory.bytes());
  Arena arena = memory.all(scratch);
  char* between = arena.take<char>(memory.shared);
  const Scratch rest{arena.take<char>(memory.each), memory.each};
  Hidden at = rows;
  for (int64_t i = 0; i < packs.count; ++i) {
    // By turns, so that the last one writes the result.
    at.out = (packs.count - i) % 2 == 1 ? rows.out : between;
    layer(packs.data[i], at, mask, bias, threads, rest);
    at.x = at.out;
    at.row_stride = rows.hidden;
    at.batch_stride = rows.T * rows.hidden;
  }
}

}  // namespace slimkern
