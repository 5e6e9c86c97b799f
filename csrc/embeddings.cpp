#include "embeddings.h"

#include <stdexcept>
#include <string>

#include "isa.h"
#include "parallel.h"
#include "token_rows.h"

namespace slimkern {
namespace {

constexpr int64_t kBlock = 32;  // tokens whose sums are still in the first-level cache for the norm

int64_t row_of(const Table& table, int64_t b, int64_t t) {
  if (table.ids == nullptr) return t * table.step;
  return table.ids[b * table.batch_stride + t * table.token_stride];
}

void check(const Embeddings& e) {
  if (e.tables < 1 || e.tables > kMostTables || e.B < 0 || e.T < 0 || e.hidden < 0) {
    throw std::invalid_argument("embeddings take 1 to " + std::to_string(kMostTables) +
                                " tables and sizes that are not negative");
  }
  for (int i = 0; i < e.tables; ++i) {
    const Table& table = e.table[i];
    const int64_t B = table.ids == nullptr ? min(e.B, int64_t{1}) : e.B;
    for (int64_t b = 0; b < B; ++b) {
      for (int64_t t = 0; t < e.T; ++t) {
        const int64_t row = row_of(table, b, t);
        if (row >= 0 && row < table.rows) continue;
        throw std::out_of_range("index " + std::to_string(row) + " at token " + std::to_string(t) +
                                " of sequence " + std::to_string(b) + " is no row of table " +
                                std::to_string(i) + ", which has " + std::to_string(table.rows));
      }
    }
  }
}

// sum = the tables' rows of one token.
template <class T>
void add_rows(const Embeddings& e, int64_t b, int64_t t, float* sum) {
  const T* row[kMostTables] = {};
  for (int i = 0; i < e.tables; ++i) {
    const Table& table = e.table[i];
    row[i] = static_cast<const T*>(table.data) + row_of(table, b, t) * table.row_stride;
  }
  const T *first = row[0], *second = row[1], *third = row[2];
  if (e.tables == 3) {
    for (int64_t j = 0; j < e.hidden; ++j) {
      sum[j] = (widen(first[j]) + widen(second[j])) + widen(third[j]);
    }
  } else if (e.tables == 2) {
    for (int64_t j = 0; j < e.hidden; ++j) sum[j] = widen(first[j]) + widen(second[j]);
  } else {
    for (int64_t j = 0; j < e.hidden; ++j) sum[j] = widen(first[j]);
  }
}

WorkerMemory memory_of(const Embeddings& e, int threads) {
  WorkerMemory memory;
  memory.workers = threads < 1 ? 1 : threads;
  Arena arena;
  arena.take<float>(kBlock * row_stride(e.hidden));
  memory.each = arena.used();
  return memory;
}

}  // namespace

int64_t embeddings_scratch(const Embeddings& e, int threads) {
  return memory_of(e, threads).bytes();
}

void embeddings(const Embeddings& e, int threads, const Scratch& scratch) {
  check(e);
  const WorkerMemory memory = memory_of(e, threads);
  check_scratch(scratch, memory.bytes());
  const int64_t tokens = e.B * e.T, stride = row_stride(e.hidden);
  const RowKernel& rows = active_table().rows;
  const bool narrow = e.dtype == DType::kBFloat16;
  parallel_for(ceil_div(tokens, kBlock), memory.workers, [&](int64_t task, int worker) {
    Arena arena = memory.of(scratch, worker);
    float* sums = arena.take<float>(kBlock * stride);
    const int64_t begin = task * kBlock, end = min(begin + kBlock, tokens);
    for (int64_t token = begin; token < end; ++token) {
      float* sum = sums + (token - begin) * stride;
      if (narrow) {
        add_rows<bf16_t>(e, token / e.T, token % e.T, sum);
      } else {
        add_rows<float>(e, token / e.T, token % e.T, sum);
      }
    }
    char* out = static_cast<char*>(e.out) + begin * e.hidden * (narrow ? 2 : 4);
    rows.add_norm(Norm::kLayer, sums, stride, nullptr, 0, e.gamma, e.beta, e.eps, e.dtype, out,
                  e.hidden, nullptr, 0, end - begin, e.hidden);
  });
}

}  // namespace slimkern
