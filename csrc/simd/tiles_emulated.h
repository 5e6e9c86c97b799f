// AmxTiles in plain C++, for tests where there are no tiles. One thread, and not fast.
#pragma once

#include <cstdint>

#include "dtypes.h"

namespace slimkern {
namespace {

struct EmulatedTiles {
  static constexpr int kTiles = 8, kMostRows = 16, kMostBytes = 64;
  struct Tile {
    int rows, bytes;  // as configured; rows and bytes beyond read as zero
    uint8_t data[kMostRows][kMostBytes];
  };
  static inline Tile tiles[kTiles] = {};

  static void configure(const uint8_t (&config)[64]) {
    for (int t = 0; t < kTiles; ++t) {
      tiles[t] = {config[48 + t], config[16 + 2 * t] + 256 * config[17 + 2 * t], {}};
    }
  }
  static void release() {
    for (Tile& tile : tiles) tile = {};
  }
  template <int kTile>
  static void zero() {
    tiles[kTile] = {tiles[kTile].rows, tiles[kTile].bytes, {}};
  }
  template <int kTile>
  static void load(const void* data, int64_t stride) {
    load(tiles[kTile], static_cast<const uint8_t*>(data), stride);
  }
  template <int kTile>
  static void store(void* data, int64_t stride) {
    store(tiles[kTile], static_cast<uint8_t*>(data), stride);
  }
  template <int kC, int kA, int kB>
  static void dot() {
    dot(tiles[kC], tiles[kA], tiles[kB]);
  }

  static void load(Tile& tile, const uint8_t* data, int64_t stride) {
    if (tile.rows == 0) __builtin_trap();
    tile = {tile.rows, tile.bytes, {}};
    for (int i = 0; i < tile.rows; ++i) {
      __builtin_memcpy(tile.data[i], data + i * stride, tile.bytes);
    }
  }
  static void store(const Tile& tile, uint8_t* data, int64_t stride) {
    if (tile.rows == 0) __builtin_trap();
    for (int i = 0; i < tile.rows; ++i) {
      __builtin_memcpy(data + i * stride, tile.data[i], tile.bytes);
    }
  }
  // The even and the odd products of a row are summed by fused multiply-adds from zero, then added
  // to each other, then to c. Denormals are read and left as zeros.
  static void dot(Tile& c, const Tile& a, const Tile& b) {
    const bool distinct = &c != &a && &c != &b && &a != &b;
    const bool fits = c.rows == a.rows && c.bytes == b.bytes && a.bytes == 4 * b.rows;
    if (!distinct || !fits || c.rows == 0) __builtin_trap();  // an illegal instruction there, too
    for (int m = 0; m < c.rows; ++m) {
      for (int n = 0; n < c.bytes / 4; ++n) {
        float even = 0, odd = 0;
        for (int k = 0; k < a.bytes / 4; ++k) {
          even = fma(half(a, m, 2 * k), half(b, k, 2 * n), even);
          odd = fma(half(a, m, 2 * k + 1), half(b, k, 2 * n + 1), odd);
        }
        float sum;
        __builtin_memcpy(&sum, &c.data[m][4 * n], 4);
        sum = flush(flush(sum) + flush(even + odd));
        __builtin_memcpy(&c.data[m][4 * n], &sum, 4);
      }
    }
  }
  static float half(const Tile& tile, int row, int column) {
    bf16_t value;
    __builtin_memcpy(&value, &tile.data[row][2 * column], 2);
    return flush(widen(value));
  }
  static float fma(float a, float b, float c) { return flush(__builtin_fmaf(a, b, c)); }
  static float flush(float v) {
    return __builtin_fabsf(v) < 0x1p-126f ? __builtin_copysignf(0.f, v) : v;
  }
};

}  // namespace
}  // namespace slimkern
