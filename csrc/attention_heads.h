// Attention of the query heads of one key head, within one sequence.
#pragma once

#include "token_rows.h"

namespace slimkern {

// What one call of `attend` is about. Rows of a sequence lie one after the other; each holds the
// heads of the queries, then those of the keys, then those of the values.
struct HeadTask {
  const float* qkv;  // of the sequence's first token
  int64_t qkv_stride;
  int64_t length;    // tokens of the sequence
  int64_t kv_head;
  Range queries;
  const float* key_mask;  // [length], added to the scores; or null
  HeadBias bias;
  float* context;  // of the sequence's first token: [length, heads * head_dim]
  int64_t context_stride;
};

// A worker's memory.
struct HeadScratch {
  char *keys, *values;        // of a block of keys, packed as weights
  float *scores, *bias;       // of a block of queries and keys
  char *queries, *weights;    // operands
  float *maximum, *sum;       // of each query head and query
  float *factor;              // of each query of a block
};

void check_bias(const HeadBias& bias, int64_t heads);

// How many queries of how many heads a task may have: their running sums stay in the cache.
int64_t most_queries(const PackSpec& spec);

HeadScratch take_heads(Arena& arena, const Pack& pack, int64_t T);

// context = softmax(scale q kT + bias) v, a block of keys at a time: the softmax is that of
// Milakov and Gimelshein (Online normalizer calculation for softmax, 2018), the blocks are those
// of Dao et al. (FlashAttention, 2022). A query that the mask leaves no key gets zeros.
void attend(const Pack& pack, const HeadTask& task, const HeadScratch& scratch);

}  // namespace slimkern
