// Forward kernels of the bf16 path; forward.cu has the equations and the call graph.
//
//   sum_keys   S and m of each split     A: rotated features, transposed     B: values
//   attend     outputs                   A: rotated features                 B: S
//
// Normalizers and means are tensor-core products, too: of features before rotation, with m as the sum of two bf16.
#include "bf16.cuh"
#include "kernels.cuh"

namespace polaformer::bf16 {
namespace {

template <int kHeadDim>
struct KeyShared {
  using Stage = TokenStage<kHeadDim>;  // keys as rows, values as B fragments
  static constexpr int kStages = 3;
  Stage stages[kStages];
  float max_abs[kHeadDim / 16];
};

// One block per split; each warp sums 16 columns of k over all tokens.
template <int kHeadDim>
struct KeySums {
  using Shared = KeyShared<kHeadDim>;

  Accumulator sums[2][kHeadDim / 8] = {};  // S, by part: rows 2g and 2g + 1 of the warp's columns × eight columns each
  Accumulator means[2] = {};
  Bf16x2 max_abs = 0;

  // Adds 16 tokens of a stage.
  __device__ __forceinline__ void add(const typename Shared::Stage& stage, int begin, const char* rotary) {
    Pairs unrotated[2][2], rotated[2][2];  // by part, then token
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const int token = begin + group_id() + 8 * row;
      const RotaryOffsets offsets = stage.rotary[token];
      const Rotation by_row(__ldg(reinterpret_cast<const uint2*>(rotary + offsets.by_row)));
      const Rotation by_column(__ldg(reinterpret_cast<const uint2*>(rotary + offsets.by_column)));
      const uint2 words = *reinterpret_cast<const uint2*>(stage.rows + token * Shared::Stage::kRowStride +
                                                          threadIdx.x / 32 * 16 + 4 * thread_in_group());
      const Columns x = {words.x, words.y};
      max_abs = max_bf16x2(max_abs, x.max_abs());
      const Pairs features = key_features(x), negative = x.negative();
      unrotated[0][row] = unmasked(features, negative), unrotated[1][row] = masked(features, negative);
      rotated[0][row] = by_row.forward(unrotated[0][row]), rotated[1][row] = by_column.forward(unrotated[1][row]);
    }
    __syncwarp();  // stops the compiler from computing other tokens' features here: too few registers
    FragmentA a[2];
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      mma_m16n8k16_bf16(means[part], columns_as_a(unrotated[part]).words, {kOnes, kOnes});
      a[part] = columns_as_a(rotated[part]);
    }
    const SmemPointer values = b_rows(stage.b, Shared::Stage::kBStride) + begin * Shared::Stage::kBStride * 2;
#pragma unroll
    for (int column = 0; column < kHeadDim; column += 16) {
      uint32_t b[2][2];
      load_b(b, values + 2 * column);
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        mma_m16n8k16_bf16(sums[part][column / 8], a[part].words, b[0]);
        mma_m16n8k16_bf16(sums[part][column / 8 + 1], a[part].words, b[1]);
      }
    }
  }

  // Writes this warp's rows of S and m, divided by N.
  __device__ __forceinline__ void store(float* state, float* mean, const Shape& shape, float scale) const {
    const int head_dim = shape.head_dim, row = threadIdx.x / 32 * 16 + 2 * group_id();
    if (row >= head_dim) return;
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      if (thread_in_group() == 0) {
        *reinterpret_cast<float2*>(mean + part * head_dim + row) =
            make_float2(means[part][0] * scale, means[part][2] * scale);
      }
      store_rows(state + (part * head_dim + row) * head_dim, head_dim, sums[part], head_dim, scale);
    }
  }
};

template <int kHeadDim>
__global__ void __launch_bounds__(2 * kHeadDim, kKeyBlocksPerSm.at(true, kHeadDim))
    sum_keys(const ForwardParams params) {
  using Shared = KeyShared<kHeadDim>;
  auto& shared = shared_memory<Shared>();
  const Split split = locate_split(blockIdx.x, params.plan.keys, params.shape);

  StageCopies<kHeadDim, typename Shared::Stage, Shared::kStages> copies(shared.stages, params.k, params.v, false, split,
                                                                        params.shape);
  const auto start_copy = [&](int step) {
    const int first = split.begin + step * kSumTokens, stage = step % Shared::kStages;
    if (first < split.end) {
      copies.start(stage);
      if (const int token = first + 2 * threadIdx.x; threadIdx.x < kSumTokens / 2) {
        cp_async(SmemPointer(&shared.stages[stage].rotary[2 * threadIdx.x]), params.rotary_offsets + token,
                 token < split.end);
      }
    }
    cp_async_commit_group();
  };

  const char* rotary = reinterpret_cast<const char*>(params.packed_cos_sin + thread_in_group()) +
                       threadIdx.x / 32 * 16 * rotary_stride(params.shape);
  KeySums<kHeadDim> sums;
  for (int step = 0; step < Shared::kStages - 1; ++step) start_copy(step);
  for (int step = 0; split.begin + step * kSumTokens < split.end; ++step) {
    cp_async_wait_group<Shared::kStages - 2>();
    __syncthreads();  // this stage has arrived, and no thread reads the one to be overwritten
    start_copy(step + Shared::kStages - 1);
    const auto& stage = shared.stages[step % Shared::kStages];
#pragma unroll 1
    for (int token = 0; token < kSumTokens; token += 16) sums.add(stage, token, rotary);
  }

  const bool is_unsplit = params.plan.keys.splits_per_head == 1;
  sums.store((is_unsplit ? params.state : params.split_state) + blockIdx.x * params.shape.state_size(),
             (is_unsplit ? params.key_mean : params.split_mean) + blockIdx.x * params.shape.features(), params.shape,
             params.plan.inv_tokens);
  const float own = warp_max(largest(sums.max_abs));
  if (threadIdx.x % 32 == 0) shared.max_abs[threadIdx.x / 32] = own;
  __syncthreads();
  if (threadIdx.x == 0) {
    float max_abs = 0.f;
    for (int warp = 0; warp < kHeadDim / 16; ++warp) max_abs = fmaxf(max_abs, shared.max_abs[warp]);
    params.split_max_abs[blockIdx.x] = max_abs;
  }
}

constexpr int kQueryThreads = 128;

constexpr int kQueryWarps = kQueryThreads / 32;
constexpr int query_tiles(int head_dim) { return head_dim <= 96 ? 2 : 1; }  // above, registers suffice for one
template <int kHeadDim>
using QueryRing = ChunkRing<kHeadDim, query_tiles(kHeadDim), kQueryWarps * 16 * query_tiles(kHeadDim)>;

template <int kHeadDim>
struct QueryShared {
  static constexpr int kStride = kHeadDim + 8;
  alignas(16) uint16_t state[2 * kHeadDim * kStride];
  QueryTables<kHeadDim> head;
  typename QueryRing<kHeadDim>::Storage queries[kQueryWarps];
};

struct QueryPointers {
  SmemPointer state, means, temperatures;
};

// A warp's 32 tokens, or 16 above W = 96; a thread has tokens g, g + 8 and so on.
template <int kHeadDim>
struct QueryTile {
  using Shared = QueryShared<kHeadDim>;
  static constexpr int kTiles = query_tiles(kHeadDim);  // tiles of 16 tokens, sharing each fragment of S
  static constexpr int kRows = 2 * kTiles;              // tokens per thread

  const QueryPointers& shared;
  const CosSin* cos_sin;
  unsigned cos_sin_stride;
  RotaryRow rotary[kRows];

  Accumulator sums[kTiles][2][kHeadDim / 16] = {};  // by flow; eight columns of the flow's half each
  Accumulator normalizers[kTiles][2] = {};
  Bf16x2 max_abs = 0;

  // Adds the products of 16 columns of q.
  __device__ __forceinline__ void add(const Columns (&x)[kRows], unsigned column) {
    uint32_t means[2][2];
    load_b(means, shared.means + 16 * column);
    Temperatures temperatures[4];
    load_temperatures(temperatures, shared.temperatures + 16 * column);
    const SmemPointer state = shared.state + 2 * Shared::kStride * column;
    const char* const table = reinterpret_cast<const char*>(cos_sin) + column * cos_sin_stride;
#pragma unroll
    for (int flow = 0; flow < 2; ++flow) {
      __syncwarp();            // stops the compiler from computing the other flow's features here: too few registers
      FragmentA a[2][kTiles];  // by part
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        Pairs unrotated[2][2], rotated[2][2];  // by part, then token
#pragma unroll
        for (int row = 0; row < 2; ++row) {
          const int own = 2 * tile + row;
          const Pairs negative = x[own].negative();
          if (flow == 0) max_abs = max_bf16x2(max_abs, x[own].max_abs());
          const Parts parts(features_of(Exponents(x[own], temperatures, flow).values), negative, flow);
          unrotated[0][row] = parts.part[0], unrotated[1][row] = parts.part[1];
          rotated[0][row] = rotary[own].first(table).forward(parts.part[0]);
          rotated[1][row] = rotary[own].second(table).forward(parts.part[1]);
        }
#pragma unroll
        for (int part = 0; part < 2; ++part) {
          mma_m16n8k16_bf16(normalizers[tile][flow], rows_as_a(unrotated[part]).words, means[part]);
          a[part][tile] = rows_as_a(rotated[part]);
        }
      }
#pragma unroll
      for (int part = 0; part < 2; ++part) {
#pragma unroll
        for (int j = 0; j < kHeadDim / 2; j += 16) {
          uint32_t b[2][2];
          load_b(b, state + 2 * (part * kHeadDim * Shared::kStride + flow * kHeadDim / 2 + j));
#pragma unroll
          for (int tile = 0; tile < kTiles; ++tile) {
            mma_m16n8k16_bf16(sums[tile][flow][j / 8], a[part][tile].words, b[0]);
            mma_m16n8k16_bf16(sums[tile][flow][j / 8 + 1], a[part][tile].words, b[1]);
          }
        }
      }
    }
  }

  __device__ __forceinline__ void add_all(QueryRing<kHeadDim>& queries) {
#pragma unroll 1
    for (unsigned column = 0; column < kHeadDim; column += 16) {
      Columns x[kRows];
      queries.load(x);
      add(x, column);
    }
  }

  // Writes four columns of every 16 of both halves of a token's output; `half` is D/2.
  __device__ __forceinline__ void store(uint16_t* out, int own, int half) const {
    const int tile = own / 2, row = own % 2;
#pragma unroll
    for (int flow = 0; flow < 2; ++flow) {
      const float normalizer = normalizers[tile][flow][2 * row] + normalizers[tile][flow][2 * row + 1];
      const float inverse = reciprocal(max_or_nan(normalizer, 0.f) + float(kEpsilon));
      uint16_t* const columns = out + flow * half;
#pragma unroll
      for (int j = 0; j < kHeadDim / 32; ++j) {
        const auto& first = sums[tile][flow][2 * j];
        const auto& second = sums[tile][flow][2 * j + 1];
        const uint32_t words[2] = {
            pack_bf16_finite(first[2 * row] * inverse, first[2 * row + 1] * inverse),
            pack_bf16_finite(second[2 * row] * inverse, second[2 * row + 1] * inverse),
        };
        if (16 * j + 4 * thread_in_group() < half) store_words(columns + 16 * j, words);
      }
    }
  }
};

// Writes a split's outputs. Returns whether they must be recomputed with a shift.
template <int kHeadDim>
__device__ __forceinline__ bool attend_split(QueryShared<kHeadDim>& shared, const ForwardParams& params) {
  using Shared = QueryShared<kHeadDim>;
  constexpr int kTiles = QueryTile<kHeadDim>::kTiles, kRows = QueryTile<kHeadDim>::kRows;
  constexpr int kTokensPerStep = kQueryWarps * 16 * kTiles;
  const Split split = locate_split(blockIdx.x, params.plan.queries, params.shape);
  const int head_dim = params.shape.head_dim;
  load_state<kHeadDim, Shared::kStride>(shared.state, params.state + int64_t{split.head} * params.shape.state_size(),
                                        head_dim, kQueryThreads, true, interleave_16);
  if (__syncthreads_or(shared.head.load(params, split, kQueryThreads))) return true;

  const int warp = threadIdx.x / 32;
  int token = split.begin + warp * (16 * kTiles) + group_id();
  TokenPosition first_position(token, params.shape);
  const TokenPosition position_step(kTokensPerStep, params.shape), eight(8, params.shape);
  QueryRing<kHeadDim> queries(shared.queries[warp], rows_of<false>(params.q, params.shape, split), token - group_id(),
                              split.end);
  const int64_t stride = int64_t{params.shape.heads} * head_dim;
  auto* out =
      static_cast<uint16_t*>(params.out) + first_row(split, params.shape) + token * stride + 4 * thread_in_group();
  bool needs_shift = false;
  const QueryPointers pointers = {b_rows(shared.state, Shared::kStride), shared.head.mean_rows(),
                                  shared.head.temperature_rows()};
  for (; token - group_id() < split.end; token += kTokensPerStep) {
    QueryTile<kHeadDim> tile{pointers, params.packed_cos_sin, rotary_stride(params.shape)};
    TokenPosition position = first_position;
    first_position.move(position_step, params.shape);
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      tile.rotary[row] = RotaryRow(position, params.shape);
      position.move(eight, params.shape);
    }
    tile.add_all(queries);
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      if (token + 8 * row < split.end) tile.store(out + 8 * row * stride, row, head_dim / 2);
    }
    needs_shift |= largest(tile.max_abs) > kMaxUnshiftedExponent;
    out += kTokensPerStep * stride;
  }
  cp_async_wait_group<0>();
  return __syncthreads_or(needs_shift);
}

template <int kHeadDim>
__global__ void __launch_bounds__(kQueryThreads, kQueryBlocksPerSm.at(true, kHeadDim))
    attend(const ForwardParams params) {
  const bool needs_shift = attend_split<kHeadDim>(shared_memory<QueryShared<kHeadDim>>(), params);
  if (threadIdx.x == 0) params.needs_shift[blockIdx.x] = needs_shift ? 1.f : 0.f;
}

}  // namespace

const char* launch_sum_keys(const ForwardParams& params, void* stream) {
  return dispatch_head_dim(params.shape.padded_head_dim(), [&](auto head_dim) {
    constexpr int kHeadDim = head_dim();
    return launch_blocks<KeyShared<kHeadDim>, kHeadDim, kKeyBlocksPerSm.at(true, kHeadDim)>(
        sum_keys<kHeadDim>, params.plan.keys.splits, 2 * kHeadDim, stream, params);
  });
}

const char* launch_attend(const ForwardParams& params, void* stream) {
  return dispatch_head_dim(params.shape.padded_head_dim(), [&](auto head_dim) {
    constexpr int kHeadDim = head_dim();
    return launch_blocks<QueryShared<kHeadDim>, kHeadDim, kQueryBlocksPerSm.at(true, kHeadDim)>(
        attend<kHeadDim>, params.plan.queries.splits, kQueryThreads, stream, params);
  });
}

}  // namespace polaformer::bf16
