#include "token_rows.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

namespace slimkern {
namespace {

int64_t item(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

const char* place(const Hidden& at, int64_t s, int64_t t) {
  const int64_t element = s * at.batch_stride + t * at.row_stride;
  return static_cast<const char*>(at.x) + element * item(at.dtype);
}

char* out_place(const Hidden& at, int64_t s, int64_t t) {
  return static_cast<char*>(at.out) + (s * at.T + t) * at.hidden * item(at.dtype);
}

// f(first row of the run within the range, sequence, its row, rows), for the runs of a range.
template <class F>
void for_runs(const Tokens& tokens, Range range, const F& f) {
  if (tokens.flat) {
    f(int64_t{0}, int64_t{0}, range.begin, range.size());
    return;
  }
  for (int64_t i = range.begin, s = tokens.sequence(i); i < range.end; ++s) {
    const int64_t end = min(tokens.begin(s + 1), range.end);
    if (end > i) f(i - range.begin, s, i - tokens.begin(s), end - i);
    i = max(i, end);
  }
}

// Where the first row of a range in one run lies.
const char* run_begin(const Tokens& tokens, Range range) {
  const int64_t s = tokens.flat ? 0 : tokens.sequence(range.begin);
  return place(tokens.at, s, range.begin - tokens.begin(s));
}

}  // namespace

int64_t Tokens::sequence(int64_t i) const {
  if (first == nullptr) return i / at.T;
  return std::upper_bound(first, first + at.B + 1, i) - first - 1;
}

Tokens all_tokens(const Hidden& at) {
  Tokens tokens;
  tokens.at = at;
  tokens.flat = at.B <= 1 || at.batch_stride == at.T * at.row_stride;
  return tokens;
}

Rows gather(const RowKernel& kernel, const Tokens& tokens, Range range, float* buffer) {
  const Hidden& at = tokens.at;
  if (at.dtype == DType::kFloat32 && tokens.one_run(range)) {
    return {run_begin(tokens, range), at.row_stride};
  }
  const int64_t stride = row_stride(at.hidden);
  for_runs(tokens, range, [&](int64_t row, int64_t s, int64_t t, int64_t rows) {
    kernel.convert(place(at, s, t), at.dtype, at.row_stride, buffer + row * stride,
                   DType::kFloat32, stride, rows, at.hidden);
  });
  return {buffer, stride};
}

OutRows results(const Tokens& tokens, Range range, float* buffer) {
  const Hidden& at = tokens.at;
  if (at.dtype == DType::kFloat32 && tokens.one_run(range)) {
    const int64_t s = tokens.flat ? 0 : tokens.sequence(range.begin);
    char* out = out_place(at, s, range.begin - tokens.begin(s));
    return {reinterpret_cast<float*>(out), at.hidden};
  }
  return {buffer, row_stride(at.hidden)};
}

void scatter(const RowKernel& kernel, const Tokens& tokens, Range range, const OutRows& from) {
  const Hidden& at = tokens.at;
  if (at.dtype == DType::kFloat32 && tokens.one_run(range)) return;
  for_runs(tokens, range, [&](int64_t row, int64_t s, int64_t t, int64_t rows) {
    kernel.convert(from.data + row * from.stride, DType::kFloat32, from.stride,
                   out_place(at, s, t), at.dtype, at.hidden, rows, at.hidden);
  });
}

void zero_padding(const Tokens& tokens, int64_t sequence) {
  const Hidden& at = tokens.at;
  const int64_t valid = tokens.length(sequence);
  if (valid == at.T) return;
  const int64_t bytes = (at.T - valid) * at.hidden * item(at.dtype);
  std::memset(out_place(at, sequence, valid), 0, static_cast<size_t>(bytes));
}

Rows operand(const LinearKernel& kernel, const Rows& x, int64_t rows, int64_t K, char* buffer) {
  if (kernel.operand_bytes(rows, K) == 0) return x;
  kernel.load(x.data, DType::kFloat32, x.stride, rows, K, buffer);
  return {buffer, 0};
}

Rows token_operand(const LinearKernel& kernel, const RowKernel& row_kernel, const Tokens& tokens,
                   Range range, float* gathered, char* buffer) {
  const Hidden& at = tokens.at;
  const int64_t rows = range.size();
  if (kernel.operand_bytes(rows, at.hidden) > 0 && tokens.one_run(range)) {
    kernel.load(run_begin(tokens, range), at.dtype, at.row_stride, rows, at.hidden, buffer);
    return {buffer, 0};
  }
  return operand(kernel, gather(row_kernel, tokens, range, gathered), rows, at.hidden, buffer);
}

void multiply(const LinearKernel& kernel, const PackedLinear& w, const Rows& x, int64_t rows,
              const OutRows& y) {
  kernel.multiply(x.data, x.stride, rows, w.K, w.weight, {0, w.N}, w.bias, false, y.data, y.stride);
}

void check_scratch(const Scratch& scratch, int64_t needed) {
  if (scratch.bytes < needed || (needed > 0 && scratch.data == nullptr)) {
    throw std::invalid_argument("scratch holds " + std::to_string(scratch.bytes) +
                                " bytes; accepted: at least " + std::to_string(needed));
  }
}

void check_hidden(const Hidden& rows, int64_t hidden) {
  if (rows.dtype != DType::kFloat32 && rows.dtype != DType::kBFloat16) {
    throw std::invalid_argument("x has another dtype; accepted: float32, bfloat16");
  }
  if (rows.hidden != hidden) {
    throw std::invalid_argument("x has rows of " + std::to_string(rows.hidden) +
                                "; accepted: " + std::to_string(hidden));
  }
  constexpr int64_t kMost = int64_t{1} << 31;
  if (rows.B < 0 || rows.T < 0 || rows.B > kMost || rows.T > kMost) {
    throw std::invalid_argument("x has a negative size, or more than 2**31 rows");
  }
  const bool empty = rows.B == 0 || rows.T == 0 || hidden == 0;
  if (!empty && rows.x == nullptr) throw std::invalid_argument("x has no memory");
}

}  // namespace slimkern
