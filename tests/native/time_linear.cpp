// Speed of every packed linear on this machine, one thread: a line per instruction set, math and
// shape, with GFLOP/s of kept columns and GB/s of packed weight. Arguments: isa [math [M N K]].
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "timing.h"

using namespace slimkern;

namespace {

constexpr const char* kMathNames[kMathCount] = {"fp32", "bf16", "bf16x3", "bf16x6"};

void time_shape(Isa isa, int math, int64_t M, int64_t N, int64_t K) {
  const LinearKernel& kernel = isa_table(isa)->linear[math];
  std::mt19937 rng(1);
  std::normal_distribution<float> normal;
  std::vector<float> x(M * K), w(N * K), bias(N), out(M * N);
  for (auto* values : {&x, &w, &bias}) {
    for (float& v : *values) v = normal(rng);
  }
  const int64_t packed_bytes = kernel.packed_bytes(N, K);
  const int64_t operand_bytes = kernel.operand_bytes(M, K);
  Buffer packed(packed_bytes), operand(operand_bytes);
  const MatView view{w.data(), K, 1, nullptr, nullptr};
  const double pack = best_seconds(
      [&] { kernel.pack(view, DType::kFloat32, N, K, packed.data()); });
  const bool loads = operand_bytes > 0;
  const auto load = [&] {
    if (loads) kernel.load(x.data(), DType::kFloat32, K, M, K, operand.data());
  };
  const double load_time = best_seconds(load);
  const int repeats = static_cast<int>(std::max<int64_t>(1, 20'000'000 / (M * N * K)));
  const double time = best_seconds([&] {
    for (int i = 0; i < repeats; ++i) {
      kernel.multiply(loads ? static_cast<void*>(operand.data()) : x.data(), K, M, K,
                      packed.data(), {0, N}, bias.data(), false, out.data(), N);
    }
  }) / repeats;
  double error = 0;
  for (int i = 0; i < 100; ++i) {
    const int64_t m = rng() % M, n = rng() % N;
    double want = bias[n];
    for (int64_t k = 0; k < K; ++k) want += double(x[m * K + k]) * w[n * K + k];
    error = std::max(error, std::fabs(out[m * N + n] - want) / std::sqrt(double(K)));
  }
  std::printf("%-11s %-6s %5ld %5ld %5ld  %7.1f GFLOP/s %6.1f GB/s  "
              "load %5.2f pack %5.2f ns/element  error %.1e\n",
              isa_name(isa), kMathNames[math], long(M), long(N), long(K), 2e-9 * M * N * K / time,
              1e-9 * packed_bytes / time, 1e9 * load_time / (M * K), 1e9 * pack / (N * K), error);
  std::fflush(stdout);
}

}  // namespace

int main(int argc, char** argv) {
  const int64_t shapes[][2] = {{1536, 384}, {384, 1536}, {384, 384}, {320, 384}, {384, 320},
                               {308, 384},  {384, 308},  {480, 384}, {384, 160}};
  for (int i = 0; i < kIsaCount; ++i) {
    const Isa isa = static_cast<Isa>(i);
    if (isa_table(isa) == nullptr || (argc > 1 && std::strcmp(argv[1], isa_name(isa)))) continue;
    for (int math = 0; math < kMathCount; ++math) {
      if (isa_table(isa)->linear[math].multiply == nullptr) continue;
      if (argc > 2 && std::strcmp(argv[2], kMathNames[math])) continue;
      if (argc > 5) {
        time_shape(isa, math, std::atol(argv[3]), std::atol(argv[4]), std::atol(argv[5]));
        continue;
      }
      for (const auto& shape : shapes) {
        for (const int64_t M : {1, 4, 16, 96, 1024}) time_shape(isa, math, M, shape[0], shape[1]);
      }
    }
  }
}
