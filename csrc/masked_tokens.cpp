#include "masked_tokens.h"

#include <limits>
#include <stdexcept>
#include <string>

namespace slimkern {
namespace {

bool keeps(const Mask& mask, int64_t s, int64_t t, float* added) {
  const int64_t at = s * mask.row_stride + t * mask.col_stride;
  if (mask.kind == MaskKind::kKeep) {
    *added = 0.0f;
    return static_cast<const uint8_t*>(mask.data)[at] != 0;
  }
  *added = static_cast<const float*>(mask.data)[at];
  return !(*added <= kRemoved);
}

// The valid length of sequence s, and what is added to the scores of the keys within.
int64_t read_mask(const Mask& mask, int64_t s, int64_t T, float* key_mask, bool* masked) {
  *masked = false;
  if (mask.kind == MaskKind::kNone) return T;
  if (mask.kind == MaskKind::kLengths) {
    return static_cast<const int64_t*>(mask.data)[s * mask.row_stride];
  }
  int64_t length = T;
  float added = 0.0f;
  while (length > 0 && !keeps(mask, s, length - 1, &added)) --length;
  for (int64_t t = 0; t < length; ++t) {
    const bool kept = keeps(mask, s, t, &added);
    key_mask[t] = kept ? added : -std::numeric_limits<float>::infinity();
    *masked |= key_mask[t] != 0.0f;
  }
  return length;
}

}  // namespace

void check_mask(const Mask& mask) {
  if (mask.kind < MaskKind::kNone || mask.kind > MaskKind::kAdded ||
      (mask.kind != MaskKind::kNone && mask.data == nullptr)) {
    throw std::invalid_argument("mask is of no known kind, or has no memory");
  }
}

MaskedKeys take_keys(Arena& arena, int64_t B, int64_t T) {
  MaskedKeys at;
  at.first = arena.take<int64_t>(B + 1);
  at.masked = arena.take<bool>(B);
  at.added = arena.take<float>(B * T);
  return at;
}

Tokens read_tokens(const Hidden& rows, const Mask& mask, const MaskedKeys& keys) {
  Tokens tokens;
  tokens.at = rows;
  int64_t total = 0;
  for (int64_t s = 0; s < rows.B; ++s) {
    keys.first[s] = total;
    const int64_t length =
        read_mask(mask, s, rows.T, keys.added + s * rows.T, &keys.masked[s]);
    if (length < 0 || length > rows.T) {
      throw std::invalid_argument("mask has a length of " + std::to_string(length) +
                                  "; accepted: 0 to " + std::to_string(rows.T));
    }
    total += length;
  }
  keys.first[rows.B] = total;
  if (total == rows.B * rows.T) return all_tokens(rows);
  tokens.first = keys.first;
  return tokens;
}

int64_t make_groups(const Tokens& tokens, int64_t most, int64_t* group_first) {
  int64_t groups = 0, size = 0;
  group_first[0] = 0;
  for (int64_t s = 0; s < tokens.at.B; ++s) {
    const int64_t length = tokens.length(s);
    if (s > group_first[groups] && size + length > most) {
      group_first[++groups] = s;
      size = 0;
    }
    size += length;
  }
  if (tokens.at.B > 0) group_first[++groups] = tokens.at.B;
  return groups;
}

}  // namespace slimkern
