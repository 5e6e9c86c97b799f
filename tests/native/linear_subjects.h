// The packed linears that tests run: those of every instruction set of this machine, those of the
// tiles on their emulation, and, where they can be trapped, the real ones of AMX.
#pragma once

#include <cstring>
#include <new>
#include <vector>

#include "isa.h"
#include "kernels/linear_tiles.inl.h"
#include "simd/scalar.h"
#include "simd/tiles_emulated.h"
#include "trap_tiles.h"

namespace slimkern {
namespace {

// Exactly as many bytes, aligned, all NaN.
struct Buffer {
  void* data;
  explicit Buffer(int64_t size)
      : data(::operator new(size, std::align_val_t(kLinearAlignment))) {
    std::memset(data, 0xff, size);
  }
  ~Buffer() { ::operator delete(data, std::align_val_t(kLinearAlignment)); }
  Buffer(const Buffer&) = delete;
};

struct Subject {
  const char* name;
  Math math;
  LinearKernel kernel;
  bool tiles;  // products of parts: an infinity may become a NaN
  bool known;  // its arithmetic is tiled_value, bit by bit
};

std::vector<Subject> subjects() {
  std::vector<Subject> all;
  for (int i = 0; i < kIsaCount; ++i) {
    const KernelTable* table = isa_table(static_cast<Isa>(i));
    for (int math = 0; table != nullptr && math < kMathCount; ++math) {
      const Isa isa = static_cast<Isa>(i);
      const LinearKernel& kernel = table->linear[math];
      const bool tiles = isa == Isa::kAmx && math > 0;
      if (kernel.multiply) all.push_back({isa_name(isa), Math(math), kernel, tiles, false});
    }
  }
  const LinearKernel emulated[] = {tiled_linear_kernel<Scalar<float>, EmulatedTiles, 1>(),
                                   tiled_linear_kernel<Scalar<float>, EmulatedTiles, 2>(),
                                   tiled_linear_kernel<Scalar<float>, EmulatedTiles, 3>()};
  for (int i = 0; i < 3; ++i) all.push_back({"emulated", Math(i + 1), emulated[i], true, true});
  const KernelTable* trapped = trapped_table();
  for (int math = 1; trapped != nullptr && math < kMathCount; ++math) {
    all.push_back({"trapped", Math(math), trapped->linear[math], true, true});
  }
  return all;
}

}  // namespace
}  // namespace slimkern
