// What both bindings of the CPU kernels take from PyTorch: the instruction set, and the services of Runtime.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>

#include <atomic>
#include <string>
#include <vector>

#include "cpu/interface.h"

namespace polaformer {

// The kernels for this CPU, or for the lower capability that ATEN_CPU_CAPABILITY names.
inline const Kernels& kernels() {
#if defined(__x86_64__)
  const std::string capability = at::get_cpu_capability();
  return capability == "AVX512" ? kAvx512 : capability == "AVX2" ? kAvx2 : kBaseline;
#else
  return kBaseline;
#endif
}

class TorchRuntime final : public Runtime {
 public:
  int threads() override { return at::get_num_threads(); }

  void* allocate(int64_t bytes) override {
    memory_.push_back(at::empty({bytes}, at::kByte));
    return memory_.back().data_ptr();
  }

  void parallel(int64_t tasks, void (*body)(void*, int64_t, int), void* context) override {
    at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) body(context, task, at::get_thread_num());
      if (used_tiles_) at::native::cpublas::brgemm_release();
    });
  }

  void multiply_bf16(int m, int n, int k, const uint16_t* a, int lda, const uint16_t* b, int ldb, float* c, int ldc,
                     bool add) override {
    used_tiles_ = true;
    at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, add, reinterpret_cast<const at::BFloat16*>(a),
                                reinterpret_cast<const at::BFloat16*>(b), c);
  }

 private:
  std::vector<at::Tensor> memory_;
  std::atomic<bool> used_tiles_{false};
};

inline at::ScalarType compute_type(const at::Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// The type of a tensor that the kernels read.
inline Type kernel_type(const at::Tensor& x) {
  return x.scalar_type() == at::kDouble  ? Type::float64
         : x.scalar_type() == at::kFloat ? Type::float32
                                         : Type::bfloat16;
}

// x in a dtype that the kernels read, with a last stride of 1.
inline at::Tensor to_kernel_layout(const at::Tensor& x) {
  const at::Tensor wide = x.scalar_type() == at::kHalf ? x.to(at::kFloat) : x;
  return wide.stride(3) == 1 || wide.size(3) == 1 ? wide : wide.contiguous();
}

}  // namespace polaformer
