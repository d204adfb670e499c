// Building blocks of the bf16 path: packed features and rotations, fragments, tiles of 16 tokens × 16 columns.
//
// A warp holds 16 tokens as rows of an A fragment of mma.m16n8k16: thread (g, t), with g = lane / 4 and t = lane % 4,
// has tokens g and g + 8. Of every 16 columns it has four neighbours x0 … x3 = 4t … 4t + 3, two rotary pairs, as
//
//   Pairs {(x0, x2), (x1, x3)}: the first and the second elements of both pairs, two bf16 per register.
//
// So a rotation takes four packed instructions, and the registers are those of an A fragment without any move: `first`
// is its columns 2t and 2t + 1, `second` its columns 2t + 8 and 2t + 9. The B operand has its rows in order_16(), too.
//
// Each input x has two features, of x⁺ and of x⁻, one of which is 0. Both come from one exponential and are told apart
// by a mask of x's sign (all ones: negative). Part 0 of the features, which rotates by the token's row, belongs to x⁺
// for keys and in the same-sign flow, to x⁻ in the opposite-sign flow; part 1 rotates by the column.
#pragma once

#include "tiles.cuh"

namespace polaformer::bf16 {

constexpr Bf16x2 kOnes = 0x3f803f80u, kMinusZeros = 0x80008000u;
constexpr float kLog2E = 1.44269504f;

__device__ __forceinline__ Bf16x2 multiply(Bf16x2 a, Bf16x2 b) { return fma_bf16x2(a, b, kMinusZeros); }
__device__ __forceinline__ Bf16x2 add(Bf16x2 a, Bf16x2 b) { return fma_bf16x2(a, kOnes, b); }
__device__ __forceinline__ Bf16x2 choose(uint32_t mask, Bf16x2 if_set, Bf16x2 if_not) {
  return (if_set & mask) | (if_not & ~mask);
}
__device__ __forceinline__ float largest(Bf16x2 x) { return fmaxf(lower_half(x), upper_half(x)); }

template <int kCount>
__device__ __forceinline__ void set_zero(Accumulator (&sums)[kCount]) {
#pragma unroll
  for (auto& sum : sums) sum[0] = sum[1] = sum[2] = sum[3] = 0.f;
}

struct Pairs {
  Bf16x2 first, second;
};

__device__ __forceinline__ Pairs masked(Pairs x, Pairs mask) { return {x.first & mask.first, x.second & mask.second}; }
__device__ __forceinline__ Pairs unmasked(Pairs x, Pairs mask) {
  return {x.first & ~mask.first, x.second & ~mask.second};
}
__device__ __forceinline__ Pairs choose(Pairs mask, Pairs if_set, Pairs if_not) {
  return {choose(mask.first, if_set.first, if_not.first), choose(mask.second, if_set.second, if_not.second)};
}
__device__ __forceinline__ Pairs add(Pairs a, Pairs b) { return {add(a.first, b.first), add(a.second, b.second)}; }
__device__ __forceinline__ Pairs multiply(Pairs a, Pairs b) {
  return {multiply(a.first, b.first), multiply(a.second, b.second)};
}

// Rotation of a token's two pairs: forward is (x0 cos − x1 sin, x1 cos + x0 sin), back its inverse. The negative sine
// is computed once for both flows, as ptxas folds no negation into packed multiplications.
struct Rotation {
  Bf16x2 cosine, sine, minus_sine;

  __device__ __forceinline__ explicit Rotation(uint2 entry)
      : cosine(entry.x), sine(entry.y), minus_sine(negate_bf16x2(entry.y)) {}
  __device__ __forceinline__ Pairs forward(Pairs x) const {
    return {fma_bf16x2(x.second, minus_sine, multiply(x.first, cosine)),
            fma_bf16x2(x.first, sine, multiply(x.second, cosine))};
  }
  __device__ __forceinline__ Pairs back(Pairs x) const {
    return {fma_bf16x2(x.second, sine, multiply(x.first, cosine)),
            fma_bf16x2(x.first, minus_sine, multiply(x.second, cosine))};
  }
};

// Four neighbouring columns of one token: x0, x1 in `low`, x2, x3 in `high`, as in memory.
struct Columns {
  Bf16x2 low, high;

  __device__ __forceinline__ Pairs pairs() const { return {low_halves(low, high), high_halves(low, high)}; }
  __device__ __forceinline__ Pairs negative() const { return {low_signs(low, high), high_signs(low, high)}; }
  __device__ __forceinline__ float operator[](int i) const {
    const Bf16x2 word = i / 2 ? high : low;
    return i % 2 ? upper_half(word) : lower_half(word);
  }
  __device__ __forceinline__ Bf16x2 max_abs() const { return max_bf16x2(absolute_bf16x2(low), absolute_bf16x2(high)); }
  __device__ __forceinline__ Pairs absolute_pairs() const {
    const Pairs x = pairs();
    return {absolute_bf16x2(x.first), absolute_bf16x2(x.second)};
  }
  // y as four columns with these columns' signs; 0 where they are 0.
  __device__ __forceinline__ Columns signed_like(Pairs y, Pairs negative) const {
    const Bf16x2 first = y.first ^ (negative.first & kMinusZeros), second = y.second ^ (negative.second & kMinusZeros);
    return {low_halves(first, second) & nonzero_bf16x2(low), high_halves(first, second) & nonzero_bf16x2(high)};
  }
};

// e^x − 1 of four exponents in units of ln 2, computed in float32 and packed. The absolute error of 2^-22 exceeds bf16
// rounding for x < 1e-4, which matters only for tokens without any larger element.
__device__ __forceinline__ Pairs features_of(const float (&exponents)[4]) {
  float features[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) features[i] = ex2_approx(exponents[i]) - 1.f;
  return {pack_bf16(features[0], features[2]), pack_bf16(features[1], features[3])};
}
// e^x − 1 of four exponents in units of ln 2, scaled by `by`.
__device__ __forceinline__ Pairs features_of(const float (&exponents)[4], float by) {
  float features[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) features[i] = ex2_approx(exponents[i]) * by - by;
  return {pack_bf16(features[0], features[2]), pack_bf16(features[1], features[3])};
}
__device__ __forceinline__ Pairs key_features(Columns x) {
  const float exponents[4] = {fabsf(x[0]) * kLog2E, fabsf(x[1]) * kLog2E, fabsf(x[2]) * kLog2E, fabsf(x[3]) * kLog2E};
  return features_of(exponents);
}

// e^x from e^x − 1.
__device__ __forceinline__ Pairs slopes(Pairs features) {
  return {add(features.first, kOnes), add(features.second, kOnes)};
}

// e^x of four exponents in units of ln 2.
__device__ __forceinline__ Pairs powers_of(const float (&exponents)[4]) {
  float powers[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) powers[i] = ex2_approx(exponents[i]);
  return {pack_bf16(powers[0], powers[2]), pack_bf16(powers[1], powers[3])};
}

// Temperatures of a column in units of ln 2: x·difference + |x|·sum is |x| times the temperature of x's part.
struct alignas(16) Temperatures {
  float difference[2], sum[2];  // by flow

  __device__ __forceinline__ float exponent(float x, int flow, float more = 0.f) const {
    return x * difference[flow] + (fabsf(x) * sum[flow] + more);
  }
};

__device__ __forceinline__ void load_temperatures(Temperatures (&four)[4], SmemPointer address) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint4 words = load_words(address + 64 * i);
    four[i] = {{__builtin_bit_cast(float, words.x), __builtin_bit_cast(float, words.y)},
               {__builtin_bit_cast(float, words.z), __builtin_bit_cast(float, words.w)}};
  }
}

// Exponents of one flow in units of ln 2, plus `more`.
struct Exponents {
  float values[4];
  __device__ __forceinline__ Exponents(Columns x, const Temperatures (&by)[4], int flow, float more = 0.f) {
#pragma unroll
    for (int i = 0; i < 4; ++i) values[i] = by[i].exponent(x[i], flow, more);
  }
};

// x as the sum of two bf16, the larger in the low half.
__device__ __forceinline__ Bf16x2 split_bf16(float x) {
  const float high = lower_half(pack_bf16(x, 0.f));
  return pack_bf16(high, x - high);
}

// Row order of a B operand whose A fragments are Pairs: position of column i within every 16.
__device__ __forceinline__ int order_16(int i) { return i / 16 * 16 + i % 2 * 8 + i / 4 % 4 * 2 + i / 2 % 2; }
// Order of tables by column: x_i of thread t is at 4·i + t of every 16, so that a warp reads four neighbours at once.
__device__ __forceinline__ int order_table(int i) { return i / 16 * 16 + i % 4 * 4 + i / 4 % 4; }

// This lane's row address for load_b() and load_b_transposed() of a matrix in shared memory.
__device__ __forceinline__ SmemPointer b_rows(const uint16_t* tile, int stride) {
  const int lane = threadIdx.x % 32;
  return SmemPointer(tile + lane % 16 * stride + lane / 16 * 8);
}
__device__ __forceinline__ SmemPointer b_rows_transposed(const uint16_t* tile, int stride) {
  const int lane = threadIdx.x % 32;
  return SmemPointer(tile + (lane % 8 + lane / 16 * 8) * stride + lane / 8 % 2 * 8);
}
// Loads two adjacent B fragments: K = 16 rows of memory, N = 2 × 8 columns.
__device__ __forceinline__ void load_b(uint32_t (&b)[2][2], SmemPointer rows) {
  uint32_t words[4];
  ldmatrix_x4_trans(words, rows);
  b[0][0] = words[0], b[0][1] = words[1], b[1][0] = words[2], b[1][1] = words[3];
}
// Loads two adjacent B fragments of the transpose: N = 2 × 8 rows of memory, K = 16 columns.
__device__ __forceinline__ void load_b_transposed(uint32_t (&b)[2][2], SmemPointer rows) {
  uint32_t words[4];
  ldmatrix_x4(words, rows);
  b[0][0] = words[0], b[0][1] = words[1], b[1][0] = words[2], b[1][1] = words[3];
}

// Loads one B fragment from rows of 16 bytes: K = 16 rows, N = 8 columns.
__device__ __forceinline__ void load_b_narrow(uint32_t (&b)[2], const void* rows) {
  uint32_t words[4];
  ldmatrix_x4_trans(words, SmemPointer(static_cast<const char*>(rows) + threadIdx.x % 16 * 16));
  b[0] = words[0], b[1] = words[1];
}

// A fragment of mma.m16n8k16. rows_as_a(): 16 tokens × 16 features, from the two tokens of each thread. columns_as_a():
// its transpose, whose row g is feature 2g of the 16, and row g + 8 feature 2g + 1.
struct FragmentA {
  uint32_t words[4];
};
// Keeps the fragment in four consecutive registers, as mma requires. ptxas would otherwise move loaded words before
// every product; an XOR with a zero that it cannot see through moves them once.
__device__ __forceinline__ FragmentA pin_registers(FragmentA a, uint32_t zero) {
#pragma unroll
  for (int i = 0; i < 4; ++i) a.words[i] ^= zero;
  return a;
}
// Splits features into the two parts of a flow: part 0 is x⁺ in the same-sign flow and x⁻ in the opposite-sign flow.
struct Parts {
  Pairs part[2];
  __device__ __forceinline__ Parts(Pairs features, Pairs negative, int flow)
      : part{flow ? masked(features, negative) : unmasked(features, negative),
             flow ? unmasked(features, negative) : masked(features, negative)} {}
};
__device__ __forceinline__ FragmentA rows_as_a(const Pairs (&rows)[2]) {
  return {{rows[0].first, rows[1].first, rows[0].second, rows[1].second}};
}
__device__ __forceinline__ FragmentA columns_as_a(const Pairs (&rows)[2]) {
  return {{movmatrix_trans(rows[0].first), movmatrix_trans(rows[0].second), movmatrix_trans(rows[1].first),
           movmatrix_trans(rows[1].second)}};
}

// Reads one head's (2D, D) matrix, four neighbouring columns of two features in each thread: calls store(part,
// position, column, first, second), where `position` is that of the first feature in order_16(), and the second one's
// is the next. Columns are padded to W, each half separately with `halves`. D is a multiple of 16; what lies beyond is
// 0.
template <int kHeadDim, class Store>
__device__ __forceinline__ void read_state(const float* state, int head_dim, int threads, bool halves, Store store) {
  const int lane = threadIdx.x % 32, half = halves ? head_dim / 2 : head_dim;
  const int own_feature = lane / 8 * 4 + lane / 4 % 2, own_column = lane % 4 * 4;
#pragma unroll 1
  for (int block = opaque(int(threadIdx.x / 32)); block < kHeadDim / 8; block += threads / 32) {  // of 16 features
    const int part = block / (kHeadDim / 16), feature = block % (kHeadDim / 16) * 16 + own_feature;
    const float* const row = state + (part * head_dim + feature) * head_dim + own_column;
#pragma unroll
    for (int column = 0; column < kHeadDim; column += 16) {
      const int upper = halves && column >= kHeadDim / 2, within = column - upper * (kHeadDim / 2);
      float4 first = {0.f, 0.f, 0.f, 0.f}, second = first;
      if (feature < head_dim && within + own_column < half) {
        const float* const four = row + upper * half + within;
        first = __ldg(reinterpret_cast<const float4*>(four));
        second = __ldg(reinterpret_cast<const float4*>(four + 2 * head_dim));
      }
      store(part, order_16(feature), column + own_column, first, second);
    }
  }
}

// Copies it into shared memory as rows of bf16, by part; column_order keeps neighbouring pairs of columns together.
template <int kHeadDim, int kStride, class ColumnOrder>
__device__ __forceinline__ void load_state(uint16_t* tile, const float* state, int head_dim, int threads, bool halves,
                                           ColumnOrder column_order) {
  read_state<kHeadDim>(state, head_dim, threads, halves, [&](int part, int position, int column, float4 a, float4 b) {
    uint16_t* const row = tile + (part * kHeadDim + position) * kStride;
    const auto store = [&](int i, float x, float y) {
      *reinterpret_cast<uint32_t*>(row + i / 4 * kStride + column_order(column + i % 4)) = pack_bf16(x, y);
    };
    store(0, a.x, a.y), store(2, a.z, a.w), store(4, b.x, b.y), store(6, b.z, b.w);
  });
}

// The same for warpgroups' products: core matrices of 8 features × 8 columns, the features by 16, then part.
template <int kHeadDim>
struct CoreMatrices {
  static constexpr int kBytes = 128, kRowBytes = kHeadDim / 8 * kBytes;  // of one; of those of the same 8 features
  alignas(16) uint16_t elements[2 * kHeadDim * kHeadDim];

  template <class ColumnOrder>
  __device__ __forceinline__ void load(const float* state, int head_dim, int threads, bool halves,
                                       ColumnOrder column_order) {
    char* const bytes = reinterpret_cast<char*>(elements);
    read_state<kHeadDim>(state, head_dim, threads, halves, [&](int part, int position, int column, float4 a, float4 b) {
      char* const rows =
          bytes + offset(position / 16 * 16, part, 0) + position % 16 / 8 * kRowBytes + position % 8 * 16;
      const auto store = [&](int i, float x, float y) {
        const int at = column_order(column + i % 4);
        *reinterpret_cast<uint32_t*>(rows + i / 4 * 16 + at / 8 * kBytes + at % 8 * 2) = pack_bf16(x, y);
      };
      store(0, a.x, a.y), store(2, a.z, a.w), store(4, b.x, b.y), store(6, b.z, b.w);
    });
    fence_shared_for_products();
  }

  // Bytes from the start to 16 features' rows and a column, which is a multiple of 8.
  static __device__ __forceinline__ constexpr int offset(int feature, int part, int column) {
    return (feature / 8 + part) * 2 * kRowBytes + column / 8 * kBytes;
  }
  // Operand B of which K are features and N are columns (Major::kN), or the other way around (Major::kK).
  __device__ __forceinline__ MatrixDescriptor by_features() const { return {elements, kRowBytes, kBytes}; }
  __device__ __forceinline__ MatrixDescriptor by_columns() const { return {elements, kBytes, kRowBytes}; }
};

// Row and column of a token in the image, advanced without divisions.
struct TokenPosition {
  int row, column;

  __device__ __forceinline__ TokenPosition(int token, const Shape& shape)
      : row(token / shape.width), column(token - row * shape.width) {}
  __device__ __forceinline__ void move(const TokenPosition& by, const Shape& shape) {
    row += by.row, column += by.column;
    if (column >= shape.width) column -= shape.width, ++row;
  }
};

// Byte offsets into the packed rotary table (rotary.cu) for a token at this thread's four of 16 columns. The first part
// of the features rotates by the token's row, the second by its column. Each further 16 columns are rotary_stride()
// bytes per column away.
struct RotaryRow {
  unsigned by_row, by_column;

  // Tokens beyond the image, whose results are discarded, use the last row's entries.
  RotaryRow() = default;
  __device__ __forceinline__ RotaryRow(const TokenPosition& position, const Shape& shape) {
    constexpr unsigned kBytes = 4 * sizeof(CosSin);
    const unsigned own = sizeof(CosSin) * thread_in_group();
    by_row = opaque(own + min(position.row, shape.height - 1) * kBytes);
    by_column = opaque(own + (shape.height + position.column) * kBytes);
  }
  __device__ __forceinline__ Rotation first(const char* table) const { return load(table + by_row); }
  __device__ __forceinline__ Rotation second(const char* table) const { return load(table + by_column); }

 private:
  static __device__ __forceinline__ Rotation load(const char* entry) {
    return Rotation(__ldg(reinterpret_cast<const uint2*>(entry)));
  }
};
__device__ __forceinline__ unsigned rotary_stride(const Shape& shape) {
  return (shape.height + shape.width) * (4 * sizeof(CosSin) / 16);
}

// Load neighbouring columns of a token, zeros if not `valid`.
__device__ __forceinline__ uint4 load_eight(const char* columns, bool valid) {
  return valid ? __ldg(reinterpret_cast<const uint4*>(columns)) : uint4{0, 0, 0, 0};
}
__device__ __forceinline__ Columns load_four(const char* columns, bool valid) {
  const uint2 words = valid ? __ldg(reinterpret_cast<const uint2*>(columns)) : uint2{0, 0};
  return {words.x, words.y};
}

// A chunk of 16 tokens × 16 columns in shared memory, as 16 bytes of each lane in the order in which lanes copy them.
constexpr int kChunkBytes = 16 * 16 * 2;
// Loads four columns of tokens g, g + 8 and so on; address: of this lane's 8 bytes in the first of the chunks.
template <int kRows>
__device__ __forceinline__ void load_chunks(Columns (&x)[kRows], SmemPointer address) {
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
    const uint2 words = load_two_words(address + row * (kChunkBytes / 2));
    x[row] = {words.x, words.y};
  }
}

// A warp's ring in shared memory: 16 columns each of its next tile of 16·kTiles tokens, then of the tile
// `kStep` tokens on. Asynchronous copies keep all but one in flight. (Loads to registers that far ahead would make the
// warp wait for them as soon as it needs entries of the rotary table, which it loads later: there are too few
// scoreboards to tell them apart.)
template <int kHeadDim, int kTiles, int kStep>
struct ChunkRing {
  static constexpr int kSlots = kHeadDim <= 96 ? 4 : 2, kSlotBytes = kTiles * kChunkBytes;
  using Storage = uint4[kSlots][kSlotBytes / 16];

  SmemPointer target, own;   // in slot 0: the 16 bytes that this lane copies, and the columns that it reads
  const char* source;        // of the next copy
  int64_t stride;            // of tokens, in bytes
  int head_dim, column = 0;  // the first one of the next copies
  int remaining;             // tokens, from the next one that this lane copies on
  int slot = 0;              // to be read next

  // token: the first one of the warp.
  __device__ __forceinline__ ChunkRing(Storage& storage, const Rows<false>& rows, int token, int end)
      : target(storage[0] + threadIdx.x % 32),
        own(reinterpret_cast<const uint2*>(storage[0]) + threadIdx.x % 32),
        stride(rows.stride),
        head_dim(rows.head_dim) {
    const int lane = threadIdx.x % 32;
    source = rows.at(token + lane / 2, lane % 2 * 8);
    remaining = end - token - lane / 2;
    for (int i = 0; i < kSlots - 1; ++i) start(i);
  }

  // Waits for the next slot and loads this thread's columns of tokens g, g + 8 and so on.
  __device__ __forceinline__ void load(Columns (&x)[2 * kTiles], int /*column*/) {
    cp_async_wait_group<kSlots - 2>();
    __syncwarp();  // the slot has arrived, and no lane reads the one to be overwritten
    start((slot + kSlots - 1) % kSlots);
    load_chunks(x, own + slot * kSlotBytes);
    slot = (slot + 1) % kSlots;
  }

 private:
  __device__ __forceinline__ void start(int to) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      cp_async(target + to * kSlotBytes + tile * kChunkBytes, source + 16 * tile * stride,
               16 * tile < remaining && column < head_dim);
    }
    cp_async_commit_group();
    source += 32, column += 16;
    if (column == kHeadDim) column = 0, remaining -= kStep, source += kStep * stride - 2 * kHeadDim;
  }
};

// A warp's next tile of 16 tokens in shared memory, for loops over columns that are unrolled: as soon as 16 columns
// have been read, an asynchronous copy of those of the tile `kStep` tokens on takes their place.
template <int kHeadDim, int kStep>
struct TileCopies {
  static constexpr int kChunks = kHeadDim / 16;
  using Storage = uint4[kChunks][kChunkBytes / 16];

  SmemPointer target, own;  // in the first chunk: the 16 bytes that this lane copies, and the columns that it reads
  const char* source;       // of this lane's copies for the next tile
  int64_t step;             // to the tile after it, in bytes
  int head_dim, remaining;  // tokens, from the one that this lane copies on

  // token: the first one of the warp.
  __device__ __forceinline__ TileCopies(Storage& storage, const Rows<false>& rows, int token, int end)
      : target(storage[0] + threadIdx.x % 32),
        own(reinterpret_cast<const uint2*>(storage[0]) + threadIdx.x % 32),
        step(kStep * rows.stride),
        head_dim(rows.head_dim) {
    const int lane = threadIdx.x % 32;
    source = rows.at(token + lane / 2, lane % 2 * 8);
    remaining = end - token - lane / 2;
#pragma unroll
    for (int column = 0; column < kHeadDim; column += 16) start(column);
  }

  // Loads this thread's four of 16 columns of tokens g and g + 8.
  __device__ __forceinline__ void load(Columns (&x)[2], int column) {
    cp_async_wait_group<kChunks - 1>();
    __syncwarp();  // all lanes' copies have arrived
    load_chunks(x, own + column / 16 * kChunkBytes);
    __syncwarp();  // all lanes have read them
    start(column);
  }

 private:
  __device__ __forceinline__ void start(int column) {
    cp_async(target + column / 16 * kChunkBytes, source + 2 * column, remaining > 0 && column < head_dim);
    cp_async_commit_group();
    if (column == kHeadDim - 16) source += step, remaining -= kStep;
  }
};

// One stage: 32 tokens of two tensors, one read as rows of 16 columns by each warp, the other as B fragments.
template <int kHeadDim>
struct alignas(16) TokenStage {
  static constexpr int kRowStride = kHeadDim + 16;  // four rows of 16 columns are in different banks
  static constexpr int kBStride = kHeadDim + 8;     // eight rows of 8 columns are in different banks
  uint16_t rows[kSumTokens * kRowStride], b[kSumTokens * kBStride];
  RotaryOffsets rotary[kSumTokens];
};

// A thread's share of the asynchronous copies of a split's tokens into stages, 32 tokens per step. Half of the block's
// 2·W threads copy `rows`, the others `b`: 16 bytes of every eighth token.
template <int kHeadDim, class Stage, int kStages>
struct StageCopies {
  SmemPointer target;
  const char* source;
  int64_t source_stride;
  int target_stride, remaining;  // stride in bytes; tokens left, counted from the next one of this thread

  // halves: pad each half of the columns of `b` separately.
  __device__ __forceinline__ StageCopies(Stage (&stages)[kStages], const StridedTensor& rows, const StridedTensor& b,
                                         bool halves, const Split& split, const Shape& shape)
      : target(threadIdx.x >= kHeadDim ? stages[0].b : stages[0].rows) {
    const bool copies_b = threadIdx.x >= kHeadDim;
    const int row = threadIdx.x % kHeadDim / (kHeadDim / 8), padded = threadIdx.x % (kHeadDim / 8) * 8;
    const int column = column_of<kHeadDim>(padded, shape.head_dim, copies_b && halves);
    const Rows<false> from = rows_of<false>(copies_b ? b : rows, shape, split);
    target_stride = 2 * (copies_b ? Stage::kBStride : Stage::kRowStride);
    target = target + row * target_stride + 2 * padded;
    source = from.at(split.begin + row, max(column, 0)), source_stride = from.stride;
    remaining = column >= 0 ? split.end - split.begin - row : 0;
  }

  // Starts the copies of the next 32 tokens.
  __device__ __forceinline__ void start(int stage) {
    const SmemPointer first = target + stage * int(sizeof(Stage));
#pragma unroll
    for (int i = 0; i < kSumTokens; i += 8) {
      cp_async(first + i * target_stride, source, i < remaining);
      source += 8 * source_stride;
    }
    remaining -= kSumTokens;
  }
};

// Writes `columns` columns of rows 2g and 2g + 1 of a product, rows g and g + 8 of the accumulators, times `scale`.
template <int kCount>
__device__ __forceinline__ void store_rows(float* row, int stride, const Accumulator (&sums)[kCount], int columns,
                                           float scale) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int column = 8 * i + 2 * thread_in_group();
    if (column >= columns) break;
    *reinterpret_cast<float2*>(row + column) = make_float2(sums[i][0] * scale, sums[i][1] * scale);
    *reinterpret_cast<float2*>(row + stride + column) = make_float2(sums[i][2] * scale, sums[i][3] * scale);
  }
}

// m or its gradient for four neighbouring columns, by part.
struct alignas(16) MeanPairs {
  Pairs first, second;
};

__device__ __forceinline__ MeanPairs load_means(SmemPointer address) {
  const uint4 words = load_words(address);
  return {{words.x, words.y}, {words.z, words.w}};
}

__device__ __forceinline__ void fill_means(MeanPairs* means, const float* of_head, int head_dim, int padded_head_dim,
                                           int threads) {
  for (int i = opaque(int(threadIdx.x)); i < padded_head_dim / 4; i += threads) {
    MeanPairs four = {};
    if (4 * i < head_dim) {
      const float4 a = __ldg(reinterpret_cast<const float4*>(of_head) + i);
      const float4 b = __ldg(reinterpret_cast<const float4*>(of_head + head_dim) + i);
      four = {{pack_bf16(a.x, a.z), pack_bf16(a.y, a.w)}, {pack_bf16(b.x, b.z), pack_bf16(b.y, b.w)}};
    }
    means[i] = four;
  }
}

// Whether this thread's share of a head's key shifts has any.
__device__ __forceinline__ bool is_shifted(const float* shifts, int head_dim, int threads) {
  bool shifted = false;
  for (int i = opaque(int(threadIdx.x)); i < head_dim; i += threads) shifted |= shifts[i] > 0.f;
  return shifted;
}

// Fills a table of temperatures in order_table().
__device__ __forceinline__ void fill_temperatures(Temperatures* table, const CommonParams& params, const Split& split,
                                                  int padded_head_dim, int threads) {
  const int head_dim = params.shape.head_dim;
  const float* same = params.same_logits + int64_t{split.head_in_batch} * (2 * head_dim);
  const float* opposite = params.opposite_logits + int64_t{split.head_in_batch} * (2 * head_dim);
  for (int i = opaque(int(threadIdx.x)); i < padded_head_dim; i += threads) {
    Temperatures by = {};
    if (i < head_dim) {
      constexpr float kHalf = 0.5f * kLog2E;
      const float same_positive = kHalf * logistic(same[i]), same_negative = kHalf * logistic(same[head_dim + i]);
      const float opposite_negative = kHalf * logistic(opposite[i]);
      const float opposite_positive = kHalf * logistic(opposite[head_dim + i]);
      by = {{same_positive - same_negative, opposite_positive - opposite_negative},
            {same_positive + same_negative, opposite_positive + opposite_negative}};
    }
    table[order_table(i)] = by;
  }
}

// Tables in shared memory for one head's queries: temperatures for features, m for normalizers.
template <int kHeadDim>
struct QueryTables {
  Temperatures temperatures[kHeadDim];          // in order_table()
  alignas(16) uint16_t means[2 * kHeadDim][8];  // m by part, as the sum of two bf16, four times

  // Fills all tables. Returns whether this thread's share of the key shifts has any.
  template <class Params>
  __device__ __forceinline__ bool load(const Params& params, const Split& split, int threads) {
    const int head_dim = params.shape.head_dim;
    const float* mean = params.key_mean + int64_t{split.head} * (2 * head_dim);
    fill_temperatures(temperatures, params, split, kHeadDim, threads);
    for (int i = opaque(int(threadIdx.x)); i < 2 * kHeadDim; i += threads) {
      const int part = i / kHeadDim, column = i % kHeadDim;
      const Bf16x2 two = column < head_dim ? split_bf16(mean[part * head_dim + column]) : 0;
      *reinterpret_cast<uint4*>(means[part * kHeadDim + order_16(column)]) = {two, two, two, two};
    }
    return is_shifted(params.key_shift + int64_t{split.head} * head_dim, head_dim, threads);
  }

  // Address for load_temperatures() of this thread's columns; 16 bytes per column.
  __device__ __forceinline__ SmemPointer temperature_rows() const {
    return SmemPointer(temperatures + thread_in_group());
  }
  // Address for load_b() of the B fragments of m, by part; 16 bytes per column.
  __device__ __forceinline__ SmemPointer mean_rows() const {
    const int lane = threadIdx.x % 32;
    return SmemPointer(means[lane / 16 * kHeadDim + lane % 16]);
  }
};

}  // namespace polaformer::bf16
