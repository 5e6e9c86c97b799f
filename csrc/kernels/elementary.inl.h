// The exponential and the normal distribution, in a vector of floats. tests/coefficients.py makes
// the constants and says how the two are computed; the error bounds below are tested.
#pragma once

#include "kernel_table.h"

namespace slimkern {
namespace {

constexpr float kLog2e = 1.442695f;
constexpr float kLn2High = 0.69314575f;  // 16 bits
constexpr float kLn2Low = 1.4286068e-06f;
constexpr float kExpLowest = -87.33655f;  // of a normal result
constexpr float kExpHighest = 89.0f;  // its result is inf
constexpr float kExp[5] = {
    0.5f, 0.16666576f, 0.041666552f, 0.008363233f,
    0.001392625f,
};
constexpr float kPhiInverseStep = 2.5f;
constexpr float kPhiEnd = 6.0f;
constexpr float kPhi[6][16] = {
    {
        0.5f, 0.34457827f, 0.21185541f, 0.11506967f,
        0.05479929f, 0.02275013f, 0.008197535f, 0.0025551303f,
        0.0006871383f, 0.00015910891f, 3.1671407e-05f, 5.412604e-06f,
        7.93345e-07f, 9.9648005e-08f, 1.0718263e-08f, 0.0f,
    },
    {
        -0.15957691f, -0.14730805f, -0.11587662f, -0.077674426f,
        -0.044368334f, -0.021596387f, -0.008957812f, -0.0031661806f,
        -0.00095363526f, -0.0002447608f, -5.3532112e-05f, -9.976999e-06f,
        -1.584523e-06f, -2.1444228e-07f, -2.4730657e-08f, 0.0f,
    },
    {
        -7.189082e-08f, 0.011784252f, 0.018539844f, 0.018641736f,
        0.014198009f, 0.008638748f, 0.004299851f, 0.0017730702f,
        0.00061030017f, 0.0001762043f, 4.2813757e-05f, 8.775413e-06f,
        1.519926e-06f, 2.2274968e-07f, 2.7649754e-08f, 0.0f,
    },
    {
        0.0042559667f, 0.003299666f, 0.0011124415f, -0.000911332f,
        -0.001845699f, -0.0017277176f, -0.0011370608f, -0.0005775206f,
        -0.00023497721f, -7.806081e-05f, -2.1411368e-05f, -4.884022e-06f,
        -9.3103404e-07f, -1.4884621e-07f, -2.0009274e-08f, 0.0f,
    },
    {
        -2.0176506e-06f, -0.00044204845f, -0.000578964f, -0.00038641942f,
        -8.481314e-05f, 0.00011311543f, 0.0001571499f, 0.00011432665f,
        5.919892e-05f, 2.3653452e-05f, 7.5501493e-06f, 1.9613408e-06f,
        4.193547e-07f, 7.43488e-08f, 1.0987422e-08f, 0.0f,
    },
    {
        -9.9414996e-05f, -6.454694e-05f, 1.0361877e-05f, 5.8586043e-05f,
        5.4706677e-05f, 2.3107525e-05f, -2.9216749e-06f, -1.1671452e-05f,
        -9.427576e-06f, -4.883275e-06f, -1.8771468e-06f, -5.644887e-07f,
        -1.3629243e-07f, -2.6822892e-08f, -4.3448365e-09f, 0.0f,
    },
};

// Added to a number of at most 2^22 it leaves the nearest integer in the low bits.
constexpr float kRound = 0x1.8p23f;

template <class Simd, int kCount>
inline typename Simd::Vec polynomial(typename Simd::Vec x, const float (&coefficients)[kCount]) {
  typename Simd::Vec y = Simd::set(coefficients[kCount - 1]);
#pragma GCC unroll 8
  for (int i = kCount - 2; i >= 0; --i) y = Simd::fmadd(y, x, Simd::set(coefficients[i]));
  return y;
}

// exp(x) for x <= kExpHighest, within 1 ulp (1.3 without a fused multiply-add). Results below the
// least normal number (x < -87.34) are zero and those above exp(88.37) are inf; NaN gives NaN.
template <class Simd>
inline typename Simd::Vec exponential(typename Simd::Vec x) {
  using Vec = typename Simd::Vec;
  constexpr float kBias = 127;
  const Vec shift = Simd::set(kRound + kBias);
  const Vec biased = Simd::fmadd(x, Simd::set(kLog2e), shift);  // its low bits: n + 127
  const Vec n = Simd::sub(biased, shift);
  Vec r = Simd::fnmadd(n, Simd::set(kLn2High), x);
  r = Simd::fnmadd(n, Simd::set(kLn2Low), r);
  const Vec one = Simd::set(1.0f);
  Vec y = Simd::fmadd(polynomial<Simd>(r, kExp), r, one);
  y = Simd::fmadd(y, r, one);
  y = Simd::mul(y, Simd::exponent(biased));
  return Simd::select(Simd::less(x, Simd::set(kExpLowest)), Simd::zero(), y);
}

// x / (1 + exp(v))
template <class Simd>
inline typename Simd::Vec logistic(typename Simd::Vec x, typename Simd::Vec v) {
  const typename Simd::Vec e = exponential<Simd>(Simd::min(Simd::set(kExpHighest), v));
  return Simd::div(x, Simd::add(Simd::set(1.0f), e));
}

// P(z > |x|) for a standard normal z; zero beyond kPhiEnd.
template <class Simd>
inline typename Simd::Vec normal_tail(typename Simd::Vec x) {
  using Vec = typename Simd::Vec;
  const Vec a = Simd::min(Simd::set(kPhiEnd), Simd::abs(x));
  const Vec inverse = Simd::set(kPhiInverseStep), shift = Simd::set(kRound);
  const Vec piece = Simd::fmadd(a, inverse, shift);
  const Vec f = Simd::fmadd(a, inverse, Simd::sub(shift, piece));
  Vec phi = Simd::lookup(kPhi[5], piece);
#pragma GCC unroll 5
  for (int i = 4; i >= 0; --i) phi = Simd::fmadd(phi, f, Simd::lookup(kPhi[i], piece));
  return phi;
}

// x * P(z <= x), from the tail of x.
template <class Simd>
inline typename Simd::Vec times_tail(typename Simd::Vec x, typename Simd::Vec tail) {
  using Vec = typename Simd::Vec;
  const Vec a = Simd::min(Simd::set(kPhiEnd), Simd::abs(x));
  // x where it is positive, else 0: but NaN for -inf, as 0 * -inf has it.
  const Vec positive = Simd::sub(x, Simd::min(x, Simd::zero()));
  return Simd::fnmadd(a, tail, positive);
}

// x * P(z <= x) for a standard normal z.
template <class Simd>
inline typename Simd::Vec times_normal(typename Simd::Vec x) {
  return times_tail<Simd>(x, normal_tail<Simd>(x));
}

}  // namespace
}  // namespace slimkern
