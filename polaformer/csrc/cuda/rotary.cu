// Tables of the rotary embedding: cosines and sines for every row and column of the image, (height + width, W/2, 2).
//
// coordinate · frequency is rounded to float32 as in polaformer/layers.py; cosine and sine of it are exact to the last
// bit of float32. For the bf16 path the kernel also fills packed_cos_sin and rotary_offsets (launch_params.h).
#include <iterator>

#include "kernels.cuh"
#include "tiles.cuh"

namespace polaformer {
namespace {

struct RotaryTables {
  Shape shape;
  int pairs;  // W/2
  float frequencies[kMaxHeadDim / 2];
  float* cos_sin;
  uint16_t* packed;  // null unless on the bf16 path
  RotaryOffsets* rotary_offsets;
};

constexpr int kThreads = 128;

// c[0] + c[1]·x + c[2]·x² + …
template <int kCount>
__device__ __forceinline__ double polynomial(double x, const double (&coefficients)[kCount]) {
  double sum = coefficients[kCount - 1];
#pragma unroll
  for (int i = kCount - 2; i >= 0; --i) sum = sum * x + coefficients[i];
  return sum;
}

// Cosine and sine of 0 ≤ angle < 2^31 by Taylor series around the nearest multiple of π/2, which is subtracted in
// float64. CUDA's own functions need a stack for large angles.
__device__ __forceinline__ float2 cos_sin_of(float angle) {
  const double quarters = rint(angle * 0.63661977236758134);
  const double x = (angle - quarters * 1.5707963267948966) - quarters * 6.123233995736766e-17;
  const double square = x * x;
  const double sine = x * polynomial(square, {1., -1. / 6, 1. / 120, -1. / 5040, 1. / 362880, -1. / 39916800});
  const double cosine =
      polynomial(square, {1., -1. / 2, 1. / 24, -1. / 720, 1. / 40320, -1. / 3628800, 1. / 479001600});
  const int64_t quadrant = static_cast<int64_t>(quarters);
  const double rotated_cosine = quadrant & 1 ? -sine : cosine, rotated_sine = quadrant & 1 ? cosine : sine;
  const float sign = quadrant & 2 ? -1.f : 1.f;
  return make_float2(sign * static_cast<float>(rotated_cosine), sign * static_cast<float>(rotated_sine));
}

// One thread per entry of cos_sin, and per token where there are rotary_offsets.
__global__ void __launch_bounds__(kThreads) fill_rotary_tables(const RotaryTables table) {
  const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (table.packed && index < table.shape.even_tokens()) {
    constexpr unsigned kBytes = 4 * sizeof(CosSin);
    const unsigned width = table.shape.width, row = static_cast<unsigned>(index) / width;
    const unsigned column = static_cast<unsigned>(index) - row * width;
    table.rotary_offsets[index] = {min(row, unsigned(table.shape.height) - 1) * kBytes,
                                   (table.shape.height + column) * kBytes};
  }
  const int64_t positions = table.shape.height + table.shape.width;
  const int64_t position = index / table.pairs;
  const int pair = static_cast<int>(index - position * table.pairs);
  if (position >= positions) return;
  const int coordinate = static_cast<int>(position < table.shape.height ? position : position - table.shape.height);
  const float frequency = 2 * pair < table.shape.head_dim ? table.frequencies[pair] : 0.f;
  const float2 cos_sin = cos_sin_of(static_cast<float>(coordinate) * frequency);
  reinterpret_cast<float2*>(table.cos_sin)[index] = cos_sin;
  if (!table.packed) return;
  // Eight pairs per position, two per entry: cosine, cosine, sine, sine.
  uint16_t* entry = table.packed + (pair / 8 * positions + position) * 16 + pair % 8 / 2 * 4 + pair % 2;
  entry[0] = static_cast<uint16_t>(pack_bf16(cos_sin.x, 0.f));
  entry[2] = static_cast<uint16_t>(pack_bf16(cos_sin.y, 0.f));
}

}  // namespace

const char* make_rotary_tables(const CommonParams& params, void* stream) {
  RotaryTables table{params.shape,         params.shape.padded_head_dim() / 2, {}, params.cos_sin, nullptr,
                     params.rotary_offsets};
  if (params.plan.path == Path::kBfloat16) table.packed = reinterpret_cast<uint16_t*>(params.packed_cos_sin);
  std::copy(std::begin(params.frequencies), std::end(params.frequencies), table.frequencies);
  const int64_t entries = std::max<int64_t>(params.shape.cos_sin_size() / 2, params.shape.even_tokens());
  return launch(fill_rotary_tables, {(entries + kThreads - 1) / kThreads, kThreads, 0}, stream, table);
}

}  // namespace polaformer
