// Between the binding, which knows PyTorch, and the kernels, which are compiled once for each instruction set and
// know nothing but what stands here.
#pragma once

#include <cstdint>

namespace polaformer {

enum class Type { float32, bfloat16, float64 };

// A (B, H, N, D) tensor whose D numbers lie side by side; strides in elements, not bytes.
struct StridedTensor {
  void* data = nullptr;
  Type type = Type::float32;
  int64_t batch = 0, head = 0, token = 0;
};

struct Problem {
  int64_t batch, heads, height, width;
  int head_dim;
  bool bf16_gemm;            // multiply matrices in bfloat16 with float32 sums, by `multiply_bf16`
  const float* frequencies;  // (D/2): the rotation angle of each pair per unit of distance
};

// Everything in the compute type, float or double, contiguous: logits (H, 2D), state (B, H, 2D, D), key_mean
// (B, H, 2D), key_shift (B, H, D). Gradients of logits are (H, 2D) too.
struct ForwardParams {
  Problem problem;
  StridedTensor q, k, v, out;
  const void *same_logits, *opposite_logits;
  void *state, *key_mean, *key_shift;
};

struct BackwardParams {
  Problem problem;
  StridedTensor grad_out, q, k, v, grad_q, grad_k, grad_v;
  const void *same_logits, *opposite_logits, *state, *key_mean, *key_shift;
  void *grad_same, *grad_opposite;
};

// What the kernels need of PyTorch. `allocate` gives uninitialised memory, aligned to 64 bytes, that lives as long as
// the call. `multiply_bf16` is C (M, N) = A (M, K) B, or added to C, where B's rows are interleaved in pairs.
struct Runtime {
  virtual ~Runtime() = default;
  virtual int threads() = 0;
  virtual void* allocate(int64_t bytes) = 0;
  virtual void parallel(int64_t tasks, void (*body)(void* context, int64_t task, int thread), void* context) = 0;
  virtual void multiply_bf16(int m, int n, int k, const uint16_t* a, int lda, const uint16_t* b, int ldb, float* c,
                             int ldc, bool add) = 0;
};

struct Kernels {
  const char* instruction_set;
  void (*forward)(const ForwardParams&, Runtime&);
  void (*backward)(const BackwardParams&, Runtime&);
};

extern const Kernels kBaseline;
#if defined(__x86_64__)
extern const Kernels kAvx2, kAvx512;
#endif

}  // namespace polaformer
