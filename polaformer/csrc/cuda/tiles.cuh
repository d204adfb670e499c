// Tokens in memory: their rows, their rotary offsets, tiles of them in shared memory, results back.
#pragma once

#include "ptx.cuh"
#include "launch_params.h"

namespace polaformer {

__device__ __forceinline__ int group_id() { return threadIdx.x % 32 / 4; }  // g
__device__ __forceinline__ int thread_in_group() { return threadIdx.x % 4; }      // t
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

// The tokens of one head: rows of head_dim elements, float32 or, as dtype says, of 16 bits.
template <bool kFloat>
struct Rows {
  static constexpr int kBytes = kFloat ? 4 : 2;
  const char* data;
  int64_t stride;  // bytes
  int head_dim;
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
__device__ __forceinline__ Rows<kFloat> rows_of(const StridedTensor& tensor, const Shape& shape, const Split& split) {
  const int64_t offset = int64_t{split.batch} * tensor.batch + split.head_in_batch * tensor.head;
  constexpr int kBytes = Rows<kFloat>::kBytes;
  return {static_cast<const char*>(tensor.data) + offset * kBytes, tensor.token * kBytes, shape.head_dim,
          shape.dtype == Dtype::kHalf};
}

// Where column `padded` of W lies among D, or −1. With `halves` each half of the columns is padded by itself, so that
// the two flows part at W/2.
template <int kHeadDim>
__device__ __forceinline__ int column_of(int padded, int head_dim, bool halves) {
  const int upper = halves && padded >= kHeadDim / 2, within = padded - upper * (kHeadDim / 2);
  const int half = halves ? head_dim / 2 : head_dim;
  return within < half ? upper * half + within : -1;
}

// Where a head's first row begins in a (B, N, H, D) tensor; H·D elements further the next.
__device__ __forceinline__ int64_t first_row(const Split& split, const Shape& shape) {
  return (int64_t{split.batch} * shape.tokens() * shape.heads + split.head_in_batch) * shape.head_dim;
}

// A warp's tokens come from memory eight columns a thread: thread t has columns 8t … 8t + 7 of every 32, and A
// fragments take the first four of them as columns {2t, 2t + 1, 2t + 8, 2t + 9} of one product, the others of the next.
// So a matrix that meets them has its rows in this order; sums over them come out in it too, eight neighbours a thread.
__device__ __forceinline__ int interleave_32(int i) {
  return i / 32 * 32 + i / 4 % 2 * 16 + i / 2 % 2 * 8 + i / 8 % 4 * 2 + i % 2;
}
// The same for four columns a thread.
__device__ __forceinline__ int interleave_16(int i) { return i / 16 * 16 + i / 2 % 2 * 8 + i / 4 % 4 * 2 + i % 2; }

// Calls what visits with the padded width as a constant.
template <int kHeadDim>
struct HeadDim {
  constexpr int operator()() const { return kHeadDim; }
};
template <class Visitor>
const char* dispatch_head_dim(int padded_head_dim, Visitor visit) {
  return padded_head_dim == 32   ? visit(HeadDim<32>())
         : padded_head_dim == 64 ? visit(HeadDim<64>())
         : padded_head_dim == 96 ? visit(HeadDim<96>())
                              : visit(HeadDim<128>());
}

// Launches a kernel for one padded width, of which as many blocks shall share a multiprocessor as the plan counts on.
template <class Shared, int kHeadDim, int kBlocksPerSm, class Arguments>
const char* launch_blocks(void (*kernel)(Arguments), int64_t blocks, int threads, void* stream, const Arguments& f) {
  static_assert(sizeof(Shared) <= max_shared_bytes(kHeadDim) && fits_in_shared_memory(kBlocksPerSm, sizeof(Shared)));
  return launch(kernel, {blocks, threads, sizeof(Shared)}, stream, f);
}

// Offsets, in the rotary table, of a token's row and column: for parts of features 0 … D and D … 2D.
template <int kHeadDim>
__device__ __forceinline__ int2 locate_cos_sin(int token, const Shape& shape) {
  const int row = token / shape.width, column = token - row * shape.width;
  return make_int2(row * (kHeadDim / 2), (shape.height + column) * (kHeadDim / 2));
}

__device__ __forceinline__ float logistic(float x) { return 1.f / (1.f + expf(-x)); }

// Over the lanes of one g, or of the warp; every lane receives the result.
__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(kFullWarpMask, x, 1);
  return x + __shfl_xor_sync(kFullWarpMask, x, 2);
}
__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(kFullWarpMask, x, 1));
  return fmaxf(x, __shfl_xor_sync(kFullWarpMask, x, 2));
}
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) x = fmaxf(x, __shfl_xor_sync(kFullWarpMask, x, lanes));
  return x;
}

}  // namespace polaformer
