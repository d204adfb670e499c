// Sums over splits, for forward.cu and backward.cu. What a split adds to a sum is a row, or two, of vectors of four
// floats. A thread loads several rows at a time; where there are many, several threads share a vector's rows. The order
// of additions depends on the plan alone.
#pragma once

#include "launch_params.h"
#include "ptx.cuh"

namespace polaformer {

constexpr int kCombineThreads = 256;  // per block
constexpr int kRowsInFlight = 4;      // per thread
constexpr int kMinVectors = 4;        // per block: 64 contiguous bytes of each row

// How the threads of a block divide its vectors and their rows: thread t has vector t % vectors and every sharers-th
// row, from row t / vectors on. Both numbers are powers of two.
struct SumThreads {
  int vectors = kCombineThreads, sharers = 1;

  explicit SumThreads(int64_t rows) {
    for (; sharers * kRowsInFlight < rows && vectors > kMinVectors; sharers *= 2) vectors /= 2;
  }

  __device__ __forceinline__ int sharer() const { return static_cast<int>(threadIdx.x * sharers / kCombineThreads); }
  __device__ __forceinline__ int vector() const { return static_cast<int>(threadIdx.x) - sharer() * vectors; }

  // The sum of a vector's rows, for the thread with sharer() == 0; row(i) points to this thread's vector of row i.
  // Every thread of the block must call it.
  template <class Row>
  __device__ __forceinline__ float4 sum(int rows, Row row) const {
    float4 sum = {0.f, 0.f, 0.f, 0.f};
    for (int i = sharer(); i < rows; i += kRowsInFlight * sharers) {
      float4 loaded[kRowsInFlight];
#pragma unroll
      for (int j = 0; j < kRowsInFlight; ++j) {
        loaded[j] = {0.f, 0.f, 0.f, 0.f};
        if (i + j * sharers < rows) loaded[j] = __ldg(reinterpret_cast<const float4*>(row(i + j * sharers)));
      }
#pragma unroll
      for (int j = 0; j < kRowsInFlight; ++j) add(sum, loaded[j]);
    }
    if (sharers == 1) return sum;
    auto& partial_sums = shared_memory<float4[kCombineThreads]>();
    partial_sums[threadIdx.x] = sum;
    __syncthreads();
    if (sharer() > 0) return sum;
#pragma unroll 4
    for (int i = 1; i < sharers; ++i) add(sum, partial_sums[i * vectors + threadIdx.x]);
    return sum;
  }

 private:
  static __device__ __forceinline__ void add(float4& sum, const float4& x) {
    sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w;
  }
};

// Sums of `size` floats per head.
struct SplitSums {
  const float* split_sums;  // (B·H, rows, size)
  float* sums;              // (B·H, size)
  int rows, size;
};

// The sums of each head, of its mean and of its state; the head's blocks divide their vectors, in this order.
struct HeadSums {
  SumThreads threads;
  SplitSums mean, state;

  int blocks() const { return ((mean.size + state.size) / 4 + threads.vectors - 1) / threads.vectors; }

  __device__ __forceinline__ void compute(unsigned head, int block) const {
    const int column = 4 * (block * threads.vectors + threads.vector());
    const bool of_mean = column < mean.size;
    const SplitSums of = of_mean ? mean : state;
    const int index = of_mean ? column : column - mean.size, rows = index < of.size ? of.rows : 0;
    const float* first = opaque(of.split_sums + int64_t{head} * (of.rows * of.size) + index);
    const float4 sum = threads.sum(rows, [=](int row) { return first + row * of.size; });
    if (rows == 0 || threads.sharer() > 0) return;
    *reinterpret_cast<float4*>(of.sums + int64_t{head} * of.size + index) = sum;
  }
};

}  // namespace polaformer
