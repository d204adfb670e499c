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

// The reference computes the others.
bool has_kernel(const Tensor& weight) { return weight.size(2) == 3 || weight.size(2) == 5; }

// Weights (C, 1, k, k) as the kernels read them: (k·k, C).
Tensor by_tap(const Tensor& weight, at::ScalarType type) { return weight.flatten(1).to(type).t().contiguous(); }

Tensor empty_like_contiguous(const Tensor& x) { return at::empty(x.sizes(), x.options()); }

Tensor forward(const Tensor& x, const Tensor& weight, const Tensor& bias, const std::optional<Tensor>& residual,
               bool adds_input) {
  check_depthwise(at::kCPU, x, weight, bias, residual, adds_input);
  if (x.numel() == 0) return empty_like_contiguous(x);
  if (!has_kernel(weight))
    return call_reference<Tensor>("polaformer::depthwise_reference", x, weight, bias, residual, adds_input);
  const Tensor in = to_kernel_layout(x), out = empty_like_contiguous(in);
  const Tensor added = residual ? to_kernel_layout(*residual) : in;
  const bool adds = residual || adds_input;
  const Tensor taps = by_tap(weight, compute_type(x)), biases = bias.to(compute_type(x)).contiguous();
  TorchRuntime runtime;
  kernels().depthwise_forward(
      {size_of(in, weight), image(in), adds ? image(added) : Image{}, image(out), taps.data_ptr(), biases.data_ptr()},
      runtime);
  return out.to(x.scalar_type());
}

using Gradients = std::tuple<Tensor, Tensor, Tensor>;

Gradients backward(const Tensor& grad_out, const Tensor& x, const Tensor& weight, bool adds_input) {
  check_depthwise_gradient(at::kCPU, grad_out, x, weight);
  const int64_t channels = x.size(3), taps_count = weight.size(2) * weight.size(3);
  if (x.numel() == 0)
    return {empty_like_contiguous(x), at::zeros(weight.sizes(), weight.options()),
            at::zeros({channels}, weight.options())};
  if (!has_kernel(weight))
    return call_reference<Gradients>("polaformer::depthwise_reference_backward", grad_out, x, weight, adds_input);
  const Tensor in = to_kernel_layout(x), grad = to_kernel_layout(grad_out), grad_in = empty_like_contiguous(in);
  const Tensor taps = by_tap(weight, compute_type(x));
  const Tensor sums = at::empty({taps_count + 1, channels}, taps.options());
  TorchRuntime runtime;
  kernels().depthwise_backward(
      {size_of(in, weight), image(in), image(grad), image(grad_in), taps.data_ptr(), sums.data_ptr(), adds_input},
      runtime);
  const Tensor grad_weight = sums.narrow(0, 0, taps_count).t().to(weight.scalar_type()).contiguous();
  return {grad_in.to(x.scalar_type()), grad_weight.view(weight.sizes()),
          sums[taps_count].to(weight.scalar_type()).clone()};
}

}  // namespace

TORCH_LIBRARY_IMPL(polaformer, CPU, library) {
  library.impl("depthwise_conv2d", forward);
  library.impl("depthwise_conv2d_backward", backward);
}

}  // namespace polaformer
