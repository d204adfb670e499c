// PTX instructions, shared memory and launches: everything, with wgmma.cuh, that needs a GPU. All other device code is
// plain C++, so that tests/polaformer/cuda/emulator.h can replace this file and run the same kernels on a CPU.
//
// Fragment layouts: PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type", "… mma.m16n8k8" and
// "ldmatrix". Below, g = lane / 4 (groupID) and t = lane % 4 (threadID_in_group).
#ifndef POLAFORMER_PTX_CUH
#define POLAFORMER_PTX_CUH

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

namespace polaformer {

constexpr unsigned kFullWarpMask = 0xffffffffu;

// The block's dynamic shared memory.
template <class T>
__device__ __forceinline__ T& shared_memory() {
  extern __shared__ __align__(16) char bytes[];
  return *reinterpret_cast<T*>(bytes);
}

__device__ __forceinline__ uint32_t smem_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// x, hidden from the optimizer: values derived from it are not hoisted out of a loop, where they would occupy
// registers, and x itself is not recomputed inside one.
template <class T>
__device__ __forceinline__ T opaque(T x) {
  asm volatile("" : "+r"(x));
  return x;
}
template <class T>
__device__ __forceinline__ T* opaque(T* pointer) {
  asm volatile("" : "+l"(pointer));
  return pointer;
}

// A shared-memory address in one register, where a generic pointer takes two.
struct SmemPointer {
  uint32_t address;

  __device__ __forceinline__ explicit SmemPointer(const void* pointer) : address(opaque(smem_address(pointer))) {}
  __device__ __forceinline__ SmemPointer operator+(int bytes) const {
    SmemPointer moved = *this;
    moved.address += bytes;
    return moved;
  }
};

__device__ __forceinline__ uint4 load_words(SmemPointer pointer) {
  uint4 words;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
               : "r"(pointer.address)
               : "memory");
  return words;
}
__device__ __forceinline__ uint2 load_two_words(SmemPointer pointer) {
  uint2 words;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(words.x), "=r"(words.y) : "r"(pointer.address) : "memory");
  return words;
}
__device__ __forceinline__ void store_words(SmemPointer pointer, uint4 words) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(pointer.address), "r"(words.x), "r"(words.y),
               "r"(words.z), "r"(words.w)
               : "memory");
}

// Loads four 8×8 matrices of 16-bit elements; lane i passes the address of row i % 8 of matrix i / 8, 16 bytes each.
// Receives elements (g, 2t) and (g, 2t + 1) of each matrix, low half first.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&fragment)[4], SmemPointer row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(row.address));
}

// Loads four 8×8 matrices like ldmatrix_x4(), each transposed: receives elements (2t, g) and (2t + 1, g).
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&fragment)[4], SmemPointer row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(row.address));
}

// sum += a (16×16, bf16) · b (16×8, bf16), accumulated in float32.
__device__ __forceinline__ void mma_m16n8k16_bf16(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// sum += a (16×8, tf32) · b (8×8, tf32), accumulated in float32.
__device__ __forceinline__ void mma_m16n8k8_tf32(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// x rounded to tf32 (10 mantissa bits, ties away from zero), as the bits of a float.
__device__ __forceinline__ uint32_t round_to_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
}

// Two bf16 in a register, rounded to nearest even, the first in the low half.
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  uint32_t bits;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}

// Two bf16 in a register, packed as above but saturated at bf16's largest finite value.
__device__ __forceinline__ uint32_t pack_bf16_finite(float low, float high) {
  uint32_t bits;
  asm("cvt.rn.satfinite.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}

// Two bf16 in a register, the first in the low half.
using Bf16x2 = uint32_t;

// a·b + c, rounded once. Plain products and sums use it as well: sm_80 has no other packed bf16 arithmetic.
__device__ __forceinline__ Bf16x2 fma_bf16x2(Bf16x2 a, Bf16x2 b, Bf16x2 c) {
  Bf16x2 d;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}
__device__ __forceinline__ Bf16x2 negate_bf16x2(Bf16x2 a) {
  Bf16x2 d;
  asm("neg.bf16x2 %0, %1;" : "=r"(d) : "r"(a));
  return d;
}
__device__ __forceinline__ Bf16x2 absolute_bf16x2(Bf16x2 a) {
  Bf16x2 d;
  asm("abs.bf16x2 %0, %1;" : "=r"(d) : "r"(a));
  return d;
}
// Maximum; of a number and NaN the number.
__device__ __forceinline__ Bf16x2 max_bf16x2(Bf16x2 a, Bf16x2 b) {
  Bf16x2 d;
  asm("max.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}
// All ones in each half that is neither 0 nor −0. Compared as fp16, whose zeros have the same bits: sm_80 has no bf16
// comparison.
__device__ __forceinline__ uint32_t nonzero_bf16x2(Bf16x2 a) {
  uint32_t mask;
  asm("set.neu.u32.f16x2 %0, %1, %2;" : "=r"(mask) : "r"(a), "r"(0u));
  return mask;
}

// The low or the high halves of a and b.
__device__ __forceinline__ Bf16x2 low_halves(Bf16x2 a, Bf16x2 b) { return __byte_perm(a, b, 0x5410); }
__device__ __forceinline__ Bf16x2 high_halves(Bf16x2 a, Bf16x2 b) { return __byte_perm(a, b, 0x7632); }
// A mask of each half's sign bit. Not by __byte_perm, which does not support sign replication.
__device__ __forceinline__ uint32_t low_signs(Bf16x2 a, Bf16x2 b) {
  uint32_t mask;
  asm("prmt.b32 %0, %1, %2, 0xdd99;" : "=r"(mask) : "r"(a), "r"(b));
  return mask;
}
__device__ __forceinline__ uint32_t high_signs(Bf16x2 a, Bf16x2 b) {
  uint32_t mask;
  asm("prmt.b32 %0, %1, %2, 0xffbb;" : "=r"(mask) : "r"(a), "r"(b));
  return mask;
}

// Transposes an 8×8 matrix of 16-bit elements: from (g, 2t), (g, 2t + 1) to (2t, g), (2t + 1, g).
__device__ __forceinline__ uint32_t movmatrix_trans(uint32_t fragment) {
  uint32_t transposed;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(fragment));
  return transposed;
}

// 2^x with a relative error of 2^-22, in one instruction.
__device__ __forceinline__ float ex2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float lg2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Minimum and maximum; NaN if either operand is.
__device__ __forceinline__ float min_or_nan(float x, float y) {
  asm("min.NaN.f32 %0, %0, %1;" : "+f"(x) : "f"(y));
  return x;
}
__device__ __forceinline__ float max_or_nan(float x, float y) {
  asm("max.NaN.f32 %0, %0, %1;" : "+f"(x) : "f"(y));
  return x;
}

// 1/x to 1 ulp for normal x below 2^126, without the branch of a division.
__device__ __forceinline__ float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float half_to_float(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
__device__ __forceinline__ uint16_t float_to_half(float x) { return __half_as_ushort(__float2half_rn(x)); }

// One vector store to global memory, which the compiler would split in places.
__device__ __forceinline__ void store_words(void* global, const uint32_t (&words)[2]) {
  asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(global)), "r"(words[0]), "r"(words[1])
               : "memory");
}
__device__ __forceinline__ void store_words(void* global, const uint32_t (&words)[4]) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(global)), "r"(words[0]),
               "r"(words[1]), "r"(words[2]), "r"(words[3])
               : "memory");
}

// Starts an asynchronous 16-byte copy from global to shared memory; zero-fills, without reading, if not `valid`.
__device__ __forceinline__ void cp_async(SmemPointer shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared.address), "l"(global), "r"(valid ? 16 : 0)
               : "memory");
}

__device__ __forceinline__ void cp_async_commit_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most kPending of this thread's groups are in flight. Other threads see the data after a barrier.
template <int kPending>
__device__ __forceinline__ void cp_async_wait_group() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Starts to bring the sector of an address (32 bytes), or more around it, into the L2 cache.
__device__ __forceinline__ void prefetch_to_l2(const void* global) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(global)));
}

struct LaunchConfig {
  int64_t blocks;
  int threads, shared_bytes;
};

// Null or an error message.
inline const char* error_message(cudaError_t error) {
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template <class Params>
const char* launch(void (*kernel)(Params), LaunchConfig config, void* stream, const Params& params) {
  if (config.blocks == 0) return nullptr;
  if (config.blocks > INT32_MAX)
    return "so large an input needs more blocks than a grid has; pass fewer images at a time";
  if (config.shared_bytes > 48 * 1024) {
    const auto error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, config.shared_bytes);
    if (error != cudaSuccess) return error_message(cudaGetLastError());  // also clears the error
  }
  kernel<<<static_cast<unsigned>(config.blocks), config.threads, config.shared_bytes,
           static_cast<cudaStream_t>(stream)>>>(params);
  return error_message(cudaGetLastError());
}

}  // namespace polaformer

#include "wgmma.cuh"

#endif
