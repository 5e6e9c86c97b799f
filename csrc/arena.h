// Places in memory that the caller owns, handed out one after the other.
#pragma once

#include <cstdint>

#include "kernel_table.h"

namespace slimkern {

inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Without memory it only counts: the same code lays out and says how much it takes.
class Arena {
 public:
  Arena() = default;
  // `base` lies at a multiple of kLinearAlignment.
  explicit Arena(void* base) : base_(reinterpret_cast<uintptr_t>(base)) {}

  // Room for `count` elements, aligned for kernels.
  template <class T>
  T* take(int64_t count) {
    T* place = reinterpret_cast<T*>(base_ + static_cast<uintptr_t>(used_));
    used_ += round_up(count * static_cast<int64_t>(sizeof(T)), kLinearAlignment);
    return place;
  }

  int64_t used() const { return used_; }

 private:
  uintptr_t base_ = 0;
  int64_t used_ = 0;
};

}  // namespace slimkern
