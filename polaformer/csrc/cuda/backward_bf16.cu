// Backward kernels of the bf16 path; backward.cu has the equations and the call graph.
//
//   differentiate_queries   dq, sums of the logits' gradients, and 1/z and z·dz of each token and flow
//   sum_queries             dS and dm of each split     A: rotated features / z, transposed     B: dout
//   differentiate_keys      dk and dv                   A: v, then rotated features        B: dS, transposed and not
//
// The gradient of a token's rotated features is S dout / z. As rotations are orthogonal, z·dz = −Σ φ · R⁻¹(S dout / z).
// On compute capability 9.0 warpgroups multiply in `differentiate_keys`, elsewhere warps.
#include "bf16.cuh"
#include "kernels.cuh"

namespace polaformer::bf16 {
namespace {

// Packs one row of two accumulators (16 columns) to bf16 pairs, as a thread of an A fragment holds them.
__device__ __forceinline__ Pairs pairs_of(const Accumulator& first, const Accumulator& second, int row) {
  return {pack_bf16(first[2 * row], first[2 * row + 1]), pack_bf16(second[2 * row], second[2 * row + 1])};
}

// Temperatures of one flow, of four neighbouring columns.
struct alignas(16) TemperaturePairs {
  Pairs positive, negative;  // for positive and negative inputs
};

template <int kHeadDim>
struct QueryGradShared {
  static constexpr int kWarps = kHeadDim / 16;
  static constexpr int kStride = kHeadDim + 8;
  alignas(16) uint16_t state[2 * kHeadDim * kStride];
  QueryTables<kHeadDim> head;
  MeanPairs means[kHeadDim / 4];
  TemperaturePairs temperatures[2][kHeadDim / 4];  // by flow
  union {
    uint4 grads[kWarps][kHeadDim / 16][2][32];  // R⁻¹(S dout): by warp, 16 columns, flow, thread; next tile's inputs
    float logits[kWarps][2][2 * kHeadDim];      // sums of each warp, after the last token
  };

  __device__ __forceinline__ void load_temperatures(const BackwardParams& params, const Split& split, int threads) {
    const int head_dim = params.shape.head_dim;
    for (int i = opaque(int(threadIdx.x)); i < 2 * (kHeadDim / 4); i += threads) {
      const int flow = i / (kHeadDim / 4), column = i % (kHeadDim / 4) * 4;
      const float* logits =
          (flow ? params.opposite_logits : params.same_logits) + int64_t{split.head_in_batch} * (2 * head_dim);
      TemperaturePairs pairs = {};
      if (column < head_dim) {
        const auto of_part = [&](int part) -> Pairs {
          const float* own = logits + part * head_dim + column;
          return {pack_bf16(logistic(own[0]), logistic(own[2])), pack_bf16(logistic(own[1]), logistic(own[3]))};
        };
        pairs = {of_part(flow), of_part(1 - flow)};
      }
      temperatures[flow][column / 4] = pairs;
    }
  }
};

struct QueryGradPointers {
  SmemPointer state, means, temperatures, mean_pairs, temperature_pairs, grads, inputs;
};

// Copies of a warp's next 16 tokens into its share of `grads`, as chunks of 16 columns: a slot has one of the lower and
// one of the upper half, the first slots those of dout, the others those of q. The second pass refills a slot once it
// has read it; the first pass reads the copies before it stores over them.
template <int kHeadDim>
struct QueryGradCopies {
  static constexpr int kSlots = kHeadDim / 16;

  SmemPointer target;  // of this lane's 16 bytes
  Rows<false> grads;
  int64_t query_offset, query_stride;  // of q in bytes, less those of dout
  int token, end;                      // this lane's token

  __device__ __forceinline__ QueryGradCopies(SmemPointer target, const Rows<false>& queries, const Rows<false>& grads,
                                             int first, int end)
      : target(target),
        grads(grads),
        query_offset(queries.data - grads.data),
        query_stride(queries.stride - grads.stride),
        token(first + threadIdx.x % 32 / 2),
        end(end) {}

  // Starts the copies of a slot.
  __device__ __forceinline__ void start(int slot) const {
    const bool is_query = slot >= kSlots / 2;
    const int column = (is_query ? slot - kSlots / 2 : slot) * 16 + threadIdx.x % 2 * 8;
    const int half = is_query ? kHeadDim / 2 : grads.head_dim / 2;
    const char* const row = grads.at(token, column) + (-int64_t{is_query} & (query_offset + token * query_stride));
    const SmemPointer to = target + slot * (2 * kChunkBytes);
    cp_async(to, row, token < end && column < half);
    cp_async(to + kChunkBytes, row + 2 * half, token < end && column + half < grads.head_dim);
    cp_async_commit_group();
  }

  // Number of a chunk in this order, of 16 columns of q from `column` on and of dout's, by flow.
  static __device__ __forceinline__ int query_chunk(unsigned column) {
    const unsigned upper = column >= kHeadDim / 2;
    return kSlots + int(column / 8 - upper * (kSlots - 1));
  }
  static __device__ __forceinline__ int grad_chunk(int flow, int i) { return 2 * i + flow; }
};

// A warp's 16 tokens. Two passes over their columns, as z and dz are sums over all of them.
template <int kHeadDim>
struct QueryGradTile {
  using Shared = QueryGradShared<kHeadDim>;

  const QueryGradPointers& shared;
  const CosSin* cos_sin;
  unsigned cos_sin_stride;
  int head_dim;
  const char* queries[2];  // address of this thread's columns, per token
  bool inside[2];
  RotaryRow rotary[2];

  Accumulator normalizers[2] = {};
  Accumulator dots[2] = {};  // φ · R⁻¹(S dout)
  Bf16x2 max_abs = 0;

  __device__ __forceinline__ void load(Columns (&x)[2], unsigned column) const {
    const bool valid = int(column) + 4 * thread_in_group() < head_dim;
#pragma unroll
    for (int row = 0; row < 2; ++row) x[row] = load_four(queries[row] + 2 * column, inside[row] && valid);
  }

  // Loads a copied chunk.
  __device__ __forceinline__ void load_copied(Columns (&x)[2], int chunk) const {
    load_chunks(x, shared.inputs + chunk * kChunkBytes);
  }

  // Loads A fragments of dout, by flow.
  __device__ __forceinline__ void load_grads(FragmentA (&grads)[2][kHeadDim / 32]) const {
    const uint32_t zero = static_cast<uint32_t>(head_dim) >> 31;
#pragma unroll
    for (int flow = 0; flow < 2; ++flow) {
#pragma unroll
      for (int i = 0; i < kHeadDim / 32; ++i) {
        Columns x[2];
        load_copied(x, QueryGradCopies<kHeadDim>::grad_chunk(flow, i));
        grads[flow][i] = pin_registers({{x[0].low, x[1].low, x[0].high, x[1].high}}, zero);
      }
    }
  }

  // Adds 16 columns to the normalizers and dots; stores R⁻¹(S dout) of them in shared memory.
  __device__ __forceinline__ void add(const FragmentA (&grads)[2][kHeadDim / 32], const Columns (&x)[2],
                                      unsigned column) {
    const char* const table = reinterpret_cast<const char*>(cos_sin) + column * cos_sin_stride;
    const Rotation by_row[2] = {rotary[0].first(table), rotary[1].first(table)};
    const Rotation by_column[2] = {rotary[0].second(table), rotary[1].second(table)};
    const Pairs negative[2] = {x[0].negative(), x[1].negative()};
    max_abs = max_bf16x2(max_abs, max_bf16x2(x[0].max_abs(), x[1].max_abs()));
    uint32_t means[2][2];
    load_b(means, shared.means + 16 * column);
    Temperatures temperatures[4];
    load_temperatures(temperatures, shared.temperatures + 16 * column);
    const SmemPointer state = shared.state + 2 * Shared::kStride * column;
#pragma unroll
    for (int flow = 0; flow < 2; ++flow) {
      Accumulator products[2][2] = {};  // S dout, by part; first and second elements of the pairs
#pragma unroll
      for (int i = 0; i < kHeadDim / 32; ++i) {
#pragma unroll
        for (int part = 0; part < 2; ++part) {
          uint32_t b[2][2];
          load_b_transposed(b, state + 2 * (part * kHeadDim * Shared::kStride + flow * kHeadDim / 2 + 16 * i));
          mma_m16n8k16_bf16(products[part][0], grads[flow][i].words, b[0]);
          mma_m16n8k16_bf16(products[part][1], grads[flow][i].words, b[1]);
        }
      }
      Pairs unrotated[2][2], back[2], dot[2];  // by part, then token
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        const Pairs features = features_of(Exponents(x[row], temperatures, flow).values);
        const Parts parts(features, negative[row], flow);
        unrotated[0][row] = parts.part[0], unrotated[1][row] = parts.part[1];
        const Pairs first = by_row[row].back(pairs_of(products[0][0], products[0][1], row));
        const Pairs second = by_column[row].back(pairs_of(products[1][0], products[1][1], row));
        back[row] = flow ? choose(negative[row], first, second) : choose(negative[row], second, first);
        dot[row] = multiply(features, back[row]);
      }
      store_words(shared.grads + int(column / 16 * 2 + flow) * 512,
                  {back[0].first, back[0].second, back[1].first, back[1].second});
      mma_m16n8k16_bf16(normalizers[flow], rows_as_a(unrotated[0]).words, means[0]);
      mma_m16n8k16_bf16(normalizers[flow], rows_as_a(unrotated[1]).words, means[1]);
      mma_m16n8k16_bf16(dots[flow], rows_as_a(dot).words, {kOnes, kOnes});
    }
  }

  // Per flow and token, after the pass over all columns.
  struct Stats {
    float inverses[2][2];          // 1/z
    float grad_normalizers[2][2];  // z·dz
  };
  __device__ __forceinline__ Stats stats() const {
    constexpr float kLargest = float(kMaxNormalizerGradient);
    Stats result;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int flow = i / 2, row = i % 2;
      const float sum = normalizers[flow][2 * row] + normalizers[flow][2 * row + 1];
      const float normalizer = max_or_nan(sum, 0.f) + float(kEpsilon);
      const float inverse = reciprocal(normalizer);
      const float exact = -dots[flow][2 * row] * inverse * inverse;
      result.inverses[flow][row] = inverse;
      result.grad_normalizers[flow][row] = min_or_nan(max_or_nan(exact, -kLargest), kLargest) * normalizer;
    }
    return result;
  }

  // Returns dq of 16 columns; adds the gradients of their temperatures to the sums over tokens, in column column / 16
  // of `logits`.
  __device__ __forceinline__ void finish(Columns (&grad_queries)[2], Accumulator (&logits)[2][2], const Stats& stats,
                                         const float (&log_inverses)[2][2], const Columns (&x)[2],
                                         unsigned column) const {
    Temperatures temperatures[4];
    load_temperatures(temperatures, shared.temperatures + 16 * column);
    const MeanPairs means = load_means(shared.mean_pairs + 4 * column);
    const uint32_t own_column = unsigned(group_id()) == column / 16 ? kOnes : 0;
    const Pairs negative[2] = {x[0].negative(), x[1].negative()};
    const FragmentA signs = columns_as_a(negative);
    Pairs grad[2];
#pragma unroll
    for (int flow = 0; flow < 2; ++flow) {
      const uint4 stored = load_words(shared.grads + int(column / 16 * 2 + flow) * 512);
      const uint4 of_pairs =
          load_words(shared.temperature_pairs + 4 * column + flow * int(sizeof(TemperaturePairs[kHeadDim / 4])));
      Pairs of_temperatures[2];
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        const Pairs back = row ? Pairs{stored.z, stored.w} : Pairs{stored.x, stored.y};
        const Pairs slopes = powers_of(Exponents(x[row], temperatures, flow, log_inverses[flow][row]).values);
        const Pairs mean =
            flow ? choose(negative[row], means.first, means.second) : choose(negative[row], means.second, means.first);
        const Bf16x2 grad_normalizer = pack_bf16(stats.grad_normalizers[flow][row], stats.grad_normalizers[flow][row]);
        const Pairs grad_exponents = multiply({fma_bf16x2(grad_normalizer, mean.first, back.first),
                                               fma_bf16x2(grad_normalizer, mean.second, back.second)},
                                              slopes);
        of_temperatures[row] = multiply(grad_exponents, x[row].absolute_pairs());
        const Pairs by = choose(negative[row], {of_pairs.z, of_pairs.w}, {of_pairs.x, of_pairs.y});
        grad[row] = flow ? Pairs{fma_bf16x2(grad_exponents.first, by.first, grad[row].first),
                                 fma_bf16x2(grad_exponents.second, by.second, grad[row].second)}
                         : multiply(grad_exponents, by);
      }
      FragmentA positive = columns_as_a(of_temperatures), other = positive;
#pragma unroll
      for (int i = 0; i < 4; ++i) positive.words[i] &= ~signs.words[i], other.words[i] &= signs.words[i];
      mma_m16n8k16_bf16(logits[flow][flow], positive.words, {own_column, own_column});
      mma_m16n8k16_bf16(logits[flow][1 - flow], other.words, {own_column, own_column});
    }
    grad_queries[0] = x[0].signed_like(grad[0], negative[0]), grad_queries[1] = x[1].signed_like(grad[1], negative[1]);
  }
};

template <int kHeadDim>
__device__ __forceinline__ bool differentiate_split(QueryGradShared<kHeadDim>& shared, const BackwardParams& params) {
  using Shared = QueryGradShared<kHeadDim>;
  constexpr int kThreads = 2 * kHeadDim;
  const Split split = locate_split(blockIdx.x, params.plan.query_grads, params.shape);
  const int head_dim = params.shape.head_dim, warp = threadIdx.x / 32;
  load_state<kHeadDim, Shared::kStride>(shared.state, params.state + int64_t{split.head} * params.shape.state_size(),
                                        head_dim, kThreads, true, interleave_16);
  fill_means(shared.means, params.key_mean + int64_t{split.head} * params.shape.features(), head_dim, kHeadDim,
             kThreads);
  shared.load_temperatures(params, split, kThreads);
  if (__syncthreads_or(shared.head.load(params, split, kThreads))) return true;

  int token = split.begin + warp * 16 + group_id();
  TokenPosition positions[2] = {TokenPosition(token, params.shape), TokenPosition(token + 8, params.shape)};
  const TokenPosition position_step(kHeadDim, params.shape);
  const Rows<false> queries = rows_of<false>(params.q, params.shape, split),
                    grads = rows_of<false>(params.grad_out, params.shape, split);
  const char* query = queries.at(token, 4 * thread_in_group());
  const int64_t stride = int64_t{params.shape.heads} * head_dim;
  auto* out =
      static_cast<uint16_t*>(params.grad_q) + first_row(split, params.shape) + token * stride + 4 * thread_in_group();
  NormalizerStats* const normalizer_stats = params.normalizer_stats + int64_t{split.head} * params.shape.tokens();
  const QueryGradPointers pointers = {b_rows_transposed(shared.state, Shared::kStride),
                                      shared.head.mean_rows(),
                                      shared.head.temperature_rows(),
                                      SmemPointer(shared.means + thread_in_group()),
                                      SmemPointer(shared.temperatures[0] + thread_in_group()),
                                      SmemPointer(shared.grads[warp][0][0] + threadIdx.x % 32),
                                      SmemPointer(reinterpret_cast<uint2*>(shared.grads[warp]) + threadIdx.x % 32)};
  constexpr int kSlots = QueryGradCopies<kHeadDim>::kSlots;
  QueryGradCopies<kHeadDim> copies(pointers.grads, queries, grads, token - group_id(), split.end);
  for (int slot = 0; slot < kSlots; ++slot) copies.start(slot);
  Accumulator logits[2][2] = {};  // by flow, part
  bool needs_shift = false;
  for (; token - group_id() < split.end; token += kHeadDim) {
    QueryGradTile<kHeadDim> tile{pointers,
                                 params.packed_cos_sin,
                                 rotary_stride(params.shape),
                                 head_dim,
                                 {query, opaque(query + 8 * queries.stride)}};
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      tile.inside[row] = token + 8 * row < split.end;
      tile.rotary[row] = RotaryRow(positions[row], params.shape);
      positions[row].move(position_step, params.shape);
    }
    {
      FragmentA grad_rows[2][kHeadDim / 32];
      cp_async_wait_group<kSlots / 2>();
      __syncwarp();
      tile.load_grads(grad_rows);
#pragma unroll 2
      for (unsigned column = 0; column < kHeadDim; column += 16) {
        if (column == 0) cp_async_wait_group<1>();  // all but the last slot
        if (column == kHeadDim / 2 - 16) cp_async_wait_group<0>();
        __syncwarp();
        Columns x[2];
        tile.load_copied(x, QueryGradCopies<kHeadDim>::query_chunk(column));
        __syncwarp();  // the slot that is stored into may be that of x
        tile.add(grad_rows, x, column);
      }
    }
    Columns ahead[2];
    tile.load(ahead, 0);
    copies.token += kHeadDim;
    const auto stats = tile.stats();
    float log_inverses[2][2];
#pragma unroll
    for (int i = 0; i < 4; ++i) log_inverses[i / 2][i % 2] = lg2_approx(stats.inverses[i / 2][i % 2]);
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      if (thread_in_group() == 0 && tile.inside[row]) {
        normalizer_stats[token + 8 * row] = {
            {split_bf16(stats.grad_normalizers[0][row]), split_bf16(stats.grad_normalizers[1][row])},
            {stats.inverses[0][row], stats.inverses[1][row]}};
      }
    }
    uint16_t* const grad_query[2] = {out, opaque(out + 8 * stride)};
#pragma unroll 2
    for (unsigned column = 0; column < kHeadDim; column += 16) {
      const Columns x[2] = {ahead[0], ahead[1]};
      if (column + 16 < kHeadDim) tile.load(ahead, column + 16);
      Columns grad_queries[2];
      __syncwarp();  // the slot before has been read
      if (column > 0) copies.start(int(column) / 16 - 1);
      tile.finish(grad_queries, logits, stats, log_inverses, x, column);
      if (int(column) + 4 * thread_in_group() < head_dim) {
#pragma unroll
        for (int row = 0; row < 2; ++row) {
          if (tile.inside[row]) store_words(grad_query[row] + column, {grad_queries[row].low, grad_queries[row].high});
        }
      }
    }
    __syncwarp();
    copies.start(kSlots - 1);
    needs_shift |= largest(tile.max_abs) > kMaxUnshiftedExponent;
    query += kHeadDim * queries.stride, out += kHeadDim * stride;
  }
  cp_async_wait_group<0>();

  // Logit sums of the warps: rows 2g, 2g + 1 of each 16 columns are in accumulator columns 2t and 2t + 1.
  __syncthreads();  // no thread reads `grads` any more
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const int flow = i / 8, part = i / 4 % 2, lower = i / 2 % 2, block = 2 * thread_in_group() + i % 2;
    if (16 * block < kHeadDim) {
      shared.logits[warp][flow][part * kHeadDim + 16 * block + 2 * group_id() + lower] = logits[flow][part][i % 4];
    }
  }
  needs_shift = __syncthreads_or(needs_shift);
  for (int i = threadIdx.x; i < 4 * head_dim; i += kThreads) {
    const int flow = i / (2 * head_dim), part = i / head_dim % 2, column = i % head_dim;
    float sum = 0.f;
    for (int j = 0; j < Shared::kWarps; ++j) sum += shared.logits[j][flow][part * kHeadDim + column];
    params.split_grad_logits[int64_t{blockIdx.x} * (4 * head_dim) + i] = sum;
  }
  return needs_shift;
}

template <int kHeadDim>
__global__ void __launch_bounds__(2 * kHeadDim, kQueryGradBlocksPerSm.at(true, kHeadDim))
    differentiate_queries(const BackwardParams params) {
  const bool needs_shift = differentiate_split<kHeadDim>(shared_memory<QueryGradShared<kHeadDim>>(), params);
  if (threadIdx.x == 0) params.needs_shift[blockIdx.x] = needs_shift ? 1.f : 0.f;
}

template <int kHeadDim>
struct QuerySumShared {
  struct Stage : TokenStage<kHeadDim> {  // queries as rows, dout as B fragments
    NormalizerStats stats[kSumTokens];
  };
  static constexpr int kStages = 3;
  Stage stages[kStages];
  Temperatures temperatures[kHeadDim];
};

// One block per split; each warp sums 16 columns of q over all tokens.
template <int kHeadDim>
struct QuerySums {
  using Shared = QuerySumShared<kHeadDim>;

  // Sums of dS, by flow and part: rows 2g and 2g + 1 of the warp's columns × eight of the flow's columns.
  Accumulator sums[2][2][kHeadDim / 16] = {};
  Accumulator means[2] = {};  // sums of dm, by part: two columns per flow, to be added (z·dz is the sum of two bf16)

  // Adds 16 tokens of a stage.
  __device__ __forceinline__ void add(const typename Shared::Stage& stage, int begin, const char* rotary,
                                      SmemPointer of_columns) {
    const uint16_t* queries = stage.rows + threadIdx.x / 32 * 16 + 4 * thread_in_group();
    Columns x[2];
    Pairs negative[2];
    uint2 entries[2][2];
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const int token = begin + group_id() + 8 * row;
      const RotaryOffsets offsets = stage.rotary[token];
      entries[row][0] = __ldg(reinterpret_cast<const uint2*>(rotary + offsets.by_row));
      entries[row][1] = __ldg(reinterpret_cast<const uint2*>(rotary + offsets.by_column));
      const uint2 words = *reinterpret_cast<const uint2*>(queries + token * Shared::Stage::kRowStride);
      x[row] = {words.x, words.y}, negative[row] = x[row].negative();
    }
    const Rotation by_row[2] = {Rotation(entries[0][0]), Rotation(entries[1][0])};
    const Rotation by_column[2] = {Rotation(entries[0][1]), Rotation(entries[1][1])};
    Temperatures temperatures[4];
    load_temperatures(temperatures, of_columns);
    uint32_t stats[2];
    load_b_narrow(stats, stage.stats + begin);
    const SmemPointer grads = b_rows(stage.b, Shared::Stage::kBStride) + begin * Shared::Stage::kBStride * 2;
#pragma unroll
    for (int flow = 0; flow < 2; ++flow) {
      __syncwarp();  // stops the compiler from computing the other flow's features here: too few registers
      Pairs unrotated[2][2], rotated[2][2];  // by part, then token; over z
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        const float inverse = stage.stats[begin + group_id() + 8 * row].inverses[flow];
        const Parts parts(features_of(Exponents(x[row], temperatures, flow).values, inverse), negative[row], flow);
        unrotated[0][row] = parts.part[0], unrotated[1][row] = parts.part[1];
        rotated[0][row] = by_row[row].forward(parts.part[0]), rotated[1][row] = by_column[row].forward(parts.part[1]);
      }
      const uint32_t own = group_id() / 2 == flow ? ~0u : 0u;  // columns 2·flow and 2·flow + 1
      FragmentA a[2];
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        mma_m16n8k16_bf16(means[part], columns_as_a(unrotated[part]).words, {stats[0] & own, stats[1] & own});
        a[part] = columns_as_a(rotated[part]);
      }
#pragma unroll
      for (int column = 0; column < kHeadDim / 2; column += 16) {
        uint32_t b[2][2];
        load_b(b, grads + 2 * (flow * kHeadDim / 2 + column));
#pragma unroll
        for (int part = 0; part < 2; ++part) {
          mma_m16n8k16_bf16(sums[flow][part][column / 8], a[part].words, b[0]);
          mma_m16n8k16_bf16(sums[flow][part][column / 8 + 1], a[part].words, b[1]);
        }
      }
    }
  }

  // Writes this warp's rows of dS and dm, divided by N.
  __device__ __forceinline__ void store(float* state, float* mean, const Shape& shape, float scale) const {
    const int head_dim = shape.head_dim, row = threadIdx.x / 32 * 16 + 2 * group_id();
    if (row >= head_dim) return;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int flow = i / 2, part = i % 2;
      const Accumulator& both = means[part];
      if (thread_in_group() == flow) {
        *reinterpret_cast<float2*>(mean + (2 * flow + part) * head_dim + row) =
            make_float2((both[0] + both[1]) * scale, (both[2] + both[3]) * scale);
      }
      store_rows(state + (part * head_dim + row) * head_dim + flow * (head_dim / 2), head_dim, sums[flow][part],
                 head_dim / 2, scale);
    }
  }
};

template <int kHeadDim>
__global__ void __launch_bounds__(2 * kHeadDim, kQueryGradBlocksPerSm.at(true, kHeadDim))
    sum_queries(const BackwardParams params) {
  using Shared = QuerySumShared<kHeadDim>;
  constexpr int kUnrolledTokens = kHeadDim == 96 && !kIsWarpgroupCode ? 16 : kSumTokens;  // else registers would spill
  if (params.needs_shift[blockIdx.x] != 0.f) return;
  auto& shared = shared_memory<Shared>();
  const Split split = locate_split(blockIdx.x, params.plan.query_grads, params.shape);
  fill_temperatures(shared.temperatures, params, split, kHeadDim, 2 * kHeadDim);

  StageCopies<kHeadDim, typename Shared::Stage, Shared::kStages> copies(shared.stages, params.q, params.grad_out, true,
                                                                        split, params.shape);
  const auto start_copy = [&](int step) {
    const int first = split.begin + step * kSumTokens;
    if (first < split.end) {
      copies.start(step % Shared::kStages);
      auto& stage = shared.stages[step % Shared::kStages];
      if (const int token = first + threadIdx.x; threadIdx.x < kSumTokens) {
        cp_async(SmemPointer(&stage.stats[threadIdx.x]),
                 params.normalizer_stats + int64_t{split.head} * params.shape.tokens() + token, token < split.end);
      }
      if (const int token = first + 2 * threadIdx.x; threadIdx.x < kSumTokens / 2) {
        cp_async(SmemPointer(&stage.rotary[2 * threadIdx.x]), params.rotary_offsets + token, token < split.end);
      }
    }
    cp_async_commit_group();
  };

  const char* rotary = reinterpret_cast<const char*>(params.packed_cos_sin + thread_in_group()) +
                       threadIdx.x / 32 * 16 * rotary_stride(params.shape);
  const SmemPointer temperatures(shared.temperatures + threadIdx.x / 32 * 16 + thread_in_group());
  QuerySums<kHeadDim> sums;
  for (int step = 0; step < Shared::kStages - 1; ++step) start_copy(step);
  for (int step = 0; split.begin + step * kSumTokens < split.end; ++step) {
    cp_async_wait_group<Shared::kStages - 2>();
    __syncthreads();  // this stage has arrived, and no thread reads the one to be overwritten
    start_copy(step + Shared::kStages - 1);
    const auto& stage = shared.stages[step % Shared::kStages];
#pragma unroll 1
    for (int token = 0; token < kSumTokens; token += kUnrolledTokens) {
#pragma unroll
      for (int i = 0; i < kUnrolledTokens; i += 16) sums.add(stage, token + i, rotary, temperatures);
    }
  }
  const bool is_unsplit = params.plan.query_grads.splits_per_head == 1;
  sums.store((is_unsplit ? params.grad_state : params.split_grad_state) + blockIdx.x * params.shape.state_size(),
             params.split_grad_mean + blockIdx.x * (2 * params.shape.features()), params.shape, params.plan.inv_tokens);
}

constexpr int kKeyGradThreads = 2 * kKeyGradTokens, kKeyGradWarps = kKeyGradThreads / 32;

// The products of differentiate_keys by mma.sync: dS lies in shared memory as rows.
template <int kHeadDim>
struct WarpKeyGrads {
  static constexpr int columns_unrolled() { return 1; }
  static constexpr int kStride = kHeadDim + 8;
  using State = uint16_t[2 * kHeadDim * kStride];
  using Keys = ChunkRing<kHeadDim, 1, kKeyGradTokens>;
  using Values = FragmentA[kHeadDim / 16];
  using Products = Accumulator[4];  // by part: first, then second elements of the pairs
  using GradValues = Accumulator[kHeadDim / 8];

  SmemPointer rows, columns;
  Products products;

  __device__ __forceinline__ explicit WarpKeyGrads(const State& state)
      : rows(b_rows(state, kStride)), columns(b_rows_transposed(state, kStride)) {}

  static __device__ __forceinline__ void load(State& state, const float* of_head, int head_dim) {
    load_state<kHeadDim, kStride>(state, of_head, head_dim, kKeyGradThreads, false, interleave_32);
  }

  __device__ __forceinline__ void begin(GradValues& grad_values, const Values&) const { set_zero(grad_values); }

  // Adds R(φ) dS of 16 columns of k to dv; a: by part.
  __device__ __forceinline__ void add(GradValues& grad_values, const FragmentA (&a)[2], const Values&,
                                      int column) const {
#pragma unroll
    for (int part = 0; part < 2; ++part) {
#pragma unroll
      for (int i = 0; i < kHeadDim / 16; ++i) {
        uint32_t b[2][2];
        load_b(b, rows + 2 * ((part * kHeadDim + column) * kStride + 16 * i));
        mma_m16n8k16_bf16(grad_values[2 * i], a[part].words, b[0]);
        mma_m16n8k16_bf16(grad_values[2 * i + 1], a[part].words, b[1]);
      }
    }
  }
  // dS v of 16 columns of k.
  __device__ __forceinline__ const Products& of_columns(const Values& values, int column) {
    set_zero(products);
#pragma unroll
    for (int i = 0; i < kHeadDim / 16; ++i) {
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        uint32_t b[2][2];
        load_b_transposed(b, columns + 2 * ((part * kHeadDim + column) * kStride + 16 * i));
        mma_m16n8k16_bf16(products[2 * part], values[i].words, b[0]);
        mma_m16n8k16_bf16(products[2 * part + 1], values[i].words, b[1]);
      }
    }
    return products;
  }
  static __device__ __forceinline__ void finish(GradValues&) {}
};

// The same by wgmma. The tensor cores compute dS v of the next 16 columns while those before them are differentiated.
template <int kHeadDim>
struct WarpgroupKeyGrads {
  static constexpr int columns_unrolled() { return kHeadDim / 16; }
  using State = CoreMatrices<kHeadDim>;
  using Keys = TileCopies<kHeadDim, kKeyGradTokens>;
  using Values = FragmentA[kHeadDim / 16];
  using Products = Accumulator[4];
  using GradValues = Accumulator[kHeadDim / 8];

  MatrixDescriptor by_features, by_columns;
  Products products[2];  // of an even and an odd number of 16 columns

  __device__ __forceinline__ explicit WarpgroupKeyGrads(const State& state)
      : by_features(state.by_features()), by_columns(state.by_columns()) {}

  static __device__ __forceinline__ void load(State& state, const float* of_head, int head_dim) {
    state.load(of_head, head_dim, kKeyGradThreads, false, interleave_32);
  }

  __device__ __forceinline__ void begin(GradValues&, const Values& values) {
    warpgroup_arrive();
    start(values, 0);
    warpgroup_commit_batch();
  }
  __device__ __forceinline__ void add(GradValues& grad_values, const FragmentA (&a)[2], const Values& values,
                                      int column) {
    warpgroup_wait<0>();
    warpgroup_fence(products[column / 16 % 2]);
    warpgroup_arrive();
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      wgmma_m64k16_bf16<Major::kN>(grad_values, a[part].words, by_features + State::offset(column, part, 0),
                                   column + part > 0);
    }
    if (column + 16 < kHeadDim) start(values, column + 16);
    warpgroup_commit_batch();
  }
  __device__ __forceinline__ const Products& of_columns(const Values&, int column) const {
    return products[column / 16 % 2];
  }
  static __device__ __forceinline__ void finish(GradValues& grad_values) {
    warpgroup_wait<0>();
    warpgroup_fence(grad_values);
  }

 private:
  __device__ __forceinline__ void start(const Values& values, int column) {
#pragma unroll
    for (int i = 0; i < kHeadDim / 16; ++i) {
      wgmma_m64k16_bf16<Major::kK>(products[column / 16 % 2], values[i].words,
                                   by_columns + State::offset(column, 0, 16 * i), i > 0);
    }
  }
};

template <int kHeadDim, class KeyGrads>
struct KeyGradShared {
  alignas(16) typename KeyGrads::State state;  // dS
  MeanPairs means[kHeadDim / 4];               // dm of four columns each
  typename KeyGrads::Keys::Storage keys[kKeyGradWarps];
};

// A warp's 16 tokens.
template <int kHeadDim, class KeyGrads>
struct KeyGradTile {
  KeyGrads& key_grads;
  SmemPointer means;
  const CosSin* cos_sin;
  unsigned cos_sin_stride;
  typename KeyGrads::Values values;
  RotaryRow rotary[2];
  typename KeyGrads::GradValues grad_values;

  // Loads A fragments of v.
  __device__ __forceinline__ void load_values(const char* rows, int64_t stride, const bool (&inside)[2], int head_dim) {
    const uint32_t zero = static_cast<uint32_t>(head_dim) >> 31;
#pragma unroll
    for (int i = 0; i < kHeadDim / 32; ++i) {
      const bool valid = 32 * i + 8 * thread_in_group() < head_dim;
      const uint4 first = load_eight(rows + 64 * i, inside[0] && valid);
      const uint4 second = load_eight(rows + 64 * i + 8 * stride, inside[1] && valid);
      values[2 * i] = pin_registers({{first.x, second.x, first.y, second.y}}, zero);
      values[2 * i + 1] = pin_registers({{first.z, second.z, first.w, second.w}}, zero);
    }
  }

  static __device__ __forceinline__ void prefetch_values(const char* rows, int64_t stride, int head_dim) {
#pragma unroll
    for (int i = 0; i < kHeadDim / 32; ++i) {
      if (32 * i + 8 * thread_in_group() >= head_dim) break;
      prefetch_to_l2(rows + 64 * i);
      prefetch_to_l2(rows + 64 * i + 8 * stride);
    }
  }

  // Adds the contribution of 16 columns of k to dv; returns dk of these columns.
  __device__ __forceinline__ void differentiate(Columns (&grad_keys)[2], const Columns (&x)[2], unsigned column) {
    const char* const table = reinterpret_cast<const char*>(cos_sin) + column * cos_sin_stride;
    Pairs features[2], rotated[2][2];  // rotated: by part, then token
    const Rotation by_row[2] = {rotary[0].first(table), rotary[1].first(table)};
    const Rotation by_column[2] = {rotary[0].second(table), rotary[1].second(table)};
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const Pairs negative = x[row].negative();
      features[row] = key_features(x[row]);
      rotated[0][row] = by_row[row].forward(unmasked(features[row], negative));
      rotated[1][row] = by_column[row].forward(masked(features[row], negative));
    }
    key_grads.add(grad_values, {rows_as_a(rotated[0]), rows_as_a(rotated[1])}, values, column);
    const auto& products = key_grads.of_columns(values, column);
    const MeanPairs grad_means = load_means(means + 4 * column);
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const Pairs negative = x[row].negative();
      const Pairs grad = choose(negative, by_column[row].back(pairs_of(products[2], products[3], row)),
                                by_row[row].back(pairs_of(products[0], products[1], row)));
      const Pairs grad_features = add(grad, choose(negative, grad_means.second, grad_means.first));
      grad_keys[row] = x[row].signed_like(multiply(grad_features, slopes(features[row])), negative);
    }
  }

  __device__ __forceinline__ void store_values(uint16_t* out, int row, int head_dim) const {
#pragma unroll
    for (int i = 0; i < kHeadDim / 32; ++i) {
      uint32_t words[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const Accumulator& sum = grad_values[4 * i + j];
        words[j] = pack_bf16_finite(sum[2 * row], sum[2 * row + 1]);
      }
      if (32 * i + 8 * thread_in_group() < head_dim) store_words(out + 32 * i, words);
    }
  }
};

// Writes dk and dv of a split, except where forward used a shift.
template <int kHeadDim, class KeyGrads>
__device__ __forceinline__ void differentiate_keys_of_split(KeyGradShared<kHeadDim, KeyGrads>& shared,
                                                            const BackwardParams& params) {
  const Split split = locate_split(blockIdx.x, params.plan.key_grads, params.shape);
  const int head_dim = params.shape.head_dim;
  KeyGrads::load(shared.state, params.grad_state + int64_t{split.head} * params.shape.state_size(), head_dim);
  fill_means(shared.means, params.grad_mean + int64_t{split.head} * params.shape.features(), head_dim, kHeadDim,
             kKeyGradThreads);
  if (__syncthreads_or(is_shifted(params.key_shift + int64_t{split.head} * head_dim, head_dim, kKeyGradThreads)))
    return;

  const int warp = threadIdx.x / 32;
  int token = split.begin + warp * 16 + group_id();
  TokenPosition positions[2] = {TokenPosition(token, params.shape), TokenPosition(token + 8, params.shape)};
  const TokenPosition position_step(kKeyGradTokens, params.shape);
  const Rows<false> values = rows_of<false>(params.v, params.shape, split);
  typename KeyGrads::Keys keys(shared.keys[warp], rows_of<false>(params.k, params.shape, split), token - group_id(),
                               split.end);
  const char* value = values.at(token, 8 * thread_in_group());
  const int64_t stride = int64_t{params.shape.heads} * head_dim;
  int64_t out = first_row(split, params.shape) + token * stride;
  KeyGrads key_grads(shared.state);
  const SmemPointer means(shared.means + thread_in_group());
  for (int step = split.begin; step < split.end; step += kKeyGradTokens) {
    KeyGradTile<kHeadDim, KeyGrads> tile{key_grads, means, params.packed_cos_sin, rotary_stride(params.shape)};
    const bool inside[2] = {token < split.end, token + 8 < split.end};
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      tile.rotary[row] = RotaryRow(positions[row], params.shape);
      positions[row].move(position_step, params.shape);
    }
    tile.load_values(value, values.stride, inside, head_dim);
    key_grads.begin(tile.grad_values, tile.values);
    value += kKeyGradTokens * values.stride;
    if (token + kKeyGradTokens + 8 < split.end) tile.prefetch_values(value, values.stride, head_dim);
    uint16_t* const first = opaque(static_cast<uint16_t*>(params.grad_k) + out + 4 * thread_in_group());
    uint16_t* const grad_key[2] = {first, opaque(first + 8 * stride)};
#pragma unroll(KeyGrads::columns_unrolled())
    for (unsigned column = 0; column < kHeadDim; column += 16) {
      Columns x[2], grads[2];
      keys.load(x, column);
      tile.differentiate(grads, x, column);
      if (int(column) + 4 * thread_in_group() < head_dim) {
#pragma unroll
        for (int row = 0; row < 2; ++row) {
          if (inside[row]) store_words(grad_key[row] + column, {grads[row].low, grads[row].high});
        }
      }
    }
    key_grads.finish(tile.grad_values);
    uint16_t* const grad_value = static_cast<uint16_t*>(params.grad_v) + out + 8 * thread_in_group();
    if (inside[0]) tile.store_values(grad_value, 0, head_dim);
    if (inside[1]) tile.store_values(grad_value + 8 * stride, 1, head_dim);
    token += kKeyGradTokens, out += kKeyGradTokens * stride;
  }
  cp_async_wait_group<0>();
}

template <int kHeadDim>
__global__ void __launch_bounds__(kKeyGradThreads, kKeyGradBlocksPerSm.at(true, kHeadDim, kIsWarpgroupCode))
    differentiate_keys(const BackwardParams params) {
  choose_products(params.plan.uses_warpgroups, [&](auto uses_warpgroups) {
    using KeyGrads = std::conditional_t<uses_warpgroups(), WarpgroupKeyGrads<kHeadDim>, WarpKeyGrads<kHeadDim>>;
    differentiate_keys_of_split(shared_memory<KeyGradShared<kHeadDim, KeyGrads>>(), params);
  });
}

}  // namespace

const char* launch_differentiate_queries(const BackwardParams& params, void* stream) {
  return dispatch_head_dim(params.shape.padded_head_dim(), [&](auto head_dim) {
    constexpr int kHeadDim = head_dim();
    return launch_blocks<QueryGradShared<kHeadDim>, kHeadDim, kQueryGradBlocksPerSm.at(true, kHeadDim)>(
        differentiate_queries<kHeadDim>, params.plan.query_grads.splits, 2 * kHeadDim, stream, params);
  });
}

const char* launch_sum_queries(const BackwardParams& params, void* stream) {
  return dispatch_head_dim(params.shape.padded_head_dim(), [&](auto head_dim) {
    constexpr int kHeadDim = head_dim();
    return launch_blocks<QuerySumShared<kHeadDim>, kHeadDim, kQueryGradBlocksPerSm.at(true, kHeadDim)>(
        sum_queries<kHeadDim>, params.plan.query_grads.splits, 2 * kHeadDim, stream, params);
  });
}

const char* launch_differentiate_keys(const BackwardParams& params, void* stream) {
  return dispatch_head_dim(params.shape.padded_head_dim(), [&](auto head_dim) {
    constexpr int kHeadDim = head_dim();
    const int64_t blocks = params.plan.key_grads.splits;
    if (params.plan.uses_warpgroups) {
      return launch_warpgroups<KeyGradShared<kHeadDim, WarpgroupKeyGrads<kHeadDim>>,
                               kKeyGradBlocksPerSm.at(true, kHeadDim, true)>(differentiate_keys<kHeadDim>, blocks,
                                                                             kKeyGradThreads, stream, params);
    }
    return launch_blocks<KeyGradShared<kHeadDim, WarpKeyGrads<kHeadDim>>, kHeadDim,
                         kKeyGradBlocksPerSm.at(true, kHeadDim)>(differentiate_keys<kHeadDim>, blocks, kKeyGradThreads,
                                                                 stream, params);
  });
}

}  // namespace polaformer::bf16
