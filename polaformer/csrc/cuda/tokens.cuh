// Tokens in memory: their rows, the turns at their places, tiles of them in shared memory, results back.
#pragma once

#include "operands.cuh"

namespace polaformer {

// One item: some tokens of one head.
struct Item {
  unsigned head;  // of all B·H
  int batch, head_in_batch, begin, end;
};

__device__ __forceinline__ Item locate_item(unsigned item, const Split& split, const Shape& shape) {
  const unsigned head = item / split.items_per_head, batch = head / shape.heads;
  const int begin = static_cast<int>(item - head * split.items_per_head) * split.tokens_per_item;
  return {head, static_cast<int>(batch), static_cast<int>(head - batch * shape.heads), begin,
          min(begin + split.tokens_per_item, shape.tokens())};
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
__device__ __forceinline__ Rows<kFloat> rows_of(const Strided& tensor, const Shape& shape, const Item& item) {
  const int64_t offset = int64_t{item.batch} * tensor.batch + item.head_in_batch * tensor.head;
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

// Starts copying kRows tokens from `first` on into a tile of rows of W + padding elements; zeros from `end` on.
template <class Operand, int kRows, int kWidth>
__device__ __forceinline__ void copy_tile(typename Operand::Element* tile, const Rows<Operand::kFloatInputs>& rows,
                                          bool halves, int first, int end, int thread, int threads) {
  constexpr int kStride = kWidth + Operand::kPadding;
  constexpr int kVector = 16 / sizeof(typename Operand::Element);
  if constexpr (Operand::kVectors) {
#pragma unroll
    for (int i = thread; i < kRows * kWidth / kVector; i += threads) {
      const int row = i / (kWidth / kVector), padded = i % (kWidth / kVector) * kVector;
      const int column = column_of<kWidth>(padded, rows.head_width, halves);
      const bool valid = first + row < end && column >= 0;
      copy_async(tile + row * kStride + padded, valid ? rows.at(first + row, column) : rows.data, valid);
    }
  } else {
    for (int i = thread; i < kRows * kWidth; i += threads) {
      const int row = i / kWidth, padded = i % kWidth;
      const int column = column_of<kWidth>(padded, rows.head_width, halves);
      const bool valid = first + row < end && column >= 0;
      tile[row * kStride + padded] = Operand::element(valid ? rows.load(first + row, column) : 0.f);
    }
  }
}

// Four or eight neighbouring elements of a token's row, zeros beyond its width.
template <class Operand, int kCount>
__device__ __forceinline__ typename Operand::template Neighbours<kCount> load_neighbours(
    const Rows<Operand::kFloatInputs>& rows, int token, int column) {
  typename Operand::template Neighbours<kCount> x = {};
  if constexpr (!Operand::kVectors) {
    column = opaque(column);
#pragma unroll
    for (int i = 0; i < kCount; ++i) x.values[i] = column + i < rows.head_width ? rows.load(token, column + i) : 0.f;
  } else if (column < rows.head_width) {
    const char* place = rows.at(token, column);
    if constexpr (!Operand::kNarrow) {
#pragma unroll
      for (int i = 0; i < kCount; i += 4) {
        const float4 four = __ldg(reinterpret_cast<const float4*>(place) + i / 4);
        x.values[i] = four.x, x.values[i + 1] = four.y, x.values[i + 2] = four.z, x.values[i + 3] = four.w;
      }
    } else if constexpr (kCount == 8) {
      const uint4 words = __ldg(reinterpret_cast<const uint4*>(place));
      x = {words.x, words.y, words.z, words.w};
    } else {
      const uint2 words = __ldg(reinterpret_cast<const uint2*>(place));
      x = {words.x, words.y};
    }
  }
  return x;
}

// Stores neighbouring elements of a (B, N, H, D) tensor, of which `count` lie inside: of bf16 operands all or none.
// Numbers beyond the largest of the tensor's type become that.
template <class Operand, int kCount>
__device__ __forceinline__ void store_elements(void* tensor, int64_t index, const float (&values)[kCount], int count,
                                               Dtype given) {
  count = opaque(count);
  if constexpr (Operand::kNarrow) {
    uint32_t words[kCount / 2];
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) words[i] = pack_bf16_finite(values[2 * i], values[2 * i + 1]);
    if (count >= kCount) store_words(static_cast<uint16_t*>(tensor) + index, words);
  } else {
    const Dtype dtype = Operand::dtype(given);
    const float most = dtype == Dtype::kHalf ? 65504.f : FLT_MAX;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (i >= count) continue;
      const float x = max_or_nan(min_or_nan(values[i], most), -most);
      if (dtype == Dtype::kFloat) {
        static_cast<float*>(tensor)[index + i] = x;
      } else {
        const uint32_t bits = dtype == Dtype::kHalf ? float_to_half(x) : pack_bf16_finite(x, 0.f);
        static_cast<uint16_t*>(tensor)[index + i] = static_cast<uint16_t>(bits);
      }
    }
  }
}

// Where a head's first row begins in a (B, N, H, D) tensor; H·D elements further the next.
__device__ __forceinline__ int64_t first_row(const Item& item, const Shape& shape) {
  return (int64_t{item.batch} * shape.tokens() * shape.heads + item.head_in_batch) * shape.head_width;
}

// A warp's tokens come from memory eight columns a thread: thread t has columns 8t … 8t + 7 of every 32, and left
// operands take the first four of them as columns {2t, 2t + 1, 2t + 8, 2t + 9} of one product, the others of the next.
// So a matrix that meets them has its rows in this order; sums over them come out in it too, eight neighbours a thread.
__device__ __forceinline__ int interleave_32(int i) {
  return i / 32 * 32 + i / 4 % 2 * 16 + i / 2 % 2 * 8 + i / 8 % 4 * 2 + i % 2;
}
// The same for four columns a thread.
__device__ __forceinline__ int interleave_16(int i) { return i / 16 * 16 + i / 2 % 2 * 8 + i / 4 % 4 * 2 + i % 2; }

// The even ones of 16 first: rows of left operands that a thread has in pairs.
__device__ __forceinline__ int even_first(int i) { return i / 16 * 16 + i % 2 * 8 + i / 2 % 8; }

// Copies one head's (2D, D) matrix into shared memory: 2W rows, both poles padded; W columns, with `halves` each half
// of them padded by itself. The orders say where a pole's row and a padded column go; the second keeps neighbours.
template <class Operand, int kWidth, class RowOrder, class ColumnOrder>
__device__ __forceinline__ void load_state(typename Operand::Element* tile, const float* state, int head_width,
                                           int threads, bool halves, RowOrder row_order, ColumnOrder column_order) {
  constexpr int kStride = kWidth + Operand::kPadding;
#pragma unroll 4
  for (int i = opaque(int(threadIdx.x)); i < 2 * kWidth * kWidth / 2; i += threads) {
    const int row = i / (kWidth / 2), padded = i % (kWidth / 2) * 2;
    const int pole = row / kWidth, feature = row % kWidth;
    const float* source = state + static_cast<int64_t>(pole * head_width + feature) * head_width;
    float pair[2];
    for (int j = 0; j < 2; ++j) {
      const int column = column_of<kWidth>(padded + j, head_width, halves);
      pair[j] = feature < head_width && column >= 0 ? __ldg(source + column) : 0.f;
    }
    const int place = (pole * kWidth + row_order(feature)) * kStride + column_order(padded);
    Operand::store_pair(tile + place, pair[0], pair[1]);
  }
}

// Fills the table of turns. Null, or what went wrong.
const char* make_turns(float* turns, const Shape& shape, const float (&angles)[kMaxHeadWidth / 2], void* stream);

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

// Offsets, in the table of turns, of a token's row and column: for poles of features 0 … D and D … 2D.
template <int kWidth>
__device__ __forceinline__ int2 locate_turns(int token, const Shape& shape) {
  const int row = token / shape.width, column = token - row * shape.width;
  return make_int2(row * (kWidth / 2), (shape.height + column) * (kWidth / 2));
}

}  // namespace polaformer
