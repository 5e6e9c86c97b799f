// What a mask says: how long each sequence is, and what is added to the scores of its keys.
#pragma once

#include "token_rows.h"

namespace slimkern {

struct MaskedKeys {
  int64_t* first;  // [B + 1]; see Tokens
  bool* masked;    // [B]: `added` holds something other than zeros
  float* added;    // [B, T]; of a sequence that is not masked it may hold anything

  const float* of(int64_t sequence, int64_t T) const {
    return masked[sequence] ? added + sequence * T : nullptr;
  }
};

MaskedKeys take_keys(Arena& arena, int64_t B, int64_t T);

void check_mask(const Mask& mask);

// The tokens that count; `keys` is filled. Throws std::invalid_argument for a length out of range.
Tokens read_tokens(const Hidden& rows, const Mask& mask, const MaskedKeys& keys);

// Groups of whole sequences that have no more than `most` tokens, or are one sequence: group g is
// [group_first[g], group_first[g + 1]). Returns the number of groups.
int64_t make_groups(const Tokens& tokens, int64_t most, int64_t* group_first);

}  // namespace slimkern
