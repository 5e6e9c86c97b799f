// Random blocks of rows, strides and odd values through the row kernels of every instruction set,
// in buffers of exactly the size that is needed: built with sanitizers, one element too far is an
// error. Results are compared with loops in double. Arguments: seconds to run, seed.
#include <cfloat>
#include <chrono>

#include "row_blocks.h"

namespace {

constexpr double kUnit = 0x1p-24;

void fail(const char* what, Isa isa, int64_t rows, int64_t cols, double got = 0, double want = 0) {
  std::fprintf(stderr, "FAILED: %s, isa %s, %lld x %lld, got %.9g, want %.9g\n", what,
               isa_name(isa), static_cast<long long>(rows), static_cast<long long>(cols), got,
               want);
  std::exit(1);
}

void check(bool fine, const char* what, Isa isa, const Block& b, double got = 0, double want = 0) {
  if (!fine) fail(what, isa, b.rows, b.cols, got, want);
}

DType storage() { return pick(0, 1) ? DType::kFloat32 : DType::kBFloat16; }

void try_activation(Isa isa, const RowKernel& kernel) {
  const Activation a = static_cast<Activation>(pick(0, kActivationCount - 1));
  const bool gated = pick(0, 1);
  const int64_t rows = size(), cols = size();
  Block x(DType::kFloat32, rows, cols, 3, Special::kAll);
  Block up = x;
  for (size_t i = 0; i < up.bytes.size() / 4; ++i) up.put(i, draw(1, Special::kNan));
  const Block before = x;
  if (gated) {
    kernel.gate(a, x.floats(), up.floats(), x.stride, rows, cols);
  } else {
    kernel.activate(a, x.floats(), x.stride, rows, cols);
  }
  check(!x.strayed(before), "activation wrote between the rows", isa, x);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < cols; ++j) {
      const double from = before.get(i, j), by = gated ? up.get(i, j) : 1;
      const double y = activation_exact(a, from), want = y * by;
      const ActivationBound promised = activation_bound(a, isa);
      const double error = promised.ulps * ulp(y) + (from < 0 ? promised.below : 0);
      const double bound = error * std::fabs(by) + (gated ? ulp(want) : 0);
      check(agrees(x.get(i, j), want, bound), activation_name(a), isa, x, x.get(i, j), want);
    }
  }
}

// y[j] and a bound of its error, from the row s in double.
struct Normed {
  std::vector<double> y, bound;
};

Normed norm_exact(Norm norm, const std::vector<double>& s, const float* gamma, const float* beta,
                  float eps) {
  const double n = static_cast<double>(s.size());
  double mean = 0, square = 0, largest = 0;
  for (const double v : s) {
    mean += norm == Norm::kLayer ? v / n : 0;
    largest = std::fmax(largest, std::fabs(v));
  }
  for (const double v : s) square += (v - mean) * (v - mean) / n;
  if (std::isinf(largest)) largest = 0;  // what is not NaN then is exact
  const double scale = norm == Norm::kNone ? 1 : 1 / std::sqrt(square + eps);
  Normed out;
  for (size_t j = 0; j < s.size(); ++j) {
    const double z = (s[j] - mean) * scale, g = gamma ? gamma[j] : 1, b = beta ? beta[j] : 0;
    const double y = z * g + b;
    // Sums of n terms in float; the rounding of s, seen through the scale.
    const bool none = norm == Norm::kNone;
    const double spread = 4 * (none ? std::fabs(s[j]) : largest * scale * (1 + std::fabs(z)));
    const double chain = none ? 0 : (n / 4 + 16) * std::fabs(z);
    out.y.push_back(y);
    out.bound.push_back(kUnit * ((spread + chain) * std::fabs(g) + 2 * std::fabs(y)));
  }
  return out;
}

void try_add_norm(Isa isa, const RowKernel& kernel) {
  const Norm norm = static_cast<Norm>(pick(0, 2));
  const DType dtype = storage();
  const int64_t rows = size(), cols = size();
  const Special special = pick(0, 3) ? Special::kNone : Special::kNanAndInf;
  Block x(DType::kFloat32, rows, cols, 1, special), residual(dtype, rows, cols, 1, special);
  if (pick(0, 1)) {  // far from zero
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < cols; ++j) x.set(i, j, x.get(i, j) + 300);
    }
  }
  Block out(dtype, rows, cols), sum(DType::kFloat32, rows, cols);
  Block gamma(DType::kFloat32, 1, cols), beta(DType::kFloat32, 1, cols);
  const float eps = pick(0, 1) ? 1e-5f : 1e-12f;
  const bool added = pick(0, 2), summed = pick(0, 1), scaled = pick(0, 3), shifted = pick(0, 3);
  // Results may lie where the operands do.
  const int64_t place = pick(0, 3);
  Block* to = place == 1 ? &residual : place == 2 && dtype == DType::kFloat32 ? &x : &out;
  Block* kept = place == 3 ? &x : &sum;
  const Block before_x = x, before_residual = residual, before_to = *to, before_kept = *kept;
  kernel.add_norm(norm, x.floats(), x.stride, added ? residual.data() : nullptr, residual.stride,
                  scaled ? gamma.floats() : nullptr, shifted ? beta.floats() : nullptr, eps, dtype,
                  to->data(), to->stride, summed ? kept->floats() : nullptr, kept->stride, rows,
                  cols);
  check(!to->strayed(before_to) && !kept->strayed(before_kept), "add_norm strayed", isa, out);
  for (int64_t i = 0; i < rows; ++i) {
    std::vector<double> s(cols);
    for (int64_t j = 0; j < cols; ++j) {
      s[j] = before_x.get(i, j) + (added ? double{before_residual.get(i, j)} : 0.0);
      if (!summed) continue;
      check(agrees(kept->get(i, j), s[j], ulp(s[j])), "the sum", isa, out, kept->get(i, j), s[j]);
    }
    const Normed want = norm_exact(norm, s, scaled ? gamma.floats() : nullptr,
                                   shifted ? beta.floats() : nullptr, eps);
    for (int64_t j = 0; j < cols; ++j) {
      const double store = dtype == DType::kBFloat16 ? 0x1p-8 * std::fabs(want.y[j]) : 0;
      const double got = to->get(i, j), bound = want.bound[j] * 1.01 + store + 1e-37;
      check(agrees(got, want.y[j], bound), "add_norm", isa, out, got, want.y[j]);
    }
  }
}

void try_softmax(Isa isa, const RowKernel& kernel) {
  const int64_t rows = size(), blocks = pick(1, 3);
  const float scale = pick(0, 1) ? 1.0f : 0.125f;
  const bool broadcast = pick(0, 1), biased = pick(0, 2);
  std::vector<float> m(rows, -INFINITY), l(rows, 0), rescale(rows, NAN);
  std::vector<std::vector<double>> scores(rows), weights(rows);
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t keys = size();
    Block s(DType::kFloat32, rows, keys, 8, pick(0, 3) ? Special::kNone : Special::kNanAndInf);
    Block bias(DType::kFloat32, broadcast ? 1 : rows, keys, 3);
    const int64_t masked = pick(0, 2);  // none, some, all
    const float low = pick(0, 1) ? -INFINITY : -3.4028234663852886e38f;
    for (int64_t i = 0; i < bias.rows; ++i) {
      for (int64_t j = 0; j < keys; ++j) {
        if (masked == 2 || (masked == 1 && pick(0, 2) == 0)) bias.set(i, j, low);
      }
    }
    const Block before = s;
    kernel.softmax_block(s.floats(), s.stride, biased ? bias.floats() : nullptr,
                         broadcast ? 0 : bias.stride, scale, m.data(), l.data(), rescale.data(),
                         rows, keys);
    check(!s.strayed(before), "softmax_block wrote between the rows", isa, s);
    for (int64_t i = 0; i < rows; ++i) {
      for (double& weight : weights[i]) weight *= rescale[i];
      for (int64_t j = 0; j < keys; ++j) {
        const double shift = biased ? double{bias.get(broadcast ? 0 : i, j)} : 0.0;
        scores[i].push_back(static_cast<float>(before.get(i, j) * double{scale} + shift));
        weights[i].push_back(s.get(i, j));
      }
      double peak = -INFINITY;
      bool nan = false;
      for (const double v : scores[i]) nan |= std::isnan(v), peak = std::fmax(peak, v);
      check(m[i] == peak || std::fabs(m[i] - peak) <= 2 * ulp(peak), "m", isa, s, m[i], peak);
      if (peak == -INFINITY && !nan) {
        check(l[i] == 0 && rescale[i] == 1, "a row of -inf", isa, s, l[i], rescale[i]);
      }
    }
  }
  for (int64_t i = 0; i < rows; ++i) {
    double sum = 0, peak = -INFINITY;
    bool nan = false;
    for (const double v : scores[i]) nan |= std::isnan(v), peak = std::fmax(peak, v);
    if (nan || peak == INFINITY) {
      if (!std::isnan(l[i])) fail("a NaN was lost", isa, rows, 0, l[i], NAN);
      continue;
    }
    const double from = peak == -INFINITY ? 0 : peak;
    for (const double v : scores[i]) sum += std::exp(v - from);
    if (sum == 0) continue;
    for (size_t j = 0; j < scores[i].size(); ++j) {
      const double v = scores[i][j], want = std::exp(v - from) / sum, got = weights[i][j] / l[i];
      const double steps = 8 * blocks + static_cast<double>(scores[i].size());
      const double far = std::fmin(std::fabs(v - peak), 100) + std::fmin(std::fabs(v), 1000);
      if (!agrees(got, want, kUnit * (steps + 4 * (far + 1)) * want + 1e-37)) {
        fail("softmax", isa, rows, static_cast<int64_t>(j), got, want);
      }
    }
  }
}

// Whether rounding to bfloat16, one instruction there, stores denormals as zeros.
bool flushes(Isa isa) { return isa == Isa::kAvx512Bf16 || isa == Isa::kAmx; }

void try_moves(Isa isa, const RowKernel& kernel) {
  const int64_t rows = size(), cols = size();
  Block from(storage(), rows, cols, 1, Special::kAll), to(storage(), rows, cols);
  const Block before = to;
  kernel.convert(from.data(), from.dtype, from.stride, to.data(), to.dtype, to.stride, rows, cols);
  check(!to.strayed(before), "convert wrote between the rows", isa, to);
  Block x(DType::kFloat32, rows, cols, 1, Special::kAll);
  const Block before_x = x;
  std::vector<float> factor(rows);
  for (float& f : factor) f = pick(0, 2) ? draw(1, Special::kNanAndInf) : 1.0f;
  kernel.scale_rows(x.floats(), x.stride, factor.data(), rows, cols);
  check(!x.strayed(before_x), "scale_rows wrote between the rows", isa, x);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < cols; ++j) {
      const bool rounded = to.dtype == DType::kBFloat16;
      const float v = from.get(i, j), moved = rounded ? widen(to_bf16(v)) : v;
      const double bound = rounded && flushes(isa) && std::fabs(v) < FLT_MIN ? FLT_MIN : 0;
      check(agrees(to.get(i, j), moved, bound), "convert", isa, to, to.get(i, j), moved);
      const float want = before_x.get(i, j) * factor[i];
      check(agrees(x.get(i, j), want, 0), "scale_rows", isa, x, x.get(i, j), want);
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  const double seconds = argc > 1 ? std::atof(argv[1]) : 5;
  const uint64_t seed = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 0;
  rng.seed(seed);
  using Clock = std::chrono::steady_clock;
  const auto start = Clock::now();
  int64_t rounds = 0;
  do {
    for (int i = 0; i < kIsaCount; ++i) {
      const Isa isa = static_cast<Isa>(i);
      const KernelTable* table = isa_table(isa);
      if (table == nullptr) continue;
      try_activation(isa, table->rows);
      try_add_norm(isa, table->rows);
      try_softmax(isa, table->rows);
      try_moves(isa, table->rows);
    }
    ++rounds;
  } while (std::chrono::duration<double>(Clock::now() - start).count() < seconds);
  std::printf("fuzz_rows: %lld rounds, seed %llu: clean\n", static_cast<long long>(rounds),
              static_cast<unsigned long long>(seed));
}
