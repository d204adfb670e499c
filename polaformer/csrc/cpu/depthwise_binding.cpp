// PyTorch binding of the depthwise convolution's CPU kernels: checks and prepares tensors.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

#include "call_reference.h"
#include "checks.h"
#include "cpu/interface.h"
#include "cpu/runtime.h"

namespace polaformer {
namespace {

using at::Tensor;

Image image(const Tensor& x) { return {x.data_ptr(), kernel_type(x), x.stride(0), x.stride(1), x.stride(2)}; }

DepthwiseSize size_of(const Tensor& x, const Tensor& weight) {
  return {x.size(0), x.size(1), x.size(2), x.size(3), int(weight.size(2))};
}

// The kernels for this CPU whose vectors the channels of x fill: those of AVX2 if 64 bytes are more than there are.
const Kernels& kernels_for(const Tensor& x) {
#if defined(__x86_64__)
  if (&kernels() == &kAvx512 && x.size(3) * x.element_size() < 64) return kAvx2;
#endif
  return kernels();
}

// The reference computes the others.
bool has_kernel(const Tensor& weight) { return weight.size(2) == 3 || weight.size(2) == 5; }

// Weights or bias as the kernels read them.
Tensor parameter(const Tensor& weight, const Tensor& x) { return weight.to(compute_type(x)).contiguous(); }

Tensor empty_like_contiguous(const Tensor& x) { return at::empty(x.sizes(), x.options()); }

Tensor forward(const Tensor& x, const Tensor& weight, const Tensor& bias, const std::optional<Tensor>& residual,
               bool adds_input) {
  check_depthwise(at::kCPU, x, weight, bias, residual, adds_input);
  if (x.numel() == 0) return empty_like_contiguous(x);
  if (!has_kernel(weight))
    return call_reference<Tensor>("polaformer::depthwise_reference", x, weight, bias, residual, adds_input,
                                  c10::string_view("the kernels serve 3×3 and 5×5"));
  const Tensor in = to_kernel_layout(x), out = empty_like_contiguous(in);
  const Tensor added = residual ? to_kernel_layout(*residual) : in;
  const bool adds = residual || adds_input;
  const Tensor weights = parameter(weight, x), biases = parameter(bias, x);
  TorchRuntime runtime;
  kernels_for(in).depthwise_forward({size_of(in, weight), image(in), adds ? image(added) : Image{}, image(out),
                                     weights.data_ptr(), biases.data_ptr()},
                                    runtime);
  return out.to(x.scalar_type());
}

using Gradients = std::tuple<Tensor, Tensor, Tensor>;

Gradients backward(const Tensor& grad_out, const Tensor& x, const Tensor& weight, bool adds_input) {
  check_depthwise_gradient(at::kCPU, grad_out, x, weight);
  if (x.numel() == 0)
    return {empty_like_contiguous(x), at::zeros(weight.sizes(), weight.options()),
            at::zeros({x.size(3)}, weight.options())};
  if (!has_kernel(weight))
    return call_reference<Gradients>("polaformer::depthwise_reference_backward", grad_out, x, weight, adds_input);
  const Tensor in = to_kernel_layout(x), grad = to_kernel_layout(grad_out), grad_in = empty_like_contiguous(in);
  const Tensor weights = parameter(weight, x), grad_weight = empty_like_contiguous(weights);
  const Tensor grad_bias = at::empty({x.size(3)}, weights.options());
  TorchRuntime runtime;
  kernels_for(in).depthwise_backward({size_of(in, weight), image(in), image(grad), image(grad_in), weights.data_ptr(),
                                      grad_weight.data_ptr(), grad_bias.data_ptr(), adds_input},
                                     runtime);
  return {grad_in.to(x.scalar_type()), grad_weight.to(weight.scalar_type()), grad_bias.to(weight.scalar_type())};
}

}  // namespace

TORCH_LIBRARY_IMPL(polaformer, CPU, library) {
  library.impl("depthwise_conv2d", forward);
  library.impl("depthwise_conv2d_backward", backward);
}

}  // namespace polaformer
