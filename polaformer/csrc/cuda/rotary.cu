// Cosines and sines of the rotations of every row and column, (height + width, W/2, 2): position · angle is rounded to
// float32 as in polaformer/layers.py; what follows is exact to float32's last bit.
#include <iterator>

#include "tiles.cuh"

namespace polaformer {
namespace {

struct RotaryTables {
  Shape shape;
  int pairs;  // W/2
  float frequencies[kMaxHeadDim / 2];
  float* cos_sin;
  uint16_t* packed;  // null but of aligned bf16
  RotaryOffsets* places;
};

constexpr int kThreads = 128;

// c[0] + c[1]·x + c[2]·x² + …
template <int kCount>
__device__ __forceinline__ double series(double x, const double (&coefficients)[kCount]) {
  double sum = coefficients[kCount - 1];
#pragma unroll
  for (int i = kCount - 2; i >= 0; --i) sum = sum * x + coefficients[i];
  return sum;
}

// Cosine and sine of 0 ≤ angle < 2^31, by Taylor series around the nearest multiple of π/2, which is taken off in
// float64: CUDA's own functions keep a stack for large angles.
__device__ __forceinline__ float2 cos_sin_of(float angle) {
  const double quarters = rint(angle * 0.63661977236758134);
  const double x = (angle - quarters * 1.5707963267948966) - quarters * 6.123233995736766e-17;
  const double square = x * x;
  const double sine = x * series(square, {1., -1. / 6, 1. / 120, -1. / 5040, 1. / 362880, -1. / 39916800});
  const double cosine = series(square, {1., -1. / 2, 1. / 24, -1. / 720, 1. / 40320, -1. / 3628800, 1. / 479001600});
  const int64_t quadrant = static_cast<int64_t>(quarters);
  const double rotated_cosine = quadrant & 1 ? -sine : cosine, rotated_sine = quadrant & 1 ? cosine : sine;
  const float sign = quadrant & 2 ? -1.f : 1.f;
  return make_float2(sign * static_cast<float>(rotated_cosine), sign * static_cast<float>(rotated_sine));
}

__global__ void __launch_bounds__(kThreads) fill_rotary_tables(const RotaryTables table) {
  const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (table.packed && index < table.shape.even_tokens()) {
    constexpr unsigned kBytes = 4 * sizeof(CosSin);
    const unsigned width = table.shape.width, row = static_cast<unsigned>(index) / width;
    const unsigned column = static_cast<unsigned>(index) - row * width;
    table.places[index] = {min(row, unsigned(table.shape.height) - 1) * kBytes, (table.shape.height + column) * kBytes};
  }
  const int64_t place = index / table.pairs;
  const int pair = static_cast<int>(index - place * table.pairs);
  if (place >= table.shape.height + table.shape.width) return;
  const int position = static_cast<int>(place < table.shape.height ? place : place - table.shape.height);
  const float angle = 2 * pair < table.shape.head_dim ? table.frequencies[pair] : 0.f;
  const float2 entry_cos_sin = cos_sin_of(static_cast<float>(position) * angle);
  reinterpret_cast<float2*>(table.cos_sin)[index] = entry_cos_sin;
  if (!table.packed) return;
  // Of eight pairs, two to an entry: cosine, cosine, sine, sine.
  const int64_t positions = table.shape.height + table.shape.width;
  uint16_t* entry = table.packed + (pair / 8 * positions + place) * 16 + pair % 8 / 2 * 4 + pair % 2;
  entry[0] = static_cast<uint16_t>(pack_bf16(entry_cos_sin.x, 0.f)), entry[2] = static_cast<uint16_t>(pack_bf16(entry_cos_sin.y, 0.f));
}

}  // namespace

template <class Arguments>
const char* make_rotary_tables(const Arguments& f, void* stream) {
  RotaryTables table{f.shape, f.shape.padded_head_dim() / 2, {}, f.cos_sin, nullptr, f.rotary_offsets};
  if (f.plan.path == Path::kBfloat16) table.packed = reinterpret_cast<uint16_t*>(f.packed_cos_sin);
  std::copy(std::begin(f.frequencies), std::end(f.frequencies), table.frequencies);
  const int64_t entries = std::max<int64_t>(f.shape.cos_sin_size() / 2, f.shape.even_tokens());
  return launch(fill_rotary_tables, {(entries + kThreads - 1) / kThreads, kThreads, 0}, stream, table);
}
template const char* make_rotary_tables(const Forward&, void*);
template const char* make_rotary_tables(const Backward&, void*);

}  // namespace polaformer
