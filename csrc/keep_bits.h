// Which blocks of a weight are kept, given as bits, and what packing makes of it.
#pragma once

#include <cstdint>

#include "kernel_table.h"

namespace slimkern {

// Of a weight [N, K]: bit j % 8 of byte j / 8 of a row says whether block column j is kept. Bits
// beyond the last block column mean nothing.
struct BlockBits {
  const uint8_t* bits = nullptr;  // null: everything is kept
  int64_t rows = 0, row_bytes = 0;
  int64_t bn = 1, bk = 1;
  int64_t N = 0, K = 0;
};

// Throws std::invalid_argument where there are not the rows and bytes that the sizes ask for.
void check_block_bits(const BlockBits& blocks);

// A bit per element: `view` (not turned) lies in memory of element_bits_bytes(blocks).
struct ElementBits {
  BitView view;
  int64_t bn = 1, N = 0, K = 0;
};

int64_t element_bits_bytes(const BlockBits& blocks);
ElementBits element_bits(const BlockBits& blocks, uint8_t* memory);

// Blocks that are kept, of all.
double kept_share(const BlockBits& blocks);

// Whether anything is kept in rows n and columns k (at most 32 of them).
bool any_kept(const ElementBits& bits, Range n, Range k);

// The steps of the reduction, `depth` elements each (a power of two, at most 32), in which something
// is kept of the outputs n (at most 32 of them): of y = x Wt they are rows of the weight, and the
// reduction runs over its columns; where `turned` it is the other way round. In rising order to
// `steps`, which may be null; returns how many.
int64_t list_steps(const ElementBits& bits, bool turned, Range n, int depth, int32_t* steps);

}  // namespace slimkern
