// Random blocks of rows through the passes of training, on every instruction set, in buffers of
// exactly the size that is needed: built with sanitizers, one element too far is an error. Results
// are compared with loops in double. Arguments: seconds to run, seed.
#include <chrono>

#include "row_blocks.h"
#include "training_rows.h"

namespace {

constexpr double kUnit = 0x1p-24;

void check(bool fine, const char* what, Isa isa, const Block& b, double got = 0, double want = 0) {
  if (fine) return;
  std::fprintf(stderr, "FAILED: %s, isa %s, %lld x %lld, got %.9g, want %.9g\n", what,
               isa_name(isa), static_cast<long long>(b.rows), static_cast<long long>(b.cols), got,
               want);
  std::exit(1);
}

DType storage() { return pick(0, 1) ? DType::kFloat32 : DType::kBFloat16; }
RowsOf rows_of(Block& b) { return {b.data(), b.stride}; }
double stored(const Block& b, double v) {
  return b.dtype == DType::kBFloat16 ? 0x1p-8 * std::fabs(v) : 0;
}

// a'(x), from a difference that is exact enough: the derivative is known to 1e-9.
double slope_exact(Activation a, double x) {
  if (a == Activation::kNone) return 1;
  if (a == Activation::kRelu) return x > 0 ? 1 : 0;
  if (a == Activation::kSquaredRelu) return x > 0 ? 2 * x : 0;
  const double h = 1e-5;
  return (activation_exact(a, x - 2 * h) - 8 * activation_exact(a, x - h) +
          8 * activation_exact(a, x + h) - activation_exact(a, x + 2 * h)) / (12 * h);
}

void try_activation(Isa isa) {
  const Activation a = static_cast<Activation>(pick(0, kActivationCount - 1));
  const DType dtype = storage();
  const int64_t rows = size(), cols = size();
  Block x(dtype, rows, cols, 2), grad(dtype, rows, cols), dx(dtype, rows, cols);
  Block value(dtype, rows, cols), out(dtype, rows, cols);
  Block sums(DType::kFloat32, 1, cols);
  Block* to = pick(0, 1) ? &dx : &grad;  // the gradient may be overwritten
  const Block before = grad, before_to = *to, before_value = value, before_out = out;
  const int threads = static_cast<int>(pick(1, 3));
  std::vector<float> scratch(row_sums_scratch(rows, cols, 1));
  const ActivationGrad at{rows_of(grad), rows_of(x), rows_of(*to), rows_of(value), nullptr};
  activation_grad(dtype, a, at, sums.floats(), rows, cols, threads, scratch.data(),
                  static_cast<int64_t>(scratch.size()));
  activate(dtype, a, rows_of(x), rows_of(out), rows, cols, threads);
  check(!to->strayed(before_to) && !value.strayed(before_value) && !out.strayed(before_out),
        "an activation wrote between the rows", isa, x);
  for (int64_t j = 0; j < cols; ++j) {
    double total = 0, size = 0;
    for (int64_t i = 0; i < rows; ++i) {
      const double at_x = x.get(i, j), g = before.get(i, j), y = activation_exact(a, at_x);
      const double want = g * slope_exact(a, at_x), error = 1e-6 * std::fabs(g) * (1 + std::fabs(at_x));
      check(agrees(to->get(i, j), want, error + stored(x, want)), "slope", isa, x, to->get(i, j), want);
      for (const Block* b : {&value, &out}) {
        check(agrees(b->get(i, j), y, 1e-6 * (1 + std::fabs(y)) + stored(x, y)), activation_name(a),
              isa, x, b->get(i, j), y);
      }
      total += want, size += std::fabs(want) + std::fabs(g) * (1 + std::fabs(at_x));
    }
    check(agrees(sums.get(0, j), total, 1e-5 * size), "the sum of slopes", isa, x, sums.get(0, j), total);
  }
}

void try_norm(Isa isa) {
  const DType x_type = storage(), dtype = storage();
  const int64_t rows = size(), cols = size();
  if (cols == 0) return;
  Block x(x_type, rows, cols), residual(dtype, rows, cols), out(dtype, rows, cols);
  Block sum(DType::kFloat32, rows, cols), stats(DType::kFloat32, 1, 3 * rows);
  Block gamma(DType::kFloat32, 1, cols), beta(DType::kFloat32, 1, cols);
  Block grad(dtype, rows, cols), ds(dtype, rows, cols), low(x_type, rows, cols);
  Block sums(DType::kFloat32, 1, 3 * cols);
  const bool both = pick(0, 1);
  const float eps = 1e-3f;
  const int threads = static_cast<int>(pick(1, 3));
  const Block before_out = out, before_sum = sum, before_ds = ds, before_low = low;
  norm_forward(x_type, dtype,
               {rows_of(x), rows_of(residual), rows_of(out), rows_of(sum), stats.floats(),
                gamma.floats(), beta.floats(), eps},
               rows, cols, threads);
  NormGrad at;
  at.grad = rows_of(grad), at.sum = rows_of(sum), at.to_residual = rows_of(ds);
  if (both) at.to_x = rows_of(low);
  at.stats = stats.floats(), at.gamma = gamma.floats();
  std::vector<float> scratch(row_sums_scratch(rows, cols, 3));
  norm_grad(x_type, dtype, at, sums.floats(), rows, cols, threads, scratch.data(),
            static_cast<int64_t>(scratch.size()));
  check(!out.strayed(before_out) && !sum.strayed(before_sum) && !ds.strayed(before_ds) &&
            !low.strayed(before_low),
        "a norm wrote between the rows", isa, out);
  const double n = static_cast<double>(cols);
  std::vector<double> d_gamma(cols), d_beta(cols), d_bias(cols), size(cols);
  for (int64_t i = 0; i < rows; ++i) {
    double mean = 0, square = 0, first = 0, second = 0, largest = 0;
    std::vector<double> s(cols), z(cols), g(cols);
    for (int64_t j = 0; j < cols; ++j) {
      s[j] = double{x.get(i, j)} + residual.get(i, j);
      mean += s[j] / n, largest = std::fmax(largest, std::fabs(s[j]));
    }
    for (int64_t j = 0; j < cols; ++j) square += (s[j] - mean) * (s[j] - mean) / n;
    const double scale = 1 / std::sqrt(square + eps);
    double most = 0;
    for (int64_t j = 0; j < cols; ++j) {
      z[j] = (s[j] - mean) * scale, g[j] = double{grad.get(i, j)} * gamma.get(0, j);
      first += g[j] / n, second += g[j] * z[j] / n, most = std::fmax(most, std::fabs(g[j]));
    }
    const double error = 16 * (n / 4 + 16) * kUnit * (1 + largest * scale);
    for (int64_t j = 0; j < cols; ++j) {
      const double y = z[j] * gamma.get(0, j) + beta.get(0, j);
      const double off = error * (std::fabs(double{gamma.get(0, j)}) * (1 + std::fabs(z[j])) + std::fabs(y));
      check(agrees(out.get(i, j), y, off + stored(out, y)), "norm", isa, out, out.get(i, j), y);
      const double d = scale * (g[j] - first - z[j] * second);
      const double away = error * scale * most * (1 + std::fabs(z[j])) * (1 + std::fabs(z[j]));
      check(agrees(ds.get(i, j), d, away + stored(ds, d)), "its slope", isa, out, ds.get(i, j), d);
      if (both) check(agrees(low.get(i, j), d, away + stored(low, d)), "in x's type", isa, out);
      d_gamma[j] += grad.get(i, j) * z[j], d_beta[j] += grad.get(i, j), d_bias[j] += d;
      size[j] += std::fabs(grad.get(i, j)) * (1 + std::fabs(z[j])) * (1 + error) +
                 scale * most * (1 + std::fabs(z[j])) * (1 + std::fabs(z[j]));
    }
  }
  for (int64_t j = 0; j < cols; ++j) {
    const double want[3] = {d_gamma[j], d_beta[j], d_bias[j]};
    for (int k = 0; k < 3; ++k) {
      const double got = sums.get(0, k * cols + j);
      check(agrees(got, want[k], 1e-4 * (n + 16) * size[j]), "a norm's sums", isa, out, got, want[k]);
    }
  }
}

void try_drop(Isa isa) {
  const DType dtype = storage();
  const int64_t count = size() * size();
  Block x(dtype, 1, count), out(dtype, 1, count), again(dtype, 1, count);
  const Dropout by{rng(), static_cast<uint32_t>(rng()), 1.25f};
  drop(dtype, by, x.data(), out.data(), count, static_cast<int>(pick(1, 3)));
  drop(dtype, by, x.data(), again.data(), count, 1);
  for (int64_t i = 0; i < count; ++i) {
    const double kept = 1.25 * x.get(0, i), got = out.get(0, i);
    check(got == again.get(0, i), "dropout depends on threads", isa, out);
    check(got == 0 || agrees(got, kept, ulp(kept) + stored(x, kept)), "dropout", isa, out, got, kept);
  }
}

template <class Bits>
void try_columns(Isa isa) {
  const int64_t rows = size(), cols = size(), stride = cols + pick(0, 5);
  std::vector<Bits> w(rows == 0 ? 0 : (rows - 1) * stride + cols), dead(cols);
  for (Bits& v : w) v = pick(0, 3) ? static_cast<Bits>(rng()) : 0;
  for (Bits& v : dead) v = pick(0, 1) ? static_cast<Bits>(~Bits{0}) : 0;
  const std::vector<Bits> before = w;
  const auto zero = [&] {
    return zero_columns(8 * sizeof(Bits), w.data(), stride, rows, cols, dead.data(),
                        static_cast<int>(pick(1, 3)));
  };
  const bool changed = zero();
  const Block none(DType::kFloat32, rows, cols);
  check(changed == (w != before) && !zero(), "zero_columns is wrong about a change", isa, none);
  for (size_t i = 0; i < w.size(); ++i) {
    const int64_t j = static_cast<int64_t>(i) % stride;
    check(w[i] == (j < cols && dead[j] ? 0 : before[i]), "zero_columns", isa, none);
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
      if (isa_table(isa) == nullptr) continue;
      set_active_isa(isa);
      try_activation(isa);
      try_norm(isa);
      try_drop(isa);
    }
    try_columns<uint16_t>(active_isa());
    try_columns<uint32_t>(active_isa());
    try_columns<uint64_t>(active_isa());
    ++rounds;
  } while (std::chrono::duration<double>(Clock::now() - start).count() < seconds);
  std::printf("fuzz_training: %lld rounds, seed %llu: clean\n", static_cast<long long>(rounds),
              static_cast<unsigned long long>(seed));
}
