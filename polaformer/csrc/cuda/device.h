// What both bindings of the CUDA kernels ask PyTorch and the driver.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>

#include "launch_params.h"

namespace polaformer {

inline int device_attribute(const at::Tensor& x, cudaDeviceAttr attribute) {
  int value = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&value, attribute, x.get_device()));
  return value;
}

inline void* current_stream(const at::Tensor& x) { return c10::cuda::getCurrentCUDAStream(x.get_device()).stream(); }

inline at::Tensor empty_floats(const at::Tensor& like, at::IntArrayRef sizes) {
  return at::empty(sizes, like.options().dtype(at::kFloat));
}

inline Dtype dtype_of(const at::Tensor& x) {
  return x.scalar_type() == at::kBFloat16 ? Dtype::kBfloat16
         : x.scalar_type() == at::kHalf   ? Dtype::kHalf
                                          : Dtype::kFloat;
}

}  // namespace polaformer
