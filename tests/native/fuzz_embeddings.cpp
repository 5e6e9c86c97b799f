// Random embeddings in every instruction set, in buffers of exactly the size that is needed: values
// against double, bounds under sanitizers, and indices that are no rows. Arguments: seconds seed.
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <stdexcept>
#include <vector>

#include "embeddings.h"
#include "isa.h"

using namespace slimkern;

namespace {

std::mt19937_64 rng;

int64_t pick(int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(rng);
}

int64_t size() {
  static const int64_t kSizes[] = {1, 2, 3, 8, 15, 16, 17, 31, 33, 63, 65, 130};
  return kSizes[pick(0, 11)];
}

// Exactly so many elements: what is read or written beyond them is found.
template <class T>
std::unique_ptr<T[]> exactly(size_t count) {
  return std::unique_ptr<T[]>(new T[count]);
}

struct OwnTable {
  int64_t rows, stride;
  std::unique_ptr<char[]> data;
  std::unique_ptr<int64_t[]> ids;
};

float value(const OwnTable& table, DType dtype, int64_t row, int64_t j) {
  const char* data = table.data.get();
  if (dtype == DType::kFloat32) {
    float v;
    std::memcpy(&v, data + (row * table.stride + j) * 4, 4);
    return v;
  }
  bf16_t v;
  std::memcpy(&v, data + (row * table.stride + j) * 2, 2);
  return widen(v);
}

void fail(const char* what, const Embeddings& e) {
  std::fprintf(stderr, "%s: B %ld T %ld hidden %ld tables %d dtype %d isa %s\n", what, long(e.B),
               long(e.T), long(e.hidden), e.tables, static_cast<int>(e.dtype),
               isa_name(active_isa()));
  std::exit(1);
}

void compare(const Embeddings& e, const std::vector<OwnTable>& own) {
  for (int64_t at = 0; at < e.B * e.T; ++at) {
    const int64_t b = at / e.T, t = at % e.T;
    std::vector<double> row(e.hidden);
    double mean = 0, square = 0;
    for (int64_t j = 0; j < e.hidden; ++j) {
      for (int i = 0; i < e.tables; ++i) {
        const Table& table = e.table[i];
        const int64_t r = table.ids ? table.ids[b * table.batch_stride + t * table.token_stride]
                                    : t * table.step;
        row[j] += value(own[i], e.dtype, r, j);
      }
      mean += row[j] / e.hidden;
    }
    for (double v : row) square += (v - mean) * (v - mean) / e.hidden;
    for (int64_t j = 0; j < e.hidden; ++j) {
      const double want =
          (row[j] - mean) / std::sqrt(square + e.eps) * e.gamma[j] + e.beta[j];
      const char* out = static_cast<const char*>(e.out) + (at * e.hidden + j) *
                                                              (e.dtype == DType::kFloat32 ? 4 : 2);
      float got;
      if (e.dtype == DType::kFloat32) {
        std::memcpy(&got, out, 4);
      } else {
        bf16_t narrow;
        std::memcpy(&narrow, out, 2);
        got = widen(narrow);
      }
      const double unit = e.dtype == DType::kFloat32 ? 0x1p-23 : 0x1p-8;
      // eps keeps the row's spread from below: what cancels in it is no larger than this.
      const double bound = unit * (std::fabs(want) + 1) + 0x1p-23 * (e.hidden + 8) * 64;
      if (!(std::fabs(got - want) <= bound)) fail("wrong value", e);
    }
  }
}

void try_one(bool broken) {
  static std::normal_distribution<float> normal;
  Embeddings e;
  e.dtype = pick(0, 1) ? DType::kFloat32 : DType::kBFloat16;
  e.tables = static_cast<int>(pick(1, kMostTables));
  e.B = pick(0, 4), e.T = size(), e.hidden = size();
  e.eps = 1e-2f;
  const int64_t unit = e.dtype == DType::kFloat32 ? 4 : 2;
  std::vector<OwnTable> own(e.tables);
  for (int i = 0; i < e.tables; ++i) {
    OwnTable& table = own[i];
    Table& view = e.table[i];
    const bool implicit = i > 0 && pick(0, 1);
    view.step = implicit ? pick(0, 1) : 0;
    table.rows = implicit ? view.step * (e.T - 1) + 1 : pick(1, 9);
    table.stride = e.hidden + pick(0, 3);
    const int64_t elements = (table.rows - 1) * table.stride + e.hidden;
    table.data = exactly<char>(elements * unit);
    for (int64_t k = 0; k < elements; ++k) {
      const float v = normal(rng);
      const bf16_t narrow = to_bf16(v);
      std::memcpy(table.data.get() + k * unit, unit == 4 ? (const void*)&v : &narrow, unit);
    }
    view.data = table.data.get(), view.rows = table.rows, view.row_stride = table.stride;
    if (implicit) continue;
    view.batch_stride = pick(0, 1) ? e.T : 0;
    view.token_stride = 1;
    const int64_t count = view.batch_stride ? e.B * e.T : e.T;
    table.ids = exactly<int64_t>(count);
    for (int64_t k = 0; k < count; ++k) table.ids[k] = pick(0, table.rows - 1);
    if (broken && i == 0 && count > 0) {
      table.ids[pick(0, count - 1)] = pick(0, 1) ? table.rows : -1;
    }
    view.ids = table.ids.get();
  }
  auto gamma = exactly<float>(e.hidden), beta = exactly<float>(e.hidden);
  for (int64_t j = 0; j < e.hidden; ++j) gamma[j] = normal(rng), beta[j] = normal(rng);
  e.gamma = gamma.get(), e.beta = beta.get();
  auto out = exactly<char>(e.B * e.T * e.hidden * unit);
  std::memset(out.get(), 0xff, e.B * e.T * e.hidden * unit);
  e.out = out.get();
  const int threads = static_cast<int>(pick(1, 3));
  const int64_t bytes = embeddings_scratch(e, threads);
  auto scratch = exactly<char>(bytes);
  try {
    embeddings(e, threads, {scratch.get(), bytes});
  } catch (const std::out_of_range&) {
    if (!broken || e.B == 0) fail("refused", e);
    for (int64_t k = 0; k < e.B * e.T * e.hidden * unit; ++k) {
      if (static_cast<unsigned char>(out[k]) != 0xff) fail("written before it was refused", e);
    }
    return;
  }
  if (broken && e.B > 0) fail("a wrong index was taken", e);
  compare(e, own);
}

}  // namespace

int main(int argc, char** argv) {
  const double seconds = argc > 1 ? std::atof(argv[1]) : 5;
  rng.seed(argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 0);
  const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
  long cases = 0;
  while (std::chrono::steady_clock::now() < end) {
    for (int i = 0; i < kIsaCount; ++i) {
      if (!set_active_isa(static_cast<Isa>(i))) continue;
      for (int k = 0; k < 20; ++k, ++cases) try_one(k % 5 == 0);
    }
  }
  std::printf("%ld random embeddings, clean\n", cases);
}
