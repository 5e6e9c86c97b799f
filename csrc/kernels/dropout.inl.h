// Dropout whose choices are a function of a seed and the element's number: the backward makes them
// again, and nothing is stored.
#pragma once

#include <cstdint>

#include "kernel_table.h"

namespace slimkern {
namespace {

// Wellons' lowbias32 (nullprogram.com/blog/2018/07/31): a permutation of 32 bits in which every bit
// of x moves every bit of the result with a probability near one half.
inline uint32_t mixed(uint32_t x) {
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  return x ^ (x >> 16);
}

// out[i] = x[i] * scale, or 0 where the number of element first + i, mixed with both halves of the
// seed, is below `threshold`. Plain loops: each instruction set's own flags make vectors of them.
template <class T>
void drop_elements(const Dropout& by, const T* x, T* out, int64_t first, int64_t count) {
  const uint32_t low = static_cast<uint32_t>(by.seed), high = static_cast<uint32_t>(by.seed >> 32);
  const uint32_t threshold = by.threshold;
  const float scale = by.scale;
  constexpr int64_t kBlock = 1024;
  float kept[kBlock];
  for (int64_t start = 0; start < count; start += kBlock) {
    const int size = static_cast<int>(count - start < kBlock ? count - start : kBlock);
    const uint64_t number = static_cast<uint64_t>(first + start);
    const uint32_t begin = static_cast<uint32_t>(number) + low;
    const uint32_t page = static_cast<uint32_t>(number >> 32) * 0x9e3779b9u + high;
    for (int i = 0; i < size; ++i) {
      const uint32_t drawn = mixed(mixed(begin + static_cast<uint32_t>(i)) ^ page);
      kept[i] = drawn < threshold ? 0.0f : scale;
    }
    for (int i = 0; i < size; ++i) {
      // Not a product with zero: what is dropped may be an infinity.
      const float v = kept[i] == 0.0f ? 0.0f : widen(x[start + i]) * kept[i];
      out[start + i] = Storage<T>::narrow(v);
    }
  }
}

inline void drop(DType dtype, const Dropout& by, const void* x, void* out, int64_t first,
                 int64_t count) {
  if (dtype == DType::kBFloat16) {
    drop_elements(by, static_cast<const bf16_t*>(x), static_cast<bf16_t*>(out), first, count);
  } else {
    drop_elements(by, static_cast<const float*>(x), static_cast<float*>(out), first, count);
  }
}

}  // namespace
}  // namespace slimkern
