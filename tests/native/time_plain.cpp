// Where the time of a linear on a plain weight goes, one thread: per instruction set, math and
// shape the nanoseconds per element of packing and turning what they read. Arguments: isa [M N K].
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "timing.h"

using namespace slimkern;

namespace {

void time_kernel(Isa isa, int math, DType dtype, int64_t M, int64_t N, int64_t K) {
  const LinearKernel& kernel = isa_table(isa)->linear[math];
  const int64_t most = std::max({M * N, N * K, M * K});
  Buffer from(most * 4), packed(kernel.packed_bytes(std::max(N, K), std::max(M, K))),
      operand(kernel.turned_bytes(N, M));
  std::vector<int64_t> every_other(K / 2);
  for (int64_t i = 0; i < K / 2; ++i) every_other[i] = 2 * i;
  const auto pack = [&](const MatView& w, int64_t rows, int64_t depth) {
    return 1e9 / static_cast<double>(rows * depth) *
           best_seconds([&] { kernel.pack(w, dtype, rows, depth, packed.data()); });
  };
  const double plain = pack({from.data(), K, 1, nullptr, nullptr}, N, K);
  const double turned = pack({from.data(), 1, K, nullptr, nullptr}, K, N);
  const double gathered = pack({from.data(), K, 1, nullptr, every_other.data()}, N, K / 2);
  const double both = pack({from.data(), 1, K, every_other.data(), nullptr}, K / 2, N);
  const double tokens = pack({from.data(), 1, K, nullptr, nullptr}, K, M);
  const double rows = 1e9 / static_cast<double>(M * N) * best_seconds([&] {
    const int64_t step = 96;
    for (int64_t i = 0; i < N; i += step) {
      char* at = from.data() + i * (dtype == DType::kFloat32 ? 4 : 2);
      kernel.turn({at, 1, N, nullptr, nullptr}, dtype, std::min(step, N - i), M, operand.data());
    }
  });
  std::printf("%-11s math %d dtype %d %5ld %5ld %5ld  pack: plain %.2f turned %.2f gathered %.2f "
              "turned %.2f tokens %.2f  turn %.2f ns\n",
              isa_name(isa), math, static_cast<int>(dtype), long(M), long(N), long(K), plain,
              turned, gathered, both, tokens, rows);
}

}  // namespace

int main(int argc, char** argv) {
  const int64_t shapes[][3] = {{768, 1536, 384}, {768, 384, 1536}};
  for (int i = 0; i < kIsaCount; ++i) {
    const Isa isa = static_cast<Isa>(i);
    if (isa_table(isa) == nullptr || (argc > 1 && std::strcmp(argv[1], isa_name(isa)))) continue;
    for (int math = 0; math < kMathCount; ++math) {
      if (isa_table(isa)->linear[math].multiply == nullptr) continue;
      for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
        if (argc > 4) {
          time_kernel(isa, math, dtype, std::atol(argv[2]), std::atol(argv[3]), std::atol(argv[4]));
          continue;
        }
        for (const auto& s : shapes) time_kernel(isa, math, dtype, s[0], s[1], s[2]);
      }
    }
  }
}
