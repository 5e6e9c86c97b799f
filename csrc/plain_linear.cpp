#include "plain_linear.h"

#include <stdexcept>
#include <string>

#include "isa.h"
#include "packed.h"
#include "parallel.h"
#include "token_rows.h"

namespace slimkern {
namespace {

void check(const PlainLinear& a) {
  check_view(a.w, a.N, a.K, a.w_extent);
  if (a.bias.data != nullptr) check_index(a.bias.index, a.N, a.bias_extent);
  check_block_bits(a.kept);
  if (a.kept.bits == nullptr) return;
  const bool fits = a.turned ? a.kept.N == a.K && a.kept.K == a.N
                             : a.kept.N == a.N && a.kept.K == a.K;
  if (!fits || a.w.row_index != nullptr || a.w.col_index != nullptr) {
    throw std::invalid_argument("a masked weight is gathered, or its mask has other sizes");
  }
}

// The weight in panels of `width` columns, each in its place; where blocks are masked, with the
// steps that it has.
struct Panels {
  char* packed = nullptr;
  float* bias = nullptr;  // [N], or null
  uint8_t* bits = nullptr;
  int32_t* steps = nullptr;
  int64_t* counts = nullptr;
  int64_t width = 0, most_steps = 0;

  int64_t index(int64_t n) const { return n / width; }
};

Panels take_panels(Arena& arena, const PlainLinear& a, const LinearKernel& kernel) {
  Panels p;
  p.packed = arena.take<char>(kernel.packed_bytes(a.N, a.K));
  if (a.bias.data != nullptr) p.bias = arena.take<float>(a.N);
  p.width = kernel.nr;
  if (a.kept.bits == nullptr) return p;
  p.most_steps = ceil_div(a.K, kernel.step);
  const int64_t most_panels = ceil_div(a.N, kernel.narrow);
  p.bits = arena.take<uint8_t>(element_bits_bytes(a.kept));
  p.steps = arena.take<int32_t>(most_panels * p.most_steps);
  p.counts = arena.take<int64_t>(most_panels);
  return p;
}

struct WorkerRows {
  char* operand;
  float* y;
};

WorkerRows take_rows(Arena& arena, const PlainLinear& a, const LinearKernel& kernel, int64_t rows) {
  WorkerRows at;
  at.operand = arena.take<char>(kernel.operand_bytes(rows, a.K));
  const bool direct = a.dtype == DType::kFloat32;
  at.y = arena.take<float>(direct ? 0 : rows * row_stride(kPlainColumns));
  return at;
}

struct Plan {
  const LinearKernel& kernel;
  Parts blocks;
  WorkerMemory memory;
};

Plan make_plan(const PlainLinear& a, int threads) {
  const LinearKernel& kernel = plain_kernel(a.dtype, a.math);
  Plan plan{kernel, parts(a.M, kPlainRows, kernel.rows, threads), {}};
  plan.memory.workers = static_cast<int>(max(1, min(threads, plan.blocks.count)));
  Arena shared, each;
  take_panels(shared, a, kernel);
  take_rows(each, a, kernel, plan.blocks.size);
  plan.memory.shared = shared.used();
  plan.memory.each = each.used();
  return plan;
}

void read_bias(const PlainLinear& a, float* out) {
  for (int64_t i = 0; out != nullptr && i < a.N; ++i) {
    const int64_t at = (a.bias.index != nullptr ? a.bias.index[i] : i) * a.bias.stride;
    out[i] = a.dtype == DType::kFloat32 ? static_cast<const float*>(a.bias.data)[at]
                                        : widen(static_cast<const bf16_t*>(a.bias.data)[at]);
  }
}

// The view from row n on.
MatView from_row(const MatView& w, int64_t n, DType dtype) {
  MatView part = w;
  if (w.row_index != nullptr) {
    part.row_index = w.row_index + n;
  } else {
    part.data = static_cast<char*>(w.data) + n * w.row_stride * plain_item(dtype);
  }
  return part;
}

void pack_all(const PlainLinear& a, const LinearKernel& kernel, const Panels& p, int threads) {
  const Parts columns = parts(a.N, 4 * kernel.nr, kernel.nr, threads);
  parallel_for(columns.count, threads, [&](int64_t task, int) {
    const Range n = columns.at(task, {0, a.N});
    kernel.pack(from_row(a.w, n.begin, a.dtype), a.dtype, n.size(), a.K,
                p.packed + kernel.packed_bytes(n.begin, a.K));
  });
}

// Narrow panels have fewer steps that hold anything, and cost more for each: a broadcast from x
// serves less. Worth it where at least a fifth of the products goes; with many blocks kept it can
// not be.
int64_t panel_width(const PlainLinear& a, const LinearKernel& kernel, const ElementBits& bits) {
  if (kernel.narrow == kernel.nr || kept_share(a.kept) > 1.0 / 3) return kernel.nr;
  const auto products = [&](int64_t width) {
    int64_t sum = 0;
    for (int64_t n = 0; n < a.N; n += width) {
      sum += width * list_steps(bits, a.turned, {n, min(n + width, a.N)}, kernel.step, nullptr);
    }
    return sum;
  };
  return 5 * products(kernel.narrow) < 4 * products(kernel.nr) ? kernel.narrow : kernel.nr;
}

void pack_kept(const PlainLinear& a, const LinearKernel& kernel, Panels& p, int threads) {
  const ElementBits bits = element_bits(a.kept, p.bits);
  p.width = panel_width(a, kernel, bits);
  BitView kept = bits.view;
  kept.turned = a.turned;
  parallel_for(ceil_div(a.N, p.width), threads, [&](int64_t panel, int) {
    const Range n{panel * p.width, min((panel + 1) * p.width, a.N)};
    int32_t* steps = p.steps + panel * p.most_steps;
    const int64_t count = list_steps(bits, a.turned, n, kernel.step, steps);
    p.counts[panel] = count;
    kernel.pack_steps(a.w, kept, a.dtype, n, a.K, steps, count,
                      p.packed + kernel.packed_bytes(n.begin, a.K));
  });
}

// Columns n of y for a block of rows.
void multiply(const PlainLinear& a, const LinearKernel& kernel, const Panels& p, const Rows& x,
              int64_t rows, Range n, const OutRows& y) {
  if (p.steps == nullptr) {
    kernel.multiply(x.data, x.stride, rows, a.K, p.packed, n, p.bias, false, y.data, y.stride);
    return;
  }
  for (int64_t j = n.begin; j < n.end; j += p.width) {
    const int64_t panel = p.index(j);
    kernel.multiply_steps(x.data, x.stride, rows, a.K, p.packed + kernel.packed_bytes(j, a.K),
                          p.steps + panel * p.most_steps, p.counts[panel],
                          static_cast<int>(min(p.width, n.end - j)),
                          p.bias != nullptr ? p.bias + j : nullptr, y.data + (j - n.begin),
                          y.stride);
  }
}

void block_of_rows(const PlainLinear& a, const LinearKernel& kernel, const Panels& p, Range m,
                   const WorkerRows& at) {
  const void* from = static_cast<const char*>(a.x) + m.begin * a.x_stride * plain_item(a.dtype);
  Rows x{from, a.x_stride};
  if (kernel.load != nullptr) {
    kernel.load(from, a.dtype, a.x_stride, m.size(), a.K, at.operand);
    x = {at.operand, 0};
  }
  if (a.dtype == DType::kFloat32) {
    const OutRows y{static_cast<float*>(a.y) + m.begin * a.N, a.N};
    multiply(a, kernel, p, x, m.size(), {0, a.N}, y);
    return;
  }
  const int64_t stride = row_stride(kPlainColumns);
  for (int64_t j = 0; j < a.N; j += kPlainColumns) {
    const Range n{j, min(j + kPlainColumns, a.N)};
    multiply(a, kernel, p, x, m.size(), n, {at.y, stride});
    active_table().rows.convert(at.y, DType::kFloat32, stride,
                                static_cast<bf16_t*>(a.y) + m.begin * a.N + j, a.dtype, a.N,
                                m.size(), n.size());
  }
}

}  // namespace

const LinearKernel& plain_kernel(DType dtype, Math math) {
  const KernelTable& table = active_table();
  if (dtype != DType::kFloat32 && dtype != DType::kBFloat16) {
    throw std::invalid_argument("dtype is another one; accepted: float32, bfloat16");
  }
  if (!has_math(table, static_cast<int64_t>(math))) {
    throw std::invalid_argument("math " + std::to_string(static_cast<int64_t>(math)) +
                                " has no kernels on " + isa_name(active_isa()));
  }
  const LinearKernel& kernel = table.linear[static_cast<int64_t>(math)];
  if (dtype == DType::kBFloat16 && kernel.load == nullptr) {
    throw std::invalid_argument("bfloat16 is computed with float32 products; accepted: bf16");
  }
  return kernel;
}

int64_t plain_linear_scratch(const PlainLinear& call, int threads) {
  check(call);
  return make_plan(call, threads).memory.bytes();
}

void plain_linear(const PlainLinear& call, int threads, const Scratch& scratch) {
  check(call);
  const Plan plan = make_plan(call, threads);
  check_scratch(scratch, plan.memory.bytes());
  if (call.M == 0 || call.N == 0) return;
  Arena shared = plan.memory.all(scratch);
  Panels panels = take_panels(shared, call, plan.kernel);
  read_bias(call, panels.bias);
  if (panels.bits == nullptr) {
    pack_all(call, plan.kernel, panels, threads);
  } else {
    pack_kept(call, plan.kernel, panels, threads);
  }
  parallel_for(plan.blocks.count, plan.memory.workers, [&](int64_t task, int worker) {
    Arena arena = plan.memory.of(scratch, worker);
    const WorkerRows at = take_rows(arena, call, plan.kernel, plan.blocks.size);
    block_of_rows(call, plan.kernel, panels, plan.blocks.at(task, {0, call.M}), at);
  });
}

}  // namespace slimkern
