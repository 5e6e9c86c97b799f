// One step of a streaming softmax: two reads of a block of scores, one write.
#pragma once

#include <cstdint>

#include "kernel_table.h"
#include "kernels/elementary.inl.h"
#include "kernels/rows.inl.h"

namespace slimkern {
namespace {

// The scores of a row: scale * s + bias.
template <class Simd, bool kBias>
struct Scores {
  using Vec = typename Simd::Vec;
  float* s;
  const float* bias;
  Vec scale;

  template <class Lanes>
  Vec at(int64_t j, Lanes lanes) const {
    const Vec v = lanes.load(s + j);
    if constexpr (kBias) return Simd::fmadd(v, scale, lanes.load(bias + j));
    return Simd::mul(v, scale);
  }
};

// Per lane, the largest score that is a number, or -inf.
template <class Simd, bool kBias>
[[gnu::always_inline]] inline typename Simd::Vec largest_scores(const Scores<Simd, kBias>& scores,
                                                                int64_t keys) {
  using Vec = typename Simd::Vec;
  const Vec lowest = Simd::set(-__builtin_inff());
  Vec largest = lowest;
  for_columns<Simd>(keys, [&](int64_t j, auto lanes, int) {
    largest = Simd::max(lanes.pick(scores.at(j, lanes), lowest), largest);
  });
  return largest;
}

// s = exp(score - base); returns the sum per lane.
template <class Simd, bool kBias>
[[gnu::always_inline]] inline typename Simd::Vec exponentials(const Scores<Simd, kBias>& scores,
                                                              typename Simd::Vec base,
                                                              int64_t keys) {
  using Vec = typename Simd::Vec;
  Vec total = Simd::zero();
  for_columns<Simd>(keys, [&](int64_t j, auto lanes, int) {
    const Vec y = exponential<Simd>(Simd::sub(scores.at(j, lanes), base));
    lanes.store(scores.s + j, y);
    total = Simd::add(total, lanes.pick(y, Simd::zero()));
  });
  return total;
}

// As many rows at a time as there are lanes: m, l and rescale are vectors.
template <class Simd, bool kBias>
void softmax_rows(float* s, int64_t stride, const float* bias, int64_t bias_stride, float scale,
                  float* m, float* l, float* rescale, int64_t rows, int64_t keys) {
  using Vec = typename Simd::Vec;
  constexpr int kWidth = Simd::kWidth;
  const Vec lowest = Simd::set(-__builtin_inff()), factor = Simd::set(scale);
  for (int64_t i = 0; i < rows; i += kWidth) {
    const FirstLanes<Simd> lanes{rows - i < kWidth ? static_cast<int>(rows - i) : kWidth};
    const auto row = [&](int k) {
      return Scores<Simd, kBias>{s + (i + k) * stride, kBias ? bias + (i + k) * bias_stride : bias,
                                 factor};
    };
    Vec largest[kWidth], sums[kWidth];
    for (int k = 0; k < kWidth; ++k) largest[k] = lowest, sums[k] = Simd::zero();
    for (int k = 0; k < lanes.count; ++k) largest[k] = largest_scores(row(k), keys);
    const Vec before = lanes.load(m + i);
    const Vec after = Simd::max(join_lanes<Simd>(largest, Simd::max), before);
    const Vec from = Simd::select(Simd::equal(after, lowest), Simd::zero(), after);
    const Vec change = exponential<Simd>(Simd::sub(before, from));
    const Vec kept = Simd::select(Simd::equal(before, after), Simd::set(1.0f), change);
    float base[kWidth];
    Simd::store(base, from);
    for (int k = 0; k < lanes.count; ++k) {
      sums[k] = exponentials(row(k), Simd::set(base[k]), keys);
    }
    lanes.store(m + i, after);
    const Vec sum = join_lanes<Simd>(sums, Simd::add);
    lanes.store(l + i, Simd::fmadd(lanes.load(l + i), kept, sum));
    lanes.store(rescale + i, kept);
  }
}

template <class Simd>
void softmax_block(float* s, int64_t stride, const float* bias, int64_t bias_stride, float scale,
                   float* m, float* l, float* rescale, int64_t rows, int64_t keys) {
  const auto run = bias != nullptr ? softmax_rows<Simd, true> : softmax_rows<Simd, false>;
  run(s, stride, bias, bias_stride, scale, m, l, rescale, rows, keys);
}

}  // namespace
}  // namespace slimkern
