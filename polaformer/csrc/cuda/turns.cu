// Cosines and sines of the turns of every row and column, (height + width, W/2, 2): position · angle is rounded to
// float32 as in polaformer/layers.py; what follows is exact to float32's last bit.
#include <iterator>

#include "tokens.cuh"

namespace polaformer {
namespace {

struct TurnsTable {
  Shape shape;
  int pairs;  // W/2
  float angles[kMaxHeadWidth / 2];
  float* turns;
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
__device__ __forceinline__ float2 turn_of(float angle) {
  const double quarters = rint(angle * 0.63661977236758134);
  const double x = (angle - quarters * 1.5707963267948966) - quarters * 6.123233995736766e-17;
  const double square = x * x;
  const double sine = x * series(square, {1., -1. / 6, 1. / 120, -1. / 5040, 1. / 362880, -1. / 39916800});
  const double cosine = series(square, {1., -1. / 2, 1. / 24, -1. / 720, 1. / 40320, -1. / 3628800, 1. / 479001600});
  const int64_t quadrant = static_cast<int64_t>(quarters);
  const double turned_cosine = quadrant & 1 ? -sine : cosine, turned_sine = quadrant & 1 ? cosine : sine;
  const float sign = quadrant & 2 ? -1.f : 1.f;
  return make_float2(sign * static_cast<float>(turned_cosine), sign * static_cast<float>(turned_sine));
}

__global__ void __launch_bounds__(kThreads) fill_turns(const TurnsTable table) {
  const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int64_t place = index / table.pairs;
  const int pair = static_cast<int>(index - place * table.pairs);
  if (place >= table.shape.height + table.shape.width) return;
  const int position = static_cast<int>(place < table.shape.height ? place : place - table.shape.height);
  const float angle = 2 * pair < table.shape.head_width ? table.angles[pair] : 0.f;
  reinterpret_cast<float2*>(table.turns)[index] = turn_of(static_cast<float>(position) * angle);
}

}  // namespace

const char* make_turns(float* turns, const Shape& shape, const float (&angles)[kMaxHeadWidth / 2], void* stream) {
  TurnsTable table{shape, shape.padded_width() / 2, {}, turns};
  std::copy(std::begin(angles), std::end(angles), table.angles);
  return launch(fill_turns, {(shape.turns_size() / 2 + kThreads - 1) / kThreads, kThreads, 0}, stream, table);
}

}  // namespace polaformer
