// Polarity attention. Per head, with R the rotary turn of a token and m the mean over keys:
//
//   S = Σ_keys R(φ(k))ᵀ v / N      m = Σ_keys φ(k) / N            (2D, D), (2D)
//   out = R(φ(q)) S / (φ(q)·m + ε)                                of both flows, each with its half of S's columns
//
// q, k, v: (B, H, N, D) of any strides in bf16, fp16 or float32; out in the same type. Features, m, normalizers and all
// sums are float32; only the operands of the products are rounded, to bf16 or tf32 (operands.cuh).
//
// 1. make_turns       cosines and sines of every row and column
// 2. sum_keys         S and m of each item's tokens, as if no exponent exceeded the free ones
// 3. finish_keys      adds the items up in order; a head in which one did is computed again with its shift, slowly
// 4. attend           outputs, as if no exponent exceeded the free ones; notes the items where one did
// 5. attend, shifted  computes those again; leaves at once where there are none
#include "features.cuh"

namespace polaformer {
namespace {

template <class Operand, int kWidth>
struct KeyShared {
  static constexpr int kStages = Operand::kNarrow ? 3 : 2;
  static constexpr int kStride = kWidth + Operand::kPadding;
  struct alignas(16) Stage {
    typename Operand::Element keys[kKeyTokens * kStride], values[kKeyTokens * kStride];
    int2 places[kKeyTokens];
  } stages[kStages];
  float loudest[kWidth / 16];
};

// One block per item, one warp per 16 columns of k. Its features, turned and transposed, are left operands that never
// leave its registers: rows are features (row g is column 2g, row g + 8 column 2g + 1), columns are 16 tokens.
template <class Operand, int kWidth>
struct KeySums {
  static constexpr int kStride = kWidth + Operand::kPadding;
  using Left = typename Operand::Left;
  using Right = typename Operand::Right;

  Sum first[kWidth / 8] = {}, second[kWidth / 8] = {};  // of S: rows of either pole, eight columns each
  Poles mean = {};
  float loudest = 0.f;

  __device__ __forceinline__ void add(const typename Operand::Element* keys, const typename Operand::Element* values,
                                      const int2* places, const float* turns) {
    const int pair = threadIdx.x / 32 * 8 + lane_group();
    Left first_pole, second_pole;
#pragma unroll
    for (int upper = 0; upper < 2; ++upper) {
      Poles turned[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int token = 2 * lane_member() + 8 * upper + i;
        Pair<float> x;
        Operand::load_pair(keys + token * kStride + 2 * pair, x.first, x.second);
        const Pair<float> exponents = scale(absolute(x), kExponentUnit<Operand>);
        const Poles features = part_poles(features_of<Operand, false>(exponents, {}), x);
        mean.first.first += features.first.first, mean.first.second += features.first.second;
        mean.second.first += features.second.first, mean.second.second += features.second.second;
        loudest = fmaxf(loudest, largest(absolute(x)));
        turned[i] = load_turns(turns, places[token], pair).forward(features);
      }
      first_pole.set(0, upper, turned[0].first.first, turned[1].first.first);
      first_pole.set(1, upper, turned[0].first.second, turned[1].first.second);
      second_pole.set(0, upper, turned[0].second.first, turned[1].second.first);
      second_pole.set(1, upper, turned[0].second.second, turned[1].second.second);
    }
#pragma unroll
    for (int column = 0; column < kWidth; column += 16) {
      Right right[2];
      Operand::load(right, values + column, kStride);
      Operand::multiply(first[column / 8], first[column / 8 + 1], first_pole, right);
      Operand::multiply(second[column / 8], second[column / 8 + 1], second_pole, right);
    }
  }

  // Writes this warp's rows of S and m, divided by N.
  __device__ __forceinline__ void store(float* state, float* mean_out, const Shape& shape, float scale) const {
    const int width = shape.head_width, row = threadIdx.x / 32 * 16 + 2 * lane_group();
    const Poles sum = {{sum_over_members(mean.first.first), sum_over_members(mean.first.second)},
                       {sum_over_members(mean.second.first), sum_over_members(mean.second.second)}};
    if (row >= width) return;
    if (lane_member() == 0) {
      *reinterpret_cast<float2*>(mean_out + row) = make_float2(sum.first.first * scale, sum.first.second * scale);
      *reinterpret_cast<float2*>(mean_out + width + row) =
          make_float2(sum.second.first * scale, sum.second.second * scale);
    }
#pragma unroll
    for (int i = 0; i < kWidth / 8; ++i) {
      const int column = 8 * i + 2 * lane_member();
      if (column >= width) break;
      float* place = state + row * width + column;
#pragma unroll
      for (int lower = 0; lower < 2; ++lower) {
        *reinterpret_cast<float2*>(place + lower * width) =
            make_float2(first[i][2 * lower] * scale, first[i][2 * lower + 1] * scale);
        *reinterpret_cast<float2*>(place + (width + lower) * width) =
            make_float2(second[i][2 * lower] * scale, second[i][2 * lower + 1] * scale);
      }
    }
  }
};

template <class Operand, int kWidth>
__global__ void __launch_bounds__(2 * kWidth, kKeyResidents.at(Operand::kNarrow, kWidth)) sum_keys(const Forward f) {
  using Shared = KeyShared<Operand, kWidth>;
  auto& shared = shared_memory<Shared>();
  const Item item = locate_item(blockIdx.x, f.plan.keys, f.shape);
  const int copies_values = threadIdx.x / kWidth;  // half of the threads, the others keys
  const Rows<Operand::kFloatInputs> rows = rows_of<Operand::kFloatInputs>(copies_values ? f.v : f.k, f.shape, item);

  const auto start_copy = [&](int step) {
    const int first = item.begin + step * kKeyTokens;
    if (first < item.end) {
      auto& stage = shared.stages[step % Shared::kStages];
      copy_tile<Operand, kKeyTokens, kWidth>(copies_values ? stage.values : stage.keys, rows, false, first, item.end,
                                             threadIdx.x % kWidth, kWidth);
      if (threadIdx.x < kKeyTokens) {
        stage.places[threadIdx.x] = locate_turns<kWidth>(min(first + int(threadIdx.x), item.end - 1), f.shape);
      }
    }
    commit_copies();
  };

  KeySums<Operand, kWidth> sums;
  for (int step = 0; step < Shared::kStages - 1; ++step) start_copy(step);
  for (int step = 0; item.begin + step * kKeyTokens < item.end; ++step) {
    wait_for_copies<Shared::kStages - 2>();
    __syncthreads();  // this stage has arrived, and nobody reads the one that is overwritten next
    start_copy(step + Shared::kStages - 1);
    const auto& stage = shared.stages[step % Shared::kStages];
#pragma unroll 1
    for (int token = 0; token < kKeyTokens; token += 16) {
      const int place = token * Shared::kStride;
      sums.add(stage.keys + place, stage.values + place, stage.places + token, f.turns);
    }
  }

  const bool whole = f.plan.keys.items_per_head == 1;
  sums.store((whole ? f.state : f.item_state) + blockIdx.x * f.shape.state_size(),
             (whole ? f.key_mean : f.item_mean) + blockIdx.x * f.shape.features(), f.shape, f.plan.mean_weight);
  const float loudest = max_over_warp(sums.loudest);
  if (threadIdx.x % 32 == 0) shared.loudest[threadIdx.x / 32] = loudest;
  __syncthreads();
  if (threadIdx.x == 0) {
    float largest = 0.f;
    for (int warp = 0; warp < kWidth / 16; ++warp) largest = fmaxf(largest, shared.loudest[warp]);
    f.item_loudness[blockIdx.x] = largest;
  }
}
constexpr int kFinishThreads = 128;
constexpr int kFinishPairs = 8;  // of features, per block

// One head's share of a finishing block: pairs first … first + 8 of its D.
struct FinishShared {
  alignas(16) float features[16][2 * kFinishPairs];  // of 16 tokens, turned
  float sums[16][2 * kFinishPairs];
  float shifts[kFinishPairs];
};

// Exponents of a pair of features at one token.
template <bool kFloat>
__device__ __forceinline__ Pair<float> key_exponents(const Rows<kFloat>& keys, int token, int pair) {
  const int half = keys.head_width / 2;
  const float sign = pair < half ? 1.f : -1.f;
  const int column = 2 * (pair < half ? pair : pair - half);
  return {fmaxf(sign * keys.load(token, column), 0.f), fmaxf(sign * keys.load(token, column + 1), 0.f)};
}

// The shifts of this block's pairs, from the largest exponent of each over all tokens.
template <bool kFloat>
__device__ __forceinline__ void find_key_shifts(FinishShared& shared, const Rows<kFloat>& keys, int first,
                                                const Shape& shape) {
  const int pair = threadIdx.x % kFinishPairs, member = threadIdx.x / kFinishPairs;
  float largest_exponent = 0.f;
  if (first + pair < shape.head_width) {
    for (int token = member; token < shape.tokens(); token += 16) {
      largest_exponent = fmaxf(largest_exponent, largest(key_exponents(keys, token, first + pair)));
    }
  }
  shared.sums[member][pair] = largest_exponent;
  __syncthreads();
  if (threadIdx.x < kFinishPairs) {
    for (int i = 0; i < 16; ++i) largest_exponent = fmaxf(largest_exponent, shared.sums[i][threadIdx.x]);
    shared.shifts[threadIdx.x] = excess(largest_exponent);
  }
  __syncthreads();
}

// S, m and the shift of this block's pairs, without tensor cores: thread d has column d of S.
template <bool kFloat>
__device__ __forceinline__ void sum_shifted_keys(FinishShared& shared, const Forward& f, const Item& head, int first) {
  const Shape& shape = f.shape;
  const Rows<kFloat> keys = rows_of<kFloat>(f.k, shape, head), values = rows_of<kFloat>(f.v, shape, head);
  find_key_shifts(shared, keys, first, shape);

  const int pair = threadIdx.x % kFinishPairs, member = threadIdx.x / kFinishPairs, column = threadIdx.x;
  const bool by_row = 2 * (first + pair) < shape.head_width, inside = first + pair < shape.head_width;
  const float shift = shared.shifts[pair];
  const int half = shape.padded_width() / 2;
  Pair<float> mean = {0.f, 0.f};
  float sums[2 * kFinishPairs] = {};
  for (int begin = 0; begin < shape.tokens(); begin += 16) {
    const int token = begin + member;
    Pair<float> turned = {0.f, 0.f};
    if (inside && token < shape.tokens()) {
      const Pair<float> exponents = key_exponents(keys, token, first + pair);
      const Pair<float> features = features_of<AnyFloat32, true>(exponents, {shift, shift});
      mean.first += features.first, mean.second += features.second;
      const int row = token / shape.width;
      const int64_t place = by_row ? row : shape.height + token - row * shape.width;
      const int64_t turn_pair = by_row ? first + pair : first + pair - shape.head_width / 2;
      const float2 by = __ldg(reinterpret_cast<const float2*>(f.turns) + place * half + turn_pair);
      turned = turn(features, by.x, by.y);
    }
    __syncthreads();
    shared.features[member][2 * pair] = turned.first, shared.features[member][2 * pair + 1] = turned.second;
    __syncthreads();
    if (column >= shape.head_width) continue;
    for (int i = 0; i < min(16, shape.tokens() - begin); ++i) {
      const float value = values.load(begin + i, column);
#pragma unroll
      for (int j = 0; j < 2 * kFinishPairs; ++j) sums[j] += shared.features[i][j] * value;
    }
  }

  const float scale = f.plan.mean_weight;
  const int64_t feature = int64_t{head.head} * shape.features() + 2 * first;
  if (column < shape.head_width) {
#pragma unroll
    for (int j = 0; j < 2 * kFinishPairs; ++j) {
      if (2 * first + j < shape.features()) f.state[(feature + j) * shape.head_width + column] = sums[j] * scale;
    }
  }
  shared.sums[member][2 * pair] = mean.first, shared.sums[member][2 * pair + 1] = mean.second;
  __syncthreads();
  if (threadIdx.x < 2 * kFinishPairs && 2 * first + threadIdx.x < shape.features()) {
    float sum = 0.f;
    for (int i = 0; i < 16; ++i) sum += shared.sums[i][threadIdx.x];
    f.key_mean[feature + threadIdx.x] = sum * scale;
  }
  if (member == 0 && inside) f.key_shift[int64_t{head.head} * shape.head_width + first + pair] = shift;
}

// Adds up the items of a head, for the pairs of this block.
__device__ __forceinline__ void add_items(const Forward& f, const Item& head, int first) {
  const int items = f.plan.keys.items_per_head;
  const int64_t width = f.shape.head_width, features = f.shape.features(), size = f.shape.state_size();
  const int rows = min(2 * kFinishPairs, static_cast<int>(features) - 2 * first);
  if (items > 1) {
    for (int i = threadIdx.x; i < rows * width; i += kFinishThreads) {
      const float* part = f.item_state + int64_t{head.head} * items * size + 2 * first * width + i;
      float sum = 0.f;
#pragma unroll 8
      for (int item = 0; item < items; ++item) sum += part[item * size];
      f.state[int64_t{head.head} * size + 2 * first * width + i] = sum;
    }
    if (static_cast<int>(threadIdx.x) < rows) {
      const float* part = f.item_mean + int64_t{head.head} * items * features + 2 * first + threadIdx.x;
      float sum = 0.f;
#pragma unroll 8
      for (int item = 0; item < items; ++item) sum += part[item * features];
      f.key_mean[int64_t{head.head} * features + 2 * first + threadIdx.x] = sum;
    }
  }
  if (static_cast<int>(threadIdx.x) < rows / 2) f.key_shift[int64_t{head.head} * width + first + threadIdx.x] = 0.f;
}

template <bool kFloat>
__global__ void __launch_bounds__(kFinishThreads, 8) finish_keys(const Forward f) {
  const int blocks_per_head = (f.shape.head_width + kFinishPairs - 1) / kFinishPairs;
  const Item head = locate_item(blockIdx.x / blocks_per_head, {1, f.shape.tokens(), 0}, f.shape);
  const int first = static_cast<int>(blockIdx.x % blocks_per_head) * kFinishPairs;
  float loudest = 0.f;
  for (int item = 0; item < f.plan.keys.items_per_head; ++item) {
    loudest = fmaxf(loudest, f.item_loudness[int64_t{head.head} * f.plan.keys.items_per_head + item]);
  }
  if (loudest > kFreeExponent) {
    sum_shifted_keys<kFloat>(shared_memory<FinishShared>(), f, head, first);
  } else {
    add_items(f, head, first);
  }
}

constexpr int kQueryThreads = 2 * kQueryTokens;

template <class Operand, int kWidth>
struct QueryShared {
  static constexpr int kStride = kWidth + Operand::kPadding;
  alignas(16) typename Operand::Element state[2 * kWidth * kStride];
  HeadTables<kWidth> head;
};

// Fills everything. Returns whether the head's keys are shifted.
template <class Operand, int kWidth>
__device__ __forceinline__ bool load_head(QueryShared<Operand, kWidth>& shared, const Forward& f, const Item& item) {
  load_state<Operand, kWidth>(shared.state, f.state + int64_t{item.head} * f.shape.state_size(), f.shape.head_width,
                              kQueryThreads, true, interleave_32, interleave_16);
  const bool shifted = shared.head.template load<Operand>(f, item, kQueryThreads);
  return __syncthreads_or(shifted);
}

// A warp's 16 tokens: rows g and g + 8 of its left operands and sums.
template <class Operand, int kWidth, bool kShifted>
struct QueryTile {
  using Shared = QueryShared<Operand, kWidth>;
  using Left = typename Operand::Left;
  using Right = typename Operand::Right;
  using Eight = typename Operand::template Neighbours<8>;
  static constexpr bool kReadsAhead = Operand::kNarrow || kWidth < 128;  // there, registers are all in use

  const Shared& shared;
  const Rows<Operand::kFloatInputs>& queries;
  const float* turns;
  Dtype dtype;
  int tokens[2];
  int2 places[2];

  Sum sums[2][kWidth / 16] = {};  // of each flow; eight columns of its half each
  float normalizers[2][2] = {};   // of each flow and token
  float token_shifts[2][2] = {};
  float loudest = 0.f;

  __device__ __forceinline__ void load(Eight (&rows)[2], int column) const {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      rows[row] = load_neighbours<Operand, 8>(queries, tokens[row], column + 8 * lane_member());
    }
  }

  // Finds the shift of each token and flow.
  __device__ __forceinline__ void find_shifts() {
#pragma unroll 1
    for (int column = 0; column < kWidth; column += 32) {
      Eight rows[2];
      load(rows, column);
#pragma unroll
      for (int i = 0; i < 8; i += 2) {
        const int place = column + 8 * lane_member() + i;
#pragma unroll
        for (int flow = 0; flow < 2; ++flow) {
          const Poles temperatures = load_poles(&shared.head.temperatures[flow][place]);
#pragma unroll
          for (int row = 0; row < 2; ++row) {
            Pair<float> x = {rows[row][i], rows[row][i + 1]};
            if (flow) x = negative(x);
            const float wanted = demand(scale(absolute(x), select(temperatures, x)), x, shared.head.shifts[place / 2]);
            token_shifts[flow][row] = fmaxf(token_shifts[flow][row], wanted);
          }
        }
      }
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      token_shifts[j / 2][j % 2] = excess(max_over_members(token_shifts[j / 2][j % 2]));
    }
  }

  // Adds the part of 16 columns of the queries; the thread has four of them, from `first` on.
  __device__ __forceinline__ void add(const Eight (&rows)[2], int column) {
    const int first = column / 32 * 32 + 8 * lane_member() + column / 16 % 2 * 4;
    Turns by[2][2];  // token, pair
#pragma unroll
    for (int row = 0; row < 2; ++row) load_turns(by[row], turns, places[row], first / 2);
#pragma unroll
    for (int flow = 0; flow < 2; ++flow) {
      Left left[2];  // pole
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) {
        const int place = first + 2 * pair;
        const Poles temperatures = load_poles(&shared.head.temperatures[flow][place]);
        const Poles means = load_poles(&shared.head.means[place]);
#pragma unroll
        for (int row = 0; row < 2; ++row) {
          Pair<float> x = {rows[row][2 * pair], rows[row][2 * pair + 1]};
          if (flow) x = negative(x);
          else loudest = fmaxf(loudest, largest(absolute(x)));
          Pair<float> shift = {};
          if constexpr (kShifted) shift = query_shift(token_shifts[flow][row], shared.head.shifts[place / 2], x);
          const auto exponents = scale(absolute(x), select(temperatures, x));
          const Poles features = part_poles(features_of<Operand, kShifted>(exponents, shift), x);
          normalizers[flow][row] += dot(features, means);
          const Poles turned = by[row][pair].forward(features);
          left[0].set(row, pair, turned.first.first, turned.first.second);
          left[1].set(row, pair, turned.second.first, turned.second.second);
        }
      }
#pragma unroll
      for (int pole = 0; pole < 2; ++pole) {
        const auto* corner = shared.state + (pole * kWidth + column) * Shared::kStride + flow * kWidth / 2;
#pragma unroll
        for (int j = 0; j < kWidth / 2; j += 16) {
          Right right[2];
          Operand::load(right, corner + j, Shared::kStride);
          Operand::multiply(sums[flow][j / 8], sums[flow][j / 8 + 1], left[pole], right);
        }
      }
    }
  }

  __device__ __forceinline__ void add_all() {
    if constexpr (kShifted) find_shifts();
    Eight ahead[2], rows[2];
    if constexpr (kReadsAhead) load(ahead, 0);
#pragma unroll 1
    for (int column = 0; column < kWidth; column += 32) {
      if constexpr (kReadsAhead) rows[0] = ahead[0], rows[1] = ahead[1];
      if (kReadsAhead && column + 32 < kWidth) load(ahead, column + 32);
#pragma unroll 1  // unrolled, it needs more registers than there are
      for (int half = 0; half < 2; ++half) {
        if constexpr (!kReadsAhead) load(rows, column);
        if (!kReadsAhead && half) rows[0].drop_four(), rows[1].drop_four();
        add(rows, column + 16 * half);
        if constexpr (kReadsAhead) rows[0].drop_four(), rows[1].drop_four();
      }
    }
  }

  // Writes the outputs of tokens before `end`; `row` is where the first token's of this head begins.
  __device__ __forceinline__ void store(void* out, int64_t row, int begin, int end, const Shape& shape) const {
    const int half = shape.head_width / 2;
    float inverse[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float epsilon = kShifted ? shifted_epsilon(token_shifts[i / 2][i % 2]) : float(kEpsilon);
      inverse[i] = reciprocal(sum_over_members(normalizers[i / 2][i % 2]) + epsilon);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int flow = i / 2, lower = i % 2, token = begin + lane_group() + 8 * lower;
      if (token >= end) continue;
      const int64_t index = row + int64_t{token} * (shape.heads * shape.head_width) + flow * half;
#pragma unroll
      for (int j = 0; j < kWidth / 32; ++j) {
        float values[4];
#pragma unroll
        for (int k = 0; k < 4; ++k) values[k] = sums[flow][2 * j + k / 2][2 * lower + k % 2] * inverse[i];
        const int column = 16 * j + 4 * lane_member();
        store_elements<Operand>(out, index + column, values, half - column, dtype);
      }
    }
  }
};

// Writes an item's outputs. Returns whether they are to be computed again: not so if kShifted.
template <class Operand, int kWidth, bool kShifted>
__device__ __forceinline__ bool attend_item(QueryShared<Operand, kWidth>& shared, const Forward& f, unsigned index) {
  const Item item = locate_item(index, f.plan.queries, f.shape);
  if (load_head(shared, f, item) && !kShifted) return true;
  const Rows<Operand::kFloatInputs> queries = rows_of<Operand::kFloatInputs>(f.q, f.shape, item);
  const int64_t row = first_row(item, f.shape);
  bool spoiled = false;
  for (int begin = item.begin + threadIdx.x / 32 * 16; begin < item.end; begin += kQueryTokens) {
    QueryTile<Operand, kWidth, kShifted> tile{shared, queries, f.turns, Operand::dtype(f.shape.dtype)};
#pragma unroll
    for (int lower = 0; lower < 2; ++lower) {
      tile.tokens[lower] = min(begin + lane_group() + 8 * lower, item.end - 1);
      tile.places[lower] = locate_turns<kWidth>(tile.tokens[lower], f.shape);
    }
    tile.add_all();
    tile.store(f.out, row, begin, item.end, f.shape);
    spoiled |= tile.loudest > kFreeExponent;
  }
  return !kShifted && __syncthreads_or(spoiled);
}

template <class Operand, int kWidth>
__global__ void __launch_bounds__(kQueryThreads, kQueryResidents.at(Operand::kNarrow, kWidth)) attend(const Forward f) {
  auto& shared = shared_memory<QueryShared<Operand, kWidth>>();
  const bool spoiled = attend_item<Operand, kWidth, false>(shared, f, blockIdx.x);
  if (threadIdx.x == 0) f.item_spoiled[blockIdx.x] = spoiled ? 1.f : 0.f;
}

template <class Operand, int kWidth>
__global__ void __launch_bounds__(kQueryThreads, 1) attend_shifted(const Forward f) {
  auto& shared = shared_memory<QueryShared<Operand, kWidth>>();
  for (unsigned index = blockIdx.x; index < f.plan.queries.items; index += gridDim.x) {
    if (f.item_spoiled[index] == 0.f) continue;
    __syncthreads();  // nobody reads the last item's head any more
    attend_item<Operand, kWidth, true>(shared, f, index);
  }
}

// Runs everything for one padded width.
template <class Operand, int kWidth>
const char* run(const Forward& f, void* stream) {
  static_assert(fit(kKeyResidents.at(Operand::kNarrow, kWidth), sizeof(KeyShared<Operand, kWidth>)));
  static_assert(fit(kQueryResidents.at(Operand::kNarrow, kWidth), sizeof(QueryShared<Operand, kWidth>)));
  if (const char* error = make_turns(f.turns, f.shape, f.angles, stream)) return error;
  const int64_t finish_blocks = f.shape.all_heads() * ((f.shape.head_width + kFinishPairs - 1) / kFinishPairs);
  const Grid grids[] = {
      {f.plan.keys.items, 2 * kWidth, sizeof(KeyShared<Operand, kWidth>)},
      {finish_blocks, kFinishThreads, sizeof(FinishShared)},
      {f.plan.queries.items, kQueryThreads, sizeof(QueryShared<Operand, kWidth>)},
      {std::min<int64_t>(f.plan.queries.items, f.plan.multiprocessors), kQueryThreads,
       sizeof(QueryShared<Shifted<Operand>, kWidth>)},
  };
  void (*const kernels[])(Forward) = {sum_keys<Operand, kWidth>, finish_keys<Operand::kFloatInputs>,
                                      attend<Operand, kWidth>, attend_shifted<Shifted<Operand>, kWidth>};
  for (int i = 0; i < 4; ++i) {
    if (const char* error = launch(kernels[i], grids[i], stream, f)) return error;
  }
  return nullptr;
}

}  // namespace

const char* run_forward(const Forward& f, void* stream) {
  return visit_width(f.shape.padded_width(), [&](auto width) {
    return f.plan.path == Path::kBfloat16 ? run<Bfloat16, width()>(f, stream)
           : f.plan.path == Path::kFloat32 ? run<Float32, width()>(f, stream)
           : f.plan.path == Path::kAnyFloat32 ? run<AnyFloat32, width()>(f, stream)
                                              : run<Any16, width()>(f, stream);
  });
}

}  // namespace polaformer
