// Rows of several tables, added and normalised: what a text model begins with.
#pragma once

#include <cstdint>

#include "fused.h"

namespace slimkern {

// A table of `rows` rows of unit last stride, and which row each token takes: ids (int64), or
// without ids row t * step for token t of every sequence.
struct Table {
  const void* data = nullptr;
  int64_t rows = 0, row_stride = 0;
  const int64_t* ids = nullptr;
  int64_t batch_stride = 0, token_stride = 0;  // of ids
  int64_t step = 0;
};

constexpr int kMostTables = 3;

// out [B, T, hidden] = LayerNorm(sum of the tables' rows, in their order), without gaps.
struct Embeddings {
  DType dtype = DType::kFloat32;  // of tables and out: float32 or bfloat16
  int tables = 0;
  Table table[kMostTables];
  int64_t B = 0, T = 0, hidden = 0;
  const float *gamma = nullptr, *beta = nullptr;
  float eps = 0;
  void* out = nullptr;
};

// Bytes of scratch.
int64_t embeddings_scratch(const Embeddings& e, int threads);

// Throws std::out_of_range, before anything is written, where an id is no row of its table, and
// std::invalid_argument where a size does not fit.
void embeddings(const Embeddings& e, int threads, const Scratch& scratch);

}  // namespace slimkern
