// The matrices that the tensor cores multiply: 16×16 left operands, 16×8 right ones, 16×8 sums in float32, each spread
// over a warp. One interface for two families, so that every kernel is written once:
//
//   Bfloat16  aligned bf16; one mma.m16n8k16
//   Tensor32  anything, kept as float32; two mma.m16n8k8 in tf32, for float32 inputs three times as many
//             (upper·upper + upper·lower + lower·upper parts): close to float32's accuracy
//
// With g = lane / 4 and t = lane % 4, in both families a thread has of a
//   left operand   rows {g, g + 8}, columns {2t, 2t + 1, 2t + 8, 2t + 9}
//   right operand  rows {2t, 2t + 1, 2t + 8, 2t + 9}, column g
//   sum            rows {g, g + 8}, columns {2t, 2t + 1}: entries (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1)
// tf32 instructions number the inner index otherwise; it is summed over, so numbering it alike on both sides is enough.
#pragma once

#include <type_traits>

#include "device.cuh"
#include "plan.h"

namespace polaformer {

__device__ __forceinline__ int lane_group() { return threadIdx.x % 32 / 4; }   // g
__device__ __forceinline__ int lane_member() { return threadIdx.x % 4; }       // t
__device__ __forceinline__ float upper_half(uint32_t bits) { return __builtin_bit_cast(float, bits & 0xffff0000u); }
__device__ __forceinline__ float lower_half(uint32_t bits) { return __builtin_bit_cast(float, bits << 16); }

using Sum = float[4];

struct Bfloat16 {
  using Element = uint16_t;  // in shared memory
  static constexpr bool kNarrow = true, kVectors = true, kFloatInputs = false;
  static constexpr int kPadding = 8;  // of a row in shared memory: rows start in different banks

  // Neighbouring inputs of one token.
  template <int kCount>
  struct Neighbours {
    uint32_t words[kCount / 2];
    __device__ __forceinline__ float operator[](int i) const {
      return i % 2 ? upper_half(words[i / 2]) : lower_half(words[i / 2]);
    }
    __device__ __forceinline__ void drop_four() {
      for (int i = 0; i + 2 < kCount / 2; ++i) words[i] = words[i + 2];
    }
  };

  struct Left {
    uint32_t words[4];
    // Columns (2t, 2t + 1), or with `upper` (2t + 8, 2t + 9), of row g or, with `lower_row`, g + 8.
    __device__ __forceinline__ void set(int lower_row, int upper, float first, float second) {
      words[lower_row + 2 * upper] = pack_bf16(first, second);
    }
    // Rows g and g + 8 of columns that were loaded as the columns (8t + 4·half) … of each.
    __device__ __forceinline__ void set(const Neighbours<8> (&rows)[2], int half) {
      for (int i = 0; i < 4; ++i) words[i] = rows[i % 2].words[2 * half + i / 2];
    }
  };
  struct Right {
    uint32_t words[2];
  };

  static __device__ __forceinline__ Dtype dtype(Dtype) { return Dtype::kBfloat16; }
  static __device__ __forceinline__ Element element(float x) { return static_cast<Element>(pack_bf16(x, 0.f)); }
  static __device__ __forceinline__ void store_pair(Element* pair, float first, float second) {
    *reinterpret_cast<uint32_t*>(pair) = pack_bf16(first, second);
  }
  static __device__ __forceinline__ void load_pair(const Element* pair, float& first, float& second) {
    const auto bits = *reinterpret_cast<const uint32_t*>(pair);
    first = lower_half(bits), second = upper_half(bits);
  }

  // Two right operands side by side from 16 rows and 16 columns at `corner`: memory's rows are theirs.
  static __device__ __forceinline__ void load(Right (&right)[2], const Element* corner, int stride) {
    const int lane = threadIdx.x % 32;
    uint32_t words[4];
    load_matrices_transposed(words, corner + (lane % 16) * stride + lane / 16 * 8);
    right[0] = {words[0], words[1]}, right[1] = {words[2], words[3]};
  }
  // A left operand from 16 rows and 16 columns at `corner`.
  static __device__ __forceinline__ void load(Left& left, const Element* corner, int stride) {
    const int lane = threadIdx.x % 32;
    load_matrices(left.words, corner + (lane % 16) * stride + lane / 16 * 8);
  }
  // Two right operands again, where memory's columns are their rows.
  static __device__ __forceinline__ void load_transposed(Right (&right)[2], const Element* corner, int stride) {
    const int lane = threadIdx.x % 32;
    uint32_t words[4];
    load_matrices(words, corner + (lane % 8 + lane / 16 * 8) * stride + lane / 8 % 2 * 8);
    right[0] = {words[0], words[1]}, right[1] = {words[2], words[3]};
  }

  // Adds left · right to two sums side by side.
  static __device__ __forceinline__ void multiply(Sum& first, Sum& second, const Left& left,
                                                  const Right (&right)[2]) {
    multiply_bf16(first, left.words, right[0].words);
    multiply_bf16(second, left.words, right[1].words);
  }
};

template <bool kAligned, bool kThreeProducts>
struct Tensor32 {
  using Element = float;
  static constexpr bool kNarrow = false, kVectors = kAligned, kFloatInputs = kThreeProducts;
  static constexpr int kPadding = 4;

  template <int kCount>
  struct Neighbours {
    float values[kCount];
    __device__ __forceinline__ float operator[](int i) const { return values[i]; }
    __device__ __forceinline__ void drop_four() {
      for (int i = 0; i + 4 < kCount; ++i) values[i] = values[i + 4];
    }
  };

  struct Left {
    float values[2][4];  // of each of two instructions: (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4)
    __device__ __forceinline__ void set(int lower_row, int upper, float first, float second) {
      values[upper][lower_row] = first, values[upper][lower_row + 2] = second;
    }
    __device__ __forceinline__ void set_one(int lower_row, int upper, int odd, float x) {
      values[upper][lower_row + 2 * odd] = x;
    }
    __device__ __forceinline__ void set(const Neighbours<8> (&rows)[2], int half) {
      for (int i = 0; i < 8; ++i) values[i / 4][i % 4] = rows[i % 2].values[4 * half + i / 4 * 2 + i % 4 / 2];
    }
  };
  struct Right {
    float values[2][2];  // of each of two instructions: (t, g), (t + 4, g)
  };

  static __device__ __forceinline__ Dtype dtype(Dtype given) { return kThreeProducts ? Dtype::kFloat : given; }
  static __device__ __forceinline__ Element element(float x) { return x; }
  static __device__ __forceinline__ void store_pair(Element* pair, float first, float second) {
    *reinterpret_cast<float2*>(pair) = make_float2(first, second);
  }
  static __device__ __forceinline__ void load_pair(const Element* pair, float& first, float& second) {
    const auto both = *reinterpret_cast<const float2*>(pair);
    first = both.x, second = both.y;
  }

  static __device__ __forceinline__ void load(Right (&right)[2], const Element* corner, int stride) {
    __syncwarp();  // keeps loads of later operands from being moved up here, where they would occupy registers
    const Element* column = corner + 2 * lane_member() * stride + lane_group();
    for (int i = 0; i < 8; ++i) {
      right[i / 4].values[i / 2 % 2][i % 2] = column[(i / 2 % 2 * 8 + i % 2) * stride + i / 4 * 8];
    }
  }
  static __device__ __forceinline__ void load_transposed(Right (&right)[2], const Element* corner, int stride) {
    __syncwarp();
    const Element* row = corner + lane_group() * stride + 2 * lane_member();
    for (int i = 0; i < 4; ++i) {
      auto& pair = right[i / 2].values[i % 2];
      load_pair(row + i / 2 * 8 * stride + i % 2 * 8, pair[0], pair[1]);
    }
  }

  static __device__ __forceinline__ void multiply(Sum& first, Sum& second, const Left& left,
                                                  const Right (&right)[2]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      uint32_t a[4], a_rest[4];
      split(a, a_rest, left.values[i]);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        Sum& sum = j ? second : first;
        uint32_t b[2], b_rest[2];
        split(b, b_rest, right[j].values[i]);
        if constexpr (kThreeProducts) {
          multiply_tf32(sum, a, b_rest);
          multiply_tf32(sum, a_rest, b);
        }
        multiply_tf32(sum, a, b);
      }
    }
  }

 private:
  // Numbers as the sums of two of tf32.
  template <int kCount>
  static __device__ __forceinline__ void split(uint32_t (&upper)[kCount], uint32_t (&rest)[kCount],
                                               const float (&x)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      upper[i] = round_to_tf32(x[i]);
      rest[i] = round_to_tf32(x[i] - __builtin_bit_cast(float, upper[i]));
    }
  }
};

using Float32 = Tensor32<true, true>;      // aligned float32
using AnyFloat32 = Tensor32<false, true>;  // float32, one element at a time
using Any16 = Tensor32<false, false>;      // fp16 or bf16, one element at a time; they fit tf32: one product is enough

// What computes with a shift in the place of an operand family.
template <class Operand>
using Shifted = std::conditional_t<Operand::kFloatInputs, AnyFloat32, Any16>;

}  // namespace polaformer
