// Splits and rows of tokens in global memory, tile layouts in shared memory, dispatch over the padded head dimension,
// and warp reductions: what the bf16 and the tf32 kernels share.
#pragma once

#include "launch_params.h"
#include "ptx.cuh"

namespace polaformer {

__device__ __forceinline__ int group_id() { return threadIdx.x % 32 / 4; }    // g
__device__ __forceinline__ int thread_in_group() { return threadIdx.x % 4; }  // t
__device__ __forceinline__ float upper_half(uint32_t bits) { return __builtin_bit_cast(float, bits & 0xffff0000u); }
__device__ __forceinline__ float lower_half(uint32_t bits) { return __builtin_bit_cast(float, bits << 16); }

using Accumulator = float[4];  // the 16×8 results of one mma; layouts in tf32.cuh and bf16.cuh

// A contiguous range of one head's tokens.
struct Split {
  unsigned head;  // among all B·H
  int batch, head_in_batch, begin, end;
};

__device__ __forceinline__ Split locate_split(unsigned index, const Splits& splits, const Shape& shape) {
  const unsigned head = index / splits.splits_per_head, batch = head / shape.heads;
  const int begin = static_cast<int>(index - head * splits.splits_per_head) * splits.tokens_per_split;
  return {head, static_cast<int>(batch), static_cast<int>(head - batch * shape.heads), begin,
          min(begin + splits.tokens_per_split, shape.tokens())};
}

// The tokens of one head: rows of head_dim elements, float32 if kFloat, else fp16 if `half`, else bf16.
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
    const char* address = at(token, column);
    if constexpr (kFloat) return __ldg(reinterpret_cast<const float*>(address));
    const uint16_t bits = __ldg(reinterpret_cast<const uint16_t*>(address));
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

// The column among D that padded column `padded` of W stands for, or −1. With `halves`, each half of the columns is
// padded separately, so that the flows meet at W/2.
template <int kHeadDim>
__device__ __forceinline__ int column_of(int padded, int head_dim, bool halves) {
  const int upper = halves && padded >= kHeadDim / 2, within = padded - upper * (kHeadDim / 2);
  const int half = halves ? head_dim / 2 : head_dim;
  return within < half ? upper * half + within : -1;
}

// Element offset of a head's first row in a (B, N, H, D) tensor, whose rows of one head are H·D elements apart.
__device__ __forceinline__ int64_t first_row(const Split& split, const Shape& shape) {
  return (int64_t{split.batch} * shape.tokens() * shape.heads + split.head_in_batch) * shape.head_dim;
}

// Order of the K axis of a product whose A fragments are loaded eight columns per thread: thread t has columns
// 8t … 8t + 7 of every 32; the first four become columns {2t, 2t + 1, 2t + 8, 2t + 9} of one mma's A fragment, the
// others of the next. The B operand's rows are stored in this order. Conversely, a B operand whose columns are stored
// in it leaves eight neighbouring columns of the accumulators to each thread.
__device__ __forceinline__ int interleave_32(int i) {
  return i / 32 * 32 + i / 4 % 2 * 16 + i / 2 % 2 * 8 + i / 8 % 4 * 2 + i % 2;
}
// Order of the K axis for four columns per thread: every 16 columns are one mma's A fragment.
__device__ __forceinline__ int interleave_16(int i) { return i / 16 * 16 + i / 2 % 2 * 8 + i / 4 % 4 * 2 + i % 2; }

// Calls visit(head_dim) with the padded head dimension W, where head_dim() is a constant expression.
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

// Launches a kernel compiled for one W; asserts that shared memory permits as many blocks per SM as the plan assumes.
template <class Shared, int kHeadDim, int kBlocksPerSm, class Params>
const char* launch_blocks(void (*kernel)(Params), int64_t blocks, int threads, void* stream, const Params& params) {
  static_assert(sizeof(Shared) <= max_shared_bytes(kHeadDim) && fits_in_shared_memory(kBlocksPerSm, sizeof(Shared)));
  return launch(kernel, {blocks, threads, sizeof(Shared)}, stream, params);
}

// The same for a kernel in which warpgroups multiply, whose blocks share an H100's memory.
template <class Shared, int kBlocksPerSm, class Params>
const char* launch_warpgroups(void (*kernel)(Params), int64_t blocks, int threads, void* stream, const Params& params) {
  static_assert(fits_in_shared_memory(kBlocksPerSm, sizeof(Shared), true));
  return launch(kernel, {blocks, threads, sizeof(Shared)}, stream, params);
}

// Launches a kernel that computes with a shift: at most one block per SM, looping over splits, few of which need it.
template <class Shared, int kHeadDim, class Params>
const char* launch_shifted(void (*kernel)(Params), int64_t splits, int threads, void* stream, const Params& params) {
  const int64_t blocks = std::min<int64_t>(splits, params.plan.sm_count);
  return launch_blocks<Shared, kHeadDim, 1>(kernel, blocks, threads, stream, params);
}

// Offsets of a token's row (x) and column (y) in cos_sin, in entries of one pair: the row rotates features 0 … D, the
// column features D … 2D.
template <int kHeadDim>
__device__ __forceinline__ int2 locate_cos_sin(int token, const Shape& shape) {
  const int row = token / shape.width, column = token - row * shape.width;
  return make_int2(row * (kHeadDim / 2), (shape.height + column) * (kHeadDim / 2));
}

__device__ __forceinline__ float logistic(float x) { return 1.f / (1.f + expf(-x)); }

// Reductions over the four lanes of a group or over a warp; every lane receives the result.
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
