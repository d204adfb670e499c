// Backward in tf32 (backward.cu tells the equations and which kernel follows which), for float32, and for 16-bit inputs
// that are not aligned bf16; and everything with a shift.
#include "features.cuh"
#include "kernels.cuh"

namespace polaformer::tf32 {
namespace {

template <class Operand, int kWidth>
struct QueryGradShared {
  static constexpr int kStages = 4;
  static constexpr int kStride = kWidth + Operand::kPadding;
  static constexpr int kGroups = kWidth / 16;  // of columns, per flow
  // A block sums so many of dS's columns of either flow, as far as registers go; where that is not all, other blocks
  // compute everything again for the others.
  static constexpr int kColumns = kWidth < 128 ? 32 : 16;
  static constexpr int kParts = (kWidth / 2 + kColumns - 1) / kColumns;
  struct alignas(16) Stage {
    float queries[kQueryGradTokens * kStride], grads[kQueryGradTokens * kStride];
    int2 places[kQueryGradTokens];
  } stages[kStages];
  float sums[2 * kGroups][kQueryGradTokens];                    // each warp's part of normalizers, …
  float dots[2 * kGroups][kQueryGradTokens];                    // … and of their gradients
  alignas(16) float parts[2][kQueryGradTokens * (kWidth + 8)];  // of dq, by flow, per unit of exponents
  HeadTables<kWidth> head;
};

// One block per split. One warp per flow and 16 columns of q: its features, turned and transposed, are left operands
// that never leave its registers: rows are features (row g is column 2g, row g + 8 column 2g + 1), columns 16 tokens.
// S u has the same layout, so that every thread has both for tokens {2t, 2t + 1, 2t + 8, 2t + 9} and a pair of columns.
template <class Operand, int kWidth, bool kShifted>
struct QueryGrads {
  using Shared = QueryGradShared<Operand, kWidth>;
  using FragmentA = typename Operand::FragmentA;
  using FragmentB = typename Operand::FragmentB;
  static constexpr int kGroups = Shared::kGroups;

  Shared& shared;
  const Backward& f;
  int flow, group;  // this warp's
  int part;         // this block's
  unsigned head;    // of all B·H

  static constexpr int kColumns = Shared::kColumns;
  Accumulator first[kColumns / 8] = {}, second[kColumns / 8] = {};  // of dS: rows of either pole, eight columns each
  Poles logit_sum = {}, mean_sum = {};
  float max_abs = 0.f;

  static __device__ __forceinline__ int token_of(int slot) { return 2 * lane_member() + slot % 2 + slot / 2 * 8; }
  __device__ __forceinline__ int pair() const { return group * 8 + lane_group(); }

  // The head's numbers for this thread's pair, from shared memory wherever they are needed: registers are all in use.
  __device__ __forceinline__ Poles temperatures() const {
    return load_poles(&shared.head.temperatures[flow][2 * pair()]);
  }
  __device__ __forceinline__ Poles means() const { return load_poles(&shared.head.means[2 * pair()]); }
  __device__ __forceinline__ float2 key_shift() const { return kShifted ? shared.head.shifts[pair()] : float2{}; }

  // This warp's rows of S of one pole, 16 of its flow's columns.
  __device__ __forceinline__ FragmentA load_state_rows(int pole, int step) const {
    FragmentA left;
    const int width = opaque(f.shape.head_width);
    const float* state = f.state + int64_t{head} * (2 * width * width);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int lower = i / 4, upper = i / 2 % 2, odd = i % 2;
      const int row = 2 * pair() + lower, column = 16 * step + 8 * upper + 2 * lane_member() + odd;
      const bool inside = row < width && column < width / 2;
      const float* place = state + (pole * width + row) * width + flow * (width / 2) + column;
      left.set_one(lower, upper, odd, inside ? __ldg(place) : 0.f);
    }
    return left;
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
        combine(upper ? values[2] : values[0], __shfl_xor_sync(kWholeWarp, upper ? values[0] : values[2], 16));
    const float b =
        combine(upper ? values[3] : values[1], __shfl_xor_sync(kWholeWarp, upper ? values[1] : values[3], 16));
    const float c = combine(odd ? b : a, __shfl_xor_sync(kWholeWarp, odd ? a : b, 8));
    const float d = combine(c, __shfl_xor_sync(kWholeWarp, c, 4));
    if ((threadIdx.x & 4) == 0) rows[flow * kGroups + group][2 * lane_member() + odd + 8 * upper] = d;
  }

  // Combines the rows of this flow's warps: lane i has token i % 16.
  template <class Combine>
  __device__ __forceinline__ float read_rows(const float (&rows)[2 * kGroups][kQueryGradTokens],
                                             Combine combine) const {
    const int begin = flow * kGroups + threadIdx.x / 16 % 2 * (kGroups / 2), token = threadIdx.x % 16;
    float result = rows[begin][token];
#pragma unroll
    for (int i = 1; i < kGroups / 2; ++i) result = combine(result, rows[begin + i][token]);
    return combine(result, __shfl_xor_sync(kWholeWarp, result, 16));
  }

  // Where a slot's part of dq goes; before, a part of dφ waits there, as there are no registers for it.
  __device__ __forceinline__ float2* grad_place(int slot) const {
    return reinterpret_cast<float2*>(shared.parts[flow] + token_of(slot) * (kWidth + 8) + 2 * pair());
  }

  __device__ __forceinline__ void add_tile(const typename Shared::Stage& stage) {
    const auto plus = [](float a, float b) { return a + b; };
    const auto most = [](float a, float b) { return fmaxf(a, b); };
    const auto of_slot = [](float of_lane, int slot) { return __shfl_sync(kWholeWarp, of_lane, token_of(slot)); };

    float token_shift = 0.f;
    if constexpr (kShifted) {
      float wanted[4];
#pragma unroll
      for (int slot = 0; slot < 4; ++slot) {
        const Pair<float> x = load_pair(stage.queries, slot);
        wanted[slot] = demand(scale(absolute(x), select(temperatures(), x)), x, key_shift());
      }
      write_row(shared.dots, wanted, most);
      __syncthreads();
      token_shift = excess(read_rows(shared.dots, most));
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
    const float inverse = reciprocal(max_or_nan(normalizer, float(kLeastGradientNormalizer)));

    // dS += R(φ) / z · dout; S · dout.
    Accumulator grad_first[2] = {}, grad_second[2] = {};  // of turned features of tokens 0 … 7, 8 … 15
    const auto* grads = stage.grads + flow * (kWidth / 2);
#pragma unroll 1  // unrolled, it needs more registers than there are
    for (int step = 0; step < kWidth / 32; ++step) {
      FragmentB right[2];
      Operand::load_transposed(right, grads + 16 * step, Shared::kStride);
      Operand::multiply(grad_first[0], grad_first[1], load_state_rows(0, step), right);
      Operand::multiply(grad_second[0], grad_second[1], load_state_rows(1, step), right);
    }
    FragmentA first_pole, second_pole;
#pragma unroll
    for (int upper = 0; upper < 2; ++upper) {
      Poles turned[2];  // over z
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int slot = 2 * upper + i;
        const Pair<float> x = load_pair(stage.queries, slot);
        const Turns turns = load_turns(f.turns, stage.places[token_of(slot)], pair());
        const float by = of_slot(inverse, slot);
        const Poles grad = {{grad_first[upper][i], grad_first[upper][2 + i]},
                            {grad_second[upper][i], grad_second[upper][2 + i]}};
        turned[i] = turns.forward(part_poles(scale(features[slot], by), x));
        values[slot] = dot(turned[i], grad);
        const Pair<float> grad_feature = scale(select(turns.back(grad), x), by);
        *grad_place(slot) = make_float2(grad_feature.first, grad_feature.second);
      }
      first_pole.set(0, upper, turned[0].first.first, turned[1].first.first);
      first_pole.set(1, upper, turned[0].first.second, turned[1].first.second);
      second_pole.set(0, upper, turned[0].second.first, turned[1].second.first);
      second_pole.set(1, upper, turned[0].second.second, turned[1].second.second);
    }
#pragma unroll
    for (int column = 0; column < kColumns; column += 16) {
      if (kWidth / 2 % kColumns != 0 && part * kColumns + column >= kWidth / 2) break;
      FragmentB right[2];
      Operand::load(right, grads + part * kColumns + column, Shared::kStride);
      Operand::add_product(first[column / 8], first[column / 8 + 1], first_pole, right);
      Operand::add_product(second[column / 8], second[column / 8 + 1], second_pole, right);
    }
    write_row(shared.dots, values, plus);
    __syncthreads();
    const float exact = -read_rows(shared.dots, plus) * inverse;
    constexpr float kLargest = float(kLargestNormalizerGradient);
    const float grad_normalizer = min_or_nan(max_or_nan(exact, -kLargest), kLargest);

    // dφ, dx, and the sums that need dz.
#pragma unroll
    for (int slot = 0; slot < 4; ++slot) {
      const Pair<float> x = load_pair(stage.queries, slot), mean = select(means(), x), by = select(temperatures(), x);
      const float grad = of_slot(grad_normalizer, slot);
      Pair<float> shift = {};
      if constexpr (kShifted) shift = query_shift(of_slot(token_shift, slot), key_shift(), x);
      const Pair<float> slope = slopes_of<kShifted>(features[slot], scale(absolute(x), by), shift);
      const Pair<float> rest = {grad_place(slot)->x, grad_place(slot)->y};
      const Pair<float> exponent = {(rest.first + grad * mean.first) * slope.first,
                                    (rest.second + grad * mean.second) * slope.second};
      accumulate(mean_sum, features[slot], {grad, grad}, x);
      accumulate(logit_sum, exponent, absolute(x), x);
      const Pair<float> sign = {with_sign(1.f, x.first), with_sign(1.f, x.second)};
      const Pair<float> grad_query = scale(scale(exponent, by), flow ? negative(sign) : sign);
      *grad_place(slot) = make_float2(grad_query.first, grad_query.second);
    }
  }

  // Writes this warp's part of the split's sums.
  __device__ __forceinline__ void store_sums(unsigned split) const {
    const int width = f.shape.head_width, row = 2 * pair();
    const float scale = f.plan.mean_weight;
    const Poles mean = sum_poles_over_members(mean_sum), logit = sum_poles_over_members(logit_sum);
    if (row >= width) return;
    if (lane_member() == 0 && part == 0) {
      const int64_t index = (int64_t{split} * 2 + flow) * f.shape.features() + row;
      store_poles(f.split_grad_mean + index, mean, scale);
      store_poles(f.split_grad_logits + index, logit, 1.f);
    }
    float* place = (f.plan.query_grads.splits_per_head == 1 ? f.grad_state : f.split_grad_state) +
                   int64_t{split} * f.shape.state_size() + row * width + flow * (width / 2);
#pragma unroll
    for (int i = 0; i < kColumns / 8; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int column = part * kColumns + 8 * i + 2 * lane_member() + j % 2;
        if (column >= width / 2) continue;
        place[j / 2 * width + column] = first[i][j] * scale;
        place[(width + j / 2) * width + column] = second[i][j] * scale;
      }
    }
  }

  static __device__ __forceinline__ Poles sum_poles_over_members(const Poles& x) {
    return {{sum_over_members(x.first.first), sum_over_members(x.first.second)},
            {sum_over_members(x.second.first), sum_over_members(x.second.second)}};
  }

  __device__ __forceinline__ void store_poles(float* place, const Poles& x, float scale) const {
    const int width = f.shape.head_width;
    place[0] = x.first.first * scale, place[1] = x.first.second * scale;
    place[width] = x.second.first * scale, place[width + 1] = x.second.second * scale;
  }
};

// Adds the flows' parts of a tile's dq and writes it, eight columns a thread.
template <class Operand, int kWidth>
__device__ __forceinline__ void store_tile(const QueryGradShared<Operand, kWidth>& shared, const Backward& f,
                                           int64_t row, int begin, int end) {
  const int token = threadIdx.x / (kWidth / 8), column = threadIdx.x % (kWidth / 8) * 8;
  if (token >= kQueryGradTokens || begin + token >= end) return;
  float values[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int place = token * (kWidth + 8) + column + i;
    values[i] = shared.parts[0][place] + shared.parts[1][place];
  }
  const int width = f.shape.head_width;
  const int64_t index = row + int64_t{begin + token} * (f.shape.heads * width) + column;
  store_elements<Operand>(f.grad_q, index, values, width - column, f.shape.dtype);
}

// Writes a split's dq and sums. Returns whether they are to be computed again: not so if kShifted.
template <class Operand, int kWidth, bool kShifted>
__device__ __forceinline__ bool differentiate_split(QueryGradShared<Operand, kWidth>& shared, const Backward& f,
                                                    unsigned index) {
  using Shared = QueryGradShared<Operand, kWidth>;
  constexpr int kThreads = 4 * kWidth;
  const int part = index % Shared::kParts;
  const Split split = locate_split(index / Shared::kParts, f.plan.query_grads, f.shape);
  const int64_t kept_row = first_row(split, f.shape);
  const auto row = [&] {  // shifted, located again, as there is no register to keep it in
    if constexpr (!kShifted) return kept_row;
    const unsigned again = opaque(static_cast<int>(index)) / Shared::kParts;
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
      copy_tile<Operand, kQueryGradTokens, kWidth>(tile, rows, copies_grads, begin, split.end,
                                                   threadIdx.x % (kThreads / 2), kThreads / 2);
      if (threadIdx.x < kQueryGradTokens) {
        stage.places[threadIdx.x] = locate_turns<kWidth>(min(begin + int(threadIdx.x), split.end - 1), f.shape);
      }
    }
    commit_copies();
  };

  const int warp = threadIdx.x / 32;
  QueryGrads<Operand, kWidth, kShifted> sums{shared, f,         warp / Shared::kGroups, warp % Shared::kGroups,
                                             part,   split.head};
  constexpr int kAhead = (Shared::kStages - 1) * kQueryGradTokens;
  for (int ahead = 0; ahead < kAhead; ahead += kQueryGradTokens) start_copy(split.begin + ahead);
  if (shared.head.load(f, split, kThreads)) sums.max_abs = FLT_MAX;
  int begin = split.begin;
  for (; begin < split.end; begin += kQueryGradTokens) {
    wait_for_copies<Shared::kStages - 2>();
    __syncthreads();  // this stage has arrived, the last one is done with, its dq is there
    start_copy(begin + kAhead);
    if (begin > split.begin && part == 0) store_tile(shared, f, row(), begin - kQueryGradTokens, split.end);
    sums.add_tile(stage_of(begin));
  }
  __syncthreads();
  if (part == 0) store_tile(shared, f, row(), begin - kQueryGradTokens, split.end);
  sums.store_sums(index / Shared::kParts);
  return !kShifted && __syncthreads_or(sums.max_abs > kFreeExponent);
}

template <class Operand, int kWidth>
__global__ void __launch_bounds__(4 * kWidth, kQueryGradBlocksPerSm.at(false, kWidth))
    differentiate_queries(const Backward f) {
  using Shared = QueryGradShared<Operand, kWidth>;
  const bool needs_shift = differentiate_split<Operand, kWidth, false>(shared_memory<Shared>(), f, blockIdx.x);
  constexpr int kParts = Shared::kParts;
  if (threadIdx.x == 0 && blockIdx.x % kParts == 0) f.needs_shift[blockIdx.x / kParts] = needs_shift ? 1.f : 0.f;
}

template <class Operand, int kWidth>
__global__ void __launch_bounds__(4 * kWidth, 1) differentiate_queries_shifted(const Backward f) {
  auto& shared = shared_memory<QueryGradShared<Operand, kWidth>>();
  constexpr int kParts = QueryGradShared<Operand, kWidth>::kParts;
  for (unsigned index = blockIdx.x; index < f.plan.query_grads.splits * kParts; index += gridDim.x) {
    if (f.needs_shift[index / kParts] == 0.f) continue;
    __syncthreads();  // nobody reads the last split's memory any more
    differentiate_split<Operand, kWidth, true>(shared, f, index);
  }
}

template <class Operand, int kWidth>
struct KeyGradShared {
  static constexpr int kStride = kWidth + Operand::kPadding;
  alignas(16) float state[2 * kWidth * kStride];  // dS
  float2 means[kWidth];                           // dm: first, second pole
  float2 shifts[kWidth / 2];                      // of pairs
};

constexpr int kKeyGradThreads = 2 * kKeyGradTokens;

// Fills everything and returns true, or returns false: whether the head's keys are shifted is to be as said.
template <bool kShifted, class Operand, int kWidth>
__device__ __forceinline__ bool load_head(KeyGradShared<Operand, kWidth>& shared, const Backward& f,
                                          const Split& split) {
  const int width = f.shape.head_width;
  bool shifted = false;
#pragma unroll 1
  for (int i = opaque(int(threadIdx.x)); i < kWidth / 2; i += kKeyGradThreads) {
    const float* shift = f.key_shift + int64_t{split.head} * width + i;
    shared.shifts[i] = 2 * i < width ? make_float2(shift[0], shift[width / 2]) : make_float2(0.f, 0.f);
    shifted |= shared.shifts[i].x > 0.f || shared.shifts[i].y > 0.f;
  }
  if (kShifted && !__syncthreads_or(shifted)) return false;  // it seldom is: before anything is loaded in vain
  const float* mean = f.grad_mean + int64_t{split.head} * f.shape.features();
  for (int i = opaque(int(threadIdx.x)); i < kWidth; i += kKeyGradThreads) {
    shared.means[i] = i < width ? make_float2(mean[i], mean[width + i]) : make_float2(0.f, 0.f);
  }
  load_state<Operand, kWidth>(shared.state, f.grad_state + int64_t{split.head} * f.shape.state_size(), width,
                              kKeyGradThreads, false, interleave_16, interleave_32);
  if constexpr (!kShifted) return !__syncthreads_or(shifted);
  __syncthreads();
  return true;
}

// A warp's 16 tokens: rows g and g + 8 of its left operands and sums.
template <class Operand, int kWidth, bool kShifted>
struct KeyGradTile {
  using Shared = KeyGradShared<Operand, kWidth>;
  using FragmentA = typename Operand::FragmentA;
  using FragmentB = typename Operand::FragmentB;
  using Eight = typename Operand::template Neighbours<8>;
  using Four = typename Operand::template Neighbours<4>;

  const Shared& shared;
  const float* turns;
  const Rows<Operand::kFloatInputs>& values;
  int tokens[2];
  int2 places[2];

  Accumulator grad_values[kWidth / 8] = {};

  // 32 columns of v.
  __device__ __forceinline__ void load_values(FragmentA (&left)[2], int column) const {
    Eight both[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) both[i] = load_neighbours<Operand, 8>(values, tokens[i], column + 8 * lane_member());
    left[0].set(both, 0), left[1].set(both, 1);
  }

  // dS v of 16 columns of the keys: of each pole, of features {2t, 2t + 1} and {2t + 8, 2t + 9}.
  __device__ __forceinline__ void multiply_values(Accumulator (&first)[2], Accumulator (&second)[2], int column) const {
    const auto* rows = shared.state + column * Shared::kStride;
#pragma unroll 1
    for (int i = 0; i < kWidth / 32; ++i) {
      FragmentA left[2];
      load_values(left, 32 * i);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        FragmentB right[2];
        Operand::load_transposed(right, rows + 32 * i + 16 * half, Shared::kStride);
        Operand::multiply(first[0], first[1], left[half], right);
        Operand::load_transposed(right, rows + kWidth * Shared::kStride + 32 * i + 16 * half, Shared::kStride);
        Operand::multiply(second[0], second[1], left[half], right);
      }
    }
  }

  // Adds the part of 16 columns of the keys to dv; returns dk of four of them, the thread's, for either token.
  __device__ __forceinline__ void add(float (&grad_keys)[2][4], const Four (&keys)[2], int column) {
    const int place = column + 4 * lane_member();
    Accumulator first[2] = {}, second[2] = {};
    multiply_values(first, second, column);
    FragmentA left[2];  // pole
#pragma unroll
    for (int row = 0; row < 2; ++row) {
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) {
        const Turns by = load_turns(turns, places[row], place / 2 + pair);
        const Pair<float> x = {keys[row][2 * pair], keys[row][2 * pair + 1]};
        const Pair<float> mean = select(load_poles(&shared.means[place + 2 * pair]), x);
        Pair<float> shift = {};
        if constexpr (kShifted) {
          const float2 both = shared.shifts[place / 2 + pair];
          shift = select({{both.x, both.x}, {both.y, both.y}}, x);
        }
        const Pair<float> exponents = absolute(x);
        const Pair<float> features = features_of<kShifted>(exponents, shift);
        const Poles turned = by.forward(part_poles(features, x));
        left[0].set(row, pair, turned.first.first, turned.first.second);
        left[1].set(row, pair, turned.second.first, turned.second.second);

        const Poles grad = {{first[pair][2 * row], first[pair][2 * row + 1]},
                            {second[pair][2 * row], second[pair][2 * row + 1]}};
        const Pair<float> back = select(by.back(grad), x), slope = slopes_of<kShifted>(features, exponents, shift);
        grad_keys[row][2 * pair] = (back.first + mean.first) * with_sign(slope.first, x.first);
        grad_keys[row][2 * pair + 1] = (back.second + mean.second) * with_sign(slope.second, x.second);
      }
    }
#pragma unroll
    for (int pole = 0; pole < 2; ++pole) {
      const auto* rows = shared.state + (pole * kWidth + column) * Shared::kStride;
#pragma unroll
      for (int i = 0; i < kWidth / 16; ++i) {
        FragmentB right[2];
        Operand::load(right, rows + 16 * i, Shared::kStride);
        Operand::multiply(grad_values[2 * i], grad_values[2 * i + 1], left[pole], right);
      }
    }
  }
};

// Writes a split's dk and dv.
template <class Operand, int kWidth, bool kShifted>
__device__ __forceinline__ void differentiate_split_keys(KeyGradShared<Operand, kWidth>& shared, const Backward& f,
                                                         unsigned index) {
  using Four = typename Operand::template Neighbours<4>;
  const Split split = locate_split(index, f.plan.key_grads, f.shape);
  if (!load_head<kShifted>(shared, f, split)) return;
  const Rows<Operand::kFloatInputs> keys = rows_of<Operand::kFloatInputs>(f.k, f.shape, split);
  const Rows<Operand::kFloatInputs> values = rows_of<Operand::kFloatInputs>(f.v, f.shape, split);
  const int width = f.shape.head_width;
  const auto row_of = [&](int token) {  // from its parts each time, as there are no registers to keep more in
    return ((int64_t{split.batch} * f.shape.tokens() + token) * f.shape.heads + split.head_in_batch) * width;
  };

  for (int begin = split.begin + threadIdx.x / 32 * 16; begin < split.end; begin += kKeyGradTokens) {
    KeyGradTile<Operand, kWidth, kShifted> tile{shared, f.turns, values};
#pragma unroll
    for (int lower = 0; lower < 2; ++lower) {
      tile.tokens[lower] = min(begin + lane_group() + 8 * lower, split.end - 1);
      tile.places[lower] = locate_turns<kWidth>(tile.tokens[lower], f.shape);
    }
    const auto load_keys = [&](Four(&rows)[2], int column) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        rows[j] = load_neighbours<Operand, 4>(keys, tile.tokens[j], column + 4 * lane_member());
      }
    };
    Four ahead[2];
    load_keys(ahead, 0);
#pragma unroll 1
    for (int column = 0; column < kWidth; column += 16) {
      const int place = column + 4 * lane_member();
      const Four both[2] = {ahead[0], ahead[1]};
      if (column + 16 < kWidth) load_keys(ahead, column + 16);
      float grad_keys[2][4];
      tile.add(grad_keys, both, column);
#pragma unroll
      for (int lower = 0; lower < 2; ++lower) {
        const int token = begin + lane_group() + 8 * lower;
        if (token >= split.end) continue;
        store_elements<Operand>(f.grad_k, row_of(token) + place, grad_keys[lower], width - place, f.shape.dtype);
      }
    }
#pragma unroll
    for (int i = 0; i < kWidth / 32; ++i) {
#pragma unroll
      for (int lower = 0; lower < 2; ++lower) {
        const int token = begin + lane_group() + 8 * lower, place = 32 * i + 8 * lane_member();
        if (token >= split.end) continue;
        float eight[8];
#pragma unroll
        for (int j = 0; j < 8; ++j) eight[j] = tile.grad_values[4 * i + j / 2][2 * lower + j % 2];
        store_elements<Operand>(f.grad_v, row_of(token) + place, eight, width - place, f.shape.dtype);
      }
    }
  }
}

template <class Operand, int kWidth>
__global__ void __launch_bounds__(kKeyGradThreads, kKeyGradBlocksPerSm.at(false, kWidth))
    differentiate_keys(const Backward f) {
  using Shared = KeyGradShared<Operand, kWidth>;
  differentiate_split_keys<Operand, kWidth, false>(shared_memory<Shared>(), f, blockIdx.x);
}

template <class Operand, int kWidth>
__global__ void __launch_bounds__(kKeyGradThreads, 1) differentiate_keys_shifted(const Backward f) {
  for (unsigned index = blockIdx.x; index < f.plan.key_grads.splits; index += gridDim.x) {
    __syncthreads();  // nobody reads the last split's memory any more
    differentiate_split_keys<Operand, kWidth, true>(shared_memory<KeyGradShared<Operand, kWidth>>(), f, index);
  }
}

}  // namespace

const char* launch_differentiate_queries(const Backward& f, void* stream) {
  return visit_operand(f.plan, f.shape.padded_width(), [&](auto operand, auto width) {
    using Operand = decltype(operand);
    using Shared = QueryGradShared<Operand, width()>;
    constexpr int kBlocksPerSm = kQueryGradBlocksPerSm.at(false, width());
    return launch_blocks<Shared, width(), kBlocksPerSm>(
        differentiate_queries<Operand, width()>, f.plan.query_grads.splits * Shared::kParts, 4 * width(), stream, f);
  });
}

const char* launch_differentiate_queries_shifted(const Backward& f, void* stream) {
  return visit_shifted_operand(f.shape, [&](auto operand, auto width) {
    using Operand = decltype(operand);
    using Shared = QueryGradShared<Operand, width()>;
    const int64_t blocks = std::min<int64_t>(f.plan.query_grads.splits * Shared::kParts, f.plan.multiprocessors);
    return launch_blocks<Shared, width(), 1>(differentiate_queries_shifted<Operand, width()>, blocks, 4 * width(),
                                             stream, f);
  });
}

const char* launch_differentiate_keys(const Backward& f, void* stream) {
  return visit_operand(f.plan, f.shape.padded_width(), [&](auto operand, auto width) {
    using Operand = decltype(operand);
    constexpr int kBlocksPerSm = kKeyGradBlocksPerSm.at(false, width());
    return launch_blocks<KeyGradShared<Operand, width()>, width(), kBlocksPerSm>(
        differentiate_keys<Operand, width()>, f.plan.key_grads.splits, kKeyGradThreads, stream, f);
  });
}

const char* launch_differentiate_keys_shifted(const Backward& f, void* stream) {
  return visit_shifted_operand(f.shape, [&](auto operand, auto width) {
    using Operand = decltype(operand);
    const int64_t blocks = std::min<int64_t>(f.plan.key_grads.splits, f.plan.multiprocessors);
    return launch_blocks<KeyGradShared<Operand, width()>, width(), 1>(differentiate_keys_shifted<Operand, width()>,
                                                                      blocks, kKeyGradThreads, stream, f);
  });
}

}  // namespace polaformer::tf32
