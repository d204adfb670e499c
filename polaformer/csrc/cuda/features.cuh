// Features of queries and keys: exponents, the exact shift, sums over lanes. polaformer/reference.py explains them.
//
// A number x has two poles, x⁺ and x⁻, of which one is zero: one exponential makes both features. The first D features
// turn with the token's row, the others with its column; of the same flow (and of keys) the first are x⁺, of the
// opposite flow x⁻. So the opposite flow is the same flow of −x with other temperatures.
#pragma once

#include "tf32.cuh"

namespace polaformer {

__device__ __forceinline__ float excess(float exponent) { return fmaxf(exponent - kFreeExponent, 0.f); }

// e^(x − shift) − e^(−shift) without cancellation where x is small, without overflow where it is large.
__device__ __forceinline__ float shifted_feature(float exponent, float shift) {
  float feature = expm1_of_exponent(min_or_nan(exponent, kFreeExponent)) * expf(-shift);
  if (exponent > kFreeExponent) feature += expf(exponent - shift) - expf(kFreeExponent - shift);
  return feature;
}

// y · sign(x)
__device__ __forceinline__ float with_sign(float y, float x) { return x > 0.f ? y : x < 0.f ? -y : 0.f; }

// Pairs of the two poles: only the one that a number's sign selects is not zero.
struct Poles {
  Pair<float> first, second;
};

__device__ __forceinline__ Poles part_poles(Pair<float> feature, Pair<float> x) {
  return {{x.first > 0.f ? feature.first : 0.f, x.second > 0.f ? feature.second : 0.f},
          {x.first > 0.f ? 0.f : feature.first, x.second > 0.f ? 0.f : feature.second}};
}

// A token's turns for one pair: of the first pole by its row, of the second by its column.
struct Turns {
  float2 row, column;  // cosine, sine
  __device__ __forceinline__ Poles forward(const Poles& x) const {
    return {turn(x.first, row.x, row.y), turn(x.second, column.x, column.y)};
  }
  __device__ __forceinline__ Poles back(const Poles& x) const {
    return {turn(x.first, row.x, -row.y), turn(x.second, column.x, -column.y)};
  }
};

__device__ __forceinline__ Turns load_turns(const float* table, int2 place, int pair) {
  const auto* turns = reinterpret_cast<const float2*>(table);
  return {__ldg(turns + place.x + pair), __ldg(turns + place.y + pair)};
}

// Turns of two neighbouring pairs, the first of them even.
__device__ __forceinline__ void load_turns(Turns (&both)[2], const float* table, int2 place, int pair) {
  const auto* turns = reinterpret_cast<const float2*>(table);
  const float4 row = __ldg(reinterpret_cast<const float4*>(turns + place.x + pair));
  const float4 column = __ldg(reinterpret_cast<const float4*>(turns + place.y + pair));
  both[0] = {{row.x, row.y}, {column.x, column.y}};
  both[1] = {{row.z, row.w}, {column.z, column.w}};
}

__device__ __forceinline__ Pair<float> absolute(Pair<float> x) { return {fabsf(x.first), fabsf(x.second)}; }
__device__ __forceinline__ Pair<float> negative(Pair<float> x) { return {-x.first, -x.second}; }
__device__ __forceinline__ float largest(Pair<float> x) { return fmaxf(x.first, x.second); }

// Of two poles' values, those that x selects.
__device__ __forceinline__ Pair<float> select(const Poles& poles, Pair<float> x) {
  return {x.first > 0.f ? poles.first.first : poles.second.first,
          x.second > 0.f ? poles.first.second : poles.second.second};
}
// A pair's neighbours in memory, each (first pole, second pole).
__device__ __forceinline__ Poles load_poles(const float2* pair) {
  const float4 both = *reinterpret_cast<const float4*>(pair);
  return {{both.x, both.z}, {both.y, both.w}};
}
__device__ __forceinline__ Pair<float> scale(Pair<float> x, Pair<float> by) {
  return {x.first * by.first, x.second * by.second};
}
__device__ __forceinline__ Pair<float> scale(Pair<float> x, float by) { return {x.first * by, x.second * by}; }
__device__ __forceinline__ float dot(const Poles& a, const Poles& b) {
  return a.first.first * b.first.first + a.first.second * b.first.second + a.second.first * b.second.first +
         a.second.second * b.second.second;
}
// Adds a·b to the sums of the poles that x selects.
__device__ __forceinline__ void accumulate(Poles& sum, Pair<float> a, Pair<float> b, Pair<float> x) {
  (x.first > 0.f ? sum.first.first : sum.second.first) += a.first * b.first;
  (x.second > 0.f ? sum.first.second : sum.second.second) += a.second * b.second;
}

// Features of exponents; `shift` is each one's.
template <bool kShifted>
__device__ __forceinline__ Pair<float> features_of(Pair<float> exponents, Pair<float> shift) {
  if constexpr (kShifted) {
    return {shifted_feature(exponents.first, shift.first), shifted_feature(exponents.second, shift.second)};
  } else {
    return {expm1_of_exponent(exponents.first), expm1_of_exponent(exponents.second)};
  }
}

// Their derivatives by the exponents, in units of 1.
template <bool kShifted>
__device__ __forceinline__ Pair<float> slopes_of(Pair<float> features, Pair<float> exponents, Pair<float> shift) {
  if constexpr (kShifted) {
    return {expf(exponents.first - shift.first), expf(exponents.second - shift.second)};
  } else {
    return {features.first + 1.f, features.second + 1.f};
  }
}

// The exponent that a pair of queries asks its token to be shifted for, given its keys' shifts: the larger one of the
// poles that take part.
__device__ __forceinline__ float demand(Pair<float> exponents, Pair<float> x, float2 key_shift) {
  const Poles poles = part_poles(exponents, x);
  const float first = largest(poles.first), second = largest(poles.second);
  return fmaxf(first > 0.f ? first + key_shift.x : 0.f, second > 0.f ? second + key_shift.y : 0.f);
}

// The shift of each feature of a pair of queries.
__device__ __forceinline__ Pair<float> query_shift(float token_shift, float2 key_shift, Pair<float> x) {
  const float first = fmaxf(token_shift - key_shift.x, -kFreeExponent);
  const float second = fmaxf(token_shift - key_shift.y, -kFreeExponent);
  return {x.first > 0.f ? first : second, x.second > 0.f ? first : second};
}

__device__ __forceinline__ float shifted_epsilon(float token_shift) {
  return fmaxf(float(kEpsilon) * expf(-token_shift), kLeastNormalizer);
}

// What the queries of one head are turned into features and normalizers with, in shared memory.
template <int kWidth>
struct alignas(16) HeadTables {
  float2 temperatures[2][kWidth];  // of each flow: first, second pole
  float2 means[kWidth];
  float2 shifts[kWidth / 2];  // of pairs

  // Fills everything from the arguments of forward or backward. Returns whether this thread met a shift.
  template <class Arguments>
  __device__ __forceinline__ bool load(const Arguments& f, const Split& split, int threads) {
    const int width = f.shape.head_width, features = 2 * width;
    const float* mean = f.key_mean + int64_t{split.head} * features;
    for (int i = opaque(int(threadIdx.x)); i < kWidth; i += threads) {
      means[i] = i < width ? make_float2(mean[i], mean[width + i]) : make_float2(0.f, 0.f);
      for (int flow = 0; flow < 2; ++flow) {
        const float* logits = (flow ? f.opposite_logits : f.same_logits) + int64_t{split.head_in_batch} * features;
        temperatures[flow][i] = make_float2(0.f, 0.f);
        if (i >= width) continue;
        temperatures[flow][i] = make_float2(logistic(logits[i]), logistic(logits[width + i]));
      }
    }
    bool shifted = false;
    for (int i = opaque(int(threadIdx.x)); i < kWidth / 2; i += threads) {
      const float* shift = f.key_shift + int64_t{split.head} * width + i;
      shifts[i] = 2 * i < width ? make_float2(shift[0], shift[width / 2]) : make_float2(0.f, 0.f);
      shifted |= shifts[i].x > 0.f || shifts[i].y > 0.f;
    }
    return shifted;
  }
};

}  // namespace polaformer
