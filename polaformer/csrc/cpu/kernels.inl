// Polarity attention and depthwise convolution for one instruction set: the including file defines POLAFORMER_ISA and
// sets the compiler's target. No standard or PyTorch header may be included below that point: its inline functions
// would be compiled for a CPU that the rest of the program must not require.
//
// Both passes process tiles of kTile tokens whose features stay in the cache: vectorised elementwise work, then matrix
// products. A row of D elements is zero-padded to W, a multiple of the vector length; 2D features to F = 2W, positive
// parts first; each half of a value row to M, with V = 2M. The state is stored transposed, (V, F), so that every
// product over tokens reads rows. Work is divided by shape alone and sums have a fixed order: results are bit-identical
// for any number of threads.

#include "cpu/simd.inl"
#include "cpu/gemm.inl"
#include "cpu/tiles.inl"
#include "cpu/features.inl"
#include "cpu/forward.inl"
#include "cpu/backward.inl"
#include "cpu/depthwise.inl"

namespace polaformer {
namespace POLAFORMER_ISA {

// Runs a pass with the matrix products of its dtype.
template <template <class> class Pass, class Params>
void run_pass(const Params& params, Runtime& runtime) {
  if (params.q.type == Type::float64)
    Pass<DirectGemm<double>>(params, runtime).run();
  else if (params.problem.bf16_gemm)
    Pass<Bf16Gemm>(params, runtime).run();
  else
    Pass<DirectGemm<float>>(params, runtime).run();
}

inline void forward(const ForwardParams& params, Runtime& runtime) { run_pass<ForwardPass>(params, runtime); }
inline void backward(const BackwardParams& params, Runtime& runtime) { run_pass<BackwardPass>(params, runtime); }

}  // namespace POLAFORMER_ISA
}  // namespace polaformer
