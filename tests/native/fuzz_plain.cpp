// Random linears on plain weights and their gradients, gathered or masked, through every instruction
// set and math, on buffers of exactly the size that is needed and scratch poisoned with NaN: built
// with sanitizers, one element too far is an error. Results are compared with a plain loop in double,
// within the bound of the math; what is masked is NaN. Arguments: seconds to run, seed.
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
#include "packed.h"
#include "plain_linear.h"

using namespace slimkern;

namespace {

struct Subject {
  Isa isa;
  Math math;
  DType dtype;
};

[[noreturn]] void fail(const char* what, const Subject& s, int64_t M, int64_t N, int64_t K) {
  std::fprintf(stderr, "FAILED: %s, isa %s, math %d, dtype %d, M %ld, N %ld, K %ld\n", what,
               isa_name(s.isa), int(s.math), int(s.dtype), long(M), long(N), long(K));
  std::exit(1);
}

// Without indices, rows of unit stride: what the calls ask of x and dy.
Matrix rows_of(DType dtype, int64_t rows, int64_t cols) {
  Matrix m{dtype, rows, cols, {}, {}, {}, {}, {rows, cols}};
  const int64_t pitch = cols + pick(0, 3);
  const int64_t count = rows == 0 || cols == 0 ? 0 : (rows - 1) * pitch + cols;
  m.bytes.resize(count * item(dtype));
  std::normal_distribution<double> normal;
  for (int64_t i = 0; i < count; ++i) write(dtype, m.bytes.data(), i, normal(rng));
  m.view = {m.bytes.data(), pitch, 1, nullptr, nullptr};
  return m;
}

// A mask of a stored weight [N, K], in memory of its own.
struct Mask {
  std::vector<uint8_t> bytes;
  BlockBits blocks;

  Mask(int64_t N, int64_t K) {
    static const int64_t kSizes[] = {1, 1, 2, 4, 5, 16, 32, 100};
    blocks.bn = kSizes[pick(0, 7)];
    blocks.bk = kSizes[pick(0, 7)];
    blocks.N = N;
    blocks.K = K;
    blocks.rows = ceil_div(N, blocks.bn);
    blocks.row_bytes = ceil_div(ceil_div(K, blocks.bk), 8);
    bytes.resize(blocks.rows * blocks.row_bytes);
    const int64_t density = pick(0, 5);
    for (uint8_t& byte : bytes) {
      byte = 0;
      for (int b = 0; b < 8; ++b) byte |= (pick(1, 5) <= density) << b;
    }
    blocks.bits = bytes.data();
  }
  bool kept(int64_t n, int64_t k) const {
    const int64_t j = k / blocks.bk;
    return bytes[n / blocks.bn * blocks.row_bytes + j / 8] >> (j % 8) & 1;
  }
};

double operand(const Subject& s, double v) {
  const float value = static_cast<float>(v);
  return s.math == Math::kBf16 ? widen(to_bf16(value)) : value;
}

// The bound of a sum of products, and what the math leaves out of its operands.
void check(const Subject& s, double got, double want, double magnitude, int64_t terms,
           const char* what, int64_t M, int64_t N, int64_t K) {
  double products = 1, dropped = 0;
  if (s.math == Math::kBf16x3) products = 3, dropped = 3.1 * 0x1p-16;
  if (s.math == Math::kBf16x6) products = 6, dropped = 2.1 * 0x1p-24;
  const double storage = s.dtype == DType::kFloat32 ? 0x1p-24 : 0x1p-8;
  const double bound = ((products * static_cast<double>(terms) + 8) * 0x1p-24 + dropped) * magnitude +
                       storage * std::fabs(want) + 1e-30;
  if (!(std::fabs(got - want) <= bound)) {
    std::fprintf(stderr, "%.9g, not %.9g\n", got, want);
    fail(what, s, M, N, K);
  }
}

std::vector<char> poisoned(int64_t bytes) { return std::vector<char>(bytes, '\xff'); }

void try_linear(const Subject& s, bool masked) {
  const int64_t M = size(), N = size(), K = size();
  const int threads = static_cast<int>(pick(1, 3));
  const bool turned = masked && pick(0, 1);
  Matrix x = rows_of(s.dtype, M, K), w = matrix(s.dtype, N, K), bias = matrix(s.dtype, N, 1);
  bias.view.col_index = nullptr;
  Matrix y = rows_of(s.dtype, M, N);
  y.bytes = poisoned(M * N * static_cast<int64_t>(item(s.dtype)));
  y.view = {y.bytes.data(), N, 1, nullptr, nullptr};
  if (masked) {
    w.row_index.clear(), w.col_index.clear();
    w.view.row_index = w.view.col_index = nullptr;
    w.extent = {N, K};
  }
  Mask mask = turned ? Mask(K, N) : Mask(N, K);
  const auto kept = [&](int64_t n, int64_t k) {
    return !masked || (turned ? mask.kept(k, n) : mask.kept(n, k));
  };
  for (int64_t n = 0; n < N; ++n) {
    for (int64_t k = 0; k < K; ++k) {
      if (!kept(n, k)) write(s.dtype, w.view.data, place(w, n, k), std::nan(""));
    }
  }
  PlainLinear call{s.dtype, s.math, M, N, K, x.view.data, x.view.row_stride, w.view, w.extent,
                   {}, 0, {}, turned, y.view.data};
  const bool shifted = N > 0 && pick(0, 1);
  if (shifted) call.bias = {bias.view.data, bias.view.row_stride, bias.view.row_index};
  call.bias_extent = bias.extent.rows;
  if (masked) call.kept = mask.blocks;
  const int64_t bytes = plain_linear_scratch(call, threads);
  std::vector<char> scratch = poisoned(bytes);
  plain_linear(call, threads, {scratch.data(), bytes});
  for (int64_t i = 0; i < M; ++i) {
    for (int64_t n = 0; n < N; ++n) {
      if (pick(0, 7) != 0) continue;
      double want = shifted ? get(bias, n, 0) : 0, magnitude = std::fabs(want);
      for (int64_t k = 0; k < K; ++k) {
        if (!kept(n, k)) continue;
        const double product = operand(s, get(x, i, k)) * operand(s, get(w, n, k));
        want += product;
        magnitude += std::fabs(product);
      }
      check(s, get(y, i, n), want, magnitude, K, "linear", M, N, K);
    }
  }
}

// The gradient of a weight, all of which is there: of dw only what is selected is written.
void try_gradient(const Subject& s, bool masked) {
  const int64_t M = size(), N = size(), K = size();
  const int threads = static_cast<int>(pick(1, 3));
  Matrix dy = rows_of(s.dtype, M, N), x = rows_of(s.dtype, M, K);
  std::vector<int64_t> rows, cols;
  Extent extent{N, K};
  if (!masked && pick(0, 1)) rows = subset(N, extent.rows = N + pick(0, 20));
  if (!masked && pick(0, 1)) cols = subset(K, extent.cols = K + pick(0, 20));
  std::vector<char> dw = poisoned(extent.rows * extent.cols * static_cast<int64_t>(item(s.dtype)));
  const Mask mask(N, K);
  PlainGradient call{s.dtype, s.math, M, N, K, dy.view.data, dy.view.row_stride, x.view.data,
                     x.view.row_stride,
                     {dw.data(), extent.cols, 1, rows.empty() ? nullptr : rows.data(),
                      cols.empty() ? nullptr : cols.data()},
                     extent, {}};
  if (masked) call.kept = mask.blocks;
  const int64_t bytes = plain_gradient_scratch(call, threads);
  std::vector<char> scratch = poisoned(bytes);
  plain_gradient(call, threads, {scratch.data(), bytes});
  std::vector<char> written(extent.rows * extent.cols, 0);
  for (int64_t n = 0; n < N; ++n) {
    for (int64_t k = 0; k < K; ++k) {
      const int64_t at = (rows.empty() ? n : rows[n]) * extent.cols + (cols.empty() ? k : cols[k]);
      written[at] = 1;
      const double got = read(s.dtype, dw.data(), at);
      if (masked && !mask.kept(n, k)) {
        if (got != 0) fail("a masked gradient is not zero", s, M, N, K);
        continue;
      }
      if (pick(0, 7) != 0) continue;
      double want = 0, magnitude = 0;
      for (int64_t m = 0; m < M; ++m) {
        const double product = operand(s, get(dy, m, n)) * operand(s, get(x, m, k));
        want += product;
        magnitude += std::fabs(product);
      }
      check(s, got, want, magnitude, M, "gradient", M, N, K);
    }
  }
  for (size_t i = 0; i < written.size(); ++i) {
    if (!written[i] && !std::isnan(read(s.dtype, dw.data(), static_cast<int64_t>(i)))) {
      fail("the gradient wrote outside of the selection", s, M, N, K);
    }
  }
}

// Arguments that do not fit must be refused before anything is read.
void try_refusals(const Subject& s) {
  const int64_t n = pick(2, 40);
  Mask mask(n, n);
  MatView none{nullptr, n, 1, nullptr, nullptr};
  PlainLinear call{s.dtype, s.math, n, n, n, nullptr, n, none, {n, n}, {}, 0, mask.blocks, false,
                   nullptr};
  std::vector<int64_t> bad = subset(n, n + 5);
  bad[pick(0, n - 1)] = pick(0, 1) ? -1 : std::numeric_limits<int64_t>::max();
  switch (pick(0, 4)) {
    case 0: call.kept.bn += n; break;
    case 1: call.kept.bk = 0; break;
    case 2: call.kept.K += 1; break;
    case 3: call.dtype = DType::kFloat64; break;
    default: call.w.col_index = bad.data(), call.w_extent.cols = n + 5;
  }
  if (call.kept.bn > n && ceil_div(n, mask.blocks.bn) == 1) call.kept.rows += 1;
  try {
    plain_linear(call, 1, {nullptr, 0});
  } catch (const std::out_of_range&) {
    return;
  } catch (const std::invalid_argument&) {
    return;
  }
  fail("what does not fit was accepted", s, n, n, n);
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
      for (int math = 0; math < kMathCount; ++math) {
        for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
          const bool in_place = active_table().linear[math].load == nullptr;
          if (!has_math(active_table(), math) || (in_place && dtype == DType::kBFloat16)) continue;
          const Subject s{isa, static_cast<Math>(math), dtype};
          for (const bool masked : {false, true}) {
            try_linear(s, masked);
            try_gradient(s, masked);
          }
          try_refusals(s);
        }
      }
    }
    ++rounds;
  } while (std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() < seconds);
  std::printf("fuzz_plain: %lld rounds, seed %llu, best isa %s: clean\n",
              static_cast<long long>(rounds), static_cast<unsigned long long>(seed),
              isa_name(active_isa()));
}
