// What Python hands over: numbers in arrays, read here into the structs of the core.
#pragma once

#include <array>
#include <cstdint>

#include "fused.h"
#include "indexed.h"
#include "packed.h"

namespace slimkern {

// address, row stride, column stride, row index, rows there, column index, columns there
using PyMat = std::array<int64_t, 7>;
// address, stride, index, entries there
using PyVec = std::array<int64_t, 4>;
// address, bytes
using PyMemory = std::array<int64_t, 2>;
// address, row stride
using PyRows = std::array<int64_t, 2>;

inline void* address(int64_t value) { return reinterpret_cast<void*>(value); }
inline const int64_t* index(int64_t value) { return reinterpret_cast<const int64_t*>(value); }

inline MatView mat(const PyMat& v) {
  return {address(v[0]), v[1], v[2], index(v[3]), index(v[5])};
}
inline Extent extent(const PyMat& v) { return {v[4], v[6]}; }
inline VecView vec(const PyVec& v) { return {address(v[0]), v[1], index(v[2])}; }
inline Scratch scratch_of(const PyMemory& v) { return {address(v[0]), v[1]}; }

}  // namespace slimkern
