// How far the elementary functions are from the truth, over grids of all magnitudes, for every
// instruction set: prints the worst errors and fails where one is beyond its promise.
//
//     accuracy_rows                           the grids
//     accuracy_rows ISA FUNCTION [COLUMNS]    floats from stdin, results to stdout; FUNCTION is an
//                                             activation, exp, layer or rms (rows of COLUMNS)
#include <string>

#include "row_blocks.h"

namespace {

constexpr double kLeastNormal = 0x1p-126;

// exp(x) as softmax_block computes it, of numbers that are not positive.
void exponential(const RowKernel& kernel, std::vector<float>& x) {
  float m = 0, l = 0, rescale;
  const int64_t count = static_cast<int64_t>(x.size());
  kernel.softmax_block(x.data(), 0, nullptr, 0, 1, &m, &l, &rescale, 1, count);
}

// Every 1009th float of a sign, zeros and infinities included.
std::vector<float> grid(bool negative) {
  std::vector<float> x;
  const uint32_t sign = negative ? 0x80000000u : 0;
  for (uint32_t bits = 0; bits < 0x7f800000u; bits += 1009) {
    x.push_back(__builtin_bit_cast(float, bits | sign));
  }
  return x;
}

bool grid_of_exponential() {
  const std::vector<float> x = grid(true);
  bool fine = true;
  for (int i = 0; i < kIsaCount; ++i) {
    const KernelTable* table = isa_table(static_cast<Isa>(i));
    if (table == nullptr) continue;
    std::vector<float> y = x;
    y.push_back(-INFINITY);
    exponential(table->rows, y);
    double worst = 0;
    for (size_t j = 0; j < x.size(); ++j) {
      const double want = std::exp(static_cast<double>(x[j]));
      if (want < kLeastNormal * (1 - 1e-6)) {
        fine = fine && y[j] == 0;
      } else {
        worst = std::fmax(worst, std::fabs(y[j] - want) / ulp(want));
      }
    }
    const double promised = static_cast<Isa>(i) == Isa::kScalar ? 1.3 : 1;
    fine = fine && worst <= promised && y.back() == 0;
    std::printf("%-12s exp: %.3g ulp of %g\n", isa_name(static_cast<Isa>(i)), worst, promised);
  }
  return fine;
}

bool grid_of_activation(Activation a) {
  bool fine = true;
  for (const bool negative : {false, true}) {
    const std::vector<float> x = grid(negative);
    std::vector<double> want;
    for (const float v : x) want.push_back(activation_exact(a, v));
    for (int i = 0; i < kIsaCount; ++i) {
      const KernelTable* table = isa_table(static_cast<Isa>(i));
      if (table == nullptr) continue;
      const ActivationBound promised = activation_bound(a, static_cast<Isa>(i));
      std::vector<float> y = x;
      table->rows.activate(a, y.data(), 0, 1, static_cast<int64_t>(y.size()));
      double worst = 0;
      for (size_t j = 0; j < x.size(); ++j) {
        if (std::isinf(static_cast<float>(want[j]))) continue;  // the squared ReLU's
        worst = std::fmax(worst, std::fabs(y[j] - want[j]) / (negative ? 1 : ulp(want[j])));
      }
      fine = fine && worst <= (negative ? promised.below : promised.ulps);
      std::printf("%-12s %s(x %s 0): %.3g %s of %g\n", isa_name(static_cast<Isa>(i)),
                  activation_name(a), negative ? "<" : ">=", worst, negative ? "absolute" : "ulp",
                  negative ? promised.below : promised.ulps);
    }
  }
  return fine;
}

bool apply(const RowKernel& kernel, const std::string& what, int64_t cols, std::vector<float>& x) {
  const int64_t count = static_cast<int64_t>(x.size());
  for (int a = 0; a < kActivationCount; ++a) {
    if (what != activation_name(static_cast<Activation>(a))) continue;
    kernel.activate(static_cast<Activation>(a), x.data(), count, 1, count);
    return true;
  }
  if (what == "exp") {
    exponential(kernel, x);
    return true;
  }
  if ((what != "layer" && what != "rms") || cols < 1) return false;
  kernel.add_norm(what == "layer" ? Norm::kLayer : Norm::kRms, x.data(), cols, nullptr, 0, nullptr,
                  nullptr, 1e-5f, DType::kFloat32, x.data(), cols, nullptr, 0, count / cols, cols);
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3) {
    bool fine = grid_of_exponential();
    for (int a = 1; a < kActivationCount; ++a) {
      fine &= grid_of_activation(static_cast<Activation>(a));
    }
    std::puts(fine ? "accuracy_rows: within the bounds" : "FAILED: a bound is broken");
    return fine ? 0 : 1;
  }
  std::vector<float> x;
  for (float v; std::fread(&v, sizeof v, 1, stdin) == 1;) x.push_back(v);
  const KernelTable* table = nullptr;
  for (int i = 0; i < kIsaCount; ++i) {
    const Isa isa = static_cast<Isa>(i);
    if (isa_name(isa) == std::string(argv[1])) table = isa_table(isa);
  }
  if (table == nullptr) {
    std::fprintf(stderr, "no kernels for %s\n", argv[1]);
    return 2;
  }
  if (!apply(table->rows, argv[2], argc > 3 ? std::atoll(argv[3]) : 0, x)) {
    std::fprintf(stderr, "no function %s\n", argv[2]);
    return 2;
  }
  return std::fwrite(x.data(), sizeof(float), x.size(), stdout) == x.size() ? 0 : 1;
}
