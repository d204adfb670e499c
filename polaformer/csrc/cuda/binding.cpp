// PyTorch binding of the attention's CUDA kernels: checks, outputs, workspaces, stream. polaformer/ops.py defines the
// schemas.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/linspace.h>
#include <ATen/ops/pow.h>
#include <ATen/ops/reciprocal.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <array>
#include <initializer_list>
#include <mutex>
#include <tuple>

#include "call_reference.h"
#include "checks.h"
#include "device.h"
#include "kernels.cuh"
#include "launch_params.h"

namespace polaformer {
namespace {

using at::Tensor;

// Requires check_inputs(), after which every size but the batch fits an int.
Shape shape_of(const Tensor& q, int64_t height, int64_t width) {
  return {q.size(0),
          static_cast<int>(q.size(1)),
          static_cast<int>(height),
          static_cast<int>(width),
          static_cast<int>(q.size(3)),
          dtype_of(q)};
}

// x, or a contiguous copy if its last stride is not 1.
Tensor with_unit_last_stride(const Tensor& x) { return x.stride(3) == 1 || x.size(3) == 1 ? x : x.contiguous(); }

StridedTensor strided(const Tensor& x) {
  const auto stride = [&](int axis) { return x.size(axis) > 1 ? x.stride(axis) : 0; };
  return {x.const_data_ptr(), stride(0), stride(1), stride(2)};
}

// x in float32, contiguous and aligned to 16 bytes.
Tensor to_aligned_float(const Tensor& x) {
  const Tensor floats = x.to(at::kFloat).contiguous();
  return reinterpret_cast<uintptr_t>(floats.const_data_ptr()) % 16 == 0 ? floats : floats.clone();
}

// An uninitialised tensor like q in the memory layout of a contiguous (B, N, H, D).
Tensor empty_bnhd(const Tensor& q) {
  return at::empty({q.size(0), q.size(2), q.size(1), q.size(3)}, q.options()).transpose(1, 2);
}

// Bit-identical to rotary.rotary_frequencies; computed once per head dimension.
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

// Why the reference runs instead of the kernels, or null. Empty for float64, which never has kernels: no warning then.
const char* fallback_reason(const Tensor& q, const Shape& shape) {
  if (q.scalar_type() == at::kDouble) return "";
  return unsupported_reason(shape, device_attribute(q, cudaDevAttrComputeCapabilityMajor),
                            device_attribute(q, cudaDevAttrMaxSharedMemoryPerBlockOptin));
}

// The tensors that both passes read, as the kernels need them; they must outlive the launch.
struct KernelInputs {
  Tensor q, k, v, same_logits, opposite_logits;

  KernelInputs(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& same_logits,
               const Tensor& opposite_logits)
      : q(with_unit_last_stride(q)),
        k(with_unit_last_stride(k)),
        v(with_unit_last_stride(v)),
        same_logits(to_aligned_float(same_logits)),
        opposite_logits(to_aligned_float(opposite_logits)) {}

  void assign(CommonParams& params, const Shape& shape) const {
    params.shape = shape;
    params.q = strided(q), params.k = strided(k), params.v = strided(v);
    params.same_logits = same_logits.const_data_ptr<float>();
    params.opposite_logits = opposite_logits.const_data_ptr<float>();
    copy_frequencies(params.frequencies, shape.head_dim);
  }
};

// Allocates the workspaces of a pass in one tensor, which must outlive the launch.
template <class Params>
Tensor make_workspaces(Params& params, const Tensor& like) {
  int64_t size = 0;
  params.assign_workspaces([&](int64_t floats) {
    size += (floats + 3) / 4 * 4;
    return static_cast<float*>(nullptr);
  });
  const Tensor workspace = empty_floats(like, {size});
  float* next = workspace.mutable_data_ptr<float>();
  params.assign_workspaces([&](int64_t floats) {
    float* const taken = next;
    next += (floats + 3) / 4 * 4;
    return taken;
  });
  return workspace;
}

// Plans a pass for the layout of `inputs` and launches it on the current stream of q's device. Raises RuntimeError,
// which names `what`, if a launch fails.
template <class Params>
void plan_and_run(const char* (*run)(const Params&, void*), Params& params, const Tensor& q,
                  std::initializer_list<StridedTensor> inputs, const char* what) {
  params.plan = make_plan(params.shape, choose_path(params.shape, inputs),
                          device_attribute(q, cudaDevAttrMultiProcessorCount), bf16::has_warpgroups());
  const Tensor workspaces = make_workspaces(params, q);
  const char* error = run(params, current_stream(q));
  TORCH_CHECK(!error, what, " did not start on ", q.device(), ": ", error);
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
  const Tensor key_mean = empty_floats(q, {batch, heads, 2 * head_dim});
  const Tensor key_shift = empty_floats(q, {batch, heads, head_dim});
  if (q.numel() == 0) return {out, state.zero_(), key_mean.zero_(), key_shift.zero_()};

  const KernelInputs inputs(q, k, v, same_logits, opposite_logits);
  ForwardParams params{};
  inputs.assign(params, shape);
  params.out = out.mutable_data_ptr();
  params.state = state.mutable_data_ptr<float>();
  params.key_mean = key_mean.mutable_data_ptr<float>();
  params.key_shift = key_shift.mutable_data_ptr<float>();
  plan_and_run(run_forward, params, q, {params.q, params.k, params.v}, "polarity attention");
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

  const KernelInputs inputs(q, k, v, same_logits, opposite_logits);
  const Tensor grad_rows = with_unit_last_stride(grad_out), saved_state = to_aligned_float(state);
  const Tensor saved_mean = to_aligned_float(key_mean), saved_shift = to_aligned_float(key_shift);
  const Tensor grad_same = empty_floats(q, same_logits.sizes());
  const Tensor grad_opposite = empty_floats(q, opposite_logits.sizes());
  BackwardParams params{};
  inputs.assign(params, shape);
  params.grad_out = strided(grad_rows);
  params.state = saved_state.const_data_ptr<float>();
  params.key_mean = saved_mean.const_data_ptr<float>();
  params.key_shift = saved_shift.const_data_ptr<float>();
  params.grad_q = grad_q.mutable_data_ptr();
  params.grad_k = grad_k.mutable_data_ptr();
  params.grad_v = grad_v.mutable_data_ptr();
  params.grad_same_logits = grad_same.mutable_data_ptr<float>();
  params.grad_opposite_logits = grad_opposite.mutable_data_ptr<float>();
  plan_and_run(run_backward, params, q, {params.grad_out, params.q, params.k, params.v},
               "the gradient of polarity attention");
  return {grad_q, grad_k, grad_v, grad_same.to(same_logits.scalar_type()),
          grad_opposite.to(opposite_logits.scalar_type())};
}

}  // namespace
}  // namespace polaformer

TORCH_LIBRARY_IMPL(polaformer, CUDA, m) {
  m.impl("polarity_attention", polaformer::forward);
  m.impl("polarity_attention_backward", polaformer::backward);
}
