// SIMD vectors of the including file's instruction set, as compiler vector extensions.

namespace polaformer {
namespace POLAFORMER_ISA {

template <class R>
struct Simd {
  typedef R Vec __attribute__((vector_size(POLAFORMER_VECTOR_BYTES)));
  typedef R Unaligned __attribute__((vector_size(POLAFORMER_VECTOR_BYTES), aligned(sizeof(R)), may_alias));
  static constexpr int lanes = POLAFORMER_VECTOR_BYTES / sizeof(R);
};
template <class R>
using Vec = typename Simd<R>::Vec;
typedef int32_t Words __attribute__((vector_size(POLAFORMER_VECTOR_BYTES)));
typedef uint32_t UnsignedWords __attribute__((vector_size(POLAFORMER_VECTOR_BYTES)));
typedef uint16_t HalfWords __attribute__((vector_size(POLAFORMER_VECTOR_BYTES / 2), aligned(2), may_alias));

template <class R>
inline Vec<R> load(const R* from) {
  return *reinterpret_cast<const typename Simd<R>::Unaligned*>(from);
}
template <class R>
inline void store(R* to, Vec<R> x) {
  *reinterpret_cast<typename Simd<R>::Unaligned*>(to) = x;
}
template <class R>
inline Vec<R> broadcast(R x) {
  return x - Vec<R>{};
}

template <class V>
inline V swap_pairs(V x);
template <>
inline Vec<float> swap_pairs(Vec<float> x) {
#if POLAFORMER_VECTOR_BYTES == 64
  return __builtin_shuffle(x, Words{1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14});
#elif POLAFORMER_VECTOR_BYTES == 32
  return __builtin_shuffle(x, Words{1, 0, 3, 2, 5, 4, 7, 6});
#else
  return __builtin_shuffle(x, Words{1, 0, 3, 2});
#endif
}
template <>
inline Vec<double> swap_pairs(Vec<double> x) {
  Vec<double> swapped;
  for (int i = 0; i < Simd<double>::lanes; ++i) swapped[i] = x[i ^ 1];
  return swapped;
}

template <class R>
inline R sum_of(Vec<R> x) {
  R sums[Simd<R>::lanes];
  store(sums, x);
  for (int half = Simd<R>::lanes / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
  return sums[0];
}
template <class R>
inline R max_of(Vec<R> x) {
  R largest = x[0];
  for (int i = 1; i < Simd<R>::lanes; ++i) largest = x[i] > largest ? x[i] : largest;
  return largest;
}

inline Vec<double> expm1_of(Vec<double> x) {
  for (int i = 0; i < Simd<double>::lanes; ++i) x[i] = __builtin_expm1(x[i]);
  return x;
}
inline Vec<float> expm1_of(Vec<float> x) { return expm1_of_exponent(x); }

}  // namespace POLAFORMER_ISA

template <>
struct Bits<POLAFORMER_ISA::Vec<float>> {
  using type = POLAFORMER_ISA::Words;
};

namespace POLAFORMER_ISA {

constexpr int padded(int count, int lanes) { return (count + lanes - 1) / lanes * lanes; }

template <class R>
inline R clamp_magnitude(R x, R limit) {
  return x > limit ? limit : x < -limit ? -limit : x;
}

}  // namespace POLAFORMER_ISA
}  // namespace polaformer
