// Polarity attention, forward. Per head, with R the rotary embedding of a token (formulas: polaformer/reference.py):
//
//   S = Σ_keys R(φ(k))ᵀ v / N             m = Σ_keys φ(k) / N             (2D, D), (2D)
//   out = R(φ(q)) S / (φ(q)·m + ε)        for both flows, each with its half of the columns of S
//
// q, k, v: (B, H, N, D) of any strides in bf16, fp16 or float32; out in the same dtype. Sums are float32. On the tf32
// paths so is everything but the operands of products; on the bf16 path features are rounded to bf16 once (bf16.cuh).
//
// Call graph; kernels launch in this order. "bf16" is forward_bf16.cu, for aligned bf16; "tf32" is forward_tf32.cu.
//
// run_forward
// ├─ fill_rotary_tables   rotary.cu      cosines and sines of every row and column; on the bf16 path also offsets
// ├─ sum_keys             bf16 or tf32   S and m of each split, unshifted; its largest |k|
// ├─ combine_key_splits   this file      adds up the splits; recomputes shifted the heads where |k| is too large
// ├─ attend               bf16 or tf32   outputs, unshifted; marks splits that need a shift
// └─ attend_shifted       tf32           recomputes the marked splits; exits at once if there are none
#include "combine.cuh"
#include "features_tf32.cuh"
#include "kernels.cuh"

namespace polaformer {
namespace {

// Of a block that sums shifted keys: pairs of features, tokens in one step; features of S that a thread sums, from
// begin_row on.
constexpr int kCombinePairs = 8, kCombineTokens = kCombineThreads / kCombinePairs;
constexpr int kColumnFeatures = 2 * kCombinePairs * kMaxHeadDim / kCombineThreads;

// Shared memory of a block that sums shifted keys, of pairs first … first + 7 of one head.
struct CombineShared {
  alignas(16) float features[kCombineTokens][2 * kCombinePairs];  // rotated
  float sums[kCombineTokens][2 * kCombinePairs];
  float shifts[kCombinePairs];
};

// Exponents of a pair of features at one token.
template <bool kFloat>
__device__ __forceinline__ Pair<float> key_exponents(const Rows<kFloat>& keys, int token, int pair) {
  const int half = keys.head_dim / 2;
  const float sign = pair < half ? 1.f : -1.f;
  const int column = 2 * (pair < half ? pair : pair - half);
  return {max_or_nan(sign * keys.load(token, column), 0.f), max_or_nan(sign * keys.load(token, column + 1), 0.f)};
}

// Shifts of this block's pairs, from each pair's largest exponent over all tokens.
template <bool kFloat>
__device__ __forceinline__ void find_key_shifts(CombineShared& shared, const Rows<kFloat>& keys, int first,
                                                const Shape& shape) {
  const int pair = threadIdx.x % kCombinePairs, slot = threadIdx.x / kCombinePairs;
  float largest_exponent = 0.f;
  if (first + pair < shape.head_dim) {
    for (int token = slot; token < shape.tokens(); token += kCombineTokens) {
      largest_exponent = fmaxf(largest_exponent, largest(key_exponents(keys, token, first + pair)));
    }
  }
  shared.sums[slot][pair] = largest_exponent;
  __syncthreads();
  if (threadIdx.x < kCombinePairs) {
    for (int i = 0; i < kCombineTokens; ++i) largest_exponent = fmaxf(largest_exponent, shared.sums[i][threadIdx.x]);
    shared.shifts[threadIdx.x] = required_shift(largest_exponent);
  }
  __syncthreads();
}

// S, m and the shifts of this block's pairs, without tensor cores: two threads share a column of S.
template <bool kFloat>
__device__ __forceinline__ void sum_shifted_keys(CombineShared& shared, const ForwardParams& params, const Split& head,
                                                 int first) {
  const Shape& shape = params.shape;
  const Rows<kFloat> keys = rows_of<kFloat>(params.k, shape, head), values = rows_of<kFloat>(params.v, shape, head);
  find_key_shifts(shared, keys, first, shape);

  const int pair = threadIdx.x % kCombinePairs, slot = threadIdx.x / kCombinePairs;
  const int column = threadIdx.x % kMaxHeadDim, begin_row = threadIdx.x / kMaxHeadDim * kColumnFeatures;
  const bool by_row = 2 * (first + pair) < shape.head_dim, inside = first + pair < shape.head_dim;
  const float shift = shared.shifts[pair];
  const int half = shape.padded_head_dim() / 2;
  Pair<float> mean = {0.f, 0.f};
  float sums[kColumnFeatures] = {};
  for (int begin = 0; begin < shape.tokens(); begin += kCombineTokens) {
    const int token = begin + slot;
    Pair<float> rotated = {0.f, 0.f};
    if (inside && token < shape.tokens()) {
      const Pair<float> exponents = key_exponents(keys, token, first + pair);
      const Pair<float> features = features_of<true>(exponents, {shift, shift});
      mean.first += features.first, mean.second += features.second;
      const int row = token / shape.width;
      const int64_t position = by_row ? row : shape.height + token - row * shape.width;
      const int64_t rotary_pair = by_row ? first + pair : first + pair - shape.head_dim / 2;
      const float2 by = __ldg(reinterpret_cast<const float2*>(params.cos_sin) + position * half + rotary_pair);
      rotated = rotate(features, by.x, by.y);
    }
    __syncthreads();
    shared.features[slot][2 * pair] = rotated.first, shared.features[slot][2 * pair + 1] = rotated.second;
    __syncthreads();
    if (column >= shape.head_dim) continue;
    for (int i = 0; i < min(kCombineTokens, shape.tokens() - begin); ++i) {
      const float value = values.load(begin + i, column);
#pragma unroll
      for (int j = 0; j < kColumnFeatures; ++j) sums[j] += shared.features[i][begin_row + j] * value;
    }
  }

  const float scale = params.plan.inv_tokens;
  const int64_t feature = int64_t{head.head} * shape.features() + 2 * first;
  if (column < shape.head_dim) {
#pragma unroll
    for (int j = 0; j < kColumnFeatures; ++j) {
      const int row = begin_row + j;
      if (2 * first + row < shape.features()) params.state[(feature + row) * shape.head_dim + column] = sums[j] * scale;
    }
  }
  shared.sums[slot][2 * pair] = mean.first, shared.sums[slot][2 * pair + 1] = mean.second;
  __syncthreads();
  if (threadIdx.x < 2 * kCombinePairs && 2 * first + threadIdx.x < shape.features()) {
    float sum = 0.f;
    for (int i = 0; i < kCombineTokens; ++i) sum += shared.sums[i][threadIdx.x];
    params.key_mean[feature + threadIdx.x] = sum * scale;
  }
  if (slot == 0 && inside) params.key_shift[int64_t{head.head} * shape.head_dim + first + pair] = shift;
}

struct CombineParams {
  ForwardParams forward;
  HeadSums sums;
  int blocks_per_head;
};

// Adds up the splits of a head, or, where a key needs a shift, sums the keys again.
template <bool kFloat>
__global__ void __launch_bounds__(kCombineThreads, 5) combine_key_splits(const CombineParams params) {
  const Shape& shape = params.forward.shape;
  const unsigned head = blockIdx.x / params.blocks_per_head;
  const int block = static_cast<int>(blockIdx.x - head * params.blocks_per_head);
  const int splits = params.forward.plan.keys.splits_per_head;
  bool needs_shift = false;
#pragma unroll 1
  for (int split = threadIdx.x; split < splits; split += kCombineThreads) {
    needs_shift |= params.forward.split_max_abs[int64_t{head} * splits + split] > kMaxUnshiftedExponent;
  }
  if (!__syncthreads_or(needs_shift)) {
    params.sums.compute(head, block);
    if (block == 0 && static_cast<int>(threadIdx.x) < shape.head_dim) {
      params.forward.key_shift[int64_t{head} * shape.head_dim + threadIdx.x] = 0.f;
    }
  } else if (const int first = block * kCombinePairs; first < shape.head_dim) {
    sum_shifted_keys<kFloat>(shared_memory<CombineShared>(), params.forward,
                             locate_split(head, {1, shape.tokens(), 0}, shape), first);
  }
}

const char* launch_combine_key_splits(const ForwardParams& params, void* stream) {
  static_assert(kCombineThreads >= kMaxHeadDim && sizeof(CombineShared) >= sizeof(float4[kCombineThreads]));
  const Shape& shape = params.shape;
  const int splits = params.plan.keys.splits_per_head;
  const int mean_size = splits > 1 ? static_cast<int>(shape.features()) : 0, state_size = mean_size * shape.head_dim;
  const HeadSums sums = {.threads = SumThreads(splits),
                         .mean = {params.split_mean, params.key_mean, splits, mean_size},
                         .state = {params.split_state, params.state, splits, state_size}};
  const int blocks_per_head = std::max((shape.head_dim + kCombinePairs - 1) / kCombinePairs, sums.blocks());
  return launch(shape.dtype == Dtype::kFloat ? combine_key_splits<true> : combine_key_splits<false>,
                {shape.batch_heads() * blocks_per_head, kCombineThreads, sizeof(CombineShared)}, stream,
                CombineParams{params, sums, blocks_per_head});
}

}  // namespace

const char* run_forward(const ForwardParams& params, void* stream) {
  const bool is_bf16 = params.plan.path == Path::kBfloat16;
  const char* error = make_rotary_tables(params, stream);
  if (!error) error = is_bf16 ? bf16::launch_sum_keys(params, stream) : tf32::launch_sum_keys(params, stream);
  if (!error) error = launch_combine_key_splits(params, stream);
  if (!error) error = is_bf16 ? bf16::launch_attend(params, stream) : tf32::launch_attend(params, stream);
  if (!error) error = tf32::launch_attend_shifted(params, stream);
  return error;
}

}  // namespace polaformer
