// Backward in tf32 (backward.cu tells the equations and which kernel follows which), for float32, and for 16-bit inputs
// that are not aligned bf16; and everything with a shift.
#include "features_tf32.cuh"
#include "kernels.cuh"

namespace polaformer::tf32 {
namespace {

template <class Operand, int kHeadDim>
struct QueryGradShared {
  static constexpr int kStages = 4;
  static constexpr int kStride = kHeadDim + Operand::kPadding;
  static constexpr int kGroups = kHeadDim / 16;  // of columns, per flow
  // A block sums so many of dS's columns of either flow, as far as registers go; where that is not all, other blocks
  // compute everything again for the others.
  static constexpr int kColumns = kHeadDim < 128 ? 32 : 16;
  static constexpr int kColumnBlocks = (kHeadDim / 2 + kColumns - 1) / kColumns;
  struct alignas(16) Stage {
    float queries[kQueryGradTokens * kStride], grads[kQueryGradTokens * kStride];
    int2 places[kQueryGradTokens];
  } stages[kStages];
  float sums[2 * kGroups][kQueryGradTokens];                    // each warp's part of normalizers, …
  float dots[2 * kGroups][kQueryGradTokens];                    // … and of their gradients
  alignas(16) float grad_queries[2][kQueryGradTokens * (kHeadDim + 8)];  // of dq, by flow, per unit of exponents
  QueryTables<kHeadDim> head;
};

// One block per split. One warp per flow and 16 columns of q: its features, rotated and transposed, are A fragments
// that never leave its registers: rows are features (row g is column 2g, row g + 8 column 2g + 1), columns 16 tokens.
// S u has the same layout, so that every thread has both for tokens {2t, 2t + 1, 2t + 8, 2t + 9} and a pair of columns.
template <class Operand, int kHeadDim, bool kShifted>
struct QueryGrads {
  using Shared = QueryGradShared<Operand, kHeadDim>;
  using FragmentA = typename Operand::FragmentA;
  using FragmentB = typename Operand::FragmentB;
  static constexpr int kGroups = Shared::kGroups;

  Shared& shared;
  const Backward& f;
  int flow, group;  // this warp's
  int column_block;         // this block's
  unsigned head;    // of all B·H

  static constexpr int kColumns = Shared::kColumns;
  Accumulator first[kColumns / 8] = {}, second[kColumns / 8] = {};  // of dS: rows of either part, eight columns each
  PolarPair logit_sum = {}, mean_sum = {};
  float max_abs = 0.f;

  static __device__ __forceinline__ int token_of(int slot) { return 2 * thread_in_group() + slot % 2 + slot / 2 * 8; }
  __device__ __forceinline__ int pair() const { return group * 8 + group_id(); }

  // The head's numbers for this thread's pair, from shared memory wherever they are needed: registers are all in use.
  __device__ __forceinline__ PolarPair temperatures() const {
    return load_polar_pair(&shared.head.temperatures[flow][2 * pair()]);
  }
  __device__ __forceinline__ PolarPair means() const { return load_polar_pair(&shared.head.means[2 * pair()]); }
  __device__ __forceinline__ float2 key_shift() const { return kShifted ? shared.head.shifts[pair()] : float2{}; }

  // This warp's rows of S of one part, 16 of its flow's columns.
  __device__ __forceinline__ FragmentA load_state_rows(int part, int step) const {
    FragmentA frag_a;
    const int width = opaque(f.shape.head_dim);
    const float* state = f.state + int64_t{head} * (2 * width * width);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int lower = i / 4, upper = i / 2 % 2, odd = i % 2;
      const int row = 2 * pair() + lower, column = 16 * step + 8 * upper + 2 * thread_in_group() + odd;
      const bool inside = row < width && column < width / 2;
      const float* place = state + (part * width + row) * width + flow * (width / 2) + column;
      frag_a.set_one(lower, upper, odd, inside ? __ldg(place) : 0.f);
    }
    return frag_a;
  }

  // The numbers of a token's pair of columns, negated in the opposite flow.
  __device__ __forceinline__ Pair<float> load_pair(const float* queries, int slot) const {
    const auto both = *reinterpret_cast<const float2*>(queries + token_of(slot) * Shared::kStride + 2 * pair());
    const Pair<float> x = {both.x, both.y};
    return flow ? negative(x) : x;
  }

  // Combines each slot's values over the warp and writes them to its row, one for each token.
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

  // Combines the rows of this flow's warps: lane i has token i % 16.
  template <class Combine>
  __device__ __forceinline__ float read_rows(const float (&rows)[2 * kGroups][kQueryGradTokens],
                                             Combine combine) const {
    const int begin = flow * kGroups + threadIdx.x / 16 % 2 * (kGroups / 2), token = threadIdx.x % 16;
    float result = rows[begin][token];
#pragma unroll
    for (int i = 1; i < kGroups / 2; ++i) result = combine(result, rows[begin + i][token]);
    return combine(result, __shfl_xor_sync(kFullWarpMask, result, 16));
  }

  // Where a slot's part of dq goes; before, a part of dφ waits there, as there are no registers for it.
  __device__ __forceinline__ float2* grad_pointer(int slot) const {
    return reinterpret_cast<float2*>(shared.grad_queries[flow] + token_of(slot) * (kHeadDim + 8) + 2 * pair());
  }

  __device__ __forceinline__ void add_tile(const typename Shared::Stage& stage) {
    const auto plus = [](float a, float b) { return a + b; };
    const auto most = [](float a, float b) { return fmaxf(a, b); };
    const auto of_slot = [](float of_lane, int slot) { return __shfl_sync(kFullWarpMask, of_lane, token_of(slot)); };

    float token_shift = 0.f;
    if constexpr (kShifted) {
      float wanted[4];
#pragma unroll
      for (int slot = 0; slot < 4; ++slot) {
        const Pair<float> x = load_pair(stage.queries, slot);
        wanted[slot] = max_shifted_exponent(scale(absolute(x), select(temperatures(), x)), x, key_shift());
      }
      write_row(shared.dots, wanted, most);
      __syncthreads();
      token_shift = required_shift(read_rows(shared.dots, most));
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
    Accumulator grad_first[2] = {}, grad_second[2] = {};  // of rotated features of tokens 0 … 7, 8 … 15
    const auto* grads = stage.grads + flow * (kHeadDim / 2);
#pragma unroll 1  // unrolled, it needs more registers than there are
    for (int step = 0; step < kHeadDim / 32; ++step) {
      FragmentB frag_b[2];
      Operand::load_transposed(frag_b, grads + 16 * step, Shared::kStride);
      Operand::multiply(grad_first[0], grad_first[1], load_state_rows(0, step), frag_b);
      Operand::multiply(grad_second[0], grad_second[1], load_state_rows(1, step), frag_b);
    }
    FragmentA first_part, second_part;
#pragma unroll
    for (int upper = 0; upper < 2; ++upper) {
      PolarPair rotated[2];  // over z
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int slot = 2 * upper + i;
        const Pair<float> x = load_pair(stage.queries, slot);
        const AxialRotation rotation = load_rotation(f.cos_sin, stage.places[token_of(slot)], pair());
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

    // dφ, dx, and the sums that need dz.
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

  // Writes this warp's part of the split's sums.
  __device__ __forceinline__ void store_sums(unsigned split) const {
    const int width = f.shape.head_dim, row = 2 * pair();
    const float scale = f.plan.inv_tokens;
    const PolarPair mean = quad_sum_pair(mean_sum), logit = quad_sum_pair(logit_sum);
    if (row >= width) return;
    if (thread_in_group() == 0 && column_block == 0) {
      const int64_t index = (int64_t{split} * 2 + flow) * f.shape.features() + row;
      store_polar_pair(f.split_grad_mean + index, mean, scale);
      store_polar_pair(f.split_grad_logits + index, logit, 1.f);
    }
    float* place = (f.plan.query_grads.splits_per_head == 1 ? f.grad_state : f.split_grad_state) +
                   int64_t{split} * f.shape.state_size() + row * width + flow * (width / 2);
#pragma unroll
    for (int i = 0; i < kColumns / 8; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int column = column_block * kColumns + 8 * i + 2 * thread_in_group() + j % 2;
        if (column >= width / 2) continue;
        place[j / 2 * width + column] = first[i][j] * scale;
        place[(width + j / 2) * width + column] = second[i][j] * scale;
      }
    }
  }

  static __device__ __forceinline__ PolarPair quad_sum_pair(const PolarPair& x) {
    return {{quad_sum(x.first.first), quad_sum(x.first.second)},
            {quad_sum(x.second.first), quad_sum(x.second.second)}};
  }

  __device__ __forceinline__ void store_polar_pair(float* place, const PolarPair& x, float scale) const {
    const int width = f.shape.head_dim;
    place[0] = x.first.first * scale, place[1] = x.first.second * scale;
    place[width] = x.second.first * scale, place[width + 1] = x.second.second * scale;
  }
};

// Adds the flows' parts of a tile's dq and writes it, eight columns a thread.
template <class Operand, int kHeadDim>
__device__ __forceinline__ void store_tile(const QueryGradShared<Operand, kHeadDim>& shared, const Backward& f,
                                           int64_t row, int begin, int end) {
  const int token = threadIdx.x / (kHeadDim / 8), column = threadIdx.x % (kHeadDim / 8) * 8;
  if (token >= kQueryGradTokens || begin + token >= end) return;
  float values[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int place = token * (kHeadDim + 8) + column + i;
    values[i] = shared.grad_queries[0][place] + shared.grad_queries[1][place];
  }
  const int width = f.shape.head_dim;
  const int64_t index = row + int64_t{begin + token} * (f.shape.heads * width) + column;
  store_elements<Operand>(f.grad_q, index, values, width - column, f.shape.dtype);
}

// Writes a split's dq and sums. Returns whether they are to be computed again: not so if kShifted.
template <class Operand, int kHeadDim, bool kShifted>
__device__ __forceinline__ bool differentiate_split(QueryGradShared<Operand, kHeadDim>& shared, const Backward& f,
                                                    unsigned index) {
  using Shared = QueryGradShared<Operand, kHeadDim>;
  constexpr int kThreads = 4 * kHeadDim;
  const int column_block = index % Shared::kColumnBlocks;
  const Split split = locate_split(index / Shared::kColumnBlocks, f.plan.query_grads, f.shape);
  const int64_t kept_row = first_row(split, f.shape);
  const auto row = [&] {  // shifted, located again, as there is no register to keep it in
    if constexpr (!kShifted) return kept_row;
    const unsigned again = opaque(static_cast<int>(index)) / Shared::kColumnBlocks;
    return first_row(locate_split(again, f.plan.query_grads, f.shape), f.shape);
  };

  // Half of the threads copy q, the others dout.
  const int copies_grads = threadIdx.x / (kThreads / 2);
  const auto rows = rows_of<Operand::kFloatInputs>(copies_grads ? f.grad_out : f.q, f.shape, split);
  const auto stage_of = [&](int begin) -> auto& { return shared.stages[begin / kQueryGradTokens % Shared::kStages]; };
  const auto start_copy = [&](int begin) {
    if (begin < split.end) {
      auto& stage = stage_of(begin);
      auto* tile = copies_grads ? stage.grads : stage.queries;
      copy_tile<Operand, kQueryGradTokens, kHeadDim>(tile, rows, copies_grads, begin, split.end,
                                                   threadIdx.x % (kThreads / 2), kThreads / 2);
      if (threadIdx.x < kQueryGradTokens) {
        stage.places[threadIdx.x] = locate_cos_sin<kHeadDim>(min(begin + int(threadIdx.x), split.end - 1), f.shape);
      }
    }
    cp_async_commit_group();
  };

  const int warp = threadIdx.x / 32;
  QueryGrads<Operand, kHeadDim, kShifted> sums{shared, f,         warp / Shared::kGroups, warp % Shared::kGroups,
                                             column_block,   split.head};
  constexpr int kAhead = (Shared::kStages - 1) * kQueryGradTokens;
  for (int ahead = 0; ahead < kAhead; ahead += kQueryGradTokens) start_copy(split.begin + ahead);
  if (shared.head.load(f, split, kThreads)) sums.max_abs = FLT_MAX;
  int begin = split.begin;
  for (; begin < split.end; begin += kQueryGradTokens) {
    cp_async_wait_group<Shared::kStages - 2>();
    __syncthreads();  // this stage has arrived, the last one is done with, its dq is there
    start_copy(begin + kAhead);
    if (begin > split.begin && column_block == 0) store_tile(shared, f, row(), begin - kQueryGradTokens, split.end);
    sums.add_tile(stage_of(begin));
  }
  __syncthreads();
  if (column_block == 0) store_tile(shared, f, row(), begin - kQueryGradTokens, split.end);
  sums.store_sums(index / Shared::kColumnBlocks);
  return !kShifted && __syncthreads_or(sums.max_abs > kMaxUnshiftedExponent);
}

template <class Operand, int kHeadDim>
__global__ void __launch_bounds__(4 * kHeadDim, kQueryGradBlocksPerSm.at(false, kHeadDim))
    differentiate_queries(const Backward f) {
  using Shared = QueryGradShared<Operand, kHeadDim>;
  const bool needs_shift = differentiate_split<Operand, kHeadDim, false>(shared_memory<Shared>(), f, blockIdx.x);
  constexpr int kColumnBlocks = Shared::kColumnBlocks;
  if (threadIdx.x == 0 && blockIdx.x % kColumnBlocks == 0) f.needs_shift[blockIdx.x / kColumnBlocks] = needs_shift ? 1.f : 0.f;
}

template <class Operand, int kHeadDim>
__global__ void __launch_bounds__(4 * kHeadDim, 1) differentiate_queries_shifted(const Backward f) {
  auto& shared = shared_memory<QueryGradShared<Operand, kHeadDim>>();
  constexpr int kColumnBlocks = QueryGradShared<Operand, kHeadDim>::kColumnBlocks;
  for (unsigned index = blockIdx.x; index < f.plan.query_grads.splits * kColumnBlocks; index += gridDim.x) {
    if (f.needs_shift[index / kColumnBlocks] == 0.f) continue;
    __syncthreads();  // nobody reads the last split's memory any more
    differentiate_split<Operand, kHeadDim, true>(shared, f, index);
  }
}

template <class Operand, int kHeadDim>
struct KeyGradShared {
  static constexpr int kStride = kHeadDim + Operand::kPadding;
  alignas(16) float state[2 * kHeadDim * kStride];  // dS
  float2 means[kHeadDim];                           // dm: first, second part
  float2 shifts[kHeadDim / 2];                      // of pairs
};

constexpr int kKeyGradThreads = 2 * kKeyGradTokens;

// Fills everything and returns true, or returns false: whether the head's keys are shifted is to be as said.
template <bool kShifted, class Operand, int kHeadDim>
__device__ __forceinline__ bool load_head(KeyGradShared<Operand, kHeadDim>& shared, const Backward& f,
                                          const Split& split) {
  const int width = f.shape.head_dim;
  bool shifted = false;
#pragma unroll 1
  for (int i = opaque(int(threadIdx.x)); i < kHeadDim / 2; i += kKeyGradThreads) {
    const float* shift = f.key_shift + int64_t{split.head} * width + i;
    shared.shifts[i] = 2 * i < width ? make_float2(shift[0], shift[width / 2]) : make_float2(0.f, 0.f);
    shifted |= shared.shifts[i].x > 0.f || shared.shifts[i].y > 0.f;
  }
  if (kShifted && !__syncthreads_or(shifted)) return false;  // it seldom is: before anything is loaded in vain
  const float* mean = f.grad_mean + int64_t{split.head} * f.shape.features();
  for (int i = opaque(int(threadIdx.x)); i < kHeadDim; i += kKeyGradThreads) {
    shared.means[i] = i < width ? make_float2(mean[i], mean[width + i]) : make_float2(0.f, 0.f);
  }
  load_state<Operand, kHeadDim>(shared.state, f.grad_state + int64_t{split.head} * f.shape.state_size(), width,
                              kKeyGradThreads, false, interleave_16, interleave_32);
  if constexpr (!kShifted) return !__syncthreads_or(shifted);
  __syncthreads();
  return true;
}

// A warp's 16 tokens: rows g and g + 8 of its A fragments and sums.
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
  int2 places[2];

  Accumulator grad_values[kHeadDim / 8] = {};

  // 32 columns of v.
  __device__ __forceinline__ void load_values(FragmentA (&frag_a)[2], int column) const {
    Elements8 both[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) both[i] = load_elements<Operand, 8>(values, tokens[i], column + 8 * thread_in_group());
    frag_a[0].set(both, 0), frag_a[1].set(both, 1);
  }

  // dS v of 16 columns of the keys: of each part, of features {2t, 2t + 1} and {2t + 8, 2t + 9}.
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

  // Adds the part of 16 columns of the keys to dv; returns dk of four of them, the thread's, for either token.
  __device__ __forceinline__ void add(float (&grad_keys)[2][4], const Elements4 (&keys)[2], int column) {
    const int place = column + 4 * thread_in_group();
    Accumulator first[2] = {}, second[2] = {};
    multiply_values(first, second, column);
    FragmentA frag_a[2];  // part
#pragma unroll
    for (int row = 0; row < 2; ++row) {
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) {
        const AxialRotation by = load_rotation(cos_sin, places[row], place / 2 + pair);
        const Pair<float> x = {keys[row][2 * pair], keys[row][2 * pair + 1]};
        const Pair<float> mean = select(load_polar_pair(&shared.means[place + 2 * pair]), x);
        Pair<float> shift = {};
        if constexpr (kShifted) {
          const float2 both = shared.shifts[place / 2 + pair];
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
__device__ __forceinline__ void differentiate_split_keys(KeyGradShared<Operand, kHeadDim>& shared, const Backward& f,
                                                         unsigned index) {
  using Elements4 = typename Operand::template Elements<4>;
  const Split split = locate_split(index, f.plan.key_grads, f.shape);
  if (!load_head<kShifted>(shared, f, split)) return;
  const Rows<Operand::kFloatInputs> keys = rows_of<Operand::kFloatInputs>(f.k, f.shape, split);
  const Rows<Operand::kFloatInputs> values = rows_of<Operand::kFloatInputs>(f.v, f.shape, split);
  const int width = f.shape.head_dim;
  const auto row_of = [&](int token) {  // from its parts each time, as there are no registers to keep more in
    return ((int64_t{split.batch} * f.shape.tokens() + token) * f.shape.heads + split.head_in_batch) * width;
  };

  for (int begin = split.begin + threadIdx.x / 32 * 16; begin < split.end; begin += kKeyGradTokens) {
    KeyGradTile<Operand, kHeadDim, kShifted> tile{shared, f.cos_sin, values};
#pragma unroll
    for (int lower = 0; lower < 2; ++lower) {
      tile.tokens[lower] = min(begin + group_id() + 8 * lower, split.end - 1);
      tile.places[lower] = locate_cos_sin<kHeadDim>(tile.tokens[lower], f.shape);
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
      const int place = column + 4 * thread_in_group();
      const Elements4 both[2] = {ahead[0], ahead[1]};
      if (column + 16 < kHeadDim) load_keys(ahead, column + 16);
      float grad_keys[2][4];
      tile.add(grad_keys, both, column);
#pragma unroll
      for (int lower = 0; lower < 2; ++lower) {
        const int token = begin + group_id() + 8 * lower;
        if (token >= split.end) continue;
        store_elements<Operand>(f.grad_k, row_of(token) + place, grad_keys[lower], width - place, f.shape.dtype);
      }
    }
#pragma unroll
    for (int i = 0; i < kHeadDim / 32; ++i) {
#pragma unroll
      for (int lower = 0; lower < 2; ++lower) {
        const int token = begin + group_id() + 8 * lower, place = 32 * i + 8 * thread_in_group();
        if (token >= split.end) continue;
        float eight[8];
#pragma unroll
        for (int j = 0; j < 8; ++j) eight[j] = tile.grad_values[4 * i + j / 2][2 * lower + j % 2];
        store_elements<Operand>(f.grad_v, row_of(token) + place, eight, width - place, f.shape.dtype);
      }
    }
  }
}

template <class Operand, int kHeadDim>
__global__ void __launch_bounds__(kKeyGradThreads, kKeyGradBlocksPerSm.at(false, kHeadDim))
    differentiate_keys(const Backward f) {
  using Shared = KeyGradShared<Operand, kHeadDim>;
  differentiate_split_keys<Operand, kHeadDim, false>(shared_memory<Shared>(), f, blockIdx.x);
}

template <class Operand, int kHeadDim>
__global__ void __launch_bounds__(kKeyGradThreads, 1) differentiate_keys_shifted(const Backward f) {
  for (unsigned index = blockIdx.x; index < f.plan.key_grads.splits; index += gridDim.x) {
    __syncthreads();  // nobody reads the last split's memory any more
    differentiate_split_keys<Operand, kHeadDim, true>(shared_memory<KeyGradShared<Operand, kHeadDim>>(), f, index);
  }
}

}  // namespace

const char* launch_differentiate_queries(const Backward& f, void* stream) {
  return dispatch_operand(f.plan, f.shape.padded_head_dim(), [&](auto operand, auto width) {
    using Operand = decltype(operand);
    using Shared = QueryGradShared<Operand, width()>;
    constexpr int kBlocksPerSm = kQueryGradBlocksPerSm.at(false, width());
    return launch_blocks<Shared, width(), kBlocksPerSm>(
        differentiate_queries<Operand, width()>, f.plan.query_grads.splits * Shared::kColumnBlocks, 4 * width(), stream, f);
  });
}

const char* launch_differentiate_queries_shifted(const Backward& f, void* stream) {
  return dispatch_shifted_operand(f.shape, [&](auto operand, auto width) {
    using Operand = decltype(operand);
    using Shared = QueryGradShared<Operand, width()>;
    const int64_t blocks = std::min<int64_t>(f.plan.query_grads.splits * Shared::kColumnBlocks, f.plan.sm_count);
    return launch_blocks<Shared, width(), 1>(differentiate_queries_shifted<Operand, width()>, blocks, 4 * width(),
                                             stream, f);
  });
}

const char* launch_differentiate_keys(const Backward& f, void* stream) {
  return dispatch_operand(f.plan, f.shape.padded_head_dim(), [&](auto operand, auto width) {
    using Operand = decltype(operand);
    constexpr int kBlocksPerSm = kKeyGradBlocksPerSm.at(false, width());
    return launch_blocks<KeyGradShared<Operand, width()>, width(), kBlocksPerSm>(
        differentiate_keys<Operand, width()>, f.plan.key_grads.splits, kKeyGradThreads, stream, f);
  });
}

const char* launch_differentiate_keys_shifted(const Backward& f, void* stream) {
  return dispatch_shifted_operand(f.shape, [&](auto operand, auto width) {
    using Operand = decltype(operand);
    const int64_t blocks = std::min<int64_t>(f.plan.key_grads.splits, f.plan.sm_count);
    return launch_blocks<KeyGradShared<Operand, width()>, width(), 1>(differentiate_keys_shifted<Operand, width()>,
                                                                      blocks, kKeyGradThreads, stream, f);
  });
}

}  // namespace polaformer::tf32
