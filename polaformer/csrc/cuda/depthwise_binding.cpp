// PyTorch binding of the depthwise convolution's CUDA kernels: checks, outputs, workspace, stream.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <limits>
#include <optional>
#include <tuple>

#include "call_reference.h"
#include "checks.h"
#include "depthwise_params.h"
#include "device.h"

namespace polaformer {
namespace {

using at::Tensor;

// Requires check_depthwise_sizes(), and sizes that fit an int.
DepthwiseShape shape_of(const Tensor& x, const Tensor& weight) {
  return {x.size(0),
          static_cast<int>(x.size(1)),
          static_cast<int>(x.size(2)),
          static_cast<int>(x.size(3)),
          static_cast<int>(weight.size(2)),
          dtype_of(x)};
}

// Why the reference runs instead of the kernels, or null. Empty for float64, which never has kernels: no warning then.
const char* fallback_reason(const Tensor& x, const Tensor& weight) {
  constexpr int64_t kMaxInt = std::numeric_limits<int>::max();
  if (x.scalar_type() == at::kDouble) return "";
  if (x.size(1) > kMaxInt || x.size(2) > kMaxInt || x.size(3) > kMaxInt) return "a size is 2^31 or more";
  return unsupported_reason(shape_of(x, weight), device_attribute(x, cudaDevAttrComputeCapabilityMajor),
                            device_attribute(x, cudaDevAttrMaxSharedMemoryPerBlockOptin));
}

// A tensor that the kernels read in place or, where its channels are not contiguous and aligned, a copy.
struct Operand {
  Tensor tensor;

  explicit Operand(const Tensor& x) : tensor(x) {
    if (x.stride(3) != 1 || !images().aligned()) tensor = x.clone(at::MemoryFormat::Contiguous);
  }

  Images images() const {
    const auto stride = [&](int axis) {
      return tensor.size(axis) > 1 ? tensor.stride(axis) * tensor.element_size() : int64_t{0};
    };
    // Operands are only read: a pointer to const keeps PyTorch's copies on write lazy.
    return {static_cast<char*>(const_cast<void*>(tensor.const_data_ptr())), stride(0), stride(1), stride(2), 0};
  }
};

Tensor empty_contiguous(const Tensor& x) { return at::empty(x.sizes(), x.options()); }

Tensor contiguous_floats(const Tensor& x) { return x.to(at::kFloat).contiguous(); }

void plan(DepthwiseParams& params, bool backward, bool reads_center, const Tensor& x) {
  params.set_plan(make_depthwise_plan(params.shape, backward, reads_center,
                                      device_attribute(x, cudaDevAttrMultiProcessorCount),
                                      device_attribute(x, cudaDevAttrMaxSharedMemoryPerMultiprocessor)));
}

Tensor forward(const Tensor& x, const Tensor& weight, const Tensor& bias, const std::optional<Tensor>& residual,
               bool adds_input) {
  check_depthwise(at::kCUDA, x, weight, bias, residual, adds_input);
  if (x.numel() == 0) return empty_contiguous(x);
  const c10::cuda::CUDAGuard guard(x.device());
  if (const char* reason = fallback_reason(x, weight))
    return call_reference<Tensor>("polaformer::depthwise_reference", x, weight, bias, residual, adds_input,
                                  c10::string_view(reason));
  const Tensor out = empty_contiguous(x), taps = contiguous_floats(weight), biases = contiguous_floats(bias);
  const Operand in(x);
  const auto added = residual ? std::optional<Operand>(*residual) : std::nullopt;
  DepthwiseParams params{};
  params.shape = shape_of(x, weight);
  params.window = in.images();
  if (added) params.center = added->images();
  params.result = contiguous_images(out.mutable_data_ptr(), params.shape);
  params.weight = taps.const_data_ptr<float>();
  params.bias = biases.const_data_ptr<float>();
  params.adds_window = adds_input;
  plan(params, false, residual.has_value(), x);
  const char* error = run_depthwise_forward(params, current_stream(x));
  TORCH_CHECK(!error, "depthwise convolution did not start on ", x.device(), ": ", error);
  return out;
}

using Gradients = std::tuple<Tensor, Tensor, Tensor>;

Gradients backward(const Tensor& grad_out, const Tensor& x, const Tensor& weight, bool adds_input) {
  check_depthwise_gradient(at::kCUDA, grad_out, x, weight);
  if (x.numel() == 0)
    return {empty_contiguous(x), at::zeros(weight.sizes(), weight.options()), at::zeros({x.size(3)}, weight.options())};
  const c10::cuda::CUDAGuard guard(x.device());
  if (fallback_reason(x, weight))
    return call_reference<Gradients>("polaformer::depthwise_reference_backward", grad_out, x, weight, adds_input);

  const Tensor grad_x = empty_contiguous(x), taps = contiguous_floats(weight);
  const Tensor grad_weight = empty_floats(x, weight.sizes()), grad_bias = empty_floats(x, {x.size(3)});
  const Operand in(x), grad(grad_out);
  DepthwiseParams params{};
  params.shape = shape_of(x, weight);
  params.window = grad.images();
  params.center = in.images();
  params.result = contiguous_images(grad_x.mutable_data_ptr(), params.shape);
  params.weight = taps.const_data_ptr<float>();
  params.adds_window = adds_input;
  plan(params, true, true, x);
  const Tensor split_sums = empty_floats(x, {params.plan.splits, params.shape.taps() + 1, params.shape.channels});
  params.split_sums = split_sums.mutable_data_ptr<float>();
  params.grad_weight = grad_weight.mutable_data_ptr<float>();
  params.grad_bias = grad_bias.mutable_data_ptr<float>();
  const char* error = run_depthwise_backward(params, current_stream(x));
  TORCH_CHECK(!error, "the gradient of depthwise convolution did not start on ", x.device(), ": ", error);
  return {grad_x, grad_weight.to(weight.scalar_type()), grad_bias.to(weight.scalar_type())};
}

}  // namespace
}  // namespace polaformer

TORCH_LIBRARY_IMPL(polaformer, CUDA, m) {
  m.impl("depthwise_conv2d", polaformer::forward);
  m.impl("depthwise_conv2d_backward", polaformer::backward);
}
