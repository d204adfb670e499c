// Features of queries and keys in float32: exponents, exact shift, rotation; polaformer/reference.py has the formulas.
//
// An input x has two parts, x⁺ and x⁻, one of which is zero, so one exponential gives both features. The first D
// features rotate by the token's row, the others by its column. For keys and in the same-sign flow the first are of x⁺,
// in the opposite-sign flow of x⁻: that flow is the same-sign flow of −x with other temperatures.
#pragma once

#include "tf32.cuh"

namespace polaformer {

__device__ __forceinline__ float required_shift(float exponent) { return fmaxf(exponent - kMaxUnshiftedExponent, 0.f); }

// e^(x − shift) − e^(−shift), without cancellation for small x and without overflow for large x.
__device__ __forceinline__ float shifted_feature(float exponent, float shift) {
  float feature = expm1_of_exponent(min_or_nan(exponent, kMaxUnshiftedExponent)) * expf(-shift);
  if (exponent > kMaxUnshiftedExponent) feature += expf(exponent - shift) - expf(kMaxUnshiftedExponent - shift);
  return feature;
}

// y · sign(x)
__device__ __forceinline__ float with_sign(float y, float x) { return x > 0.f ? y : x < 0.f ? -y : 0.f; }

// Both parts of a rotary pair; for each element, only the part that its sign selects is not zero.
struct PolarPair {
  Pair<float> first, second;
};

__device__ __forceinline__ PolarPair split_polarity(Pair<float> feature, Pair<float> x) {
  return {{x.first > 0.f ? feature.first : 0.f, x.second > 0.f ? feature.second : 0.f},
          {x.first > 0.f ? 0.f : feature.first, x.second > 0.f ? 0.f : feature.second}};
}

// A token's rotations of one pair: the first part rotates by the token's row, the second by its column.
struct AxialRotation {
  float2 row, column;  // cosine, sine
  __device__ __forceinline__ PolarPair forward(const PolarPair& x) const {
    return {rotate(x.first, row.x, row.y), rotate(x.second, column.x, column.y)};
  }
  __device__ __forceinline__ PolarPair back(const PolarPair& x) const {
    return {rotate(x.first, row.x, -row.y), rotate(x.second, column.x, -column.y)};
  }
};

__device__ __forceinline__ AxialRotation load_rotation(const float* table, int2 offsets, int pair) {
  const auto* cos_sin = reinterpret_cast<const float2*>(table);
  return {__ldg(cos_sin + offsets.x + pair), __ldg(cos_sin + offsets.y + pair)};
}

// Loads the rotations of two neighbouring pairs, the first of them even.
__device__ __forceinline__ void load_rotation(AxialRotation (&both)[2], const float* table, int2 offsets, int pair) {
  const auto* cos_sin = reinterpret_cast<const float2*>(table);
  const float4 row = __ldg(reinterpret_cast<const float4*>(cos_sin + offsets.x + pair));
  const float4 column = __ldg(reinterpret_cast<const float4*>(cos_sin + offsets.y + pair));
  both[0] = {{row.x, row.y}, {column.x, column.y}};
  both[1] = {{row.z, row.w}, {column.z, column.w}};
}

__device__ __forceinline__ Pair<float> absolute(Pair<float> x) { return {fabsf(x.first), fabsf(x.second)}; }
__device__ __forceinline__ Pair<float> negative(Pair<float> x) { return {-x.first, -x.second}; }
__device__ __forceinline__ float largest(Pair<float> x) { return fmaxf(x.first, x.second); }

// The part of each element that x's sign selects.
__device__ __forceinline__ Pair<float> select(const PolarPair& parts, Pair<float> x) {
  return {x.first > 0.f ? parts.first.first : parts.second.first,
          x.second > 0.f ? parts.first.second : parts.second.second};
}
// Loads two neighbouring (first part, second part) entries.
__device__ __forceinline__ PolarPair load_polar_pair(const float2* pair) {
  const float4 both = *reinterpret_cast<const float4*>(pair);
  return {{both.x, both.z}, {both.y, both.w}};
}
__device__ __forceinline__ Pair<float> scale(Pair<float> x, Pair<float> by) {
  return {x.first * by.first, x.second * by.second};
}
__device__ __forceinline__ Pair<float> scale(Pair<float> x, float by) { return {x.first * by, x.second * by}; }
__device__ __forceinline__ float dot(const PolarPair& a, const PolarPair& b) {
  return a.first.first * b.first.first + a.first.second * b.first.second + a.second.first * b.second.first +
         a.second.second * b.second.second;
}
// Adds a·b to the parts that x selects.
__device__ __forceinline__ void accumulate(PolarPair& sum, Pair<float> a, Pair<float> b, Pair<float> x) {
  (x.first > 0.f ? sum.first.first : sum.second.first) += a.first * b.first;
  (x.second > 0.f ? sum.first.second : sum.second.second) += a.second * b.second;
}

// Features of exponents, each with its own shift.
template <bool kShifted>
__device__ __forceinline__ Pair<float> features_of(Pair<float> exponents, Pair<float> shift) {
  if constexpr (kShifted) {
    return {shifted_feature(exponents.first, shift.first), shifted_feature(exponents.second, shift.second)};
  } else {
    return {expm1_of_exponent(exponents.first), expm1_of_exponent(exponents.second)};
  }
}

// Derivatives of features by their exponents.
template <bool kShifted>
__device__ __forceinline__ Pair<float> slopes_of(Pair<float> features, Pair<float> exponents, Pair<float> shift) {
  if constexpr (kShifted) {
    return {expf(exponents.first - shift.first), expf(exponents.second - shift.second)};
  } else {
    return {features.first + 1.f, features.second + 1.f};
  }
}

// The shifted exponent of a pair of queries, given the shifts of its keys: the larger of the nonzero parts'.
__device__ __forceinline__ float max_shifted_exponent(Pair<float> exponents, Pair<float> x, float2 key_shift) {
  const PolarPair parts = split_polarity(exponents, x);
  const float first = largest(parts.first), second = largest(parts.second);
  return fmaxf(first > 0.f ? first + key_shift.x : 0.f, second > 0.f ? second + key_shift.y : 0.f);
}

// The shift of each feature of a pair of queries.
__device__ __forceinline__ Pair<float> query_shift(float token_shift, float2 key_shift, Pair<float> x) {
  const float first = fmaxf(token_shift - key_shift.x, -kMaxUnshiftedExponent);
  const float second = fmaxf(token_shift - key_shift.y, -kMaxUnshiftedExponent);
  return {x.first > 0.f ? first : second, x.second > 0.f ? first : second};
}

__device__ __forceinline__ float shifted_epsilon(float token_shift) {
  return fmaxf(float(kEpsilon) * expf(-token_shift), kMinNormalizer);
}

// Tables in shared memory for one head's queries: temperatures for features, m for normalizers, key shifts.
template <int kHeadDim>
struct alignas(16) QueryTables {
  float2 temperatures[2][kHeadDim];  // by flow: first, second part
  float2 means[kHeadDim];
  float2 shifts[kHeadDim / 2];  // per pair

  // Fills all tables. Returns whether this thread's share of the key shifts has any.
  template <class Params>
  __device__ __forceinline__ bool load(const Params& params, const Split& split, int threads) {
    const int head_dim = params.shape.head_dim, features = 2 * head_dim;
    const float* mean = params.key_mean + int64_t{split.head} * features;
    for (int i = opaque(int(threadIdx.x)); i < kHeadDim; i += threads) {
      means[i] = i < head_dim ? make_float2(mean[i], mean[head_dim + i]) : make_float2(0.f, 0.f);
      for (int flow = 0; flow < 2; ++flow) {
        const float* logits =
            (flow ? params.opposite_logits : params.same_logits) + int64_t{split.head_in_batch} * features;
        temperatures[flow][i] = make_float2(0.f, 0.f);
        if (i >= head_dim) continue;
        temperatures[flow][i] = make_float2(logistic(logits[i]), logistic(logits[head_dim + i]));
      }
    }
    bool shifted = false;
    for (int i = opaque(int(threadIdx.x)); i < kHeadDim / 2; i += threads) {
      const float* shift = params.key_shift + int64_t{split.head} * head_dim + i;
      shifts[i] = 2 * i < head_dim ? make_float2(shift[0], shift[head_dim / 2]) : make_float2(0.f, 0.f);
      shifted |= shifts[i].x > 0.f || shifts[i].y > 0.f;
    }
    return shifted;
  }
};

}  // namespace polaformer
