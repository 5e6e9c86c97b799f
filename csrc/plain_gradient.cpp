#include <stdexcept>

#include "isa.h"
#include "parallel.h"
#include "plain_linear.h"
#include "token_rows.h"

namespace slimkern {
namespace {

void check(const PlainGradient& a) {
  check_view(a.dw, a.N, a.K, a.dw_extent);
  check_block_bits(a.kept);
  if (a.dw.col_stride != 1) throw std::invalid_argument("dw has gaps within its rows");
  if (a.kept.bits == nullptr) return;
  if (a.kept.N != a.N || a.kept.K != a.K || a.dw.row_index || a.dw.col_index) {
    throw std::invalid_argument("a masked gradient is scattered, or its mask has other sizes");
  }
}

// Results that need no more than their sum.
bool direct(const PlainGradient& a) {
  return a.dtype == DType::kFloat32 && a.kept.bits == nullptr && a.dw.row_index == nullptr &&
         a.dw.col_index == nullptr;
}

// Rows of the gradient that are left out together where nothing of them is kept: those of a block
// of the mask, in units that an operand can be entered at.
int64_t group_of(const PlainGradient& a) { return min(round_up(a.kept.bn, 16), kPlainRows); }

struct Shared {
  char* x;  // xt as a packed weight: its outputs are the columns of dw, the tokens its k
  uint8_t* bits;
};

Shared take_shared(Arena& arena, const PlainGradient& a, const LinearKernel& kernel) {
  Shared at;
  at.x = arena.take<char>(kernel.packed_bytes(a.K, a.M));
  at.bits = arena.take<uint8_t>(element_bits_bytes(a.kept));
  return at;
}

struct WorkerRows {
  char* operand;  // rows of dyt
  float* sums;
};

WorkerRows take_rows(Arena& arena, const PlainGradient& a, const LinearKernel& kernel,
                     int64_t rows) {
  WorkerRows at;
  at.operand = arena.take<char>(kernel.turned_bytes(rows, a.M));
  at.sums = arena.take<float>(direct(a) ? 0 : rows * row_stride(kPlainColumns));
  return at;
}

struct Plan {
  const LinearKernel& kernel;
  Parts blocks;  // of rows of dw
  WorkerMemory memory;
};

Plan make_plan(const PlainGradient& a, int threads) {
  const LinearKernel& kernel = plain_kernel(a.dtype, a.math);
  const int64_t unit = a.kept.bits != nullptr ? group_of(a) : kernel.rows;
  Plan plan{kernel, parts(a.N, kPlainRows, unit, threads), {}};
  plan.memory.workers = static_cast<int>(max(1, min(threads, plan.blocks.count)));
  Arena shared, each;
  take_shared(shared, a, kernel);
  take_rows(each, a, kernel, plan.blocks.size);
  plan.memory.shared = shared.used();
  plan.memory.each = each.used();
  return plan;
}

const void* column(const void* data, int64_t j, DType dtype) {
  return static_cast<const char*>(data) + j * plain_item(dtype);
}

// The columns of a matrix [M, ...] as rows, from column j on.
MatView columns_from(const void* data, int64_t stride, int64_t j, DType dtype) {
  return {const_cast<void*>(column(data, j, dtype)), 1, stride, nullptr, nullptr};
}

void pack_tokens(const PlainGradient& a, const LinearKernel& kernel, char* packed, int threads) {
  const Parts columns = parts(a.K, 4 * kernel.nr, kernel.nr, threads);
  parallel_for(columns.count, threads, [&](int64_t task, int) {
    const Range k = columns.at(task, {0, a.K});
    kernel.pack(columns_from(a.x, a.x_stride, k.begin, a.dtype), a.dtype, k.size(), a.M,
                packed + kernel.packed_bytes(k.begin, a.M));
  });
}

// What multiplies a block of rows of the gradient.
struct Block {
  const PlainGradient& a;
  const LinearKernel& kernel;
  const ElementBits* bits;  // or null
  const char* packed;
  char* operand;
  int64_t stride;  // floats between rows of the operand
  Range n;

  // Rows [begin, end) of the block, columns k.
  void multiply(int64_t begin, int64_t end, Range k, float* out, int64_t out_stride) const {
    kernel.multiply(operand + kernel.turned_bytes(begin, a.M), stride, end - begin, a.M, packed, k, nullptr,
                    false, out + begin * out_stride, out_stride);
  }
};

// Panel by panel only the groups of rows in which something is kept, neighbours together. What is
// not computed is not written either.
void multiply_kept(const Block& b, Range k, float* out, int64_t out_stride) {
  const int64_t group = group_of(b.a), rows = b.n.size();
  for (int64_t j = k.begin; j < k.end; j += b.kernel.nr) {
    const Range panel{j, min(j + b.kernel.nr, k.end)};
    int64_t begin = 0;
    for (int64_t i = 0; i < rows; i += group) {
      const int64_t end = min(i + group, rows);
      const bool kept = any_kept(*b.bits, {b.n.begin + i, b.n.begin + end}, panel);
      if (kept && end < rows) continue;
      const int64_t last = kept ? end : i;
      if (last > begin) b.multiply(begin, last, panel, out + (j - k.begin), out_stride);
      begin = end;
    }
  }
}

// Brings the sums of columns k to their places.
void store(const Block& b, Range k, const float* sums, int64_t stride) {
  const PlainGradient& a = b.a;
  const RowKernel& rows = active_table().rows;
  const auto row = [&](int64_t i) {
    const int64_t at = a.dw.row_index != nullptr ? a.dw.row_index[b.n.begin + i] : b.n.begin + i;
    return static_cast<char*>(a.dw.data) + at * a.dw.row_stride * plain_item(a.dtype);
  };
  if (b.bits != nullptr) {
    const BitView& kept = b.bits->view;
    rows.keep(sums, stride, kept.bits + b.n.begin * kept.row_bytes + k.begin / 8, kept.row_bytes,
              a.dtype, row(0) + k.begin * plain_item(a.dtype), a.dw.row_stride, b.n.size(),
              k.size());
    return;
  }
  for (int64_t i = 0; i < b.n.size(); ++i, sums += stride) {
    if (a.dw.col_index == nullptr) {
      rows.convert(sums, DType::kFloat32, 0, row(i) + k.begin * plain_item(a.dtype), a.dtype, 0, 1,
                   k.size());
      continue;
    }
    for (int64_t j = k.begin; j < k.end; ++j) {
      const int64_t at = a.dw.col_index[j];
      if (a.dtype == DType::kFloat32) {
        reinterpret_cast<float*>(row(i))[at] = sums[j - k.begin];
      } else {
        reinterpret_cast<bf16_t*>(row(i))[at] = to_bf16(sums[j - k.begin]);
      }
    }
  }
}

void block_of_rows(const Block& b, float* sums) {
  const PlainGradient& a = b.a;
  b.kernel.turn(columns_from(a.dy, a.dy_stride, b.n.begin, a.dtype), a.dtype, b.n.size(), a.M,
                b.operand);
  if (direct(a)) {
    float* out = static_cast<float*>(a.dw.data) + b.n.begin * a.dw.row_stride;
    b.multiply(0, b.n.size(), {0, a.K}, out, a.dw.row_stride);
    return;
  }
  const int64_t stride = row_stride(kPlainColumns);
  for (int64_t j = 0; j < a.K; j += kPlainColumns) {
    const Range k{j, min(j + kPlainColumns, a.K)};
    if (b.bits != nullptr) {
      multiply_kept(b, k, sums, stride);
    } else {
      b.multiply(0, b.n.size(), k, sums, stride);
    }
    store(b, k, sums, stride);
  }
}

}  // namespace

int64_t plain_gradient_scratch(const PlainGradient& call, int threads) {
  check(call);
  return make_plan(call, threads).memory.bytes();
}

void plain_gradient(const PlainGradient& call, int threads, const Scratch& scratch) {
  check(call);
  const Plan plan = make_plan(call, threads);
  const LinearKernel& kernel = plan.kernel;
  check_scratch(scratch, plan.memory.bytes());
  if (call.N == 0 || call.K == 0) return;
  Arena shared = plan.memory.all(scratch);
  const Shared at = take_shared(shared, call, kernel);
  pack_tokens(call, kernel, at.x, threads);
  ElementBits bits;
  if (call.kept.bits != nullptr) bits = element_bits(call.kept, at.bits);
  const int64_t stride = kernel.turned_bytes(1, call.M) / 4;
  parallel_for(plan.blocks.count, plan.memory.workers, [&](int64_t task, int worker) {
    Arena arena = plan.memory.of(scratch, worker);
    const WorkerRows mine = take_rows(arena, call, kernel, plan.blocks.size);
    const Block block{call,         kernel,
                      call.kept.bits != nullptr ? &bits : nullptr,
                      at.x,         mine.operand,
                      stride,
                      plan.blocks.at(task, {0, call.N})};
    block_of_rows(block, mine.sums);
  });
}

}  // namespace slimkern
