// Packed weight times a block of rows, written once over a SIMD trait and the form of its words.
//
// There is no blocking over k, and rows of x are not packed: a register tile of kMr rows
// broadcasts from x and streams a panel of the weight. Panels outermost, row tiles within.
#pragma once

#include <cstdint>

#include "kernel_table.h"
#include "kernels/linear_operands.inl.h"

namespace slimkern {
namespace {

// Rows that stay in the second-level cache while all panels stream by.
constexpr int kRowBlock = 96;

// One register tile and where it goes. All of its columns are there: a narrow one goes to a buffer.
struct LinearTile {
  const float* x;
  int64_t x_stride;
  int64_t words;  // of the panel
  const float* panel;
  const int32_t* steps;  // the words of x that the panel has, or null: all of them
  const float* start;    // what the products are added to, or null
  int64_t start_stride;
  float* out;
  int64_t out_stride;
  const char* ahead;  // what is read next, fetched on the way: so many bytes further each word
  int64_t ahead_step;
};

// A pointer of its own from here on, not one that is computed from another each time.
inline void keep_pointer(const float*& p) { __asm__("" : "+r"(p)); }

template <class Products, int kRows, int kVectors, int kPanels>
struct TileShape {
  static constexpr int kWidth = Products::Simd::kWidth, kPitch = kVectors * kWidth;
  static constexpr int kAll = kPanels * kVectors;  // vectors of a row
  static constexpr int kGroup = 3, kGroups = (kRows + kGroup - 1) / kGroup;  // share a pointer
  // Columns that fit into registers beside the sums and a broadcast are loaded once for all rows.
  static constexpr bool kKeep = kRows > 1 && kRows * kAll + kAll < Products::Simd::kRegisters;
  using Sums = typename Products::Simd::Vec[kRows][kAll];
  using Rows = const float* [kGroups];
};

// sums += x * panel over `run` words; all pointers move on, but for x where words are listed.
template <class Products, int kRows, int kVectors, int kPanels, bool kListed>
[[gnu::always_inline]] inline void add_run(
    const LinearTile& t, int64_t run, const char*& ahead, const int32_t*& steps,
    typename TileShape<Products, kRows, kVectors, kPanels>::Rows& x, const float*& panel,
    typename TileShape<Products, kRows, kVectors, kPanels>::Sums& sums) {
  using Simd = typename Products::Simd;
  using Shape = TileShape<Products, kRows, kVectors, kPanels>;
  constexpr int kAll = Shape::kAll, kPitch = Shape::kPitch, kGroup = Shape::kGroup;
  for (int64_t k = 0; k < run; ++k, panel += kPitch, ahead += t.ahead_step) {
    __builtin_prefetch(ahead, 0, 2);
    typename Simd::Vec column[kAll];
#pragma GCC unroll 8
    for (int v = 0; v < kAll; ++v) {
      const int64_t next = v / kVectors * kPitch * t.words;
      column[v] = Simd::load(panel + next + v % kVectors * Simd::kWidth);
      if (Shape::kKeep) Simd::keep(column[v]);
    }
    const int64_t word = kListed ? *steps++ : 0;
    const float* at = nullptr;
#pragma GCC unroll 12
    for (int i = 0; i < kRows; ++i) {
      if (i % kGroup == 0) {
        at = x[i / kGroup] + word;
        keep_pointer(at);
        if (!kListed) x[i / kGroup] = at + 1;
      }
      const auto row = Simd::broadcast(at + i % kGroup * t.x_stride);
#pragma GCC unroll 8
      for (int v = 0; v < kAll; ++v) sums[i][v] = Products::add(row, column[v], sums[i][v]);
    }
  }
}

// Each element of the result is summed in the same order, whatever tile it falls into, so that a
// row does not depend on the rows beside it: words in runs of kRun, each from zero, and runs one
// after the other on top of what they start from. Errors grow with the run, not with K.
template <class Products, int kRows, int kVectors, int kPanels = 1, bool kListed = false>
[[gnu::noinline]] void linear_tile(const LinearTile t) {
  using Simd = typename Products::Simd;
  using Shape = TileShape<Products, kRows, kVectors, kPanels>;
  constexpr int kWidth = Simd::kWidth, kAll = Shape::kAll;
#pragma GCC unroll 12
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kAll * kWidth; j += 16) __builtin_prefetch(t.out + i * t.out_stride + j, 1);
  }
  typename Shape::Rows x;
#pragma GCC unroll 4
  for (int g = 0; g < Shape::kGroups; ++g) x[g] = t.x + g * Shape::kGroup * t.x_stride;
  const float* panel = t.panel;
  const int32_t* steps = t.steps;
  const float* start = t.start;
  const char* ahead = t.ahead;
  int64_t start_stride = t.start_stride, left = t.words;
  do {
    typename Shape::Sums sums;
#pragma GCC unroll 12
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
      for (int v = 0; v < kAll; ++v) sums[i][v] = Simd::zero();
    }
    const int64_t run = left < Products::kRun ? left : Products::kRun;
    add_run<Products, kRows, kVectors, kPanels, kListed>(t, run, ahead, steps, x, panel, sums);
#pragma GCC unroll 12
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
      for (int v = 0; v < kAll; ++v) {
        if (start != nullptr) {
          const float* from = start + i * start_stride + v * kWidth;
          sums[i][v] = Simd::add(sums[i][v], Simd::load(from));
        }
        Simd::store(t.out + i * t.out_stride + v * kWidth, sums[i][v]);
      }
    }
    start = t.out;
    start_stride = t.out_stride;
    left -= run;
  } while (left > 0);
}

// Few rows of two whole panels: one would leave the multipliers waiting for their own results.
constexpr int kFewRows = 3;
template <class Products>
void run_two_panels(int64_t rows, const LinearTile& t) {
  constexpr int kVectors = Products::Simd::kVectors;
  if (rows == 1) return linear_tile<Products, 1, kVectors, 2>(t);
  if (rows == 2) return linear_tile<Products, 2, kVectors, 2>(t);
  linear_tile<Products, kFewRows, kVectors, 2>(t);
}

template <class Products, int kVectors, int kRows = Products::Simd::kMr>
void run_tile(int rows, const LinearTile& t) {
  if constexpr (kRows > 0) {
    if (rows == kRows && t.steps == nullptr) return linear_tile<Products, kRows, kVectors>(t);
    if (rows == kRows) return linear_tile<Products, kRows, kVectors, 1, true>(t);
    run_tile<Products, kVectors, kRows - 1>(rows, t);
  }
}

// `rows` rows of one panel, of which `width` columns are stored.
template <class Products, int kVectors = Products::Simd::kVectors>
void run_panel(int vectors, int width, int64_t rows, LinearTile t) {
  if constexpr (kVectors > 0) {
    if (vectors != kVectors) return run_panel<Products, kVectors - 1>(vectors, width, rows, t);
    using Simd = typename Products::Simd;
    constexpr int kMr = Simd::kMr, kPitch = kVectors * Simd::kWidth;
    // Rows 4 KiB apart meet in one set of the first-level cache, which has eight or twelve places.
    const int most = t.x_stride % 1024 == 0 && kMr > 8 ? 8 : kMr;
    const int64_t tiles = (rows + most - 1) / most;
    t.ahead_step /= tiles;
    for (int64_t i = 0; i < tiles; ++i) {  // of even height: 16 rows are 8 and 8, not 12 and 4
      const int height = static_cast<int>(rows * (i + 1) / tiles - rows * i / tiles);
      if (width == kPitch) {
        run_tile<Products, kVectors>(height, t);
      } else {
        float buffer[kMr * kPitch] = {};
        LinearTile narrow = t;
        if (t.start != nullptr) {
          copy_rows<Simd>(t.start, t.start_stride, buffer, kPitch, height, width);
          narrow.start = buffer;
          narrow.start_stride = kPitch;
        }
        narrow.out = buffer;
        narrow.out_stride = kPitch;
        run_tile<Products, kVectors>(height, narrow);
        copy_rows<Simd>(buffer, kPitch, t.out, t.out_stride, height, width);
      }
      t.ahead += t.ahead_step * t.words;
      t.x += height * t.x_stride;
      t.out += height * t.out_stride;
      if (t.start != nullptr) t.start += height * t.start_stride;
    }
  }
}

template <class Words>
void linear_multiply(const void* operand, int64_t operand_stride, int64_t rows, int64_t K,
                     const void* packed, Range n, const float* bias, bool accumulate, float* out,
                     int64_t out_stride) {
  constexpr int kNr = kPanel<Words>;
  const int64_t words = words_of(K, Words::kPerWord);
  const int64_t stride = Words::kRowsInPlace ? operand_stride : row_words<Words>(K);
  for (int64_t m = 0; m < rows; m += kRowBlock) {
    const float* x = static_cast<const float*>(operand) + m * stride;
    const float* panel = static_cast<const float*>(packed) + n.begin * words;
    float* to = out + m * out_stride;
    const int height = clamp_count(rows - m, kRowBlock);
    int64_t step = kNr;
    for (int64_t n0 = n.begin; n0 < n.end; n0 += step, panel += step * words, to += step) {
      // The next panel; behind the last one, the first of the next rows' or the next weight.
      const char* ahead = reinterpret_cast<const char*>(panel + kNr * words);
      LinearTile t{x, stride, words, panel, nullptr, nullptr, 0, to, out_stride, ahead, kNr * 4};
      if (accumulate) {
        t.start = to;
        t.start_stride = out_stride;
      } else if (bias != nullptr) {
        t.start = bias + n0;  // the same for every row
      }
      const bool two = height <= kFewRows && n.end - n0 >= 2 * kNr;
      step = two ? 2 * kNr : kNr;
      if (two) {
        run_two_panels<typename Words::Products>(height, t);
      } else {
        run_panel<typename Words::Products>(panel_vectors<Words>(n.end - n0),
                                            clamp_count(n.end - n0, kNr), height, t);
      }
    }
  }
}

template <class Words>
void linear_multiply_steps(const void* operand, int64_t operand_stride, int64_t rows, int64_t K,
                           const void* panel, const int32_t* steps, int64_t count, int columns,
                           const float* bias, float* out, int64_t out_stride) {
  const int64_t stride = Words::kRowsInPlace ? operand_stride : row_words<Words>(K);
  const float* weight = static_cast<const float*>(panel);
  const int pitch = panel_vectors<Words>(columns) * Words::Simd::kWidth;
  // The next panel lies behind the room that this one would take with all of its words.
  const char* ahead = reinterpret_cast<const char*>(weight + pitch * words_of(K, Words::kPerWord));
  const LinearTile t{static_cast<const float*>(operand), stride, count, weight, steps, bias, 0, out,
                     out_stride, ahead, pitch * 4};
  if (rows > 0) {
    run_panel<typename Words::Products>(panel_vectors<Words>(columns), columns, rows, t);
  }
}

template <class Words>
constexpr LinearKernel linear_kernel() {
  return {Words::Simd::kMr,
          kPanel<Words>,
          Words::Simd::kWidth,
          Words::kPerWord,
          linear_packed_bytes<Words>,
          linear_pack<Words>,
          linear_operand_bytes<Words>,
          Words::kRowsInPlace ? nullptr : linear_load<Words>,
          linear_turned_bytes<Words>,
          linear_turn<Words>,
          linear_multiply<Words>,
          linear_pack_steps<Words>,
          linear_multiply_steps<Words>};
}

}  // namespace
}  // namespace slimkern
