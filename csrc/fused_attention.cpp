#include <limits>
#include <stdexcept>
#include <string>

#include "attention_heads.h"

namespace slimkern {
namespace {

constexpr int64_t kQueries = 96;  // of a block of scores
constexpr int64_t kKeys = 512;
// Under a causal mask, half of the blocks on the diagonal is in vain: they are smaller.
constexpr int64_t kCausalKeys = 128;
constexpr int64_t kMostQueries = 1024;

int64_t group(const PackSpec& s) { return s.kv_heads > 0 ? s.heads / s.kv_heads : 0; }

// No block of `parts(n, most, unit)`, n <= whole, has more.
int64_t largest_part(int64_t whole, int64_t most, int64_t unit) {
  return round_up(min(whole, most), unit);
}

int64_t most_keys(const PackSpec& s) { return s.causal ? kCausalKeys : kKeys; }

struct KeyBlock {
  Range keys;
  int64_t head;  // of the queries
};

// What is added to the scores of a block, or null; `stride` 0: the same to each of its rows.
const float* added(const Pack& pack, const HeadTask& task, const KeyBlock& block, Range queries,
                   float* buffer, int64_t* stride) {
  const Range keys = block.keys;
  const bool cut = pack.spec.causal && keys.end - 1 > queries.begin;
  const float* bias = task.bias.data;
  if (bias != nullptr) {
    bias += block.head * task.bias.head_stride + queries.begin * task.bias.row_stride + keys.begin;
  }
  const float* mask = task.key_mask != nullptr ? task.key_mask + keys.begin : nullptr;
  if (!cut && (bias == nullptr || mask == nullptr)) {
    *stride = bias != nullptr ? task.bias.row_stride : 0;
    return bias != nullptr ? bias : mask;
  }
  *stride = row_stride(keys.size());
  for (int64_t i = 0; i < queries.size(); ++i) {
    float* row = buffer + i * *stride;
    const float* from = bias != nullptr ? bias + i * task.bias.row_stride : nullptr;
    const int64_t seen = cut ? min(queries.begin + i + 1 - keys.begin, keys.size()) : keys.size();
    for (int64_t j = 0; j < seen; ++j) {
      row[j] = (from != nullptr ? from[j] : 0.0f) + (mask != nullptr ? mask[j] : 0.0f);
    }
    for (int64_t j = max(seen, 0); j < keys.size(); ++j) {
      row[j] = -std::numeric_limits<float>::infinity();
    }
  }
  return buffer;
}

// The places of the running sums of a block of queries.
struct Running {
  float *maximum, *sum;
};

Running running(const HeadTask& task, const HeadScratch& scratch, int64_t in_group,
                int64_t query) {
  const int64_t at = in_group * task.queries.size() + query - task.queries.begin;
  return {scratch.maximum + at, scratch.sum + at};
}

// One block of queries against one block of keys.
void attend_block(const Pack& pack, const HeadTask& task, const KeyBlock& block, Range queries,
                  const Running& state, const HeadScratch& scratch) {
  const LinearKernel& kernel = *pack.linear_kernel;
  const int64_t d = pack.spec.head_dim, rows = queries.size(), keys = block.keys.size();
  const int64_t stride = row_stride(keys);
  const Rows q{task.qkv + queries.begin * task.qkv_stride + block.head * d, task.qkv_stride};
  const Rows q_operand = operand(kernel, q, rows, d, scratch.queries);
  kernel.multiply(q_operand.data, q_operand.stride, rows, d, scratch.keys, {0, keys}, nullptr,
                  false, scratch.scores, stride);
  int64_t bias_stride = 0;
  const float* bias = added(pack, task, block, queries, scratch.bias, &bias_stride);
  pack.rows->softmax_block(scratch.scores, stride, bias, bias_stride,
                           static_cast<float>(pack.spec.scale), state.maximum, state.sum,
                           scratch.factor, rows, keys);
  float* context = task.context + queries.begin * task.context_stride + block.head * d;
  const bool more = block.keys.begin > 0;
  if (more) pack.rows->scale_rows(context, task.context_stride, scratch.factor, rows, d);
  const Rows p = operand(kernel, {scratch.scores, stride}, rows, keys, scratch.weights);
  kernel.multiply(p.data, p.stride, rows, keys, scratch.values, {0, d}, nullptr, more, context,
                  task.context_stride);
}

void pack_keys(const Pack& pack, const HeadTask& task, Range keys, const HeadScratch& scratch) {
  const LinearKernel& kernel = *pack.linear_kernel;
  const PackSpec& s = pack.spec;
  // A view's data is not const because it may be written elsewhere; here it is read.
  float* k = const_cast<float*>(task.qkv) + keys.begin * task.qkv_stride +
             (s.heads + task.kv_head) * s.head_dim;
  float* v = k + s.kv_heads * s.head_dim;
  kernel.pack({k, task.qkv_stride, 1}, DType::kFloat32, keys.size(), s.head_dim, scratch.keys);
  kernel.pack({v, 1, task.qkv_stride}, DType::kFloat32, s.head_dim, keys.size(), scratch.values);
}

}  // namespace

void check_bias(const HeadBias& bias, int64_t heads) {
  if (bias.data != nullptr && bias.heads != heads) {
    throw std::invalid_argument("head_bias has " + std::to_string(bias.heads) +
                                " heads; accepted: " + std::to_string(heads));
  }
}

int64_t most_queries(const PackSpec& spec) {
  return max(kQueries, kMostQueries / max(group(spec), 1));
}

HeadScratch take_heads(Arena& arena, const Pack& pack, int64_t T) {
  const LinearKernel& kernel = *pack.linear_kernel;
  const PackSpec& s = pack.spec;
  const int64_t d = s.head_dim, keys = largest_part(T, most_keys(s), kernel.nr);
  const int64_t rows = largest_part(min(T, most_queries(s)), kQueries, kernel.rows);
  const int64_t states = group(s) * min(T, most_queries(s));
  HeadScratch at;
  at.keys = arena.take<char>(kernel.packed_bytes(keys, d));
  at.values = arena.take<char>(kernel.packed_bytes(d, keys));
  at.scores = arena.take<float>(rows * row_stride(keys));
  at.bias = arena.take<float>(rows * row_stride(keys));
  at.queries = arena.take<char>(kernel.operand_bytes(rows, d));
  at.weights = arena.take<char>(kernel.operand_bytes(rows, keys));
  at.maximum = arena.take<float>(states);
  at.sum = arena.take<float>(states);
  at.factor = arena.take<float>(rows);
  return at;
}

void attend(const Pack& pack, const HeadTask& task, const HeadScratch& scratch) {
  const PackSpec& s = pack.spec;
  const int64_t heads = group(s), d = s.head_dim;
  const int64_t first_head = task.kv_head * heads;
  const Range queries = task.queries;
  const int64_t length = s.causal ? min(task.length, queries.end) : task.length;
  const Parts key_blocks = parts(length, most_keys(s), pack.linear_kernel->nr);
  const Parts query_blocks = parts(queries.size(), kQueries, pack.linear_kernel->rows);
  for (int64_t i = 0; i < heads * queries.size(); ++i) {
    scratch.maximum[i] = -std::numeric_limits<float>::infinity();
    scratch.sum[i] = 0.0f;
  }
  for (int64_t b = 0; b < key_blocks.count; ++b) {
    const Range keys = key_blocks.at(b, {0, length});
    pack_keys(pack, task, keys, scratch);
    for (int64_t g = 0; g < heads; ++g) {
      for (int64_t i = 0; i < query_blocks.count; ++i) {
        const Range rows = query_blocks.at(i, queries);
        if (s.causal && keys.begin >= rows.end) continue;
        attend_block(pack, task, {keys, first_head + g}, rows,
                     running(task, scratch, g, rows.begin), scratch);
      }
    }
  }
  for (int64_t g = 0; g < heads; ++g) {
    float* sum = running(task, scratch, g, queries.begin).sum;
    for (int64_t i = 0; i < queries.size(); ++i) sum[i] = sum[i] == 0.0f ? 0.0f : 1.0f / sum[i];
    float* context =
        task.context + queries.begin * task.context_stride + (first_head + g) * d;
    pack.rows->scale_rows(context, task.context_stride, sum, queries.size(), d);
  }
}

}  // namespace slimkern
