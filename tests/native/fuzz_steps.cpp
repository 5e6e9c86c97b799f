// Operands that are turned and panels of which only some steps are there, for every packed linear,
// on buffers of exactly the size that is needed and poisoned with NaN: built with sanitizers, one
// element too far is an error. A turned operand gives the bits of one that was loaded; a listed panel
// gives what zeros in the weight give: the same bits from tiles, whose order of sums does not change,
// else the same to rounding. Arguments: seconds to run, seed.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "keep_bits.h"
#include "linear_subjects.h"

using namespace slimkern;

namespace {

std::mt19937_64 rng;

int64_t pick(int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(rng);
}

int64_t size() {
  static const int64_t kSizes[] = {1, 2, 3, 15, 16, 17, 31, 32, 33, 48, 65, 97, 130, 260};
  return pick(0, 30) == 0 ? 0 : kSizes[pick(0, 13)];
}

[[noreturn]] void fail(const char* what, const Subject& s, int64_t M, int64_t N, int64_t K) {
  std::fprintf(stderr, "FAILED: %s, %s math %d, M %ld, N %ld, K %ld\n", what, s.name, int(s.math),
               long(M), long(N), long(K));
  std::exit(1);
}

// Numbers of a storage type, of which float and bfloat16 hold the same.
struct Values {
  std::vector<float> floats;
  std::vector<bf16_t> halves;
  DType dtype;

  explicit Values(int64_t count) : dtype(pick(0, 1) ? DType::kBFloat16 : DType::kFloat32) {
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < count; ++i) {
      halves.push_back(to_bf16(normal(rng)));
      floats.push_back(widen(halves.back()));
    }
  }
  void* data() {
    return dtype == DType::kFloat32 ? static_cast<void*>(floats.data()) : halves.data();
  }
};

void try_turn(const Subject& s) {
  const LinearKernel& kernel = s.kernel;
  const int64_t M = size(), N = size(), K = size();
  Values xt(M * K), w(N * K);  // x [M, K] as its transpose
  std::vector<float> x(M * K);
  for (int64_t i = 0; i < M; ++i) {
    for (int64_t k = 0; k < K; ++k) x[i * K + k] = xt.floats[k * M + i];
  }
  Buffer packed(kernel.packed_bytes(N, K)), loaded(kernel.operand_bytes(M, K)),
      turned(kernel.turned_bytes(M, K));
  kernel.pack({w.data(), K, 1, nullptr, nullptr}, w.dtype, N, K, packed.data);
  if (kernel.load) kernel.load(x.data(), DType::kFloat32, K, M, K, loaded.data);
  kernel.turn({xt.data(), 1, M, nullptr, nullptr}, xt.dtype, M, K, turned.data);
  std::vector<float> want(M * N, std::nanf("")), got(M * N, std::nanf(""));
  kernel.multiply(kernel.load ? loaded.data : x.data(), K, M, K, packed.data, {0, N}, nullptr,
                  false, want.data(), N);
  kernel.multiply(turned.data, M == 0 ? 0 : kernel.turned_bytes(1, K) / 4, M, K, packed.data,
                  {0, N}, nullptr, false, got.data(), N);
  for (int64_t i = 0; i < M * N; ++i) {
    if (!(got[i] == want[i])) fail("a turned operand", s, M, N, K);
  }
}

void try_steps(const Subject& s) {
  const LinearKernel& kernel = s.kernel;
  const int64_t M = size(), N = std::min<int64_t>(size(), kernel.nr), K = size();
  const bool turned = pick(0, 1), columns = turned == (pick(0, 3) > 0);
  Values x(M * K), w(N * K);
  const int64_t row_stride = columns ? 1 : K, col_stride = columns ? N : 1;
  // A mask of blocks of the stored weight, in which w may have its rows and columns exchanged.
  const int64_t rows = turned ? K : N, cols = turned ? N : K, bk = pick(0, 1) ? 1 : 20;
  const int64_t row_bytes = ((cols + bk - 1) / bk + 7) / 8, bn = pick(1, 4);
  // One byte at least: no address would mean that there is no mask.
  std::vector<uint8_t> bits(std::max<int64_t>(1, (rows + bn - 1) / bn * row_bytes));
  for (uint8_t& byte : bits) byte = static_cast<uint8_t>(pick(0, 2) ? 0 : pick(0, 255));
  const BlockBits blocks{bits.data(), (rows + bn - 1) / bn, row_bytes, bn, bk, rows, cols};
  check_block_bits(blocks);
  Buffer memory(element_bits_bytes(blocks));
  const ElementBits elements = element_bits(blocks, static_cast<uint8_t*>(memory.data));
  BitView kept = elements.view;
  kept.turned = turned;
  std::vector<float> zeroed(N * K);
  for (int64_t n = 0; n < N; ++n) {
    for (int64_t k = 0; k < K; ++k) {
      const int64_t i = turned ? k : n, j = turned ? n : k;
      const bool there = bits[i / bn * row_bytes + j / bk / 8] >> (j / bk % 8) & 1;
      const int64_t at = n * row_stride + k * col_stride;
      zeroed[at] = there ? w.floats[at] : 0;
      if (!there) w.floats[at] = std::nanf(""), w.halves[at] = to_bf16(std::nanf(""));
    }
  }
  const int64_t most = (K + kernel.step - 1) / kernel.step;
  std::vector<int32_t> steps(list_steps(elements, turned, {0, N}, kernel.step, nullptr));
  list_steps(elements, turned, {0, N}, kernel.step, steps.data());
  const int64_t count = static_cast<int64_t>(steps.size());
  if (count > most) fail("more steps than there are", s, M, N, K);
  const double share = most == 0 ? 1 : double(count) / double(most);
  // What is listed needs no more room than its share; all of it has packed_bytes.
  Buffer panel(static_cast<int64_t>(share * double(kernel.packed_bytes(N, K)) + 0.5)),
      packed(kernel.packed_bytes(N, K)), loaded(kernel.operand_bytes(M, K));
  kernel.pack_steps({w.data(), row_stride, col_stride, nullptr, nullptr}, kept, w.dtype, {0, N}, K,
                    steps.data(), count, panel.data);
  kernel.pack({zeroed.data(), row_stride, col_stride, nullptr, nullptr}, DType::kFloat32, N, K,
              packed.data);
  if (kernel.load) kernel.load(x.floats.data(), DType::kFloat32, K, M, K, loaded.data);
  const void* operand = kernel.load ? loaded.data : x.floats.data();
  std::vector<float> want(M * N, std::nanf("")), got(M * N, std::nanf("")), bias(N, 0.5f);
  const float* start = pick(0, 1) ? bias.data() : nullptr;
  kernel.multiply(operand, K, M, K, packed.data, {0, N}, start, false, want.data(), N);
  kernel.multiply_steps(operand, K, M, K, panel.data, steps.data(), count, int(N), start,
                        got.data(), N);
  for (int64_t i = 0; i < M * N; ++i) {
    double magnitude = 0.5;
    for (int64_t k = 0; k < K; ++k) {
      const int64_t at = i % N * row_stride + k * col_stride;
      magnitude += std::fabs(double(x.floats[i / N * K + k]) * zeroed[at]);
    }
    const double bound = s.tiles ? 0 : 2 * double(K + 2) * 0x1p-24 * magnitude;
    if (!(std::fabs(double(got[i]) - want[i]) <= bound)) fail("a listed panel", s, M, N, K);
  }
}

}  // namespace

int main(int argc, char** argv) {
  const double seconds = argc > 1 ? std::atof(argv[1]) : 5;
  const uint64_t seed = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 0;
  rng.seed(seed);
  const std::vector<Subject> all = subjects();
  const auto start = std::chrono::steady_clock::now();
  int64_t rounds = 0;
  do {
    for (const Subject& subject : all) {
      try_turn(subject);
      try_steps(subject);
    }
    ++rounds;
  } while (std::chrono::steady_clock::now() - start < std::chrono::duration<double>(seconds));
  std::printf("fuzz_steps: %lld rounds of %zu kernels, seed %llu: clean\n",
              static_cast<long long>(rounds), all.size(), static_cast<unsigned long long>(seed));
}
