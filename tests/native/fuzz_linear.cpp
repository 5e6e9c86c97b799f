// Random packed linears through every instruction set and math, on buffers of exactly the size that
// is needed and poisoned with NaN: built with sanitizers, one element too far is an error. Results
// are compared with a plain loop in double, within the bound of the math; those of tiles also, bit
// by bit, with their arithmetic written out. Arguments: seconds to run, seed.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "linear_subjects.h"

using namespace slimkern;

namespace {

std::mt19937_64 rng;

int64_t pick(int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(rng);
}

float normal() { return std::normal_distribution<float>()(rng); }

int64_t size() {
  static const int64_t kSizes[] = {1,  2,  3,  7,  15, 16, 17,  24, 31,
                                   32, 33, 48, 63, 65, 97, 130, 260};
  return pick(0, 30) == 0 ? 0 : kSizes[pick(0, 16)];
}

// A matrix of float32 or bfloat16, strided.
struct Matrix {
  DType dtype;
  int64_t row_stride, col_stride;
  std::vector<float> floats;
  std::vector<bf16_t> halves;

  Matrix(DType type, int64_t rows, int64_t cols, bool strided) : dtype(type) {
    const int64_t inner = strided && pick(0, 2) == 0 ? 2 : 1;
    const bool transposed = strided && pick(0, 1);
    const int64_t pitch = (transposed ? rows : cols) * inner + pick(0, 3);
    row_stride = transposed ? inner : pitch;
    col_stride = transposed ? pitch : inner;
    const int64_t count =
        rows == 0 || cols == 0 ? 0 : (rows - 1) * row_stride + (cols - 1) * col_stride + 1;
    (dtype == DType::kFloat32 ? floats.resize(count) : halves.resize(count));
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < cols; ++j) set(i, j, normal());
    }
  }
  int64_t at(int64_t i, int64_t j) const { return i * row_stride + j * col_stride; }
  void set(int64_t i, int64_t j, float v) {
    if (dtype == DType::kFloat32) {
      floats[at(i, j)] = v;
    } else {
      halves[at(i, j)] = to_bf16(v);
    }
  }
  float get(int64_t i, int64_t j) const {
    return dtype == DType::kFloat32 ? floats[at(i, j)] : widen(halves[at(i, j)]);
  }
  void* data() {
    return dtype == DType::kFloat32 ? static_cast<void*>(floats.data()) : halves.data();
  }
};

enum Mode { kOrdinary, kSpecialRow, kSpecialColumn, kHuge, kModes };

struct Case {
  int64_t M, N, K;
  Range n;
  Mode mode;
  bool biased, accumulate;
  int64_t row, col, depth;  // where the special value is
  float special;
};

[[noreturn]] void fail(const char* what, const Subject& s, const Case& c) {
  std::fprintf(stderr, "FAILED: %s, %s math %d, M %ld, N %ld (%ld to %ld), K %ld, mode %d\n", what,
               s.name, int(s.math), long(c.M), long(c.N), long(c.n.begin), long(c.n.end), long(c.K),
               int(c.mode));
  std::exit(1);
}

Case make_case(const Subject& s) {
  Case c{};
  c.M = size(), c.N = size(), c.K = size();
  const int64_t panels = (c.N + s.kernel.nr - 1) / s.kernel.nr;
  const int64_t first = pick(0, panels), last = pick(first, panels);
  c.n = {std::min(first * s.kernel.nr, c.N), std::min(last * s.kernel.nr, c.N)};
  if (pick(0, 1)) c.n = {0, c.N};
  c.mode = pick(0, 2) ? kOrdinary : static_cast<Mode>(pick(1, kModes - 1));
  if (c.M * c.N * c.K == 0 || (c.mode == kHuge && s.math == Math::kBf16)) c.mode = kOrdinary;
  c.biased = pick(0, 1);
  c.accumulate = pick(0, 2) == 0;
  if (c.mode != kOrdinary) {
    c.row = pick(0, c.M - 1), c.col = pick(0, c.N - 1), c.depth = pick(0, c.K - 1);
  }
  const float infinity = std::numeric_limits<float>::infinity();
  const float specials[] = {std::nanf(""), infinity, -infinity};
  c.special = specials[pick(0, 2)];
  return c;
}

// |value - want| may be so large: the rounding of each sum and, relative to the sum of magnitudes,
// what the math leaves out of its operands.
double bound(Math math, int64_t K, double magnitude, double largest) {
  double products = 1, dropped = 0;
  if (math == Math::kBf16x3) products = 3, dropped = 3.1 * 0x1p-16;
  if (math == Math::kBf16x6) products = 6, dropped = 2.1 * 0x1p-24;
  const double flushed = 4 * (products * K + 1) * 0x1p-126 * (1 + largest);
  return ((products * K + 8) * 0x1p-24 + dropped) * magnitude + flushed;
}

float operand(Math math, float v) { return math == Math::kBf16 ? widen(to_bf16(v)) : v; }

void check_element(const Subject& s, const Case& c, const Matrix& x, const Matrix& w, int64_t i,
                   int64_t n, double start, float got) {
  if ((c.mode == kSpecialRow && i == c.row) || (c.mode == kSpecialColumn && n == c.col)) {
    const float other = c.mode == kSpecialRow ? w.get(n, c.depth) : x.get(i, c.depth);
    if (std::isnan(c.special) && !std::isnan(got)) fail("a NaN was lost", s, c);
    if (std::isfinite(got) && other != 0) fail("an infinity was lost", s, c);
    const bool infinite = std::isinf(c.special) && std::fabs(other) > 1e-30f;
    if (!s.tiles && infinite && got != c.special * other) {
      fail("an infinity changed", s, c);
    }
    return;
  }
  double want = start, magnitude = std::fabs(start), largest = 0;
  for (int64_t k = 0; k < c.K; ++k) {
    const double a = operand(s.math, x.get(i, k)), b = operand(s.math, w.get(n, k));
    want += a * b;
    magnitude += std::fabs(a * b);
    largest = std::max({largest, std::fabs(a), std::fabs(b)});
  }
  if (!(std::fabs(got - want) <= bound(s.math, c.K, magnitude, largest))) {
    std::fprintf(stderr, "row %ld, column %ld: %.9g, not %.9g\n", long(i), long(n), got, want);
    fail("value", s, c);
  }
}

// The parts of a float, as the tiles see them.
void split(float v, int parts, float* out) {
  for (int p = 0; p < parts; ++p) {
    float part = widen(to_bf16(v));
    if (parts > 1 && std::isfinite(v) && std::isinf(part)) {
      part = std::copysign(widen(bf16_t{0x7f7f}), v);
    }
    out[p] = part;
    v = std::isfinite(v) ? v - part : 0;
  }
}

// The arithmetic of the tiles for one result.
float tiled_value(const Subject& s, const Case& c, const Matrix& x, const Matrix& w, int64_t i,
                  int64_t n, float start) {
  const int parts = s.math == Math::kBf16 ? 1 : s.math == Math::kBf16x3 ? 2 : 3;
  const int order[3][6][2] = {
      {{0, 0}}, {{1, 0}, {0, 0}, {0, 1}}, {{2, 0}, {1, 0}, {1, 1}, {0, 1}, {0, 0}, {0, 2}}};
  const int products = parts * (parts + 1) / 2;
  float sum = start;
  for (int64_t first = 0; first < c.K; first += 32) {
    float a[32][3] = {}, b[32][3] = {};
    for (int64_t k = 0; k < 32 && first + k < c.K; ++k) {
      split(x.get(i, first + k), parts, a[k]);
      split(w.get(n, first + k), parts, b[k]);
    }
    for (int p = 0; p < products; ++p) {
      float halves[2] = {0, 0};
      for (int k = 0; k < 32; ++k) {
        const float left = EmulatedTiles::flush(a[k][order[parts - 1][p][0]]);
        const float right = EmulatedTiles::flush(b[k][order[parts - 1][p][1]]);
        halves[k % 2] = EmulatedTiles::fma(left, right, halves[k % 2]);
      }
      const float both = EmulatedTiles::flush(halves[0] + halves[1]);
      sum = EmulatedTiles::flush(EmulatedTiles::flush(sum) + both);
    }
  }
  return sum;
}

bool same(float a, float b) { return a == b || (std::isnan(a) && std::isnan(b)); }

void place_special(const Case& c, Matrix& x, Matrix& w) {
  if (c.mode == kSpecialRow) x.set(c.row, c.depth, c.special);
  if (c.mode == kSpecialColumn) w.set(c.col, c.depth, c.special);
  if (c.mode != kHuge) return;
  for (int64_t n = 0; n < c.N; ++n) {
    for (int64_t k = 0; k < c.K; ++k) w.set(n, k, w.get(n, k) * 0x1p-40f);
  }
  const float most = x.dtype == DType::kFloat32 ? std::numeric_limits<float>::max() : 0x1.fep127f;
  for (int64_t k = 0; k < c.K; ++k) x.set(c.row, k, pick(0, 1) ? most : -most);
}

void try_linear(const Subject& s) {
  const Case c = make_case(s);
  const LinearKernel& kernel = s.kernel;
  const int64_t operand_bytes = kernel.operand_bytes(c.M, c.K);
  const bool loads = operand_bytes > 0 || kernel.load != nullptr;
  Matrix x(loads && pick(0, 1) ? DType::kBFloat16 : DType::kFloat32, c.M, c.K, false);
  Matrix w(pick(0, 1) ? DType::kBFloat16 : DType::kFloat32, c.N, c.K, true);
  place_special(c, x, w);
  std::vector<float> bias(c.N);
  for (float& v : bias) v = normal();

  Buffer packed(kernel.packed_bytes(c.N, c.K)), loaded(operand_bytes);
  const MatView view{w.data(), w.row_stride, w.col_stride, nullptr, nullptr};
  kernel.pack(view, w.dtype, c.N, c.K, packed.data);
  if (loads) kernel.load(x.data(), x.dtype, x.row_stride, c.M, c.K, loaded.data);

  const int64_t columns = c.n.size(), pitch = columns + pick(0, 3);
  const int64_t elements = c.M == 0 || columns == 0 ? 0 : (c.M - 1) * pitch + columns;
  std::vector<float> out(elements, std::nanf("7"));
  for (int64_t i = 0; c.accumulate && i < c.M; ++i) {
    for (int64_t j = 0; j < columns; ++j) out[i * pitch + j] = normal();
  }
  const std::vector<float> before = out;
  kernel.multiply(loads ? loaded.data : x.data(), x.row_stride, c.M, c.K, packed.data, c.n,
                  c.biased ? bias.data() : nullptr, c.accumulate, out.data(), pitch);

  if (elements > 0) {  // a row alone gives the same bits
    const int64_t i = pick(0, c.M - 1);
    Buffer one(kernel.operand_bytes(1, c.K));
    char* row = static_cast<char*>(x.data()) +
                i * x.row_stride * (x.dtype == DType::kFloat32 ? 4 : 2);
    if (loads) kernel.load(row, x.dtype, x.row_stride, 1, c.K, one.data);
    std::vector<float> alone(before.begin() + i * pitch, before.begin() + i * pitch + columns);
    kernel.multiply(loads ? one.data : row, x.row_stride, 1, c.K, packed.data, c.n,
                    c.biased ? bias.data() : nullptr, c.accumulate, alone.data(), pitch);
    if (std::memcmp(alone.data(), &out[i * pitch], columns * 4)) fail("a row alone differs", s, c);
  }

  const int64_t apart = 1 + 2 * c.M * columns / 1000;  // a sample, of 500 or more
  for (int64_t at = 0; at < elements; ++at) {
    const int64_t i = at / pitch, n = c.n.begin + at % pitch;
    if (n >= c.n.end) {
      if (std::memcmp(&out[at], &before[at], 4) != 0) fail("wrote between the rows", s, c);
      continue;
    }
    const float start = c.accumulate ? before[at] : c.biased ? bias[n] : 0;
    if (pick(1, apart) != 1 && i != c.row && n != c.col) continue;
    if (s.known && !same(tiled_value(s, c, x, w, i, n, start), out[at])) {
      fail("not the arithmetic of the tiles", s, c);
    }
    check_element(s, c, x, w, i, n, start, out[at]);
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
    for (const Subject& subject : all) try_linear(subject);
    ++rounds;
  } while (std::chrono::steady_clock::now() - start < std::chrono::duration<double>(seconds));
  std::printf("fuzz_linear: %lld rounds of %zu kernels, seed %llu: clean\n",
              static_cast<long long>(rounds), all.size(), static_cast<unsigned long long>(seed));
}
