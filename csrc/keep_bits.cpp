#include "keep_bits.h"

#include <cstring>
#include <stdexcept>
#include <string>

#include "arena.h"

namespace slimkern {
namespace {

// More than a row needs can be read behind it, eight bytes at a time.
int64_t row_bytes_of(int64_t K) { return round_up(ceil_div(K, 8), 8) + 8; }

uint64_t read_word(const uint8_t* p) {
  uint64_t word = 0;
  for (int i = 0; i < 8; ++i) word |= uint64_t{p[i]} << (8 * i);  // one load on x86-64
  return word;
}

bool bit(const uint8_t* row, int64_t i) { return row[i >> 3] >> (i & 7) & 1; }

// Sets bits [begin, end) of a row of zeros.
void set_bits(uint8_t* row, int64_t begin, int64_t end) {
  for (; begin < end && begin % 8 != 0; ++begin) row[begin >> 3] |= 1u << (begin & 7);
  if (begin + 8 <= end) std::memset(row + begin / 8, 0xff, static_cast<size_t>((end - begin) / 8));
  for (begin = max(begin, end / 8 * 8); begin < end; ++begin) row[begin >> 3] |= 1u << (begin & 7);
}

void expand_row(const BlockBits& blocks, const uint8_t* from, uint8_t* row) {
  std::memset(row, 0, static_cast<size_t>(row_bytes_of(blocks.K)));
  if (blocks.bk == 1) {
    std::memcpy(row, from, static_cast<size_t>(ceil_div(blocks.K, 8)));
    if (blocks.K % 8 != 0) row[blocks.K / 8] &= static_cast<uint8_t>((1u << (blocks.K % 8)) - 1);
    return;
  }
  const int64_t columns = ceil_div(blocks.K, blocks.bk);
  for (int64_t j = 0; j < columns; ++j) {
    if (bit(from, j)) set_bits(row, j * blocks.bk, min((j + 1) * blocks.bk, blocks.K));
  }
}

const uint8_t* row_of(const ElementBits& bits, int64_t n) {
  return bits.view.bits + n * bits.view.row_bytes;
}

// The next row that may differ from row n.
int64_t next_row(const ElementBits& bits, int64_t n) { return (n / bits.bn + 1) * bits.bn; }

bool any_in_row(const ElementBits& bits, int64_t n, Range k) {
  const uint64_t word = read_word(row_of(bits, n) + (k.begin >> 3)) >> (k.begin & 7);
  return (word & ((uint64_t{1} << k.size()) - 1)) != 0;
}

// Steps along the rows of the weight, of which n are those of a panel.
int64_t list_along_rows(const ElementBits& bits, Range n, int depth, int32_t* steps) {
  const int shift = __builtin_ctz(static_cast<unsigned>(depth));
  int64_t count = 0;
  for (int64_t base = 0; base < bits.K; base += 64) {
    uint64_t word = 0;
    for (int64_t i = n.begin; i < n.end; i = next_row(bits, i)) {
      word |= read_word(row_of(bits, i) + base / 8);
    }
    if (steps == nullptr && depth == 1) {
      count += __builtin_popcountll(word);
      continue;
    }
    while (word != 0) {
      const int64_t step = (base + __builtin_ctzll(word)) >> shift;
      if (steps != nullptr) steps[count] = static_cast<int32_t>(step);
      ++count;
      const int64_t next = (step + 1) * depth - base;
      word = next >= 64 ? 0 : word >> next << next;
    }
  }
  return count;
}

// Steps down the rows, where n are the columns of a panel.
int64_t list_down_rows(const ElementBits& bits, Range n, int depth, int32_t* steps) {
  int64_t count = 0, next_step = 0;
  for (int64_t i = 0; i < bits.N;) {
    const int64_t end = min(next_row(bits, i), bits.N);
    if (any_in_row(bits, i, n)) {
      for (int64_t step = max(i / depth, next_step); step * depth < end; ++step) {
        if (steps != nullptr) steps[count] = static_cast<int32_t>(step);
        ++count;
        next_step = step + 1;
      }
    }
    i = end;
  }
  return count;
}

}  // namespace

void check_block_bits(const BlockBits& blocks) {
  if (blocks.bits == nullptr) return;
  if (blocks.bn < 1 || blocks.bk < 1) {
    throw std::invalid_argument("block is (" + std::to_string(blocks.bn) + ", " +
                                std::to_string(blocks.bk) + "); accepted: at least 1 each");
  }
  const int64_t rows = ceil_div(blocks.N, blocks.bn);
  const int64_t bytes = ceil_div(ceil_div(blocks.K, blocks.bk), 8);
  if (blocks.rows != rows || blocks.row_bytes != bytes) {
    throw std::invalid_argument("bits is [" + std::to_string(blocks.rows) + ", " +
                                std::to_string(blocks.row_bytes) + "]; accepted: [" +
                                std::to_string(rows) + ", " + std::to_string(bytes) + "]");
  }
}

int64_t element_bits_bytes(const BlockBits& blocks) {
  return blocks.bits == nullptr ? 0 : blocks.N * row_bytes_of(blocks.K);
}

ElementBits element_bits(const BlockBits& blocks, uint8_t* memory) {
  const int64_t bytes = row_bytes_of(blocks.K);
  for (int64_t r = 0; r < blocks.rows; ++r) {
    uint8_t* first = memory + r * blocks.bn * bytes;
    expand_row(blocks, blocks.bits + r * blocks.row_bytes, first);
    for (int64_t i = 1; i < min(blocks.bn, blocks.N - r * blocks.bn); ++i) {
      std::memcpy(first + i * bytes, first, static_cast<size_t>(bytes));
    }
  }
  return {{memory, bytes, false}, blocks.bn, blocks.N, blocks.K};
}

double kept_share(const BlockBits& blocks) {
  const int64_t columns = ceil_div(blocks.K, blocks.bk);
  int64_t kept = 0;
  for (int64_t r = 0; r < blocks.rows; ++r) {
    const uint8_t* row = blocks.bits + r * blocks.row_bytes;
    for (int64_t b = 0; b < columns / 8; ++b) kept += __builtin_popcount(row[b]);
    for (int64_t j = columns / 8 * 8; j < columns; ++j) kept += bit(row, j);
  }
  const int64_t all = blocks.rows * columns;
  return all == 0 ? 1.0 : static_cast<double>(kept) / static_cast<double>(all);
}

bool any_kept(const ElementBits& bits, Range n, Range k) {
  for (int64_t i = n.begin; i < n.end; i = next_row(bits, i)) {
    if (any_in_row(bits, i, k)) return true;
  }
  return false;
}

int64_t list_steps(const ElementBits& bits, bool turned, Range n, int depth, int32_t* steps) {
  return turned ? list_down_rows(bits, n, depth, steps) : list_along_rows(bits, n, depth, steps);
}

}  // namespace slimkern
