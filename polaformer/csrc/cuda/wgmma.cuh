// Products of warpgroups, four warps that multiply together: part of ptx.cuh, by which alone it is included.
//
// Only code for sm_90a has them; code for others instantiates nothing that calls what is below.
#pragma once

namespace polaformer {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
constexpr bool kIsWarpgroupCode = true;
#else
constexpr bool kIsWarpgroupCode = false;
#endif

// Which code the driver has chosen for the current GPU, the host reads off this kernel's launch bounds.
template <int kThreads>
__global__ void __launch_bounds__(kIsWarpgroupCode ? kThreads : 32) tell_warpgroup_code() {}
inline bool has_warpgroup_code() {
  cudaFuncAttributes attributes;
  const auto error = cudaFuncGetAttributes(&attributes, tell_warpgroup_code<128>);
  if (error != cudaSuccess) cudaGetLastError();  // clears it; a launch will report its like
  return error == cudaSuccess && attributes.maxThreadsPerBlock == 128;
}

// Calls visit(std::true_type) in code that has warpgroups' products, else visit(std::false_type). `planned` is what the
// host has found out; the emulator has only that to go by.
template <class Visitor>
__device__ __forceinline__ void choose_products(bool /*planned*/, Visitor visit) {
  visit(std::bool_constant<kIsWarpgroupCode>());
}

// A bf16 matrix in shared memory as operand B of 16 rows (K): core matrices of 8 rows of 16 bytes, 128 contiguous bytes
// each. Major::kK: a core matrix has a column of B in each of its rows; Major::kN: a row of B. k_bytes and n_bytes lead
// to the core matrix of the next 8 rows and of the next 8 columns of B. PTX ISA, "Asynchronous Warpgroup Level Matrix
// Shared Memory Layout": no swizzling, where the leading dimension is K for either order.
enum class Major { kK, kN };
struct MatrixDescriptor {
  uint64_t bits;

  __device__ __forceinline__ MatrixDescriptor(const void* shared, int k_bytes, int n_bytes)
      : bits(uint64_t{(smem_address(shared) & 0x3ffff) >> 4} | uint64_t(k_bytes >> 4) << 16 |
             uint64_t(n_bytes >> 4) << 32) {}
  __device__ __forceinline__ MatrixDescriptor operator+(int bytes) const {
    MatrixDescriptor moved = *this;
    moved.bits += bytes >> 4;
    return moved;
  }
};

// sum = a (64×16) · b (16×N) in bf16, plus sum if `accumulate`, in float32. Warp i of the four holds rows 16i … 16i +
// 15 of a and sum in the layout of mma.m16n8k16, sum with eight columns each. Products are asynchronous: until
// warpgroup_wait(), `a` must not be written nor sum touched by anything but more of them.
#define POLAFORMER_SUM(i) "+f"(sum[i][0]), "+f"(sum[i][1]), "+f"(sum[i][2]), "+f"(sum[i][3])
template <Major kMajor>
__device__ __forceinline__ void wgmma_m64k16_bf16(float (&sum)[2][4], const uint32_t (&a)[4], MatrixDescriptor b,
                                                  bool accumulate) {
  asm volatile(
      "{.reg .pred p; setp.ne.b32 p, %13, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7"
      "}, {%8, %9, %10, %11}, %12, p, 1, 1, %14;}"
      : POLAFORMER_SUM(0), POLAFORMER_SUM(1)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b.bits), "r"(int(accumulate)), "n"(kMajor == Major::kN));
}
template <Major kMajor>
__device__ __forceinline__ void wgmma_m64k16_bf16(float (&sum)[4][4], const uint32_t (&a)[4], MatrixDescriptor b,
                                                  bool accumulate) {
  asm volatile(
      "{.reg .pred p; setp.ne.b32 p, %21, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
      "}, {%16, %17, %18, %19}, %20, p, 1, 1, %22;}"
      : POLAFORMER_SUM(0), POLAFORMER_SUM(1), POLAFORMER_SUM(2), POLAFORMER_SUM(3)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b.bits), "r"(int(accumulate)), "n"(kMajor == Major::kN));
}
template <Major kMajor>
__device__ __forceinline__ void wgmma_m64k16_bf16(float (&sum)[6][4], const uint32_t (&a)[4], MatrixDescriptor b,
                                                  bool accumulate) {
  asm volatile(
      "{.reg .pred p; setp.ne.b32 p, %29, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n48k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23"
      "}, {%24, %25, %26, %27}, %28, p, 1, 1, %30;}"
      : POLAFORMER_SUM(0), POLAFORMER_SUM(1), POLAFORMER_SUM(2), POLAFORMER_SUM(3), POLAFORMER_SUM(4), POLAFORMER_SUM(5)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b.bits), "r"(int(accumulate)), "n"(kMajor == Major::kN));
}
template <Major kMajor>
__device__ __forceinline__ void wgmma_m64k16_bf16(float (&sum)[8][4], const uint32_t (&a)[4], MatrixDescriptor b,
                                                  bool accumulate) {
  asm volatile(
      "{.reg .pred p; setp.ne.b32 p, %37, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
      "}, {%32, %33, %34, %35}, %36, p, 1, 1, %38;}"
      : POLAFORMER_SUM(0), POLAFORMER_SUM(1), POLAFORMER_SUM(2), POLAFORMER_SUM(3), POLAFORMER_SUM(4),
        POLAFORMER_SUM(5), POLAFORMER_SUM(6), POLAFORMER_SUM(7)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b.bits), "r"(int(accumulate)), "n"(kMajor == Major::kN));
}
template <Major kMajor>
__device__ __forceinline__ void wgmma_m64k16_bf16(float (&sum)[12][4], const uint32_t (&a)[4], MatrixDescriptor b,
                                                  bool accumulate) {
  asm volatile(
      "{.reg .pred p; setp.ne.b32 p, %53, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n96k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
      "}, {%48, %49, %50, %51}, %52, p, 1, 1, %54;}"
      : POLAFORMER_SUM(0), POLAFORMER_SUM(1), POLAFORMER_SUM(2), POLAFORMER_SUM(3), POLAFORMER_SUM(4),
        POLAFORMER_SUM(5), POLAFORMER_SUM(6), POLAFORMER_SUM(7), POLAFORMER_SUM(8), POLAFORMER_SUM(9),
        POLAFORMER_SUM(10), POLAFORMER_SUM(11)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b.bits), "r"(int(accumulate)), "n"(kMajor == Major::kN));
}
template <Major kMajor>
__device__ __forceinline__ void wgmma_m64k16_bf16(float (&sum)[16][4], const uint32_t (&a)[4], MatrixDescriptor b,
                                                  bool accumulate) {
  asm volatile(
      "{.reg .pred p; setp.ne.b32 p, %69, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
      "}, {%64, %65, %66, %67}, %68, p, 1, 1, %70;}"
      : POLAFORMER_SUM(0), POLAFORMER_SUM(1), POLAFORMER_SUM(2), POLAFORMER_SUM(3), POLAFORMER_SUM(4),
        POLAFORMER_SUM(5), POLAFORMER_SUM(6), POLAFORMER_SUM(7), POLAFORMER_SUM(8), POLAFORMER_SUM(9),
        POLAFORMER_SUM(10), POLAFORMER_SUM(11), POLAFORMER_SUM(12), POLAFORMER_SUM(13), POLAFORMER_SUM(14),
        POLAFORMER_SUM(15)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b.bits), "r"(int(accumulate)), "n"(kMajor == Major::kN));
}
#undef POLAFORMER_SUM

// Comes before a batch of products whose `a` or `sum` other instructions have written.
__device__ __forceinline__ void warpgroup_arrive() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void warpgroup_commit_batch() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Waits until at most kPending of the committed batches run.
template <int kPending>
__device__ __forceinline__ void warpgroup_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// Keeps the compiler from reading sums before the wait above it.
template <int kCount>
__device__ __forceinline__ void warpgroup_fence(float (&sums)[kCount][4]) {
#pragma unroll
  for (int i = 0; i < 4 * kCount; ++i) asm volatile("" : "+f"(sums[i / 4][i % 4])::"memory");
}
// Makes this thread's writes to shared memory visible to products after the next barrier.
__device__ __forceinline__ void fence_shared_for_products() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

}  // namespace polaformer
