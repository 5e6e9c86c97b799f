// Intel's tiles: eight registers of up to 16 rows of 64 bytes, and their bfloat16 dot product.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "simd/avx512_bf16.h"

namespace slimkern {
namespace {

// What TDPBF16PS does is spelt out in tiles_emulated.h, which stands in for this where there are no
// tiles. The register's number has to be a constant: it is part of the instruction.
struct AmxTiles {
  // The 64 bytes of a tile configuration; clears all tiles.
  static void configure(const uint8_t (&config)[64]) {
    __asm__ volatile("ldtilecfg %0" : : "m"(config));
  }
  // Without it, every context switch saves 8 KiB, and the core can not sleep deeply.
  static void release() { __asm__ volatile("tilerelease"); }

  template <int kTile>
  static void zero() {
    __asm__ volatile("tilezero %%tmm%c0" : : "n"(kTile));
  }
  // Rows lie `stride` bytes apart.
  template <int kTile>
  static void load(const void* data, int64_t stride) {
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2"
                     :
                     : "r"(data), "r"(stride), "n"(kTile)
                     : "memory");
  }
  template <int kTile>
  static void store(void* data, int64_t stride) {
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)"
                     :
                     : "r"(data), "r"(stride), "n"(kTile)
                     : "memory");
  }
  // c += a b
  template <int kC, int kA, int kB>
  static void dot() {
    __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "n"(kC), "n"(kA), "n"(kB));
  }
};

}  // namespace
}  // namespace slimkern
