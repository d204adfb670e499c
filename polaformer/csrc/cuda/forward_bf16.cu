// Forward kernels of the bf16 path; forward.cu has the equations and the call graph.
//
//   sum_keys   S and m of each split     A: rotated features, transposed     B: values
//   attend     outputs                   A: rotated features                 B: S
//
// Normalizers and means are tensor-core products, too: of features before rotation, with m as the sum of two bf16.
// On compute capability 9.0 warpgroups multiply in `attend`, elsewhere warps.
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
#pragma unroll
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

constexpr int kQueryThreads = 128, kQueryWarps = kQueryThreads / 32;

// Products with S by mma.sync: S lies in shared memory as rows, and a warp loads each fragment once for all its tiles
// of 16 tokens.
template <int kHeadDim>
struct WarpProducts {
  static constexpr int kTiles = kHeadDim <= 96 ? 2 : 1;  // above, registers suffice for one
  static constexpr int columns_unrolled() { return 1; }
  static constexpr int kStride = kHeadDim + 8;
  using State = uint16_t[2 * kHeadDim * kStride];
  using Sums = Accumulator[kTiles][2][kHeadDim / 16];  // by flow; eight columns of the flow's half each
  using Queries = ChunkRing<kHeadDim, kTiles, kQueryWarps * 16 * kTiles>;

  SmemPointer state;

  __device__ __forceinline__ explicit WarpProducts(const State& state) : state(b_rows(state, kStride)) {}

  static __device__ __forceinline__ void load(State& state, const float* of_head, int head_dim) {
    load_state<kHeadDim, kStride>(state, of_head, head_dim, kQueryThreads, true, interleave_16);
  }

  // Adds the products of 16 features of one flow; a: by part.
  __device__ __forceinline__ void add(Sums& sums, const FragmentA (&a)[2][kTiles], int column, int flow) const {
#pragma unroll
    for (int part = 0; part < 2; ++part) {
#pragma unroll
      for (int j = 0; j < kHeadDim / 2; j += 16) {
        uint32_t b[2][2];
        load_b(b, state + 2 * ((part * kHeadDim + column) * kStride + flow * kHeadDim / 2 + j));
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          mma_m16n8k16_bf16(sums[tile][flow][j / 8], a[part][tile].words, b[0]);
          mma_m16n8k16_bf16(sums[tile][flow][j / 8 + 1], a[part][tile].words, b[1]);
        }
      }
    }
  }
  static __device__ __forceinline__ void finish(Sums&) {}
};

// Products with S by wgmma, whose operand A are the four warps' tiles of 16 tokens.
template <int kHeadDim>
struct WarpgroupProducts {
  static constexpr int kTiles = 1;
  // Of 16, so that all offsets are constants; above W = 96 registers suffice for two.
  static constexpr int columns_unrolled() { return kHeadDim <= 96 ? kHeadDim / 16 : 2; }
  using State = CoreMatrices<kHeadDim>;
  using Sums = Accumulator[kTiles][2][kHeadDim / 16];
  using Queries = TileCopies<kHeadDim, kQueryWarps * 16>;

  MatrixDescriptor state;

  __device__ __forceinline__ explicit WarpgroupProducts(const State& state) : state(state.by_features()) {}

  static __device__ __forceinline__ void load(State& state, const float* of_head, int head_dim) {
    state.load(of_head, head_dim, kQueryThreads, true, interleave_16);
  }

  __device__ __forceinline__ void add(Sums& sums, const FragmentA (&a)[2][kTiles], int column, int flow) const {
    warpgroup_arrive();
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      wgmma_m64k16_bf16<Major::kN>(sums[0][flow], a[part][0].words,
                                   state + State::offset(column, part, flow * kHeadDim / 2), column + part > 0);
    }
    warpgroup_commit_batch();
    warpgroup_wait<1>();  // the other flow's products no longer read its fragments
  }
  static __device__ __forceinline__ void finish(Sums& sums) {
    warpgroup_wait<0>();
    warpgroup_fence(sums[0][0]);
    warpgroup_fence(sums[0][1]);
  }
};

template <int kHeadDim, class Products>
struct QueryShared {
  alignas(16) typename Products::State state;
  QueryTables<kHeadDim> head;
  typename Products::Queries::Storage queries[kQueryWarps];
};

// A warp's tokens of one step; a thread has tokens g, g + 8 and so on.
template <int kHeadDim, class Products>
struct QueryTile {
  static constexpr int kTiles = Products::kTiles;  // of 16 tokens
  static constexpr int kRows = 2 * kTiles;         // tokens per thread

  const Products& products;
  SmemPointer mean_rows, temperature_rows;
  const CosSin* cos_sin;
  unsigned cos_sin_stride;
  RotaryRow rotary[kRows];

  typename Products::Sums sums = {};
  Accumulator normalizers[kTiles][2] = {};
  Bf16x2 max_abs = 0;

  // Adds the products of 16 columns of q.
  __device__ __forceinline__ void add(const Columns (&x)[kRows], unsigned column) {
    uint32_t means[2][2];
    load_b(means, mean_rows + 16 * column);
    Temperatures temperatures[4];
    load_temperatures(temperatures, temperature_rows + 16 * column);
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
      products.add(sums, a, column, flow);
    }
  }

  __device__ __forceinline__ void add_all(typename Products::Queries& queries) {
#pragma unroll(Products::columns_unrolled())
    for (unsigned column = 0; column < kHeadDim; column += 16) {
      Columns x[kRows];
      queries.load(x, column);
      add(x, column);
    }
    products.finish(sums);
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
template <int kHeadDim, class Products>
__device__ __forceinline__ bool attend_split(QueryShared<kHeadDim, Products>& shared, const ForwardParams& params) {
  constexpr int kTiles = Products::kTiles, kRows = 2 * kTiles, kTokensPerStep = kQueryWarps * 16 * kTiles;
  const Split split = locate_split(blockIdx.x, params.plan.queries, params.shape);
  const int head_dim = params.shape.head_dim;
  Products::load(shared.state, params.state + int64_t{split.head} * params.shape.state_size(), head_dim);
  if (__syncthreads_or(shared.head.load(params, split, kQueryThreads))) return true;

  const int warp = threadIdx.x / 32;
  const Products products(shared.state);
  const SmemPointer mean_rows = shared.head.mean_rows(), temperature_rows = shared.head.temperature_rows();
  int token = split.begin + warp * (16 * kTiles) + group_id();
  TokenPosition first_position(token, params.shape);
  const TokenPosition position_step(kTokensPerStep, params.shape), eight(8, params.shape);
  typename Products::Queries queries(shared.queries[warp], rows_of<false>(params.q, params.shape, split),
                                     token - group_id(), split.end);
  const int64_t stride = int64_t{params.shape.heads} * head_dim;
  auto* out =
      static_cast<uint16_t*>(params.out) + first_row(split, params.shape) + token * stride + 4 * thread_in_group();
  bool needs_shift = false;
  for (int step = split.begin; step < split.end; step += kTokensPerStep) {
    QueryTile<kHeadDim, Products> tile{products, mean_rows, temperature_rows, params.packed_cos_sin,
                                       rotary_stride(params.shape)};
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
    token += kTokensPerStep, out += kTokensPerStep * stride;
  }
  cp_async_wait_group<0>();
  return __syncthreads_or(needs_shift);
}

template <int kHeadDim>
__global__ void __launch_bounds__(kQueryThreads, kQueryBlocksPerSm.at(true, kHeadDim, kIsWarpgroupCode))
    attend(const ForwardParams params) {
  choose_products(params.plan.uses_warpgroups, [&](auto uses_warpgroups) {
    using Products = std::conditional_t<uses_warpgroups(), WarpgroupProducts<kHeadDim>, WarpProducts<kHeadDim>>;
    const bool needs_shift = attend_split(shared_memory<QueryShared<kHeadDim, Products>>(), params);
    if (threadIdx.x == 0) params.needs_shift[blockIdx.x] = needs_shift ? 1.f : 0.f;
  });
}

}  // namespace

bool has_warpgroups() { return has_warpgroup_code(); }

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
    const int64_t blocks = params.plan.queries.splits;
    if (params.plan.uses_warpgroups) {
      return launch_warpgroups<QueryShared<kHeadDim, WarpgroupProducts<kHeadDim>>,
                               kQueryBlocksPerSm.at(true, kHeadDim, true)>(attend<kHeadDim>, blocks, kQueryThreads,
                                                                           stream, params);
    }
    return launch_blocks<QueryShared<kHeadDim, WarpProducts<kHeadDim>>, kHeadDim, kQueryBlocksPerSm.at(true, kHeadDim)>(
        attend<kHeadDim>, blocks, kQueryThreads, stream, params);
  });
}

}  // namespace polaformer::bf16
