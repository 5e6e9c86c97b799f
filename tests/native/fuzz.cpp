// Random shapes, strides, gathers and threads through every instruction set, on buffers of exactly
// the size that is needed: built with sanitizers, one element too far is an error. Results are
// compared with a plain loop in double. Arguments: seconds to run, seed.
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <stdexcept>
#include <vector>

#include "indexed.h"
#include "isa.h"

using namespace slimkern;

namespace {

std::mt19937_64 rng;

int64_t pick(int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(rng);
}

int64_t size() {
  static const int64_t kSizes[] = {0, 1, 2, 5, 17, 31, 32, 33, 63, 95, 97, 130, 255, 257, 300};
  return kSizes[pick(0, 14)];
}

struct Matrix {
  DType dtype;
  int64_t rows, cols;  // as they are selected
  std::vector<int64_t> row_index, col_index;
  std::vector<char> bytes;
  MatView view;
  Extent extent;
};

size_t item(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

double read(DType dtype, const void* data, int64_t at) {
  if (dtype == DType::kFloat64) return static_cast<const double*>(data)[at];
  if (dtype == DType::kFloat32) return static_cast<const float*>(data)[at];
  return widen(static_cast<const bf16_t*>(data)[at]);
}

void write(DType dtype, void* data, int64_t at, double value) {
  if (dtype == DType::kFloat64) static_cast<double*>(data)[at] = value;
  if (dtype == DType::kFloat32) static_cast<float*>(data)[at] = static_cast<float>(value);
  if (dtype == DType::kBFloat16) static_cast<bf16_t*>(data)[at] = to_bf16(static_cast<float>(value));
}

std::vector<int64_t> subset(int64_t kept, int64_t of) {
  std::vector<int64_t> index;
  for (int64_t i = 0; i < of; ++i) {
    if (pick(0, of - i - 1) < kept - static_cast<int64_t>(index.size())) index.push_back(i);
  }
  return index;
}

// A matrix of which rows x cols are selected; gathered and strided at random.
Matrix matrix(DType dtype, int64_t rows, int64_t cols) {
  Matrix m{dtype, rows, cols, {}, {}, {}, {}, {rows, cols}};
  if (pick(0, 1)) m.row_index = subset(rows, m.extent.rows = rows + pick(0, 20));
  if (pick(0, 1)) m.col_index = subset(cols, m.extent.cols = cols + pick(0, 20));
  const int64_t inner = pick(0, 3) == 0 ? 2 : 1;
  const bool transposed = pick(0, 1);
  const int64_t major = transposed ? m.extent.cols : m.extent.rows;
  const int64_t minor = transposed ? m.extent.rows : m.extent.cols;
  const int64_t pitch = minor * inner + pick(0, 3);
  const int64_t count = major == 0 || minor == 0 ? 0 : (major - 1) * pitch + (minor - 1) * inner + 1;
  m.bytes.resize(count * item(dtype));
  std::normal_distribution<double> normal;
  for (int64_t i = 0; i < count; ++i) write(dtype, m.bytes.data(), i, normal(rng));
  m.view = {m.bytes.data(), transposed ? inner : pitch, transposed ? pitch : inner,
            m.row_index.empty() ? nullptr : m.row_index.data(),
            m.col_index.empty() ? nullptr : m.col_index.data()};
  return m;
}

int64_t place(const Matrix& m, int64_t i, int64_t j) {
  const int64_t row = m.view.row_index ? m.view.row_index[i] : i;
  const int64_t col = m.view.col_index ? m.view.col_index[j] : j;
  return row * m.view.row_stride + col * m.view.col_stride;
}

double get(const Matrix& m, int64_t i, int64_t j) {
  return read(m.dtype, m.view.data, place(m, i, j));
}

void fail(const char* what, Isa isa, DType dtype, int64_t M, int64_t N, int64_t K) {
  std::fprintf(stderr, "FAILED: %s, isa %s, dtype %d, M %lld, N %lld, K %lld\n", what, isa_name(isa),
               static_cast<int>(dtype), static_cast<long long>(M), static_cast<long long>(N),
               static_cast<long long>(K));
  std::exit(1);
}

void check_value(double got, double want, double magnitude, int64_t terms, DType dtype, Isa isa,
                 const char* what, int64_t M, int64_t N, int64_t K) {
  const double storage = dtype == DType::kFloat64 ? 0x1p-53 : dtype == DType::kFloat32 ? 0x1p-24
                                                                                       : 0x1p-8;
  const double accumulator = dtype == DType::kFloat64 ? 0x1p-53 : 0x1p-24;
  // The bound of a sum of products (twice in double: the loop it is compared with rounds as well).
  const double bound = 2 * (terms + 2) * accumulator * magnitude + 2 * storage * std::fabs(want);
  if (!(std::fabs(got - want) <= bound)) fail(what, isa, dtype, M, N, K);
}

void try_gemm(Isa isa, DType dtype) {
  const int64_t M = size(), N = size(), K = size();
  const int threads = static_cast<int>(pick(1, 3));
  Matrix a = matrix(dtype, M, K), b = matrix(dtype, K, N), c = matrix(dtype, M, N);
  Matrix bias = matrix(dtype, N, 1);
  bias.view.col_index = nullptr;
  GemmArgs args{a.view, b.view, c.view, {}, M, N, K};
  const bool shifted = pick(0, 1) && N > 0;
  if (shifted) args.bias = {bias.view.data, bias.view.row_stride, bias.view.row_index};
  const GemmExtents extents{a.extent, b.extent, c.extent, bias.extent.rows};
  const std::vector<char> before = c.bytes;

  const int64_t scratch_size = gemm_scratch(dtype, M, N, K, threads);
  const size_t compute = dtype == DType::kFloat64 ? 8 : 4;
  std::vector<char> scratch(scratch_size * compute, '\xff');  // all NaN
  gemm(dtype, args, extents, threads, scratch.data(), scratch_size);

  std::vector<char> touched(c.bytes.size() / item(dtype), 0);
  for (int64_t i = 0; i < M; ++i) {
    for (int64_t j = 0; j < N; ++j) {
      touched[place(c, i, j)] = 1;
      if (pick(0, 7) != 0) continue;  // a sample keeps the plain loop from being all the work
      double want = 0, magnitude = 0;
      for (int64_t k = 0; k < K; ++k) {
        const double product = get(a, i, k) * get(b, k, j);
        want += product;
        magnitude += std::fabs(product);
      }
      if (shifted) {
        const int64_t row = args.bias.index ? args.bias.index[j] : j;
        const double value = read(dtype, args.bias.data, row * args.bias.stride);
        want += value;
        magnitude += std::fabs(value);
      }
      check_value(get(c, i, j), want, magnitude, K, dtype, isa, "gemm", M, N, K);
    }
  }
  for (size_t i = 0; i < touched.size(); ++i) {
    if (!touched[i] && std::memcmp(&before[i * item(dtype)], &c.bytes[i * item(dtype)], item(dtype)))
      fail("gemm wrote outside of the selection", isa, dtype, M, N, K);
  }
}

void try_column_sum(Isa isa, DType dtype) {
  const int64_t rows = size(), cols = size();
  Matrix a = matrix(dtype, rows, cols);
  a.view.row_index = a.view.col_index = nullptr;
  Matrix out = matrix(dtype, cols, 1);
  const VecView target{out.view.data, out.view.row_stride, out.view.row_index};
  column_sum(dtype, a.view, rows, cols, target, out.extent.rows, static_cast<int>(pick(1, 3)));
  for (int64_t j = 0; j < cols; ++j) {
    double want = 0, magnitude = 0;
    for (int64_t i = 0; i < rows; ++i) {
      want += get(a, i, j);
      magnitude += std::fabs(get(a, i, j));
    }
    const int64_t row = target.index ? target.index[j] : j;
    check_value(read(dtype, target.data, row * target.stride), want, magnitude, rows, dtype, isa,
                "column_sum", rows, cols, 0);
  }
}

// Indices that are out of range, doubled or unsorted must be refused before anything is read.
void try_bad_index(Isa isa, DType dtype) {
  const int64_t n = pick(1, 40);
  Matrix a = matrix(dtype, n, n), b = matrix(dtype, n, n), c = matrix(dtype, n, n);
  std::vector<int64_t> bad = subset(n, n + 5);
  const int64_t at = pick(0, n - 1);
  const int64_t wrong[] = {-1, std::numeric_limits<int64_t>::min(),
                           std::numeric_limits<int64_t>::max(), n + 5,
                           at > 0 ? bad[at - 1] : -7};
  bad[at] = wrong[pick(0, 4)];
  GemmArgs args{a.view, b.view, c.view, {}, n, n, n};
  GemmExtents extents{a.extent, b.extent, c.extent, 0};
  (pick(0, 1) ? args.b.row_index : args.c.col_index) = bad.data();
  extents.b.rows = extents.c.cols = n + 5;
  try {
    gemm(dtype, args, extents, 1, nullptr, 0);
  } catch (const std::out_of_range&) {
    return;
  } catch (const std::invalid_argument&) {
  }
  fail("a bad index was accepted", isa, dtype, n, n, n);
}

}  // namespace

int main(int argc, char** argv) {
  const double seconds = argc > 1 ? std::atof(argv[1]) : 5;
  const uint64_t seed = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 0;
  rng.seed(seed);
  const auto start = std::chrono::steady_clock::now();
  int64_t rounds = 0;
  do {
    for (int i = 0; i < kIsaCount; ++i) {
      const Isa isa = static_cast<Isa>(i);
      if (!set_active_isa(isa)) continue;
      for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat64}) {
        try_gemm(isa, dtype);
        try_column_sum(isa, dtype);
        try_bad_index(isa, dtype);
      }
    }
    ++rounds;
  } while (std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() < seconds);
  std::printf("fuzz: %lld rounds, seed %llu, best isa %s: clean\n", static_cast<long long>(rounds),
              static_cast<unsigned long long>(seed), isa_name(active_isa()));
}
