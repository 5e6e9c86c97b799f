// The tokens of a batch that count, numbered without gaps, and their rows.
#pragma once

#include <cstdint>

#include "arena.h"
#include "fused.h"
#include "packed.h"

namespace slimkern {

// Rows of float, or the operand made of them.
struct Rows {
  const void* data;
  int64_t stride;
  const float* floats() const { return static_cast<const float*>(data); }
};

struct OutRows {
  float* data;
  int64_t stride;
};

// Distance of rows in scratch: whole cache lines, and an odd number of them, because rows that
// lie a power of two apart would share a few sets of the first-level cache.
inline int64_t row_stride(int64_t cols) { return (ceil_div(cols, 16) | 1) * 16; }

// The parts of `whole` are as equal as multiples of `unit` allow, and none is larger than `most`
// (rounded up to a multiple).
struct Parts {
  int64_t count, size;
  Range at(int64_t i, Range whole) const {
    const int64_t begin = whole.begin + i * size;
    return {begin, min(begin + size, whole.end)};
  }
};

inline Parts parts(int64_t whole, int64_t most, int64_t unit, int64_t least_count = 1) {
  if (whole <= 0) return {0, unit};
  const int64_t wanted = max(ceil_div(whole, max(most, 1)), min(least_count, whole));
  const int64_t size = round_up(ceil_div(whole, wanted), unit);
  return {ceil_div(whole, size), size};
}

// Sequence s holds tokens [first[s], first[s + 1]), which are its rows [0, length(s)).
struct Tokens {
  Hidden at;
  const int64_t* first = nullptr;  // B + 1; null: all T of each
  bool flat = false;               // x is one run of B * T rows of equal distance, all valid

  int64_t begin(int64_t s) const { return first != nullptr ? first[s] : s * at.T; }
  int64_t length(int64_t s) const { return begin(s + 1) - begin(s); }
  int64_t count() const { return begin(at.B); }
  // The sequence of token i; none of length 0.
  int64_t sequence(int64_t i) const;
  bool one_run(Range tokens) const {
    return flat || tokens.end <= begin(sequence(tokens.begin) + 1);
  }
};

Tokens all_tokens(const Hidden& at);

// The rows of `tokens` as float: in place where they are, else copied to `buffer` (rows
// row_stride(hidden) apart).
Rows gather(const RowKernel& kernel, const Tokens& tokens, Range range, float* buffer);

// Where the results of `range` may be written: their place itself where it is float and in one
// run, else `buffer`; `scatter` then brings them there.
OutRows results(const Tokens& tokens, Range range, float* buffer);
void scatter(const RowKernel& kernel, const Tokens& tokens, Range range, const OutRows& from);

// Rows that the mask leaves out become zeros.
void zero_padding(const Tokens& tokens, int64_t sequence);

// Float rows as operand of a linear; `buffer` holds operand_bytes(rows, K).
Rows operand(const LinearKernel& kernel, const Rows& x, int64_t rows, int64_t K, char* buffer);

// Rows of tokens as operand: made of what is stored where it lies in one run, else gathered first.
Rows token_operand(const LinearKernel& kernel, const RowKernel& row_kernel, const Tokens& tokens,
                   Range range, float* gathered, char* buffer);

// All columns of y = x Wt + b, for rows that are an operand.
void multiply(const LinearKernel& kernel, const PackedLinear& w, const Rows& x, int64_t rows,
              const OutRows& y);

// What a call takes of the scratch: a part that all share, and one for each worker.
struct WorkerMemory {
  int workers = 1;
  int64_t shared = 0, each = 0;  // multiples of kLinearAlignment
  // With room to align the beginning.
  int64_t bytes() const { return shared + workers * each + kLinearAlignment; }
  Arena all(const Scratch& scratch) const { return at(scratch, 0); }
  Arena of(const Scratch& scratch, int worker) const {
    return at(scratch, shared + worker * each);
  }

 private:
  static Arena at(const Scratch& scratch, int64_t offset) {
    const uintptr_t address = reinterpret_cast<uintptr_t>(scratch.data);
    const uintptr_t aligned = address + (-address) % kLinearAlignment;
    return Arena(reinterpret_cast<void*>(aligned + static_cast<uintptr_t>(offset)));
  }
};

void check_scratch(const Scratch& scratch, int64_t needed);
void check_hidden(const Hidden& rows, int64_t hidden);

}  // namespace slimkern
