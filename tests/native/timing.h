// What the drivers that time kernels share: aligned memory, and the fastest of many calls.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <vector>

#include "isa.h"

namespace slimkern {

struct Buffer {
  std::vector<char> bytes;
  explicit Buffer(int64_t size) : bytes(size + kLinearAlignment, 1) {}
  char* data() {
    const auto at = reinterpret_cast<uintptr_t>(bytes.data());
    return bytes.data() + (kLinearAlignment - at % kLinearAlignment) % kLinearAlignment;
  }
};

template <class F>
double best_seconds(const F& f, int milliseconds = 60) {
  using clock = std::chrono::steady_clock;
  double best = 1e9;
  const auto end = clock::now() + std::chrono::milliseconds(milliseconds);
  for (int i = 0; i < 3 || clock::now() < end; ++i) {
    const auto start = clock::now();
    f();
    best = std::min(best, std::chrono::duration<double>(clock::now() - start).count());
  }
  return best;
}

}  // namespace slimkern
