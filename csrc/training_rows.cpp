#include "training_rows.h"

#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <string>

#include "isa.h"
#include "parallel.h"

namespace slimkern {
namespace {

// Sums are added up per block first: their error grows with the block, not with the rows, and does
// not depend on the threads.
constexpr int64_t kRows = 128;

int64_t blocks_of(int64_t rows) { return (rows + kRows - 1) / kRows; }

RowsOf from_row(DType dtype, const RowsOf& at, int64_t row) {
  if (at.data == nullptr) return at;
  const int64_t item = dtype == DType::kBFloat16 ? 2 : 4;
  return {static_cast<char*>(at.data) + row * at.stride * item, at.stride};
}

// f(first row, rows, sums of the block [kinds * cols], zero) per block; then their sums.
template <class F>
void with_sums(int64_t rows, int64_t cols, int64_t kinds, int threads, float* sums, float* scratch,
               int64_t scratch_size, const F& f) {
  const int64_t needed = row_sums_scratch(rows, cols, kinds), width = kinds * cols;
  if (scratch_size < needed) {
    throw std::invalid_argument("scratch holds " + std::to_string(scratch_size) +
                                " elements, sums over rows need " + std::to_string(needed));
  }
  parallel_for(blocks_of(rows), threads, [&](int64_t block, int) {
    float* partial = scratch + block * width;
    std::fill(partial, partial + width, 0.0f);
    f(block * kRows, std::min(kRows, rows - block * kRows), partial);
  });
  std::fill(sums, sums + width, 0.0f);
  for (int64_t block = 0; block < blocks_of(rows); ++block) {
    for (int64_t j = 0; j < width; ++j) sums[j] += scratch[block * width + j];
  }
}

template <class Bits>
bool zero_columns_of(Bits* w, int64_t row_stride, int64_t rows, int64_t cols, const Bits* dead,
                     int threads) {
  std::atomic<bool> changed{false};
  parallel_for(blocks_of(rows), threads, [&](int64_t block, int) {
    bool here = false;
    const int64_t end = std::min(rows, (block + 1) * kRows);
    for (int64_t i = block * kRows; i < end; ++i) {
      Bits* row = w + i * row_stride;
      Bits found = 0;
      for (int64_t j = 0; j < cols; ++j) found |= row[j] & dead[j];
      if (found == 0) continue;
      for (int64_t j = 0; j < cols; ++j) row[j] &= static_cast<Bits>(~dead[j]);
      here = true;
    }
    if (here) changed = true;
  });
  return changed;
}

}  // namespace

void activate(DType dtype, Activation a, const RowsOf& x, const RowsOf& out, int64_t rows,
              int64_t cols, int threads) {
  const RowKernel& kernel = active_table().rows;
  parallel_for(blocks_of(rows), threads, [&](int64_t block, int) {
    const int64_t i = block * kRows;
    kernel.activate_to(a, dtype, from_row(dtype, x, i), from_row(dtype, out, i),
                       std::min(kRows, rows - i), cols);
  });
}

int64_t row_sums_scratch(int64_t rows, int64_t cols, int64_t kinds) {
  return blocks_of(rows) * cols * kinds;
}

void activation_grad(DType dtype, Activation a, const ActivationGrad& at, float* sums, int64_t rows,
                     int64_t cols, int threads, float* scratch, int64_t scratch_size) {
  const RowKernel& kernel = active_table().rows;
  const auto block = [&](int64_t i, int64_t count, float* partial) {
    const ActivationGrad part{from_row(dtype, at.grad, i), from_row(dtype, at.x, i),
                              from_row(dtype, at.dx, i), from_row(dtype, at.value, i), partial};
    kernel.activation_grad(a, dtype, part, count, cols);
  };
  with_sums(rows, cols, 1, threads, sums, scratch, scratch_size, block);
}

void norm_forward(DType x_type, DType dtype, const NormForward& at, int64_t rows, int64_t cols,
                  int threads) {
  const RowKernel& kernel = active_table().rows;
  parallel_for(blocks_of(rows), threads, [&](int64_t block, int) {
    const int64_t i = block * kRows;
    NormForward part = at;
    part.x = from_row(x_type, at.x, i);
    part.residual = from_row(dtype, at.residual, i);
    part.out = from_row(dtype, at.out, i);
    part.sum = from_row(DType::kFloat32, at.sum, i);
    part.stats = at.stats + 3 * i;
    kernel.norm_forward(x_type, dtype, part, std::min(kRows, rows - i), cols);
  });
}

void norm_grad(DType x_type, DType dtype, const NormGrad& at, float* sums, int64_t rows,
               int64_t cols, int threads, float* scratch, int64_t scratch_size) {
  const RowKernel& kernel = active_table().rows;
  const auto block = [&](int64_t i, int64_t count, float* partial) {
    NormGrad part = at;
    part.grad = from_row(dtype, at.grad, i);
    part.sum = from_row(DType::kFloat32, at.sum, i);
    part.to_residual = from_row(dtype, at.to_residual, i);
    part.to_x = from_row(x_type, at.to_x, i);
    part.stats = at.stats + 3 * i;
    part.d_gamma = partial, part.d_beta = partial + cols, part.d_bias = partial + 2 * cols;
    kernel.norm_grad(x_type, dtype, part, count, cols);
  };
  with_sums(rows, cols, 3, threads, sums, scratch, scratch_size, block);
}

void drop(DType dtype, const Dropout& by, const void* x, void* out, int64_t count, int threads) {
  constexpr int64_t kElements = 1 << 15;
  const RowKernel& kernel = active_table().rows;
  const int64_t item = dtype == DType::kBFloat16 ? 2 : 4;
  parallel_for((count + kElements - 1) / kElements, threads, [&](int64_t block, int) {
    const int64_t first = block * kElements;
    kernel.drop(dtype, by, static_cast<const char*>(x) + first * item,
                static_cast<char*>(out) + first * item, first, std::min(kElements, count - first));
  });
}

bool zero_columns(int bits, void* w, int64_t row_stride, int64_t rows, int64_t cols,
                  const void* dead, int threads) {
  const auto run = [&]<class Bits>(Bits* at) {
    return zero_columns_of(at, row_stride, rows, cols, static_cast<const Bits*>(dead), threads);
  };
  if (bits == 16) return run(static_cast<uint16_t*>(w));
  if (bits == 32) return run(static_cast<uint32_t*>(w));
  if (bits == 64) return run(static_cast<uint64_t*>(w));
  throw std::invalid_argument("elements of " + std::to_string(bits) + " bits; accepted: 16, 32, 64");
}

}  // namespace slimkern
