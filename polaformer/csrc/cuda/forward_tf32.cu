// Forward kernels in tf32, for float32 and for 16-bit inputs outside the bf16 path, and attend with a shift for all
// dtypes; forward.cu has the equations and the call graph.
#include "features_tf32.cuh"
#include "kernels.cuh"

namespace polaformer::tf32 {
namespace {

template <class Operand, int kHeadDim>
struct KeyShared {
  static constexpr int kStages = 2;
  static constexpr int kStride = kHeadDim + Operand::kPadding;
  struct alignas(16) Stage {
    float keys[kSumTokens * kStride], values[kSumTokens * kStride];
    int2 rotary_offsets[kSumTokens];
  } stages[kStages];
  float max_abs[kHeadDim / 16];
};

// One block per split; each warp sums 16 columns of k over all tokens. Its rotated features, transposed, are A
// fragments that stay in registers: rows are features (row g is column 2g, row g + 8 column 2g + 1), columns are 16
// tokens.
template <class Operand, int kHeadDim>
struct KeySums {
  static constexpr int kStride = kHeadDim + Operand::kPadding;
  using FragmentA = typename Operand::FragmentA;
  using FragmentB = typename Operand::FragmentB;

  Accumulator first[kHeadDim / 8] = {}, second[kHeadDim / 8] = {};  // S: rows of each part × eight columns
  PolarPair mean = {};
  float max_abs = 0.f;

  __device__ __forceinline__ void add(const float* keys, const float* values, const int2* rotary_offsets,
                                      const float* cos_sin) {
    const int pair = threadIdx.x / 32 * 8 + group_id();
    FragmentA first_part, second_part;
#pragma unroll
    for (int upper = 0; upper < 2; ++upper) {
      PolarPair rotated[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int token = 2 * thread_in_group() + 8 * upper + i;
        const auto both = *reinterpret_cast<const float2*>(keys + token * kStride + 2 * pair);
        const Pair<float> x = {both.x, both.y};
        const PolarPair features = split_polarity(features_of<false>(absolute(x), {}), x);
        mean.first.first += features.first.first, mean.first.second += features.first.second;
        mean.second.first += features.second.first, mean.second.second += features.second.second;
        max_abs = fmaxf(max_abs, largest(absolute(x)));
        rotated[i] = load_rotation(cos_sin, rotary_offsets[token], pair).forward(features);
      }
      first_part.set(0, upper, rotated[0].first.first, rotated[1].first.first);
      first_part.set(1, upper, rotated[0].first.second, rotated[1].first.second);
      second_part.set(0, upper, rotated[0].second.first, rotated[1].second.first);
      second_part.set(1, upper, rotated[0].second.second, rotated[1].second.second);
    }
#pragma unroll
    for (int column = 0; column < kHeadDim; column += 16) {
      FragmentB frag_b[2];
      Operand::load(frag_b, values + column, kStride);
      Operand::add_product(first[column / 8], first[column / 8 + 1], first_part, frag_b);
      Operand::add_product(second[column / 8], second[column / 8 + 1], second_part, frag_b);
    }
  }

  // Writes this warp's rows of S and m, divided by N.
  __device__ __forceinline__ void store(float* state, float* mean_out, const Shape& shape, float scale) const {
    const int head_dim = shape.head_dim, row = threadIdx.x / 32 * 16 + 2 * group_id();
    const PolarPair sum = {{quad_sum(mean.first.first), quad_sum(mean.first.second)},
                           {quad_sum(mean.second.first), quad_sum(mean.second.second)}};
    if (row >= head_dim) return;
    if (thread_in_group() == 0) {
      *reinterpret_cast<float2*>(mean_out + row) = make_float2(sum.first.first * scale, sum.first.second * scale);
      *reinterpret_cast<float2*>(mean_out + head_dim + row) =
          make_float2(sum.second.first * scale, sum.second.second * scale);
    }
#pragma unroll
    for (int i = 0; i < kHeadDim / 8; ++i) {
      const int column = 8 * i + 2 * thread_in_group();
      if (column >= head_dim) break;
      float* address = state + row * head_dim + column;
#pragma unroll
      for (int lower = 0; lower < 2; ++lower) {
        *reinterpret_cast<float2*>(address + lower * head_dim) =
            make_float2(first[i][2 * lower] * scale, first[i][2 * lower + 1] * scale);
        *reinterpret_cast<float2*>(address + (head_dim + lower) * head_dim) =
            make_float2(second[i][2 * lower] * scale, second[i][2 * lower + 1] * scale);
      }
    }
  }
};

template <class Operand, int kHeadDim>
__global__ void __launch_bounds__(2 * kHeadDim, kKeyBlocksPerSm.at(false, kHeadDim))
    sum_keys(const ForwardParams params) {
  using Shared = KeyShared<Operand, kHeadDim>;
  auto& shared = shared_memory<Shared>();
  const Split split = locate_split(blockIdx.x, params.plan.keys, params.shape);
  const int copies_values = threadIdx.x / kHeadDim;  // half of the threads copy values, the others keys
  const Rows<Operand::kFloatInputs> rows =
      rows_of<Operand::kFloatInputs>(copies_values ? params.v : params.k, params.shape, split);

  const auto start_copy = [&](int step) {
    const int first = split.begin + step * kSumTokens;
    if (first < split.end) {
      auto& stage = shared.stages[step % Shared::kStages];
      copy_tile<Operand, kSumTokens, kHeadDim>(copies_values ? stage.values : stage.keys, rows, false, first, split.end,
                                               threadIdx.x % kHeadDim, kHeadDim);
      if (threadIdx.x < kSumTokens) {
        stage.rotary_offsets[threadIdx.x] =
            locate_cos_sin<kHeadDim>(min(first + int(threadIdx.x), split.end - 1), params.shape);
      }
    }
    cp_async_commit_group();
  };

  KeySums<Operand, kHeadDim> sums;
  for (int step = 0; step < Shared::kStages - 1; ++step) start_copy(step);
  for (int step = 0; split.begin + step * kSumTokens < split.end; ++step) {
    cp_async_wait_group<Shared::kStages - 2>();
    __syncthreads();  // this stage has arrived, and no thread reads the one to be overwritten
    start_copy(step + Shared::kStages - 1);
    const auto& stage = shared.stages[step % Shared::kStages];
#pragma unroll 1
    for (int token = 0; token < kSumTokens; token += 16) {
      const int offset = token * Shared::kStride;
      sums.add(stage.keys + offset, stage.values + offset, stage.rotary_offsets + token, params.cos_sin);
    }
  }

  const bool is_unsplit = params.plan.keys.splits_per_head == 1;
  sums.store((is_unsplit ? params.state : params.split_state) + blockIdx.x * params.shape.state_size(),
             (is_unsplit ? params.key_mean : params.split_mean) + blockIdx.x * params.shape.features(), params.shape,
             params.plan.inv_tokens);
  const float max_abs = warp_max(sums.max_abs);
  if (threadIdx.x % 32 == 0) shared.max_abs[threadIdx.x / 32] = max_abs;
  __syncthreads();
  if (threadIdx.x == 0) {
    float largest = 0.f;
    for (int warp = 0; warp < kHeadDim / 16; ++warp) largest = fmaxf(largest, shared.max_abs[warp]);
    params.split_max_abs[blockIdx.x] = largest;
  }
}

constexpr int kQueryThreads = 2 * kQueryTokens;

template <class Operand, int kHeadDim>
struct QueryShared {
  static constexpr int kStride = kHeadDim + Operand::kPadding;
  alignas(16) float state[2 * kHeadDim * kStride];
  QueryTables<kHeadDim> head;
};

// Fills all of `shared`. Returns whether the head's keys are shifted.
template <class Operand, int kHeadDim>
__device__ __forceinline__ bool load_head(QueryShared<Operand, kHeadDim>& shared, const ForwardParams& params,
                                          const Split& split) {
  load_state<Operand, kHeadDim>(shared.state, params.state + int64_t{split.head} * params.shape.state_size(),
                                params.shape.head_dim, kQueryThreads, true, interleave_32, interleave_16);
  const bool shifted = shared.head.load(params, split, kQueryThreads);
  return __syncthreads_or(shifted);
}

// A warp's 16 tokens: rows g and g + 8 of its A fragments and accumulators.
template <class Operand, int kHeadDim, bool kShifted>
struct QueryTile {
  using Shared = QueryShared<Operand, kHeadDim>;
  using FragmentA = typename Operand::FragmentA;
  using FragmentB = typename Operand::FragmentB;
  using Elements8 = typename Operand::template Elements<8>;
  static constexpr bool kPrefetches = kHeadDim < 128;  // at 128 there are no registers left for it

  const Shared& shared;
  const Rows<Operand::kFloatInputs>& queries;
  const float* cos_sin;
  Dtype dtype;
  int tokens[2];
  int2 rotary_offsets[2];

  Accumulator sums[2][kHeadDim / 16] = {};  // by flow; eight columns of the flow's half each
  float normalizers[2][2] = {};             // by flow and token
  float token_shifts[2][2] = {};
  float max_abs = 0.f;

  __device__ __forceinline__ void load(Elements8 (&rows)[2], int column) const {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      rows[row] = load_elements<Operand, 8>(queries, tokens[row], column + 8 * thread_in_group());
    }
  }

  // Computes the shift of each token and flow.
  __device__ __forceinline__ void find_shifts() {
#pragma unroll 1
    for (int column = 0; column < kHeadDim; column += 32) {
      Elements8 rows[2];
      load(rows, column);
#pragma unroll
      for (int i = 0; i < 8; i += 2) {
        const int feature = column + 8 * thread_in_group() + i;
#pragma unroll
        for (int flow = 0; flow < 2; ++flow) {
          const PolarPair temperatures = load_polar_pair(&shared.head.temperatures[flow][feature]);
#pragma unroll
          for (int row = 0; row < 2; ++row) {
            Pair<float> x = {rows[row][i], rows[row][i + 1]};
            if (flow) x = negative(x);
            const float wanted =
                max_shifted_exponent(scale(absolute(x), select(temperatures, x)), x, shared.head.shifts[feature / 2]);
            token_shifts[flow][row] = fmaxf(token_shifts[flow][row], wanted);
          }
        }
      }
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      token_shifts[j / 2][j % 2] = required_shift(quad_max(token_shifts[j / 2][j % 2]));
    }
  }

  // Adds the products of 16 columns of q; the thread has four of them, from `first` on.
  __device__ __forceinline__ void add(const Elements8 (&rows)[2], int column) {
    const int first = column / 32 * 32 + 8 * thread_in_group() + column / 16 % 2 * 4;
    AxialRotation by[2][2];  // by token, pair
#pragma unroll
    for (int row = 0; row < 2; ++row) load_rotation(by[row], cos_sin, rotary_offsets[row], first / 2);
#pragma unroll
    for (int flow = 0; flow < 2; ++flow) {
      FragmentA frag_a[2];  // by part
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) {
        const int feature = first + 2 * pair;
        const PolarPair temperatures = load_polar_pair(&shared.head.temperatures[flow][feature]);
        const PolarPair means = load_polar_pair(&shared.head.means[feature]);
#pragma unroll
        for (int row = 0; row < 2; ++row) {
          Pair<float> x = {rows[row][2 * pair], rows[row][2 * pair + 1]};
          if (flow)
            x = negative(x);
          else
            max_abs = fmaxf(max_abs, largest(absolute(x)));
          Pair<float> shift = {};
          if constexpr (kShifted) shift = query_shift(token_shifts[flow][row], shared.head.shifts[feature / 2], x);
          const auto exponents = scale(absolute(x), select(temperatures, x));
          const PolarPair features = split_polarity(features_of<kShifted>(exponents, shift), x);
          normalizers[flow][row] += dot(features, means);
          const PolarPair rotated = by[row][pair].forward(features);
          frag_a[0].set(row, pair, rotated.first.first, rotated.first.second);
          frag_a[1].set(row, pair, rotated.second.first, rotated.second.second);
        }
      }
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        const auto* corner = shared.state + (part * kHeadDim + column) * Shared::kStride + flow * kHeadDim / 2;
#pragma unroll
        for (int j = 0; j < kHeadDim / 2; j += 16) {
          FragmentB frag_b[2];
          Operand::load(frag_b, corner + j, Shared::kStride);
          Operand::multiply(sums[flow][j / 8], sums[flow][j / 8 + 1], frag_a[part], frag_b);
        }
      }
    }
  }

  __device__ __forceinline__ void add_all() {
    if constexpr (kShifted) find_shifts();
    Elements8 ahead[2], rows[2];
    if constexpr (kPrefetches) load(ahead, 0);
#pragma unroll 1
    for (int column = 0; column < kHeadDim; column += 32) {
      if constexpr (kPrefetches) rows[0] = ahead[0], rows[1] = ahead[1];
      if (kPrefetches && column + 32 < kHeadDim) load(ahead, column + 32);
#pragma unroll 1  // unrolling exceeds the registers
      for (int half = 0; half < 2; ++half) {
        if constexpr (!kPrefetches) load(rows, column);
        if (!kPrefetches && half) rows[0].drop_first_four(), rows[1].drop_first_four();
        add(rows, column + 16 * half);
        if constexpr (kPrefetches) rows[0].drop_first_four(), rows[1].drop_first_four();
      }
    }
  }

  // Writes the outputs of tokens before `end`; `row`: element offset of the head's first token.
  __device__ __forceinline__ void store(void* out, int64_t row, int begin, int end, const Shape& shape) const {
    const int half = shape.head_dim / 2;
    float inverse[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float epsilon = kShifted ? shifted_epsilon(token_shifts[i / 2][i % 2]) : float(kEpsilon);
      inverse[i] = reciprocal(quad_sum(normalizers[i / 2][i % 2]) + epsilon);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int flow = i / 2, lower = i % 2, token = begin + group_id() + 8 * lower;
      if (token >= end) continue;
      const int64_t index = row + int64_t{token} * (shape.heads * shape.head_dim) + flow * half;
#pragma unroll
      for (int j = 0; j < kHeadDim / 32; ++j) {
        float values[4];
#pragma unroll
        for (int k = 0; k < 4; ++k) values[k] = sums[flow][2 * j + k / 2][2 * lower + k % 2] * inverse[i];
        const int column = 16 * j + 4 * thread_in_group();
        store_elements<Operand>(out, index + column, values, half - column, dtype);
      }
    }
  }
};

// Writes a split's outputs. Returns whether they must be recomputed with a shift; false if kShifted.
template <class Operand, int kHeadDim, bool kShifted>
__device__ __forceinline__ bool attend_split(QueryShared<Operand, kHeadDim>& shared, const ForwardParams& params,
                                             unsigned index) {
  const Split split = locate_split(index, params.plan.queries, params.shape);
  if (load_head(shared, params, split) && !kShifted) return true;
  const Rows<Operand::kFloatInputs> queries = rows_of<Operand::kFloatInputs>(params.q, params.shape, split);
  const int64_t row = first_row(split, params.shape);
  bool needs_shift = false;
  for (int begin = split.begin + threadIdx.x / 32 * 16; begin < split.end; begin += kQueryTokens) {
    QueryTile<Operand, kHeadDim, kShifted> tile{shared, queries, params.cos_sin, Operand::dtype(params.shape.dtype)};
#pragma unroll
    for (int lower = 0; lower < 2; ++lower) {
      tile.tokens[lower] = min(begin + group_id() + 8 * lower, split.end - 1);
      tile.rotary_offsets[lower] = locate_cos_sin<kHeadDim>(tile.tokens[lower], params.shape);
    }
    tile.add_all();
    tile.store(params.out, row, begin, split.end, params.shape);
    needs_shift |= tile.max_abs > kMaxUnshiftedExponent;
  }
  return !kShifted && __syncthreads_or(needs_shift);
}

template <class Operand, int kHeadDim>
__global__ void __launch_bounds__(kQueryThreads, kQueryBlocksPerSm.at(false, kHeadDim))
    attend(const ForwardParams params) {
  auto& shared = shared_memory<QueryShared<Operand, kHeadDim>>();
  const bool needs_shift = attend_split<Operand, kHeadDim, false>(shared, params, blockIdx.x);
  if (threadIdx.x == 0) params.needs_shift[blockIdx.x] = needs_shift ? 1.f : 0.f;
}

template <class Operand, int kHeadDim>
__global__ void __launch_bounds__(kQueryThreads, 1) attend_shifted(const ForwardParams params) {
  auto& shared = shared_memory<QueryShared<Operand, kHeadDim>>();
  for (unsigned index = blockIdx.x; index < params.plan.queries.splits; index += gridDim.x) {
    if (params.needs_shift[index] == 0.f) continue;
    __syncthreads();  // no thread reads the last split's head any more
    attend_split<Operand, kHeadDim, true>(shared, params, index);
  }
}

}  // namespace

const char* launch_sum_keys(const ForwardParams& params, void* stream) {
  return dispatch_operand(params, [&](auto operand, auto head_dim) {
    using Operand = decltype(operand);
    constexpr int kHeadDim = head_dim();
    return launch_blocks<KeyShared<Operand, kHeadDim>, kHeadDim, kKeyBlocksPerSm.at(false, kHeadDim)>(
        sum_keys<Operand, kHeadDim>, params.plan.keys.splits, 2 * kHeadDim, stream, params);
  });
}

const char* launch_attend(const ForwardParams& params, void* stream) {
  return dispatch_operand(params, [&](auto operand, auto head_dim) {
    using Operand = decltype(operand);
    constexpr int kHeadDim = head_dim();
    return launch_blocks<QueryShared<Operand, kHeadDim>, kHeadDim, kQueryBlocksPerSm.at(false, kHeadDim)>(
        attend<Operand, kHeadDim>, params.plan.queries.splits, kQueryThreads, stream, params);
  });
}

const char* launch_attend_shifted(const ForwardParams& params, void* stream) {
  return dispatch_shifted_operand(params, [&](auto operand, auto head_dim) {
    using Operand = decltype(operand);
    constexpr int kHeadDim = head_dim();
    return launch_shifted<QueryShared<Operand, kHeadDim>, kHeadDim>(
        attend_shifted<Operand, kHeadDim>, params.plan.queries.splits, kQueryThreads, stream, params);
  });
}

}  // namespace polaformer::tf32
