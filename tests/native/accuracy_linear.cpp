// How far the packed linears are from the truth: a line per kernel and depth, with the largest and
// the mean error relative to the length of the rows that are multiplied. Normal random numbers.
// "plain" is what one writes first: a float, and a fused multiply-add for each k.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <random>

#include "linear_subjects.h"

using namespace slimkern;

int main() {
  constexpr int64_t kRows = 32, kColumns = 64;
  for (const int64_t K : {384, 1536}) {
    std::mt19937 rng(1);
    std::normal_distribution<float> normal;
    std::vector<float> x(kRows * K), w(kColumns * K), out(kRows * kColumns);
    for (auto* values : {&x, &w}) {
      for (float& v : *values) v = normal(rng);
    }
    const MatView view{w.data(), K, 1, nullptr, nullptr};
    const auto report = [&](const char* name, const char* math) {
      double largest = 0, mean = 0;
      for (int64_t i = 0; i < kRows * kColumns; ++i) {
        const float *a = &x[i / kColumns * K], *b = &w[i % kColumns * K];
        double want = 0, a2 = 0, b2 = 0;
        for (int64_t k = 0; k < K; ++k) {
          want += double(a[k]) * b[k];
          a2 += double(a[k]) * a[k];
          b2 += double(b[k]) * b[k];
        }
        const double error = std::fabs(out[i] - want) / std::sqrt(a2 * b2);
        largest = std::max(largest, error);
        mean += error / (kRows * kColumns);
      }
      std::printf("%s %s %ld %.3e %.3e\n", name, math, long(K), largest, mean);
    };
    for (const Subject& s : subjects()) {
      Buffer packed(s.kernel.packed_bytes(kColumns, K));
      Buffer operand(s.kernel.operand_bytes(kRows, K));
      s.kernel.pack(view, DType::kFloat32, kColumns, K, packed.data);
      if (s.kernel.load) s.kernel.load(x.data(), DType::kFloat32, K, kRows, K, operand.data);
      s.kernel.multiply(s.kernel.load ? operand.data : x.data(), K, kRows, K, packed.data,
                        {0, kColumns}, nullptr, false, out.data(), kColumns);
      constexpr const char* kMaths[kMathCount] = {"fp32", "bf16", "bf16x3", "bf16x6"};
      report(s.name, kMaths[static_cast<int>(s.math)]);
    }
    for (int64_t i = 0; i < kRows * kColumns; ++i) {
      out[i] = 0;
      for (int64_t k = 0; k < K; ++k) {
        out[i] = std::fma(x[i / kColumns * K + k], w[i % kColumns * K + k], out[i]);
      }
    }
    report("plain", "fp32");
  }
}
