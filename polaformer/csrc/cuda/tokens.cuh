// Tokens in memory: their rows, the turns at their places, tiles of them in shared memory, results back.
#pragma once

#include "device.cuh"
#include "plan.h"

namespace polaformer {

__device__ __forceinline__ int lane_group() { return threadIdx.x % 32 / 4; }  // g
__device__ __forceinline__ int lane_member() { return threadIdx.x % 4; }      // t
__device__ __forceinline__ float upper_half(uint32_t bits) { return __builtin_bit_cast(float, bits & 0xffff0000u); }
__device__ __forceinline__ float lower_half(uint32_t bits) { return __builtin_bit_cast(float, bits << 16); }

using Accumulator = float[4];  // of a product 16×8, see tf32.cuh and bf16.cuh

// One split: some tokens of one head.
struct Split {
  unsigned head;  // of all B·H
  int batch, head_in_batch, begin, end;
};

__device__ __forceinline__ Split locate_split(unsigned index, const Splits& splits, const Shape& shape) {
  const unsigned head = index / splits.splits_per_head, batch = head / shape.heads;
  const int begin = static_cast<int>(index - head * splits.splits_per_head) * splits.tokens_per_split;
  return {head, static_cast<int>(batch), static_cast<int>(head - batch * shape.heads), begin,
          min(begin + splits.tokens_per_split, shape.tokens())};
}

// The tokens of one head: rows of head_width elements, float32 or, as dtype says, of 16 bits.
template <bool kFloat>
struct Rows {
  static constexpr int kBytes = kFloat ? 4 : 2;
  const char* data;
  int64_t stride;  // bytes
  int head_width;
  bool half;

  __device__ __forceinline__ const char* at(int token, int column) const {
    return data + token * stride + column * kBytes;
  }
  __device__ __forceinline__ float load(int token, int column) const {
    const char* place = at(token, column);
    if constexpr (kFloat) return __ldg(reinterpret_cast<const float*>(place));
    const uint16_t bits = __ldg(reinterpret_cast<const uint16_t*>(place));
    return half ? half_to_float(bits) : lower_half(bits);
  }
};

template <bool kFloat>
__device__ __forceinline__ Rows<kFloat> rows_of(const Strided& tensor, const Shape& shape, const Split& split) {
  const int64_t offset = int64_t{split.batch} * tensor.batch + split.head_in_batch * tensor.head;
  constexpr int kBytes = Rows<kFloat>::kBytes;
  return {static_cast<const char*>(tensor.data) + offset * kBytes, tensor.token * kBytes, shape.head_width,
          shape.dtype == Dtype::kHalf};
}

// Where column `padded` of W lies among D, or −1. With `halves` each half of the columns is padded by itself, so that
// the two flows part at W/2.
template <int kWidth>
__device__ __forceinline__ int column_of(int padded, int head_width, bool halves) {
  const int upper = halves && padded >= kWidth / 2, within = padded - upper * (kWidth / 2);
  const int half = halves ? head_width / 2 : head_width;
  return within < half ? upper * half + within : -1;
}

// Where a head's first row begins in a (B, N, H, D) tensor; H·D elements further the next.
__device__ __forceinline__ int64_t first_row(const Split& split, const Shape& shape) {
  return (int64_t{split.batch} * shape.tokens() * shape.heads + split.head_in_batch) * shape.head_width;
}

// A warp's tokens come from memory eight columns a thread: thread t has columns 8t … 8t + 7 of every 32, and left
// operands take the first four of them as columns {2t, 2t + 1, 2t + 8, 2t + 9} of one product, the others of the next.
// So a matrix that meets them has its rows in this order; sums over them come out in it too, eight neighbours a thread.
__device__ __forceinline__ int interleave_32(int i) {
  return i / 32 * 32 + i / 4 % 2 * 16 + i / 2 % 2 * 8 + i / 8 % 4 * 2 + i % 2;
}
// The same for four columns a thread.
__device__ __forceinline__ int interleave_16(int i) { return i / 16 * 16 + i / 2 % 2 * 8 + i / 4 % 4 * 2 + i % 2; }

// Calls what visits with the padded width as a constant.
template <int kWidth>
struct Width {
  constexpr int operator()() const { return kWidth; }
};
template <class Visitor>
const char* visit_width(int padded_width, Visitor visit) {
  return padded_width == 32   ? visit(Width<32>())
         : padded_width == 64 ? visit(Width<64>())
         : padded_width == 96 ? visit(Width<96>())
                              : visit(Width<128>());
}

// Launches a kernel for one padded width, of which as many blocks shall share a multiprocessor as the plan counts on.
template <class Shared, int kWidth, int kBlocksPerSm, class Arguments>
const char* launch_blocks(void (*kernel)(Arguments), int64_t blocks, int threads, void* stream, const Arguments& f) {
  static_assert(sizeof(Shared) <= most_shared_bytes(kWidth) && fit(kBlocksPerSm, sizeof(Shared)));
  return launch(kernel, {blocks, threads, sizeof(Shared)}, stream, f);
}

// Offsets, in the table of turns, of a token's row and column: for poles of features 0 … D and D … 2D.
template <int kWidth>
__device__ __forceinline__ int2 locate_turns(int token, const Shape& shape) {
  const int row = token / shape.width, column = token - row * shape.width;
  return make_int2(row * (kWidth / 2), (shape.height + column) * (kWidth / 2));
}

__device__ __forceinline__ float logistic(float x) { return 1.f / (1.f + expf(-x)); }

// Over the lanes of one g, or of the warp; every lane receives the result.
__device__ __forceinline__ float sum_over_members(float x) {
  x += __shfl_xor_sync(kWholeWarp, x, 1);
  return x + __shfl_xor_sync(kWholeWarp, x, 2);
}
__device__ __forceinline__ float max_over_members(float x) {
  x = fmaxf(x, __shfl_xor_sync(kWholeWarp, x, 1));
  return fmaxf(x, __shfl_xor_sync(kWholeWarp, x, 2));
}
__device__ __forceinline__ float max_over_warp(float x) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) x = fmaxf(x, __shfl_xor_sync(kWholeWarp, x, lanes));
  return x;
}

}  // namespace polaformer
