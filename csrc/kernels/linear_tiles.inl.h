// Packed weight times a block of rows on a unit that multiplies tiles of bfloat16, written over a
// SIMD trait (which packs and finishes) and a trait of tiles.
#pragma once

#include <cstdint>

#include "kernel_table.h"
#include "kernels/linear_tiles_pack.inl.h"

namespace slimkern {
namespace {

constexpr int kTileRowBlock = 96;  // rows that stay in the cache while all panels stream by

template <int kValue>
struct Number {
  static constexpr int value = kValue;
};

// f(Number<0>), f(Number<1>), ...: the number of a tile is part of an instruction.
template <int kEnd, int kBegin = 0, class F>
[[gnu::always_inline]] inline void for_each(const F& f) {
  if constexpr (kBegin < kEnd) {
    f(Number<kBegin>{});
    for_each<kEnd, kBegin + 1>(f);
  }
}

// Which part of x meets which part of the weight, in an order that loads little anew.
template <int kParts>
struct Products;
template <>
struct Products<1> {
  static constexpr int kCount = 1, kA[] = {0}, kB[] = {0};
};
template <>
struct Products<2> {
  static constexpr int kCount = 3, kA[] = {1, 0, 0}, kB[] = {0, 0, 1};
};
template <>
struct Products<3> {
  static constexpr int kCount = 6, kA[] = {2, 1, 1, 0, 0, 0}, kB[] = {0, 0, 1, 1, 0, 2};
};

// A block of tiles and where it goes. x: the first of the row tiles, which are depth * kParts tiles
// apart; panels of two column tiles are twice that apart.
struct TiledBlock {
  const float* x;
  const float* panel;
  int64_t depth;         // tiles of x
  const int32_t* steps;  // which of them the panel has, or null: all
  int64_t count;         // how many
  const float* bias;  // or null
  bool accumulate;
  float* out;
  int64_t out_stride;
  int width;       // columns that are stored
  int heights[2];  // rows of each row tile
};

// Registers: 0 to 3 accumulate, 4 and 5 hold rows, 6 and 7 columns. Blocks are 2 x 2 tiles, or 1 x
// 4 of two panels: fewer results would wait for each other. Each of them is one sum in the order
// of k, whatever block it falls into: a row does not depend on the rows beside it.
template <class Simd, class Tiles, int kParts, int kRowTiles, int kColumnTiles>
struct TiledKernel {
  static_assert(kRowTiles * kColumnTiles <= 4);
  static constexpr int kInPanel = kColumnTiles < 2 ? kColumnTiles : 2;

  // One tile of k for the columns of one panel.
  template <int kPanelIndex>
  static void step(const float* x, const float* panel, int64_t row_pitch) {
    using P = Products<kParts>;
    for_each<P::kCount>([&](auto p) {
      constexpr int kP = decltype(p)::value, kBefore = kP == 0 ? 0 : kP - 1;
      constexpr int kA = P::kA[kP], kB = P::kB[kP];
      constexpr bool kFirst = kP == 0 && (kPanelIndex == 0 || kParts > 1);
      for_each<kRowTiles>([&](auto i) {
        if constexpr (kFirst || kA != P::kA[kBefore]) {
          Tiles::template load<4 + i.value>(x + i.value * row_pitch + kA * kTileWords, 64);
        }
      });
      for_each<kInPanel>([&](auto j) {
        if constexpr (kP == 0 || kB != P::kB[kBefore]) {
          Tiles::template load<6 + j.value>(panel + (kB * kInPanel + j.value) * kTileWords, 64);
        }
      });
      for_each<kRowTiles>([&](auto i) {
        for_each<kInPanel>([&](auto j) {
          constexpr int kC = 2 * i.value + 2 * kPanelIndex + j.value;
          Tiles::template dot<kC, 4 + i.value, 6 + j.value>();
        });
      });
    });
  }

  template <int kTile>
  static void start(const TiledBlock& t, int row, int column, int height) {
    const float* from = t.accumulate ? t.out + row * t.out_stride : t.bias;
    const int64_t stride = t.accumulate ? t.out_stride : 0;  // 0: every row is the bias
    const int count = clamp_count(t.width - column, kTileColumns);
    if (from == nullptr) {
      Tiles::template zero<kTile>();
    } else if (count == kTileColumns) {
      Tiles::template load<kTile>(from + column, stride * 4);
    } else {
      alignas(64) float buffer[kTileWords] = {};
      copy_rows<Simd>(from + column, stride, buffer, kTileColumns, height, count);
      Tiles::template load<kTile>(buffer, kTileColumns * 4);
    }
  }

  template <int kTile>
  static void finish(const TiledBlock& t, int row, int column, int height) {
    float* out = t.out + row * t.out_stride + column;
    const int count = clamp_count(t.width - column, kTileColumns);
    if (count == kTileColumns) {
      Tiles::template store<kTile>(out, t.out_stride * 4);
    } else {
      alignas(64) float buffer[kTileWords];
      Tiles::template store<kTile>(buffer, kTileColumns * 4);
      copy_rows<Simd>(buffer, kTileColumns, out, t.out_stride, height, count);
    }
  }

  static void run(const TiledBlock& t) {
    for_each<kRowTiles * kColumnTiles>([&](auto c) {
      constexpr int kRow = c.value / kColumnTiles, kColumn = c.value % kColumnTiles;
      start<2 * kRow + kColumn>(t, kRow * kTileRows, kColumn * kTileColumns, t.heights[kRow]);
    });
    constexpr int kStepA = kParts * kTileWords, kStepB = kInPanel * kStepA;
    const int64_t row_pitch = t.depth * kStepA, panel_pitch = t.depth * kStepB;
    const float* panel = t.panel;
    for (int64_t k = 0; k < t.count; ++k, panel += kStepB) {
      const float* x = t.x + (t.steps == nullptr ? k : t.steps[k]) * kStepA;
      step<0>(x, panel, row_pitch);
      if constexpr (kColumnTiles > 2) step<1>(x, panel + panel_pitch, row_pitch);
    }
    for_each<kRowTiles * kColumnTiles>([&](auto c) {
      constexpr int kRow = c.value / kColumnTiles, kColumn = c.value % kColumnTiles;
      finish<2 * kRow + kColumn>(t, kRow * kTileRows, kColumn * kTileColumns, t.heights[kRow]);
    });
  }
};

// Tiles for two row tiles of these heights, or for one (low = 0). Full rows of 64 bytes everywhere.
template <class Tiles>
void configure_tiles(int high, int low) {
  alignas(64) uint8_t config[64] = {1};  // the palette: eight tiles of up to 16 x 64 bytes
  for (int t = 0; t < 8; ++t) {
    const bool second = low > 0 && (t == 2 || t == 3 || t == 5);
    config[16 + 2 * t] = 64;
    config[48 + t] = static_cast<uint8_t>(t >= 6 ? kTileRows : second ? low : high);
  }
  Tiles::configure(config);
}

// All columns of `rows` rows, in steps of `t.heights`, which the rows are a multiple of.
template <class Simd, class Tiles, int kParts>
void run_tiled_rows(TiledBlock t, int64_t rows, Range n, const float* packed) {
  const bool two = t.heights[1] > 0;
  const int64_t height = t.heights[0] + t.heights[1];
  const int64_t x_step = (two ? 2 : 1) * t.depth * kParts * kTileWords;
  const float* x = t.x;
  const float* bias = t.bias;
  float* out = t.out;
  configure_tiles<Tiles>(t.heights[0], t.heights[1]);
  int64_t step = kTilePanel;
  for (int64_t column = n.begin; column < n.end; column += step, out += step) {
    const int64_t left = n.end - column;
    const bool four = !two && left > kTilePanel + kTileColumns;  // two panels of two tiles
    step = four ? 2 * kTilePanel : kTilePanel;
    t.width = clamp_count(left, static_cast<int>(step));
    t.panel = packed + column * t.depth * kParts * (kTileDepth / 2);
    t.bias = bias == nullptr ? nullptr : bias + column;
    t.x = x;
    t.out = out;
    const bool wide = left > kTileColumns;
    for (int64_t m = 0; m < rows; m += height, t.x += x_step, t.out += height * t.out_stride) {
      if (two && wide) TiledKernel<Simd, Tiles, kParts, 2, 2>::run(t);
      if (two && !wide) TiledKernel<Simd, Tiles, kParts, 2, 1>::run(t);
      if (four) TiledKernel<Simd, Tiles, kParts, 1, 4>::run(t);
      if (!two && !four && wide) TiledKernel<Simd, Tiles, kParts, 1, 2>::run(t);
      if (!two && !wide) TiledKernel<Simd, Tiles, kParts, 1, 1>::run(t);
    }
  }
}

// steps: those of the only panel, or null.
template <class Simd, class Tiles, int kParts>
void multiply_tiles(const void* operand, int64_t rows, int64_t K, const void* packed, Range n,
                    const int32_t* steps, int64_t count, const float* bias, bool accumulate,
                    float* out, int64_t out_stride) {
  constexpr int kStep = 2 * kTileRows;
  const int64_t depth = tiles_of(K, kTileDepth), whole = rows - rows % kStep;
  const float* x = static_cast<const float*>(operand);
  const float* weight = static_cast<const float*>(packed);
  TiledBlock t{x,   nullptr,    depth, steps, count, bias, accumulate,
               out, out_stride, 0,     {kTileRows, kTileRows}};
  for (int64_t m = 0; m < whole; m += kTileRowBlock) {
    t.x = x + m * depth * kParts * (kTileDepth / 2);
    t.out = out + m * out_stride;
    run_tiled_rows<Simd, Tiles, kParts>(t, clamp_count(whole - m, kTileRowBlock), n, weight);
  }
  if (rows > whole) {
    t.x = x + whole * depth * kParts * (kTileDepth / 2);
    t.out = out + whole * out_stride;
    t.heights[0] = clamp_count(rows - whole, kTileRows);
    t.heights[1] = clamp_count(rows - whole - kTileRows, kTileRows);
    run_tiled_rows<Simd, Tiles, kParts>(t, rows - whole, n, weight);
  }
  Tiles::release();
}

template <class Simd, class Tiles, int kParts>
void tiled_multiply(const void* operand, int64_t, int64_t rows, int64_t K, const void* packed,
                    Range n, const float* bias, bool accumulate, float* out, int64_t out_stride) {
  multiply_tiles<Simd, Tiles, kParts>(operand, rows, K, packed, n, nullptr,
                                      tiles_of(K, kTileDepth), bias, accumulate, out, out_stride);
}

template <class Simd, class Tiles, int kParts>
void tiled_multiply_steps(const void* operand, int64_t, int64_t rows, int64_t K, const void* panel,
                          const int32_t* steps, int64_t count, int columns, const float* bias,
                          float* out, int64_t out_stride) {
  multiply_tiles<Simd, Tiles, kParts>(operand, rows, K, panel, {0, columns}, steps, count, bias,
                                      false, out, out_stride);
}

template <class Simd, class Tiles, int kParts>
constexpr LinearKernel tiled_linear_kernel() {
  return {2 * kTileRows,
          kTilePanel,
          kTileColumns,
          kTileDepth,
          tiled_packed_bytes<kParts>,
          tiled_pack<Simd, kParts>,
          tiled_operand_bytes<kParts>,
          tiled_load<Simd, kParts>,
          tiled_operand_bytes<kParts>,
          tiled_turn<Simd, kParts>,
          tiled_multiply<Simd, Tiles, kParts>,
          tiled_pack_steps<Simd, kParts>,
          tiled_multiply_steps<Simd, Tiles, kParts>};
}

}  // namespace
}  // namespace slimkern
