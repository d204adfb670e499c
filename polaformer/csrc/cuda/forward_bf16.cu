// Forward for aligned bf16 (forward.cu tells the equations and which kernel follows which):
//
//   sum_keys   S and m of each split's tokens       A: features turned and transposed, B: values
//   attend     outputs                             A: features turned, B: S
//
// Normalizers and means come from the tensor cores, too: of features that are not turned, m as the sum of two bf16.
#include "bf16.cuh"
#include "kernels.cuh"

namespace polaformer::bf16 {
namespace {

template <int kWidth>
struct KeyShared {
  using Stage = TokenStage<kWidth>;  // of keys, and values as B fragments
  static constexpr int kStages = 3;
  Stage stages[kStages];
  float max_abs[kWidth / 16];
};

// One block per split, one warp per 16 columns of k and all tokens.
template <int kWidth>
struct KeySums {
  using Shared = KeyShared<kWidth>;

  Accumulator sums[2][kWidth / 8] = {};  // of S: by part; rows 2g and 2g + 1 of the warp's columns, eight columns each
  Accumulator means[2] = {};
  Bf16x2 max_abs = 0;

  // Adds 16 tokens of a stage.
  __device__ __forceinline__ void add(const typename Shared::Stage& stage, int begin, const char* rotary) {
    Pairs plain[2][2], rotated[2][2];  // by part, then token
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const int token = begin + lane_group() + 8 * row;
      const RotaryPlace place = stage.rotary[token];
      const Rotation by_row(__ldg(reinterpret_cast<const uint2*>(rotary + place.by_row)));
      const Rotation by_column(__ldg(reinterpret_cast<const uint2*>(rotary + place.by_column)));
      const uint2 words = *reinterpret_cast<const uint2*>(stage.rows + token * Shared::Stage::kRowStride +
                                                          threadIdx.x / 32 * 16 + 4 * lane_member());
      const Columns x = {words.x, words.y};
      max_abs = max_bf16x2(max_abs, x.max_abs());
      const Pairs features = key_features(x), negative = x.negative();
      plain[0][row] = unmasked(features, negative), plain[1][row] = masked(features, negative);
      rotated[0][row] = by_row.forward(plain[0][row]), rotated[1][row] = by_column.forward(plain[1][row]);
    }
    __syncwarp();  // keeps other tokens' features from being made meanwhile: there are no registers for them
    FragmentA a[2];
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      multiply_bf16(means[part], columns_as_a(plain[part]).words, {kOnes, kOnes});
      a[part] = columns_as_a(rotated[part]);
    }
    const SharedPointer values = b_rows(stage.b, Shared::Stage::kBStride) + begin * Shared::Stage::kBStride * 2;
#pragma unroll
    for (int column = 0; column < kWidth; column += 16) {
      uint32_t b[2][2];
      load_b(b, values + 2 * column);
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        multiply_bf16(sums[part][column / 8], a[part].words, b[0]);
        multiply_bf16(sums[part][column / 8 + 1], a[part].words, b[1]);
      }
    }
  }

  // Writes this warp's rows of S and m, divided by N.
  __device__ __forceinline__ void store(float* state, float* mean, const Shape& shape, float scale) const {
    const int width = shape.head_width, row = threadIdx.x / 32 * 16 + 2 * lane_group();
    if (row >= width) return;
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      if (lane_member() == 0) {
        *reinterpret_cast<float2*>(mean + part * width + row) =
            make_float2(means[part][0] * scale, means[part][2] * scale);
      }
      store_rows(state + (part * width + row) * width, width, sums[part], width, scale);
    }
  }
};

template <int kWidth>
__global__ void __launch_bounds__(2 * kWidth, kKeyBlocksPerSm.at(true, kWidth)) sum_keys(const Forward f) {
  using Shared = KeyShared<kWidth>;
  auto& shared = shared_memory<Shared>();
  const Split split = locate_split(blockIdx.x, f.plan.keys, f.shape);

  StageCopies<kWidth, typename Shared::Stage, Shared::kStages> copies(shared.stages, f.k, f.v, false, split, f.shape);
  const auto start_copy = [&](int step) {
    const int first = split.begin + step * kSumTokens, stage = step % Shared::kStages;
    if (first < split.end) {
      copies.start(stage);
      if (const int token = first + 2 * threadIdx.x; threadIdx.x < kSumTokens / 2) {
        copy_async(SharedPointer(&shared.stages[stage].rotary[2 * threadIdx.x]), f.rotary_places + token,
                   token < split.end);
      }
    }
    commit_copies();
  };

  const char* rotary =
      reinterpret_cast<const char*>(f.packed_turns + lane_member()) + threadIdx.x / 32 * 16 * rotary_stride(f.shape);
  KeySums<kWidth> sums;
  for (int step = 0; step < Shared::kStages - 1; ++step) start_copy(step);
  for (int step = 0; split.begin + step * kSumTokens < split.end; ++step) {
    wait_for_copies<Shared::kStages - 2>();
    __syncthreads();  // this stage has arrived, and nobody reads the one that is overwritten next
    start_copy(step + Shared::kStages - 1);
    const auto& stage = shared.stages[step % Shared::kStages];
#pragma unroll 1
    for (int token = 0; token < kSumTokens; token += 16) sums.add(stage, token, rotary);
  }

  const bool whole = f.plan.keys.splits_per_head == 1;
  sums.store((whole ? f.state : f.split_state) + blockIdx.x * f.shape.state_size(),
             (whole ? f.key_mean : f.split_mean) + blockIdx.x * f.shape.features(), f.shape, f.plan.mean_weight);
  const float own = max_over_warp(largest(sums.max_abs));
  if (threadIdx.x % 32 == 0) shared.max_abs[threadIdx.x / 32] = own;
  __syncthreads();
  if (threadIdx.x == 0) {
    float max_abs = 0.f;
    for (int warp = 0; warp < kWidth / 16; ++warp) max_abs = fmaxf(max_abs, shared.max_abs[warp]);
    f.split_max_abs[blockIdx.x] = max_abs;
  }
}

constexpr int kQueryThreads = 128;

template <int kWidth>
struct QueryShared {
  static constexpr int kStride = kWidth + 8;
  alignas(16) uint16_t state[2 * kWidth * kStride];
  QueryTables<kWidth> head;
};

struct QueryPointers {
  SharedPointer state, means, temperatures;
};

// A warp's 32 tokens, of which a thread has g, g + 8, g + 16 and g + 24; above W = 96 there are registers for 16 alone.
template <int kWidth>
struct QueryTile {
  using Shared = QueryShared<kWidth>;
  static constexpr int kTiles = kWidth <= 96 ? 2 : 1;  // of 16: each fragment of S is loaded once for all
  static constexpr int kRows = 2 * kTiles;             // tokens of a thread

  const QueryPointers& shared;
  const CosSin* turns;
  unsigned turns_stride;
  int head_width;
  const char* queries[kRows];  // this thread's columns of each token
  bool inside[kRows];
  RotaryRow rotary[kRows];

  Accumulator sums[kTiles][2][kWidth / 16] = {};  // by flow; eight columns of its half each
  Accumulator normalizers[kTiles][2] = {};
  Bf16x2 max_abs = 0;

  __device__ __forceinline__ void load(Columns (&x)[kRows], unsigned column) const {
    const bool valid = int(column) + 4 * lane_member() < head_width;
#pragma unroll
    for (int row = 0; row < kRows; ++row) x[row] = load_four(queries[row] + 2 * column, inside[row] && valid);
  }

  // Adds the products of 16 columns of the queries.
  __device__ __forceinline__ void add(const Columns (&x)[kRows], unsigned column) {
    uint32_t means[2][2];
    load_b(means, shared.means + 16 * column);
    Temperatures temperatures[4];
    load_temperatures(temperatures, shared.temperatures + 16 * column);
    const SharedPointer state = shared.state + 2 * Shared::kStride * column;
    const char* const table = reinterpret_cast<const char*>(turns) + column * turns_stride;
#pragma unroll
    for (int flow = 0; flow < 2; ++flow) {
      __syncwarp();  // keeps the other flow's features from being made meanwhile: there are no registers for them
      FragmentA a[2][kTiles];  // by part
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        Pairs plain[2][2], rotated[2][2];  // by part, then token
#pragma unroll
        for (int row = 0; row < 2; ++row) {
          const int own = 2 * tile + row;
          const Pairs negative = x[own].negative();
          if (flow == 0) max_abs = max_bf16x2(max_abs, x[own].max_abs());
          const Parts parts(features_of(Exponents(x[own], temperatures, flow).values), negative, flow);
          plain[0][row] = parts.part[0], plain[1][row] = parts.part[1];
          rotated[0][row] = rotary[own].first(table).forward(parts.part[0]);
          rotated[1][row] = rotary[own].second(table).forward(parts.part[1]);
        }
#pragma unroll
        for (int part = 0; part < 2; ++part) {
          multiply_bf16(normalizers[tile][flow], rows_as_a(plain[part]).words, means[part]);
          a[part][tile] = rows_as_a(rotated[part]);
        }
      }
#pragma unroll
      for (int part = 0; part < 2; ++part) {
#pragma unroll
        for (int j = 0; j < kWidth / 2; j += 16) {
          uint32_t b[2][2];
          load_b(b, state + 2 * (part * kWidth * Shared::kStride + flow * kWidth / 2 + j));
#pragma unroll
          for (int tile = 0; tile < kTiles; ++tile) {
            multiply_bf16(sums[tile][flow][j / 8], a[part][tile].words, b[0]);
            multiply_bf16(sums[tile][flow][j / 8 + 1], a[part][tile].words, b[1]);
          }
        }
      }
    }
  }

  __device__ __forceinline__ void add_all() {
    Columns ahead[kRows];
    load(ahead, 0);
#pragma unroll 1
    for (unsigned column = 0; column < kWidth; column += 16) {
      Columns x[kRows];
#pragma unroll
      for (int row = 0; row < kRows; ++row) x[row] = ahead[row];
      if (column + 16 < kWidth) load(ahead, column + 16);
      add(x, column);
    }
  }

  // Writes four columns of every 16 of a token's two halves; `half` is the width of one.
  __device__ __forceinline__ void store(uint16_t* out, int own, int half) const {
    const int tile = own / 2, row = own % 2;
#pragma unroll
    for (int flow = 0; flow < 2; ++flow) {
      const float normalizer = normalizers[tile][flow][2 * row] + normalizers[tile][flow][2 * row + 1];
      const float inverse = reciprocal(max_or_nan(normalizer, 0.f) + float(kEpsilon));
      uint16_t* const place = out + flow * half;
#pragma unroll
      for (int j = 0; j < kWidth / 32; ++j) {
        const auto& first = sums[tile][flow][2 * j];
        const auto& second = sums[tile][flow][2 * j + 1];
        const uint32_t words[2] = {
            pack_bf16_finite(first[2 * row] * inverse, first[2 * row + 1] * inverse),
            pack_bf16_finite(second[2 * row] * inverse, second[2 * row + 1] * inverse),
        };
        if (16 * j + 4 * lane_member() < half) store_words(place + 16 * j, words);
      }
    }
  }
};

// Writes a split's outputs. Returns whether they are to be computed again with a shift.
template <int kWidth>
__device__ __forceinline__ bool attend_split(QueryShared<kWidth>& shared, const Forward& f) {
  using Shared = QueryShared<kWidth>;
  constexpr int kTiles = QueryTile<kWidth>::kTiles, kRows = QueryTile<kWidth>::kRows;
  constexpr int kTokensPerStep = kQueryThreads / 32 * 16 * kTiles;
  const Split split = locate_split(blockIdx.x, f.plan.queries, f.shape);
  const int width = f.shape.head_width;
  load_state<kWidth, Shared::kStride>(shared.state, f.state + int64_t{split.head} * f.shape.state_size(), width,
                                      kQueryThreads, true, interleave_16);
  if (__syncthreads_or(shared.head.load(f, split, kQueryThreads))) return true;

  int token = split.begin + threadIdx.x / 32 * (16 * kTiles) + lane_group();
  Place first_place(token, f.shape);
  const Place place_step(kTokensPerStep, f.shape), eight(8, f.shape);
  const Rows<false> queries = rows_of<false>(f.q, f.shape, split);
  const char* query = queries.at(token, 4 * lane_member());
  const int64_t stride = int64_t{f.shape.heads} * width;
  auto* out = static_cast<uint16_t*>(f.out) + first_row(split, f.shape) + token * stride + 4 * lane_member();
  bool needs_shift = false;
  const QueryPointers pointers = {b_rows(shared.state, Shared::kStride), shared.head.mean_rows(),
                                  shared.head.temperature_rows()};
  for (; token - lane_group() < split.end; token += kTokensPerStep) {
    QueryTile<kWidth> tile{pointers, f.packed_turns, rotary_stride(f.shape), width};
    Place place = first_place;
    first_place.move(place_step, f.shape);
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      tile.queries[row] = query + 8 * row * queries.stride;
      tile.inside[row] = token + 8 * row < split.end;
      tile.rotary[row] = RotaryRow(place, f.shape);
      place.move(eight, f.shape);
    }
    tile.add_all();
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      if (tile.inside[row]) tile.store(out + 8 * row * stride, row, width / 2);
    }
    needs_shift |= largest(tile.max_abs) > kFreeExponent;
    query += kTokensPerStep * queries.stride, out += kTokensPerStep * stride;
  }
  return __syncthreads_or(needs_shift);
}

template <int kWidth>
__global__ void __launch_bounds__(kQueryThreads, kQueryBlocksPerSm.at(true, kWidth)) attend(const Forward f) {
  const bool needs_shift = attend_split<kWidth>(shared_memory<QueryShared<kWidth>>(), f);
  if (threadIdx.x == 0) f.needs_shift[blockIdx.x] = needs_shift ? 1.f : 0.f;
}

}  // namespace

const char* launch_sum_keys(const Forward& f, void* stream) {
  return visit_width(f.shape.padded_width(), [&](auto width) {
    constexpr int kBlocksPerSm = kKeyBlocksPerSm.at(true, width());
    return launch_blocks<KeyShared<width()>, width(), kBlocksPerSm>(sum_keys<width()>, f.plan.keys.splits, 2 * width(),
                                                                    stream, f);
  });
}

const char* launch_attend(const Forward& f, void* stream) {
  return visit_width(f.shape.padded_width(), [&](auto width) {
    constexpr int kBlocksPerSm = kQueryBlocksPerSm.at(true, width());
    return launch_blocks<QueryShared<width()>, width(), kBlocksPerSm>(attend<width()>, f.plan.queries.splits,
                                                                      kQueryThreads, stream, f);
  });
}

}  // namespace polaformer::bf16
