#include "indexed.h"

#include <stdexcept>
#include <string>

#include "isa.h"
#include "parallel.h"

namespace slimkern {
namespace {

Range block(int64_t i, int64_t size, int64_t end) { return {i * size, min((i + 1) * size, end)}; }

// Sizes of the blocks that a worker holds in its second-level cache, and of the scratch.
struct Plan {
  int64_t mc, nc, kc;
  int64_t m_blocks, n_blocks, k_blocks;
  int64_t packed_b;    // elements, all of b, shared by the workers
  int64_t packed_a;    // elements per worker
  int64_t tiles;       // elements per worker
  int workers;

  int64_t scratch() const { return packed_b + workers * (packed_a + tiles); }
};

Plan make_plan(const GemmKernel& kernel, int64_t M, int64_t N, int64_t K, int threads) {
  constexpr int64_t kRows = 96, kCols = 256, kDepth = 256;
  Plan p;
  p.mc = min(round_up(kRows, kernel.mr), round_up(M, kernel.mr));
  p.nc = min(round_up(kCols, kernel.nr), round_up(N, kernel.nr));
  p.kc = min(kDepth, K);
  p.m_blocks = p.mc > 0 ? ceil_div(M, p.mc) : 0;
  p.n_blocks = p.nc > 0 ? ceil_div(N, p.nc) : 0;
  p.k_blocks = p.kc > 0 ? ceil_div(K, p.kc) : 0;
  p.workers = static_cast<int>(min(threads < 1 ? 1 : threads, p.m_blocks * p.n_blocks));
  p.packed_b = round_up(N, kernel.nr) * K;
  p.packed_a = p.mc * p.kc;
  p.tiles = p.mc * p.nc;
  return p;
}

// Addresses inside the scratch.
struct Scratch {
  double* base;
  const Plan& plan;

  // Block (n, k) of packed b: whole k blocks one after the other, n panels within.
  double* b(int64_t n_begin, int64_t n_padded, int64_t k_begin, int64_t k_size) const {
    return base + k_begin * n_padded + n_begin * k_size;
  }
  double* a(int worker) const {
    return base + plan.packed_b + worker * (plan.packed_a + plan.tiles);
  }
  double* tiles(int worker) const { return a(worker) + plan.packed_a; }
};

}  // namespace

void check_index(const int64_t* index, int64_t length, int64_t extent) {
  if (index == nullptr) {
    if (length > extent) {
      throw std::out_of_range("a length of " + std::to_string(length) + " exceeds the " +
                              std::to_string(extent) + " that are there");
    }
    return;
  }
  int64_t last = -1;
  for (int64_t i = 0; i < length; ++i) {
    if (index[i] <= last || index[i] >= extent) {
      throw std::out_of_range("index " + std::to_string(index[i]) + " at position " +
                              std::to_string(i) + " is not strictly increasing within [0, " +
                              std::to_string(extent) + ")");
    }
    last = index[i];
  }
}

void check_view(const MatView& view, int64_t rows, int64_t cols, const Extent& extent) {
  check_index(view.row_index, rows, extent.rows);
  check_index(view.col_index, cols, extent.cols);
}

int64_t gemm_scratch(int64_t M, int64_t N, int64_t K, int threads) {
  return make_plan(active_table().gemm, M, N, K, threads).scratch();
}

void gemm(const GemmArgs& args, const GemmExtents& extents, int threads, double* scratch,
          int64_t scratch_size) {
  check_view(args.a, args.M, args.K, extents.a);
  check_view(args.b, args.K, args.N, extents.b);
  check_view(args.c, args.M, args.N, extents.c);
  if (args.bias.data != nullptr) check_index(args.bias.index, args.N, extents.bias);

  const GemmKernel& kernel = active_table().gemm;
  const Plan plan = make_plan(kernel, args.M, args.N, args.K, threads);
  if (scratch_size < plan.scratch()) {
    throw std::invalid_argument("scratch holds " + std::to_string(scratch_size) +
                                " elements, gemm needs " + std::to_string(plan.scratch()));
  }
  if (args.M == 0 || args.N == 0) return;

  const Scratch at{scratch, plan};
  const int64_t n_padded = round_up(args.N, kernel.nr);

  parallel_for(plan.n_blocks * plan.k_blocks, plan.workers, [&](int64_t task, int) {
    const Range n = block(task % plan.n_blocks, plan.nc, args.N);
    const Range k = block(task / plan.n_blocks, plan.kc, args.K);
    kernel.pack_b(args, n, k, at.b(n.begin, n_padded, k.begin, k.size()));
  });

  parallel_for(plan.m_blocks * plan.n_blocks, plan.workers, [&](int64_t task, int worker) {
    const Range m = block(task / plan.n_blocks, plan.mc, args.M);
    const Range n = block(task % plan.n_blocks, plan.nc, args.N);
    const int64_t m_panels = ceil_div(m.size(), kernel.mr);
    const int64_t n_panels = ceil_div(n.size(), kernel.nr);
    double* a = at.a(worker);
    double* tiles = at.tiles(worker);
    if (plan.k_blocks == 0) {  // an empty reduction: the tiles are zero
      kernel.multiply(a, a, m_panels, n_panels, 0, false, tiles);
    }
    for (int64_t i = 0; i < plan.k_blocks; ++i) {
      const Range k = block(i, plan.kc, args.K);
      kernel.pack_a(args, m, k, a);
      kernel.multiply(a, at.b(n.begin, n_padded, k.begin, k.size()), m_panels, n_panels, k.size(),
                      i > 0, tiles);
    }
    kernel.store(args, m, n, tiles);
  });
}

void column_sum(DType dtype, const MatView& a, int64_t rows, int64_t cols, const VecView& out,
                int64_t out_size, int threads) {
  check_index(out.index, cols, out_size);
  constexpr int64_t kColumns = 128;
  const ColumnSum sum = active_table().column_sum[static_cast<int>(dtype)];
  parallel_for(ceil_div(cols, kColumns), threads, [&](int64_t task, int) {
    sum(a, rows, block(task, kColumns, cols), out);
  });
}

}  // namespace slimkern
