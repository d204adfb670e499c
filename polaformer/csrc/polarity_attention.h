// Constants and formulas of polarity attention shared by host and device code, so that CPU tests cover what the GPU
// computes. polaformer/reference.py has the formulas in PyTorch and explains the exact shift.
//
// Axes: B batch, H heads, N = height·width tokens (row-major), D head dimension; 2D features in D pairs that the rotary
// embedding rotates: the first D/2 pairs are positive parts and rotate by the token's row, the others are negative
// parts and rotate by its column.
#pragma once

#include <cfloat>
#include <cstdint>

#ifdef __CUDACC__
#define POLAFORMER_INLINE __host__ __device__ __forceinline__
#else
#define POLAFORMER_INLINE inline __attribute__((always_inline))
#endif

namespace polaformer {

// double for float64 on the CPU: where everything else in a normalizer vanishes, rounding of epsilon would dominate.
constexpr double kEpsilon = 1e-6;
constexpr float kMaxUnshiftedExponent = 20.f;  // larger exponents are shifted down to this
constexpr float kMinNormalizer = FLT_MIN;      // lower bound of epsilon · e^(−C)
constexpr double kMinGradientNormalizer = 1e-8;
constexpr double kMaxNormalizerGradient = 1e25;
constexpr int kMaxHeadDim = 128;

// Unsigned integer type as wide as F; the CPU kernels add their vector types.
template <class F>
struct Bits;
template <>
struct Bits<float> {
  using type = uint32_t;
};

// e^x − 1 for 0 ≤ x ≤ 88, to 2 ulp; unspecified for larger x. x = n·ln 2 + r with |r| ≤ ln 2 / 2; the result is
// 2^n (e^r − 1) + (2^n − 1), with a Taylor polynomial for the bracket. F is float or a vector of floats.
template <class F>
POLAFORMER_INLINE F expm1_of_exponent(F x) {
  using I = typename Bits<F>::type;
  constexpr float kRound = 12582912.f;  // 1.5·2^23: adding it leaves n in the lowest bits
  const F shifted = x * 1.44269504f + kRound;
  const F n = shifted - kRound;
  const F r = (x - n * 0.693145752f) - n * 1.42860677e-6f;  // ln 2 in two parts; n times the first is exact
  F series = r * 1.98412698e-4f + 1.38888889e-3f;
  series = series * r + 8.33333333e-3f;
  series = series * r + 4.16666667e-2f;
  series = series * r + 1.66666667e-1f;
  series = series * r + 0.5f;
  const F expm1_r = r * r * series + r;
  const F power = __builtin_bit_cast(F, (I)((__builtin_bit_cast(I, shifted) << 23) + 0x3f800000));
  return power * expm1_r + (power - 1.f);
}

// A pair of features, and its rotation by the token's angle; negate the sine for the inverse.
template <class F>
struct Pair {
  F first, second;
};
template <class F>
POLAFORMER_INLINE Pair<F> rotate(Pair<F> x, F cosine, F sine) {
  return {x.first * cosine - x.second * sine, x.second * cosine + x.first * sine};
}

}  // namespace polaformer
