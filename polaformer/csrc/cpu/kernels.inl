// Polarity attention, forward and backward, for one instruction set: the including file names it (POLAFORMER_ISA) and
// sets the compiler's target. No header of the standard library or of PyTorch may be included below that point, lest
// its inline functions be compiled for a processor that the rest of the program cannot assume.
//
// Both passes go over tiles of kTile tokens whose features live in the cache: elementwise work on vectors, then
// products of matrices. A row of D numbers is padded with zeros to W, whole vectors; 2D features to F = 2W, positive
// parts first; the two halves of a value row to M each, V = 2M. The state is kept transposed, (V, F), since then every
// product over tokens reads rows. Work is cut by the shape alone and sums are formed in a fixed order: the same bits
// on any number of threads.

#include "cpu/simd.inl"
#include "cpu/gemm.inl"
#include "cpu/tiles.inl"
#include "cpu/features.inl"
#include "cpu/forward.inl"
#include "cpu/backward.inl"

namespace polaformer {
namespace POLAFORMER_ISA {

inline void forward(const ForwardParams& params, Runtime& runtime) {
  if (params.q.type == Type::float64)
    ForwardPass<DirectGemm<double>>(params, runtime).run();
  else if (params.problem.bf16_gemm)
    ForwardPass<Bf16Gemm>(params, runtime).run();
  else
    ForwardPass<DirectGemm<float>>(params, runtime).run();
}

inline void backward(const BackwardParams& params, Runtime& runtime) {
  if (params.q.type == Type::float64)
    BackwardPass<DirectGemm<double>>(params, runtime).run();
  else if (params.problem.bf16_gemm)
    BackwardPass<Bf16Gemm>(params, runtime).run();
  else
    BackwardPass<DirectGemm<float>>(params, runtime).run();
}

}  // namespace POLAFORMER_ISA
}  // namespace polaformer
