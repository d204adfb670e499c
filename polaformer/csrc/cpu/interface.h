// Interface between the binding, which uses PyTorch, and the kernels, which are compiled once per instruction set and
// include no other header.
#pragma once

#include <cstdint>

namespace polaformer {

enum class Type { float32, bfloat16, float64 };

// A (B, H, N, D) tensor; strides in elements, not bytes; the last stride is 1.
struct StridedTensor {
  void* data = nullptr;
  Type type = Type::float32;
  int64_t batch = 0, head = 0, token = 0;
};

struct Problem {
  int64_t batch, heads, height, width;
  int head_dim;
  bool bf16_gemm;            // multiply matrices by Runtime::multiply_bf16
  const float* frequencies;  // (D/2): angle per unit of distance of each pair
};

// All pointers are to contiguous tensors in the compute type, float or double: logits and their gradients (H, 2D),
// state (B, H, 2D, D), key_mean (B, H, 2D), key_shift (B, H, D).
struct CommonParams {
  Problem problem;
  StridedTensor q, k, v;
  const void *same_logits, *opposite_logits;
};

struct ForwardParams : CommonParams {
  StridedTensor out;
  void *state, *key_mean, *key_shift;
};

struct BackwardParams : CommonParams {
  StridedTensor grad_out, grad_q, grad_k, grad_v;
  const void *state, *key_mean, *key_shift;
  void *grad_same, *grad_opposite;
};

// A (B, height, width, C) tensor of images; strides in elements, not bytes; the last stride is 1.
struct Image {
  void* data = nullptr;
  Type type = Type::float32;
  int64_t batch = 0, row = 0, column = 0;
};

struct DepthwiseSize {
  int64_t batch, height, width, channels;
  int kernel_size;  // 3 or 5
};

// Weights (C, k, k), bias (C) and their gradients are contiguous, in the compute type, float or double.
struct DepthwiseForwardParams {
  DepthwiseSize size;
  Image x, residual, out;  // residual: without data if nothing is added
  const void *weight, *bias;
};

struct DepthwiseBackwardParams {
  DepthwiseSize size;
  Image x, grad_out, grad_x;
  const void* weight;
  void *grad_weight, *grad_bias;
  bool adds_input;  // forward added its input: its gradient has grad_out added
};

// Services of PyTorch. `allocate` returns uninitialised memory, aligned to 64 bytes, that lives as long as the call.
// `multiply_bf16` computes C (M, N) = A (M, K) B, or adds to C if `add`; B's rows are interleaved in pairs.
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
  void (*depthwise_forward)(const DepthwiseForwardParams&, Runtime&);
  void (*depthwise_backward)(const DepthwiseBackwardParams&, Runtime&);
};

extern const Kernels kBaseline;
#if defined(__x86_64__)
extern const Kernels kAvx2, kAvx512;
#endif

}  // namespace polaformer
