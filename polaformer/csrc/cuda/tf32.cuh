// Operands of tf32 tensor-core products: A fragments of 16 × 16, B fragments of 16 × 8 and accumulators of 16 × 8, each
// for two mma.m16n8k8. float32 inputs take three products (3xTF32): upper·upper + upper·lower + lower·upper, which is
// close to float32 accuracy.
//
// With g = lane / 4 and t = lane % 4 a thread holds of
//   A            rows {g, g + 8}, columns {2t, 2t + 1, 2t + 8, 2t + 9}
//   B            rows {2t, 2t + 1, 2t + 8, 2t + 9}, column g
//   accumulator  rows {g, g + 8}, columns {2t, 2t + 1}: entries (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1)
// as in mma.m16n8k16. mma.m16n8k8 numbers the K axis differently, which has no effect as long as A and B agree.
#pragma once

#include <type_traits>

#include "tiles.cuh"

namespace polaformer {

// Operand type: aligned rows are loaded as 16-byte vectors, others element by element.
template <bool kAligned, bool k3xTf32>
struct Tf32Operand {
  static constexpr bool kVectorizedLoads = kAligned, kFloatInputs = k3xTf32;
  static constexpr int kPadding = 4;  // elements after each row in shared memory: rows start in different banks

  template <int kCount>
  struct Elements {
    float values[kCount];
    __device__ __forceinline__ float operator[](int i) const { return values[i]; }
    __device__ __forceinline__ void drop_first_four() {
      for (int i = 0; i + 4 < kCount; ++i) values[i] = values[i + 4];
    }
  };

  struct FragmentA {
    float values[2][4];  // per mma: (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4)
    __device__ __forceinline__ void set(int lower_row, int upper, float first, float second) {
      values[upper][lower_row] = first, values[upper][lower_row + 2] = second;
    }
    __device__ __forceinline__ void set_one(int lower_row, int upper, int odd, float x) {
      values[upper][lower_row + 2 * odd] = x;
    }
    __device__ __forceinline__ void set(const Elements<8> (&rows)[2], int half) {
      for (int i = 0; i < 8; ++i) values[i / 4][i % 4] = rows[i % 2].values[4 * half + i / 4 * 2 + i % 4 / 2];
    }
  };
  struct FragmentB {
    float values[2][2];  // per mma: (t, g), (t + 4, g)
  };

  static __device__ __forceinline__ Dtype dtype(Dtype given) { return k3xTf32 ? Dtype::kFloat : given; }

  static __device__ __forceinline__ void load(FragmentB (&b)[2], const float* corner, int stride) {
    __syncwarp();  // stops the compiler from moving later loads up here, where they would occupy registers
    const float* column = corner + 2 * thread_in_group() * stride + group_id();
    for (int i = 0; i < 8; ++i) {
      b[i / 4].values[i / 2 % 2][i % 2] = column[(i / 2 % 2 * 8 + i % 2) * stride + i / 4 * 8];
    }
  }
  static __device__ __forceinline__ void load_transposed(FragmentB (&b)[2], const float* corner, int stride) {
    __syncwarp();
    const float* row = corner + group_id() * stride + 2 * thread_in_group();
    for (int i = 0; i < 4; ++i) {
      auto& pair = b[i / 2].values[i % 2];
      const auto both = *reinterpret_cast<const float2*>(row + i / 2 * 8 * stride + i % 2 * 8);
      pair[0] = both.x, pair[1] = both.y;
    }
  }

  // Adds a·b to two adjacent accumulators.
  static __device__ __forceinline__ void multiply(Accumulator& first, Accumulator& second, const FragmentA& a,
                                                  const FragmentB (&b)[2]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      uint32_t a_upper[4], a_lower[4];
      split(a_upper, a_lower, a.values[i]);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        Accumulator& sum = j ? second : first;
        uint32_t b_upper[2], b_lower[2];
        split(b_upper, b_lower, b[j].values[i]);
        if constexpr (k3xTf32) {
          mma_m16n8k8_tf32(sum, a_upper, b_lower);
          mma_m16n8k8_tf32(sum, a_lower, b_upper);
        }
        mma_m16n8k8_tf32(sum, a_upper, b_upper);
      }
    }
  }

  // The products of multiply(), for sums over many tokens. Tensor cores round every sum towards zero; over a thousand
  // sums the error exceeds float32 accuracy. So products of 16 tokens are added by ordinary additions.
  static __device__ __forceinline__ void add_product(Accumulator& first, Accumulator& second, const FragmentA& a,
                                                     const FragmentB (&b)[2]) {
    if constexpr (!k3xTf32) return multiply(first, second, a, b);
    Accumulator product[2] = {};
    multiply(product[0], product[1], a, b);
#pragma unroll
    for (int i = 0; i < 4; ++i) first[i] += product[0][i], second[i] += product[1][i];
    __syncwarp();  // stops the compiler from starting later products here, where they would occupy registers
  }

 private:
  // x as the sum of two tf32.
  template <int kCount>
  static __device__ __forceinline__ void split(uint32_t (&upper)[kCount], uint32_t (&lower)[kCount],
                                               const float (&x)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      upper[i] = round_to_tf32(x[i]);
      lower[i] = round_to_tf32(x[i] - __builtin_bit_cast(float, upper[i]));
    }
  }
};

using Float32 = Tf32Operand<true, true>;          // aligned float32
using GenericFloat32 = Tf32Operand<false, true>;  // float32, one element at a time
using Generic16Bit =
    Tf32Operand<false, false>;  // fp16 or bf16, one element at a time; exact in tf32, so one product is enough

// Starts copying tokens `first` … `first` + kRows − 1 into a tile with rows of W + padding; zeros from `end` on.
template <class Operand, int kRows, int kHeadDim>
__device__ __forceinline__ void copy_tile(float* tile, const Rows<Operand::kFloatInputs>& rows, bool halves, int first,
                                          int end, int thread, int threads) {
  constexpr int kStride = kHeadDim + Operand::kPadding;
  if constexpr (Operand::kVectorizedLoads) {
#pragma unroll
    for (int i = thread; i < kRows * kHeadDim / 4; i += threads) {
      const int row = i / (kHeadDim / 4), padded = i % (kHeadDim / 4) * 4;
      const int column = column_of<kHeadDim>(padded, rows.head_dim, halves);
      const bool valid = first + row < end && column >= 0;
      cp_async(SmemPointer(tile + row * kStride + padded), valid ? rows.at(first + row, column) : rows.data, valid);
    }
  } else {
    for (int i = thread; i < kRows * kHeadDim; i += threads) {
      const int row = i / kHeadDim, padded = i % kHeadDim;
      const int column = column_of<kHeadDim>(padded, rows.head_dim, halves);
      const bool valid = first + row < end && column >= 0;
      tile[row * kStride + padded] = valid ? rows.load(first + row, column) : 0.f;
    }
  }
}

// Loads four or eight neighbouring elements of a token's row, zeros beyond D.
template <class Operand, int kCount>
__device__ __forceinline__ typename Operand::template Elements<kCount> load_elements(
    const Rows<Operand::kFloatInputs>& rows, int token, int column) {
  typename Operand::template Elements<kCount> x = {};
  if constexpr (!Operand::kVectorizedLoads) {
    column = opaque(column);
#pragma unroll
    for (int i = 0; i < kCount; ++i) x.values[i] = column + i < rows.head_dim ? rows.load(token, column + i) : 0.f;
  } else if (column < rows.head_dim) {
    const char* address = rows.at(token, column);
#pragma unroll
    for (int i = 0; i < kCount; i += 4) {
      const float4 four = __ldg(reinterpret_cast<const float4*>(address) + i / 4);
      x.values[i] = four.x, x.values[i + 1] = four.y, x.values[i + 2] = four.z, x.values[i + 3] = four.w;
    }
  }
  return x;
}

// Stores the first `count` of neighbouring elements of a (B, N, H, D) tensor, clamped to the range of its dtype.
template <class Operand, int kCount>
__device__ __forceinline__ void store_elements(void* tensor, int64_t index, const float (&values)[kCount], int count,
                                               Dtype given) {
  count = opaque(count);
  const Dtype dtype = Operand::dtype(given);
  const float max_value = dtype == Dtype::kHalf ? 65504.f : FLT_MAX;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (i >= count) continue;
    const float x = max_or_nan(min_or_nan(values[i], max_value), -max_value);
    if (dtype == Dtype::kFloat) {
      static_cast<float*>(tensor)[index + i] = x;
    } else {
      const uint32_t bits = dtype == Dtype::kHalf ? float_to_half(x) : pack_bf16_finite(x, 0.f);
      static_cast<uint16_t*>(tensor)[index + i] = static_cast<uint16_t>(bits);
    }
  }
}

// Copies one head's (2D, D) matrix into shared memory. Rows: each part padded to W, in row_order. Columns: padded to W,
// each half separately with `halves`, in column_order, which keeps neighbouring pairs together.
template <class Operand, int kHeadDim, class RowOrder, class ColumnOrder>
__device__ __forceinline__ void load_state(float* tile, const float* state, int head_dim, int threads, bool halves,
                                           RowOrder row_order, ColumnOrder column_order) {
  constexpr int kStride = kHeadDim + Operand::kPadding;
#pragma unroll 4
  for (int i = opaque(int(threadIdx.x)); i < 2 * kHeadDim * kHeadDim / 2; i += threads) {
    const int row = i / (kHeadDim / 2), padded = i % (kHeadDim / 2) * 2;
    const int part = row / kHeadDim, feature = row % kHeadDim;
    const float* source = state + static_cast<int64_t>(part * head_dim + feature) * head_dim;
    float pair[2];
    for (int j = 0; j < 2; ++j) {
      const int column = column_of<kHeadDim>(padded + j, head_dim, halves);
      pair[j] = feature < head_dim && column >= 0 ? __ldg(source + column) : 0.f;
    }
    const int index = (part * kHeadDim + row_order(feature)) * kStride + column_order(padded);
    *reinterpret_cast<float2*>(tile + index) = make_float2(pair[0], pair[1]);
  }
}

// Calls visit(operand type, head_dim) for the plan's path, or for a computation with a shift, and for the padded head
// dimension as in dispatch_head_dim().
template <class Visitor>
const char* dispatch_operand(const CommonParams& params, Visitor visit) {
  return dispatch_head_dim(params.shape.padded_head_dim(), [&](auto head_dim) {
    return params.plan.path == Path::kFloat32          ? visit(Float32(), head_dim)
           : params.plan.path == Path::kGenericFloat32 ? visit(GenericFloat32(), head_dim)
                                                       : visit(Generic16Bit(), head_dim);
  });
}
template <class Visitor>
const char* dispatch_shifted_operand(const CommonParams& params, Visitor visit) {
  return dispatch_head_dim(params.shape.padded_head_dim(), [&](auto head_dim) {
    return params.shape.dtype == Dtype::kFloat ? visit(GenericFloat32(), head_dim) : visit(Generic16Bit(), head_dim);
  });
}

}  // namespace polaformer
