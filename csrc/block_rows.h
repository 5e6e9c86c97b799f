// What is done to a block of rows that stays in the second-level cache.
#pragma once

#include "token_rows.h"

namespace slimkern {

// Rows of a block: enough that a panel of weights serves many rows each time it is read, few
// enough that the block and what is made of it stay in the second-level cache.
constexpr int64_t kBlockRows = 96;

// A worker's memory for one block.
struct BlockScratch {
  float *x, *normed, *y, *h;  // rows of `hidden`
  float* mid;                 // channels of the ffn, twice as many where it is gated
  char *operand, *mid_operand;
};

BlockScratch take_block(Arena& arena, const Pack& pack, int64_t rows);

// norm(x), float to float; x itself where there is none.
Rows normed(const RowKernel& kernel, const PackedNorm& norm, const Rows& x, int64_t rows,
            int64_t hidden, float* buffer);

// out = norm(x + residual); residual: no data for none.
void add_norm(const RowKernel& kernel, const PackedNorm& norm, const OutRows& x,
              const Rows& residual, int64_t rows, int64_t hidden, const OutRows& out);

// out = post(h + fc2(a(fc1(pre(h))))).
void ffn_rows(const Pack& pack, const Rows& h, int64_t rows, const BlockScratch& scratch,
              const OutRows& out);

}  // namespace slimkern
