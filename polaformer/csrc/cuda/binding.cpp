// The CUDA kernels as PyTorch operators: checks, outputs, workspaces, stream. polaformer/ops.py defines the schema.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/linspace.h>
#include <ATen/ops/pow.h>
#include <ATen/ops/reciprocal.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <array>
#include <mutex>
#include <tuple>

#include "checks.h"
#include "launch_params.h"

namespace polaformer {
namespace {

using at::Tensor;

Dtype dtype_of(const Tensor& q) {
  return q.scalar_type() == at::kBFloat16 ? Dtype::kBfloat16
         : q.scalar_type() == at::kHalf   ? Dtype::kHalf
                                          : Dtype::kFloat;
}

// After check_inputs, so that nothing is lost in an int.
Shape shape_of(const Tensor& q, int64_t height, int64_t width) {
  return {q.size(0),
          static_cast<int>(q.size(1)),
          static_cast<int>(height),
          static_cast<int>(width),
          static_cast<int>(q.size(3)),
          dtype_of(q)};
}

// With a last stride of 1; a copy if it has another.
Tensor with_unit_last_stride(const Tensor& x) { return x.stride(3) == 1 || x.size(3) == 1 ? x : x.contiguous(); }

StridedTensor strided(const Tensor& x) {
  const auto stride = [&](int axis) { return x.size(axis) > 1 ? x.stride(axis) : 0; };
  return {x.const_data_ptr(), stride(0), stride(1), stride(2)};
}

// In rows of float32, aligned to 16 bytes.
Tensor to_aligned_float(const Tensor& x) {
  const Tensor rows = x.to(at::kFloat).contiguous();
  return reinterpret_cast<uintptr_t>(rows.const_data_ptr()) % 16 == 0 ? rows : rows.clone();
}
Tensor empty_floats(const Tensor& like, at::IntArrayRef sizes) { return at::empty(sizes, like.options().dtype(at::kFloat)); }

// Like q, with the memory of a contiguous (B, N, H, D).
Tensor empty_bnhd(const Tensor& q) {
  return at::empty({q.size(0), q.size(2), q.size(1), q.size(3)}, q.options()).transpose(1, 2);
}

// The frequencies of layers.rotary_frequencies, to the last bit; computed once for each width.
void copy_frequencies(float (&frequencies)[kMaxHeadDim / 2], int head_dim) {
  static std::array<std::once_flag, kMaxHeadDim / 2 + 1> once;
  static std::array<std::array<float, kMaxHeadDim / 2>, kMaxHeadDim / 2 + 1> known;
  const int pairs = head_dim / 2;
  std::call_once(once[pairs], [&] {
    const Tensor exponents = at::linspace(0, 1, pairs, at::TensorOptions().dtype(at::kFloat).device(at::kCPU));
    const Tensor values = at::reciprocal(at::pow(at::Scalar(10000.0), exponents));
    std::copy_n(values.const_data_ptr<float>(), pairs, known[pairs].begin());
  });
  std::copy_n(known[pairs].begin(), pairs, frequencies);
}

int device_attribute(const Tensor& q, cudaDeviceAttr attribute) {
  int value = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&value, attribute, q.get_device()));
  return value;
}

// Why the reference computes instead of the kernels, or null. In float64 it always does, which is no reason to
// complain.
const char* fallback_reason(const Tensor& q, const Shape& shape) {
  if (q.scalar_type() == at::kDouble) return "";
  return unsupported_reason(shape, device_attribute(q, cudaDevAttrComputeCapabilityMajor),
                 device_attribute(q, cudaDevAttrMaxSharedMemoryPerBlockOptin));
}

// The operator of that name from polaformer/ops.py: plain PyTorch, any dtype.
template <class Results, class... Arguments>
Results call_reference(const char* name, Arguments&&... arguments) {
  const auto reference = c10::Dispatcher::singleton().findSchemaOrThrow(name, "");
  return reference.typed<Results(Arguments...)>().call(std::forward<Arguments>(arguments)...);
}

// Gives the arguments room for their workspaces; it must live until the kernels are launched.
template <class Arguments>
Tensor make_workspaces(Arguments& arguments, const Tensor& like) {
  int64_t size = 0;
  arguments.assign_workspaces([&](int64_t floats) {
    size += (floats + 3) / 4 * 4;
    return static_cast<float*>(nullptr);
  });
  const Tensor workspace = empty_floats(like, {size});
  float* next = workspace.mutable_data_ptr<float>();
  arguments.assign_workspaces([&](int64_t floats) {
    float* const taken = next;
    next += (floats + 3) / 4 * 4;
    return taken;
  });
  return workspace;
}

using ForwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

ForwardResult forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& same_logits,
                  const Tensor& opposite_logits, int64_t height, int64_t width) {
  check_inputs(at::kCUDA, q, k, v, same_logits, opposite_logits, height, width);
  const Shape shape = shape_of(q, height, width);
  const c10::cuda::CUDAGuard guard(q.device());
  if (const char* reason = fallback_reason(q, shape)) {
    return call_reference<ForwardResult>("polaformer::reference", q, k, v, same_logits, opposite_logits,
                                     c10::SymInt(height), c10::SymInt(width), c10::string_view(reason));
  }
  const int64_t batch = shape.batch, heads = shape.heads, head_dim = shape.head_dim;
  const Tensor out = empty_bnhd(q), state = empty_floats(q, {batch, heads, 2 * head_dim, head_dim});
  const Tensor key_mean = empty_floats(q, {batch, heads, 2 * head_dim}), key_shift = empty_floats(q, {batch, heads, head_dim});
  if (q.numel() == 0) return {out, state.zero_(), key_mean.zero_(), key_shift.zero_()};

  const Tensor q_rows = with_unit_last_stride(q), k_rows = with_unit_last_stride(k), v_rows = with_unit_last_stride(v);
  const Tensor same = to_aligned_float(same_logits), opposite = to_aligned_float(opposite_logits);
  Forward arguments{};
  arguments.shape = shape;
  arguments.q = strided(q_rows), arguments.k = strided(k_rows), arguments.v = strided(v_rows);
  const Path path = choose_path(shape, {arguments.q, arguments.k, arguments.v});
  arguments.plan = make_plan(shape, path, device_attribute(q, cudaDevAttrMultiProcessorCount));
  arguments.same_logits = same.const_data_ptr<float>();
  arguments.opposite_logits = opposite.const_data_ptr<float>();
  copy_frequencies(arguments.frequencies, shape.head_dim);
  arguments.out = out.mutable_data_ptr();
  arguments.state = state.mutable_data_ptr<float>();
  arguments.key_mean = key_mean.mutable_data_ptr<float>();
  arguments.key_shift = key_shift.mutable_data_ptr<float>();
  const Tensor workspaces = make_workspaces(arguments, q);
  const char* error = run_forward(arguments, c10::cuda::getCurrentCUDAStream(q.get_device()).stream());
  TORCH_CHECK(!error, "polarity attention did not start on ", q.device(), ": ", error);
  return {out, state, key_mean, key_shift};
}

Gradients backward(const Tensor& grad_out, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& same_logits,
                   const Tensor& opposite_logits, const Tensor& state, const Tensor& key_mean, const Tensor& key_shift,
                   int64_t height, int64_t width) {
  check_inputs(at::kCUDA, q, k, v, same_logits, opposite_logits, height, width);
  check_saved(grad_out, q, state, key_mean, key_shift);
  const Shape shape = shape_of(q, height, width);
  const c10::cuda::CUDAGuard guard(q.device());
  if (const char* reason = fallback_reason(q, shape)) {
    return call_reference<Gradients>("polaformer::reference_backward", grad_out, q, k, v, same_logits, opposite_logits,
                                     state, key_mean, key_shift, c10::SymInt(height), c10::SymInt(width),
                                     c10::string_view(reason));
  }
  const Tensor grad_q = empty_bnhd(q), grad_k = empty_bnhd(q), grad_v = empty_bnhd(q);
  const auto like_logits = [](const Tensor& x) { return at::zeros(x.sizes(), x.options()); };
  if (q.numel() == 0) return {grad_q, grad_k, grad_v, like_logits(same_logits), like_logits(opposite_logits)};

  const Tensor grad_rows = with_unit_last_stride(grad_out), q_rows = with_unit_last_stride(q), k_rows = with_unit_last_stride(k), v_rows = with_unit_last_stride(v);
  const Tensor same = to_aligned_float(same_logits), opposite = to_aligned_float(opposite_logits);
  const Tensor saved_state = to_aligned_float(state), saved_mean = to_aligned_float(key_mean), saved_shift = to_aligned_float(key_shift);
  const Tensor grad_same = empty_floats(q, same.sizes()), grad_opposite = empty_floats(q, same.sizes());
  Backward arguments{};
  arguments.shape = shape;
  arguments.grad_out = strided(grad_rows);
  arguments.q = strided(q_rows), arguments.k = strided(k_rows), arguments.v = strided(v_rows);
  const Path path = choose_path(shape, {arguments.grad_out, arguments.q, arguments.k, arguments.v});
  arguments.plan = make_plan(shape, path, device_attribute(q, cudaDevAttrMultiProcessorCount));
  arguments.same_logits = same.const_data_ptr<float>();
  arguments.opposite_logits = opposite.const_data_ptr<float>();
  arguments.state = saved_state.const_data_ptr<float>();
  arguments.key_mean = saved_mean.const_data_ptr<float>();
  arguments.key_shift = saved_shift.const_data_ptr<float>();
  copy_frequencies(arguments.frequencies, shape.head_dim);
  arguments.grad_q = grad_q.mutable_data_ptr();
  arguments.grad_k = grad_k.mutable_data_ptr();
  arguments.grad_v = grad_v.mutable_data_ptr();
  arguments.grad_same_logits = grad_same.mutable_data_ptr<float>();
  arguments.grad_opposite_logits = grad_opposite.mutable_data_ptr<float>();
  const Tensor workspaces = make_workspaces(arguments, q);
  const char* error = run_backward(arguments, c10::cuda::getCurrentCUDAStream(q.get_device()).stream());
  TORCH_CHECK(!error, "the gradient of polarity attention did not start on ", q.device(), ": ", error);
  return {grad_q, grad_k, grad_v, grad_same.to(same_logits.scalar_type()),
          grad_opposite.to(opposite_logits.scalar_type())};
}

}  // namespace
}  // namespace polaformer

TORCH_LIBRARY_IMPL(polaformer, CUDA, m) {
  m.impl("polarity_attention", polaformer::forward);
  m.impl("polarity_attention_backward", polaformer::backward);
}
