// Backward kernels in tf32, for float32 and for 16-bit inputs outside the bf16 path, and all of backward with a shift;
// backward.cu has the equations and the call graph.
#include "features_tf32.cuh"
#include "kernels.cuh"

namespace polaformer::tf32 {
namespace {

template <class Operand, int kHeadDim>
struct QueryGradShared {
  static constexpr int kStages = 4;
  static constexpr int kStride = kHeadDim + Operand::kPadding;
  static constexpr int kGroups = kHeadDim / 16;  // groups of 16 columns, per flow
  // Columns of dS per flow that a block sums, limited by registers. If they are not all, further blocks recompute
  // everything else for the remaining columns.
  static constexpr int kColumns = kHeadDim < 128 ? 32 : 16;
  static constexpr int kColumnBlocks = (kHeadDim / 2 + kColumns - 1) / kColumns;
  struct alignas(16) Stage {
    float queries[kQueryGradTokens * kStride], grads[kQueryGradTokens * kStride];
    int2 rotary_offsets[kQueryGradTokens];
  } stages[kStages];
  float sums[2 * kGroups][kQueryGradTokens];                             // per warp: partial normalizers
  float dots[2 * kGroups][kQueryGradTokens];                             // per warp: partial gradients of normalizers
  alignas(16) float grad_queries[2][kQueryGradTokens * (kHeadDim + 8)];  // dq by flow, before the flows are added
  QueryTables<kHeadDim> head;
};

// One block per split and column block; one warp per flow and 16 columns of q. Its rotated features, transposed, are A
// fragments that stay in registers: rows are features (row g is column 2g, row g + 8 column 2g + 1), columns are 16
// tokens. S u has the same layout, so each thread holds both for tokens {2t, 2t + 1, 2t + 8, 2t + 9} and one pair of
// columns. These four tokens are its slots.
template <class Operand, int kHeadDim, bool kShifted>
struct QueryGrads {
  using Shared = QueryGradShared<Operand, kHeadDim>;
  using FragmentA = typename Operand::FragmentA;
  using FragmentB = typename Operand::FragmentB;
  static constexpr int kGroups = Shared::kGroups;

  Shared& shared;
  const BackwardParams& params;
  int flow, group;   // this warp's
  int column_block;  // this block's
  unsigned head;     // among all B·H

  static constexpr int kColumns = Shared::kColumns;
  Accumulator first[kColumns / 8] = {}, second[kColumns / 8] = {};  // dS: rows of each part × eight columns
  PolarPair logit_sum = {}, mean_sum = {};
  float max_abs = 0.f;

  static __device__ __forceinline__ int token_of(int slot) { return 2 * thread_in_group() + slot % 2 + slot / 2 * 8; }
  __device__ __forceinline__ int pair() const { return group * 8 + group_id(); }

  // Tables of the head for this thread's pair, reloaded from shared memory at each use: registers are exhausted.
  __device__ __forceinline__ PolarPair temperatures() const {
    return load_polar_pair(&shared.head.temperatures[flow][2 * pair()]);
  }
  __device__ __forceinline__ PolarPair means() const { return load_polar_pair(&shared.head.means[2 * pair()]); }
  __device__ __forceinline__ float2 key_shift() const { return kShifted ? shared.head.shifts[pair()] : float2{}; }

  // Loads this warp's rows of one part of S × 16 of its flow's columns.
  __device__ __forceinline__ FragmentA load_state_rows(int part, int step) const {
    FragmentA frag_a;
    const int head_dim = opaque(params.shape.head_dim);
    const float* state = params.state + int64_t{head} * (2 * head_dim * head_dim);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int lower = i / 4, upper = i / 2 % 2, odd = i % 2;
      const int row = 2 * pair() + lower, column = 16 * step + 8 * upper + 2 * thread_in_group() + odd;
      const bool inside = row < head_dim && column < head_dim / 2;
      const float* address = state + (part * head_dim + row) * head_dim + flow * (head_dim / 2) + column;
      frag_a.set_one(lower, upper, odd, inside ? __ldg(address) : 0.f);
    }
    return frag_a;
  }

  // Loads a slot's pair of columns, negated in the opposite flow.
  __device__ __forceinline__ Pair<float> load_pair(const float* queries, int slot) const {
    const auto both = *reinterpret_cast<const float2*>(queries + token_of(slot) * Shared::kStride + 2 * pair());
    const Pair<float> x = {both.x, both.y};
    return flow ? negative(x) : x;
  }

  // Reduces each slot's values over the warp and writes the results to its row, one per token.
  template <class Combine>
  __device__ __forceinline__ void write_row(float (&rows)[2 * kGroups][kQueryGradTokens], const float (&values)[4],
                                            Combine combine) const {
    const bool upper = threadIdx.x & 16, odd = threadIdx.x & 8;
    const float a =
        combine(upper ? values[2] : values[0], __shfl_xor_sync(kFullWarpMask, upper ? values[0] : values[2], 16));
    const float b =
        combine(upper ? values[3] : values[1], __shfl_xor_sync(kFullWarpMask, upper ? values[1] : values[3], 16));
    const float c = combine(odd ? b : a, __shfl_xor_sync(kFullWarpMask, odd ? a : b, 8));
    const float d = combine(c, __shfl_xor_sync(kFullWarpMask, c, 4));
    if ((threadIdx.x & 4) == 0) rows[flow * kGroups + group][2 * thread_in_group() + odd + 8 * upper] = d;
  }

  // Reduces the rows of this flow's warps: lane i has token i % 16.
  template <class Combine>
  __device__ __forceinline__ float read_rows(const float (&rows)[2 * kGroups][kQueryGradTokens],
                                             Combine combine) const {
    const int begin = flow * kGroups + threadIdx.x / 16 % 2 * (kGroups / 2), token = threadIdx.x % 16;
    float result = rows[begin][token];
#pragma unroll
    for (int i = 1; i < kGroups / 2; ++i) result = combine(result, rows[begin + i][token]);
    return combine(result, __shfl_xor_sync(kFullWarpMask, result, 16));
  }

  // Address of a slot's dq; until that is known it holds R⁻¹(S u), for which there are no registers.
  __device__ __forceinline__ float2* grad_pointer(int slot) const {
    return reinterpret_cast<float2*>(shared.grad_queries[flow] + token_of(slot) * (kHeadDim + 8) + 2 * pair());
  }

  __device__ __forceinline__ void add_tile(const typename Shared::Stage& stage) {
    const auto plus = [](float a, float b) { return a + b; };
    const auto maximum = [](float a, float b) { return fmaxf(a, b); };
    const auto of_slot = [](float of_lane, int slot) { return __shfl_sync(kFullWarpMask, of_lane, token_of(slot)); };

    float token_shift = 0.f;
    if constexpr (kShifted) {
      float wanted[4];
#pragma unroll
      for (int slot = 0; slot < 4; ++slot) {
        const Pair<float> x = load_pair(stage.queries, slot);
        wanted[slot] = max_shifted_exponent(scale(absolute(x), select(temperatures(), x)), x, key_shift());
      }
      write_row(shared.dots, wanted, maximum);
      __syncthreads();
      token_shift = required_shift(read_rows(shared.dots, maximum));
    }

    // Features and normalizers.
    Pair<float> features[4];
    float values[4];
#pragma unroll
    for (int slot = 0; slot < 4; ++slot) {
      const Pair<float> x = load_pair(stage.queries, slot);
      if constexpr (!kShifted) max_abs = fmaxf(max_abs, largest(absolute(x)));
      Pair<float> shift = {};
      if constexpr (kShifted) shift = query_shift(of_slot(token_shift, slot), key_shift(), x);
      const Pair<float> exponents = scale(absolute(x), select(temperatures(), x));
      features[slot] = features_of<kShifted>(exponents, shift);
      const Pair<float> mean = select(means(), x);
      values[slot] = features[slot].first * mean.first + features[slot].second * mean.second;
    }
    write_row(shared.sums, values, plus);
    __syncthreads();
    const float epsilon = kShifted ? shifted_epsilon(token_shift) : float(kEpsilon);
    const float normalizer = read_rows(shared.sums, plus) + epsilon;
    const float inverse = reciprocal(max_or_nan(normalizer, float(kMinGradientNormalizer)));

    // dS += R(φ) / z · dout; S · dout.
    Accumulator grad_first[2] = {}, grad_second[2] = {};  // gradients of rotated features: tokens 0 … 7 and 8 … 15
    const auto* grads = stage.grads + flow * (kHeadDim / 2);
#pragma unroll 1  // unrolling exceeds the registers
    for (int step = 0; step < kHeadDim / 32; ++step) {
      FragmentB frag_b[2];
      Operand::load_transposed(frag_b, grads + 16 * step, Shared::kStride);
      Operand::multiply(grad_first[0], grad_first[1], load_state_rows(0, step), frag_b);
      Operand::multiply(grad_second[0], grad_second[1], load_state_rows(1, step), frag_b);
    }
    FragmentA first_part, second_part;
#pragma unroll
    for (int upper = 0; upper < 2; ++upper) {
      PolarPair rotated[2];  // features / z
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int slot = 2 * upper + i;
        const Pair<float> x = load_pair(stage.queries, slot);
        const AxialRotation rotation = load_rotation(params.cos_sin, stage.rotary_offsets[token_of(slot)], pair());
        const float by = of_slot(inverse, slot);
        const PolarPair grad = {{grad_first[upper][i], grad_first[upper][2 + i]},
                                {grad_second[upper][i], grad_second[upper][2 + i]}};
        rotated[i] = rotation.forward(split_polarity(scale(features[slot], by), x));
        values[slot] = dot(rotated[i], grad);
        const Pair<float> grad_feature = scale(select(rotation.back(grad), x), by);
        *grad_pointer(slot) = make_float2(grad_feature.first, grad_feature.second);
      }
      first_part.set(0, upper, rotated[0].first.first, rotated[1].first.first);
      first_part.set(1, upper, rotated[0].first.second, rotated[1].first.second);
      second_part.set(0, upper, rotated[0].second.first, rotated[1].second.first);
      second_part.set(1, upper, rotated[0].second.second, rotated[1].second.second);
    }
#pragma unroll
    for (int column = 0; column < kColumns; column += 16) {
      if (kHeadDim / 2 % kColumns != 0 && column_block * kColumns + column >= kHeadDim / 2) break;
      FragmentB frag_b[2];
      Operand::load(frag_b, grads + column_block * kColumns + column, Shared::kStride);
      Operand::add_product(first[column / 8], first[column / 8 + 1], first_part, frag_b);
      Operand::add_product(second[column / 8], second[column / 8 + 1], second_part, frag_b);
    }
    write_row(shared.dots, values, plus);
    __syncthreads();
    const float exact = -read_rows(shared.dots, plus) * inverse;
    constexpr float kLargest = float(kMaxNormalizerGradient);
    const float grad_normalizer = min_or_nan(max_or_nan(exact, -kLargest), kLargest);

    // dφ, dq, and the sums that need dz.
#pragma unroll
    for (int slot = 0; slot < 4; ++slot) {
      const Pair<float> x = load_pair(stage.queries, slot), mean = select(means(), x), by = select(temperatures(), x);
      const float grad = of_slot(grad_normalizer, slot);
      Pair<float> shift = {};
      if constexpr (kShifted) shift = query_shift(of_slot(token_shift, slot), key_shift(), x);
      const Pair<float> slope = slopes_of<kShifted>(features[slot], scale(absolute(x), by), shift);
      const Pair<float> rest = {grad_pointer(slot)->x, grad_pointer(slot)->y};
      const Pair<float> exponent = {(rest.first + grad * mean.first) * slope.first,
                                    (rest.second + grad * mean.second) * slope.second};
      accumulate(mean_sum, features[slot], {grad, grad}, x);
      accumulate(logit_sum, exponent, absolute(x), x);
      const Pair<float> sign = {with_sign(1.f, x.first), with_sign(1.f, x.second)};
      const Pair<float> grad_query = scale(scale(exponent, by), flow ? negative(sign) : sign);
      *grad_pointer(slot) = make_float2(grad_query.first, grad_query.second);
    }
  }

  // Writes this warp's share of the split's sums.
  __device__ __forceinline__ void store_sums(unsigned split) const {
    const int head_dim = params.shape.head_dim, row = 2 * pair();
    const float scale = params.plan.inv_tokens;
    const PolarPair mean = quad_sum_pair(mean_sum), logit = quad_sum_pair(logit_sum);
    if (row >= head_dim) return;
    if (thread_in_group() == 0 && column_block == 0) {
      const int64_t index = (int64_t{split} * 2 + flow) * params.shape.features() + row;
      store_polar_pair(params.split_grad_mean + index, mean, scale);
      store_polar_pair(params.split_grad_logits + index, logit, 1.f);
    }
    float* state = (params.plan.query_grads.splits_per_head == 1 ? params.grad_state : params.split_grad_state) +
                   int64_t{split} * params.shape.state_size() + row * head_dim + flow * (head_dim / 2);
#pragma unroll
    for (int i = 0; i < kColumns / 8; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int column = column_block * kColumns + 8 * i + 2 * thread_in_group() + j % 2;
        if (column >= head_dim / 2) continue;
        state[j / 2 * head_dim + column] = first[i][j] * scale;
        state[(head_dim + j / 2) * head_dim + column] = second[i][j] * scale;
      }
    }
  }

  static __device__ __forceinline__ PolarPair quad_sum_pair(const PolarPair& x) {
    return {{quad_sum(x.first.first), quad_sum(x.first.second)}, {quad_sum(x.second.first), quad_sum(x.second.second)}};
  }

  __device__ __forceinline__ void store_polar_pair(float* out, const PolarPair& x, float scale) const {
    const int head_dim = params.shape.head_dim;
    out[0] = x.first.first * scale, out[1] = x.first.second * scale;
    out[head_dim] = x.second.first * scale, out[head_dim + 1] = x.second.second * scale;
  }
};

// Adds the flows' dq of a tile and writes it, eight columns per thread.
template <class Operand, int kHeadDim>
__device__ __forceinline__ void store_tile(const QueryGradShared<Operand, kHeadDim>& shared,
                                           const BackwardParams& params, int64_t row, int begin, int end) {
  const int token = threadIdx.x / (kHeadDim / 8), column = threadIdx.x % (kHeadDim / 8) * 8;
  if (token >= kQueryGradTokens || begin + token >= end) return;
  float values[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int index = token * (kHeadDim + 8) + column + i;
    values[i] = shared.grad_queries[0][index] + shared.grad_queries[1][index];
  }
  const int head_dim = params.shape.head_dim;
  const int64_t index = row + int64_t{begin + token} * (params.shape.heads * head_dim) + column;
  store_elements<Operand>(params.grad_q, index, values, head_dim - column, params.shape.dtype);
}

// Writes a split's dq and sums. Returns whether they must be recomputed with a shift; false if kShifted.
template <class Operand, int kHeadDim, bool kShifted>
__device__ __forceinline__ bool differentiate_split(QueryGradShared<Operand, kHeadDim>& shared,
                                                    const BackwardParams& params, unsigned index) {
  using Shared = QueryGradShared<Operand, kHeadDim>;
  constexpr int kThreads = 4 * kHeadDim;
  const int column_block = index % Shared::kColumnBlocks;
  const Split split = locate_split(index / Shared::kColumnBlocks, params.plan.query_grads, params.shape);
  const int64_t row_offset = first_row(split, params.shape);
  const auto row = [&] {  // recomputed if kShifted, which leaves no register for it
    if constexpr (!kShifted) return row_offset;
    const unsigned again = opaque(static_cast<int>(index)) / Shared::kColumnBlocks;
    return first_row(locate_split(again, params.plan.query_grads, params.shape), params.shape);
  };

  // Half of the threads copy q, the others dout.
  const int copies_grads = threadIdx.x / (kThreads / 2);
  const auto rows = rows_of<Operand::kFloatInputs>(copies_grads ? params.grad_out : params.q, params.shape, split);
  const auto stage_of = [&](int begin) -> auto& { return shared.stages[begin / kQueryGradTokens % Shared::kStages]; };
  const auto start_copy = [&](int begin) {
    if (begin < split.end) {
      auto& stage = stage_of(begin);
      auto* tile = copies_grads ? stage.grads : stage.queries;
      copy_tile<Operand, kQueryGradTokens, kHeadDim>(tile, rows, copies_grads, begin, split.end,
                                                     threadIdx.x % (kThreads / 2), kThreads / 2);
      if (threadIdx.x < kQueryGradTokens) {
        stage.rotary_offsets[threadIdx.x] =
            locate_cos_sin<kHeadDim>(min(begin + int(threadIdx.x), split.end - 1), params.shape);
      }
    }
    cp_async_commit_group();
  };

  const int warp = threadIdx.x / 32;
  QueryGrads<Operand, kHeadDim, kShifted> sums{shared,       params,    warp / Shared::kGroups, warp % Shared::kGroups,
                                               column_block, split.head};
  constexpr int kAhead = (Shared::kStages - 1) * kQueryGradTokens;
  for (int ahead = 0; ahead < kAhead; ahead += kQueryGradTokens) start_copy(split.begin + ahead);
  if (shared.head.load(params, split, kThreads)) sums.max_abs = FLT_MAX;
  int begin = split.begin;
  for (; begin < split.end; begin += kQueryGradTokens) {
    cp_async_wait_group<Shared::kStages - 2>();
    __syncthreads();  // this stage has arrived, the previous one is free, and its dq is complete
    start_copy(begin + kAhead);
    if (begin > split.begin && column_block == 0)
      store_tile(shared, params, row(), begin - kQueryGradTokens, split.end);
    sums.add_tile(stage_of(begin));
  }
  __syncthreads();
  if (column_block == 0) store_tile(shared, params, row(), begin - kQueryGradTokens, split.end);
  sums.store_sums(index / Shared::kColumnBlocks);
  return !kShifted && __syncthreads_or(sums.max_abs > kMaxUnshiftedExponent);
}

template <class Operand, int kHeadDim>
__global__ void __launch_bounds__(4 * kHeadDim, kQueryGradBlocksPerSm.at(false, kHeadDim))
    differentiate_queries(const BackwardParams params) {
  using Shared = QueryGradShared<Operand, kHeadDim>;
  const bool needs_shift = differentiate_split<Operand, kHeadDim, false>(shared_memory<Shared>(), params, blockIdx.x);
  constexpr int kColumnBlocks = Shared::kColumnBlocks;
  if (threadIdx.x == 0 && blockIdx.x % kColumnBlocks == 0)
    params.needs_shift[blockIdx.x / kColumnBlocks] = needs_shift ? 1.f : 0.f;
}

template <class Operand, int kHeadDim>
__global__ void __launch_bounds__(4 * kHeadDim, 1) differentiate_queries_shifted(const BackwardParams params) {
  auto& shared = shared_memory<QueryGradShared<Operand, kHeadDim>>();
  constexpr int kColumnBlocks = QueryGradShared<Operand, kHeadDim>::kColumnBlocks;
  for (unsigned index = blockIdx.x; index < params.plan.query_grads.splits * kColumnBlocks; index += gridDim.x) {
    if (params.needs_shift[index / kColumnBlocks] == 0.f) continue;
    __syncthreads();  // no thread reads the last split's memory any more
    differentiate_split<Operand, kHeadDim, true>(shared, params, index);
  }
}

template <class Operand, int kHeadDim>
struct KeyGradShared {
  static constexpr int kStride = kHeadDim + Operand::kPadding;
  alignas(16) float state[2 * kHeadDim * kStride];  // dS
  float2 means[kHeadDim];                           // dm: first, second part
  float2 shifts[kHeadDim / 2];                      // per pair
};

constexpr int kKeyGradThreads = 2 * kKeyGradTokens;

// Fills all of `shared`. Returns whether the head's keys are shifted exactly if kShifted; the caller stops if not.
template <bool kShifted, class Operand, int kHeadDim>
__device__ __forceinline__ bool load_head(KeyGradShared<Operand, kHeadDim>& shared, const BackwardParams& params,
                                          const Split& split) {
  const int head_dim = params.shape.head_dim;
  bool shifted = false;
#pragma unroll 1
  for (int i = opaque(int(threadIdx.x)); i < kHeadDim / 2; i += kKeyGradThreads) {
    const float* shift = params.key_shift + int64_t{split.head} * head_dim + i;
    shared.shifts[i] = 2 * i < head_dim ? make_float2(shift[0], shift[head_dim / 2]) : make_float2(0.f, 0.f);
    shifted |= shared.shifts[i].x > 0.f || shared.shifts[i].y > 0.f;
  }
  if (kShifted && !__syncthreads_or(shifted)) return false;  // the usual case: skips the loads below
  const float* mean = params.grad_mean + int64_t{split.head} * params.shape.features();
  for (int i = opaque(int(threadIdx.x)); i < kHeadDim; i += kKeyGradThreads) {
    shared.means[i] = i < head_dim ? make_float2(mean[i], mean[head_dim + i]) : make_float2(0.f, 0.f);
  }
  load_state<Operand, kHeadDim>(shared.state, params.grad_state + int64_t{split.head} * params.shape.state_size(),
                                head_dim, kKeyGradThreads, false, interleave_16, interleave_32);
  if constexpr (!kShifted) return !__syncthreads_or(shifted);
  __syncthreads();
  return true;
}

// A warp's 16 tokens: rows g and g + 8 of its A fragments and accumulators.
template <class Operand, int kHeadDim, bool kShifted>
struct KeyGradTile {
  using Shared = KeyGradShared<Operand, kHeadDim>;
  using FragmentA = typename Operand::FragmentA;
  using FragmentB = typename Operand::FragmentB;
  using Elements8 = typename Operand::template Elements<8>;
  using Elements4 = typename Operand::template Elements<4>;

  const Shared& shared;
  const float* cos_sin;
  const Rows<Operand::kFloatInputs>& values;
  int tokens[2];
  int2 rotary_offsets[2];

  Accumulator grad_values[kHeadDim / 8] = {};

  // Loads A fragments of 32 columns of v.
  __device__ __forceinline__ void load_values(FragmentA (&frag_a)[2], int column) const {
    Elements8 both[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) both[i] = load_elements<Operand, 8>(values, tokens[i], column + 8 * thread_in_group());
    frag_a[0].set(both, 0), frag_a[1].set(both, 1);
  }

  // Computes dS v for 16 columns of k: by part, features {2t, 2t + 1} and {2t + 8, 2t + 9}.
  __device__ __forceinline__ void multiply_values(Accumulator (&first)[2], Accumulator (&second)[2], int column) const {
    const auto* rows = shared.state + column * Shared::kStride;
#pragma unroll 1
    for (int i = 0; i < kHeadDim / 32; ++i) {
      FragmentA frag_a[2];
      load_values(frag_a, 32 * i);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        FragmentB frag_b[2];
        Operand::load_transposed(frag_b, rows + 32 * i + 16 * half, Shared::kStride);
        Operand::multiply(first[0], first[1], frag_a[half], frag_b);
        Operand::load_transposed(frag_b, rows + kHeadDim * Shared::kStride + 32 * i + 16 * half, Shared::kStride);
        Operand::multiply(second[0], second[1], frag_a[half], frag_b);
      }
    }
  }

  // Adds the contribution of 16 columns of k to dv; returns dk of the thread's four columns, for both tokens.
  __device__ __forceinline__ void add(float (&grad_keys)[2][4], const Elements4 (&keys)[2], int column) {
    const int feature = column + 4 * thread_in_group();
    Accumulator first[2] = {}, second[2] = {};
    multiply_values(first, second, column);
    FragmentA frag_a[2];  // by part
#pragma unroll
    for (int row = 0; row < 2; ++row) {
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) {
        const AxialRotation by = load_rotation(cos_sin, rotary_offsets[row], feature / 2 + pair);
        const Pair<float> x = {keys[row][2 * pair], keys[row][2 * pair + 1]};
        const Pair<float> mean = select(load_polar_pair(&shared.means[feature + 2 * pair]), x);
        Pair<float> shift = {};
        if constexpr (kShifted) {
          const float2 both = shared.shifts[feature / 2 + pair];
          shift = select({{both.x, both.x}, {both.y, both.y}}, x);
        }
        const Pair<float> exponents = absolute(x);
        const Pair<float> features = features_of<kShifted>(exponents, shift);
        const PolarPair rotated = by.forward(split_polarity(features, x));
        frag_a[0].set(row, pair, rotated.first.first, rotated.first.second);
        frag_a[1].set(row, pair, rotated.second.first, rotated.second.second);

        const PolarPair grad = {{first[pair][2 * row], first[pair][2 * row + 1]},
                                {second[pair][2 * row], second[pair][2 * row + 1]}};
        const Pair<float> back = select(by.back(grad), x), slope = slopes_of<kShifted>(features, exponents, shift);
        grad_keys[row][2 * pair] = (back.first + mean.first) * with_sign(slope.first, x.first);
        grad_keys[row][2 * pair + 1] = (back.second + mean.second) * with_sign(slope.second, x.second);
      }
    }
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      const auto* rows = shared.state + (part * kHeadDim + column) * Shared::kStride;
#pragma unroll
      for (int i = 0; i < kHeadDim / 16; ++i) {
        FragmentB frag_b[2];
        Operand::load(frag_b, rows + 16 * i, Shared::kStride);
        Operand::multiply(grad_values[2 * i], grad_values[2 * i + 1], frag_a[part], frag_b);
      }
    }
  }
};

// Writes a split's dk and dv.
template <class Operand, int kHeadDim, bool kShifted>
__device__ __forceinline__ void differentiate_split_keys(KeyGradShared<Operand, kHeadDim>& shared,
                                                         const BackwardParams& params, unsigned index) {
  using Elements4 = typename Operand::template Elements<4>;
  const Split split = locate_split(index, params.plan.key_grads, params.shape);
  if (!load_head<kShifted>(shared, params, split)) return;
  const Rows<Operand::kFloatInputs> keys = rows_of<Operand::kFloatInputs>(params.k, params.shape, split);
  const Rows<Operand::kFloatInputs> values = rows_of<Operand::kFloatInputs>(params.v, params.shape, split);
  const int head_dim = params.shape.head_dim;
  const auto row_of = [&](int token) {  // recomputed at each use: registers are exhausted
    return ((int64_t{split.batch} * params.shape.tokens() + token) * params.shape.heads + split.head_in_batch) *
           head_dim;
  };

  for (int begin = split.begin + threadIdx.x / 32 * 16; begin < split.end; begin += kKeyGradTokens) {
    KeyGradTile<Operand, kHeadDim, kShifted> tile{shared, params.cos_sin, values};
#pragma unroll
    for (int lower = 0; lower < 2; ++lower) {
      tile.tokens[lower] = min(begin + group_id() + 8 * lower, split.end - 1);
      tile.rotary_offsets[lower] = locate_cos_sin<kHeadDim>(tile.tokens[lower], params.shape);
    }
    const auto load_keys = [&](Elements4(&rows)[2], int column) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        rows[j] = load_elements<Operand, 4>(keys, tile.tokens[j], column + 4 * thread_in_group());
      }
    };
    Elements4 ahead[2];
    load_keys(ahead, 0);
#pragma unroll 1
    for (int column = 0; column < kHeadDim; column += 16) {
      const int feature = column + 4 * thread_in_group();
      const Elements4 both[2] = {ahead[0], ahead[1]};
      if (column + 16 < kHeadDim) load_keys(ahead, column + 16);
      float grad_keys[2][4];
      tile.add(grad_keys, both, column);
#pragma unroll
      for (int lower = 0; lower < 2; ++lower) {
        const int token = begin + group_id() + 8 * lower;
        if (token >= split.end) continue;
        store_elements<Operand>(params.grad_k, row_of(token) + feature, grad_keys[lower], head_dim - feature,
                                params.shape.dtype);
      }
    }
#pragma unroll
    for (int i = 0; i < kHeadDim / 32; ++i) {
#pragma unroll
      for (int lower = 0; lower < 2; ++lower) {
        const int token = begin + group_id() + 8 * lower, feature = 32 * i + 8 * thread_in_group();
        if (token >= split.end) continue;
        float eight[8];
#pragma unroll
        for (int j = 0; j < 8; ++j) eight[j] = tile.grad_values[4 * i + j / 2][2 * lower + j % 2];
        store_elements<Operand>(params.grad_v, row_of(token) + feature, eight, head_dim - feature, params.shape.dtype);
      }
    }
  }
}

template <class Operand, int kHeadDim>
__global__ void __launch_bounds__(kKeyGradThreads, kKeyGradBlocksPerSm.at(false, kHeadDim))
    differentiate_keys(const BackwardParams params) {
  using Shared = KeyGradShared<Operand, kHeadDim>;
  differentiate_split_keys<Operand, kHeadDim, false>(shared_memory<Shared>(), params, blockIdx.x);
}

template <class Operand, int kHeadDim>
__global__ void __launch_bounds__(kKeyGradThreads, 1) differentiate_keys_shifted(const BackwardParams params) {
  for (unsigned index = blockIdx.x; index < params.plan.key_grads.splits; index += gridDim.x) {
    __syncthreads();  // no thread reads the last split's memory any more
    differentiate_split_keys<Operand, kHeadDim, true>(shared_memory<KeyGradShared<Operand, kHeadDim>>(), params, index);
  }
}

}  // namespace

const char* launch_differentiate_queries(const BackwardParams& params, void* stream) {
  return dispatch_operand(params, [&](auto operand, auto head_dim) {
    using Operand = decltype(operand);
    constexpr int kHeadDim = head_dim();
    using Shared = QueryGradShared<Operand, kHeadDim>;
    return launch_blocks<Shared, kHeadDim, kQueryGradBlocksPerSm.at(false, kHeadDim)>(
        differentiate_queries<Operand, kHeadDim>, params.plan.query_grads.splits * Shared::kColumnBlocks, 4 * kHeadDim,
        stream, params);
  });
}

const char* launch_differentiate_queries_shifted(const BackwardParams& params, void* stream) {
  return dispatch_shifted_operand(params, [&](auto operand, auto head_dim) {
    using Operand = decltype(operand);
    constexpr int kHeadDim = head_dim();
    using Shared = QueryGradShared<Operand, kHeadDim>;
    return launch_shifted<Shared, kHeadDim>(differentiate_queries_shifted<Operand, kHeadDim>,
                                            params.plan.query_grads.splits * Shared::kColumnBlocks, 4 * kHeadDim,
                                            stream, params);
  });
}

const char* launch_differentiate_keys(const BackwardParams& params, void* stream) {
  return dispatch_operand(params, [&](auto operand, auto head_dim) {
    using Operand = decltype(operand);
    constexpr int kHeadDim = head_dim();
    return launch_blocks<KeyGradShared<Operand, kHeadDim>, kHeadDim, kKeyGradBlocksPerSm.at(false, kHeadDim)>(
        differentiate_keys<Operand, kHeadDim>, params.plan.key_grads.splits, kKeyGradThreads, stream, params);
  });
}

const char* launch_differentiate_keys_shifted(const BackwardParams& params, void* stream) {
  return dispatch_shifted_operand(params, [&](auto operand, auto head_dim) {
    using Operand = decltype(operand);
    constexpr int kHeadDim = head_dim();
    return launch_shifted<KeyGradShared<Operand, kHeadDim>, kHeadDim>(
        differentiate_keys_shifted<Operand, kHeadDim>, params.plan.key_grads.splits, kKeyGradThreads, stream, params);
  });
}

}  // namespace polaformer::tf32
