// Random shapes, strides, gathers and threads through every instruction set, on buffers of exactly
// the size that is needed: built with sanitizers, one element too far is an error. Results are
// compared with a plain loop in double. Arguments: seconds to run, seed.
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <vector>

#include "gathered_matrix.h"
#include "isa.h"

using namespace slimkern;

namespace {

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

void try_gemm(Isa isa) {
  const DType dtype = DType::kFloat64;
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

  const int64_t scratch_size = gemm_scratch(M, N, K, threads);
  std::vector<double> scratch(scratch_size, std::nan(""));
  gemm(args, extents, threads, scratch.data(), scratch_size);

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
void try_bad_index(Isa isa) {
  const DType dtype = DType::kFloat64;
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
    gemm(args, extents, 1, nullptr, 0);
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
      try_gemm(isa);
      try_bad_index(isa);
      for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat64}) {
        try_column_sum(isa, dtype);
      }
    }
    ++rounds;
  } while (std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() < seconds);
  std::printf("fuzz: %lld rounds, seed %llu, best isa %s: clean\n", static_cast<long long>(rounds),
              static_cast<unsigned long long>(seed), isa_name(active_isa()));
}
