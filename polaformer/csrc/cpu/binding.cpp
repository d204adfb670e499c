// PyTorch binding of polarity attention's CPU kernels: implements the schemas of polaformer/ops.py, checks and prepares
// tensors.
#include <ATen/ATen.h>
#include <ATen/native/CPUBlas.h>
#include <torch/library.h>

#include <exception>
#include <tuple>
#include <vector>

#include "checks.h"
#include "cpu/interface.h"
#include "cpu/runtime.h"

namespace polaformer {
namespace {

using at::Tensor;

// Whether PyTorch has a bfloat16 GEMM for this CPU (AMX or AVX512-BF16); brgemm throws if it has not.
bool has_bf16_gemm() {
  static const bool has = [] {
    const std::vector<at::BFloat16> ones(32 * 32, 1.f);
    std::vector<float> product(32 * 32);
    try {
      at::native::cpublas::brgemm(32, 32, 32, 32, 32, 32, false, ones.data(), ones.data(), product.data());
      at::native::cpublas::brgemm_release();
      return product[0] == 32.f;
    } catch (const std::exception&) {
      return false;
    }
  }();
  return has;
}

// An uninitialised tensor like x in the memory layout of a contiguous (B, N, H, D).
Tensor empty_bnhd(const Tensor& x) {
  return at::empty({x.size(0), x.size(2), x.size(1), x.size(3)}, x.options()).transpose(1, 2);
}

// x in the caller's dtype. For float16 the kernels wrote float32, which is clamped to ±65,504.
Tensor clamp_to_dtype(const Tensor& x, at::ScalarType type) {
  return type == at::kHalf ? x.clamp(-65504.0, 65504.0).to(type) : x;
}

StridedTensor strided(const Tensor& x) { return {x.data_ptr(), kernel_type(x), x.stride(0), x.stride(1), x.stride(2)}; }

// Angle per unit of distance of each rotated pair, as in polaformer/rotary.py.
Tensor rotary_frequencies(int64_t head_dim) { return at::pow(10000.0, at::linspace(0, 1, head_dim / 2)).reciprocal(); }

// The tensors that both passes read, as the kernels need them; they must outlive the call.
struct KernelInputs {
  Tensor q, k, v, same_logits, opposite_logits, frequencies;

  KernelInputs(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& same_logits,
               const Tensor& opposite_logits)
      : q(to_kernel_layout(q)),
        k(to_kernel_layout(k)),
        v(to_kernel_layout(v)),
        same_logits(same_logits.to(compute_type(q)).contiguous()),
        opposite_logits(opposite_logits.to(compute_type(q)).contiguous()),
        frequencies(rotary_frequencies(q.size(3))) {}

  CommonParams params(int64_t height, int64_t width) const {
    const bool bf16 = q.scalar_type() == at::kBFloat16 && has_bf16_gemm();
    const Problem problem{
        q.size(0), q.size(1), height, width, int(q.size(3)), bf16, frequencies.const_data_ptr<float>()};
    return {problem, strided(q), strided(k), strided(v), same_logits.data_ptr(), opposite_logits.data_ptr()};
  }
};

using Inputs = const Tensor&;

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(Inputs q, Inputs k, Inputs v, Inputs same_logits,
                                                   Inputs opposite_logits, int64_t height, int64_t width) {
  check_inputs(at::kCPU, q, k, v, same_logits, opposite_logits, height, width);
  const int64_t batch = q.size(0), heads = q.size(1), head_dim = q.size(3);
  const auto compute_options = q.options().dtype(compute_type(q));
  const Tensor state = at::empty({batch, heads, 2 * head_dim, head_dim}, compute_options);
  const Tensor key_mean = at::empty({batch, heads, 2 * head_dim}, compute_options);
  const Tensor key_shift = at::empty({batch, heads, head_dim}, compute_options);
  const KernelInputs inputs(q, k, v, same_logits, opposite_logits);
  const Tensor out = empty_bnhd(inputs.q);
  if (q.numel() == 0) {
    for (const Tensor& x : {state, key_mean, key_shift}) x.zero_();
  } else {
    TorchRuntime runtime;
    kernels().forward(
        {inputs.params(height, width), strided(out), state.data_ptr(), key_mean.data_ptr(), key_shift.data_ptr()},
        runtime);
  }
  return {clamp_to_dtype(out, q.scalar_type()), state, key_mean, key_shift};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(Inputs grad_out, Inputs q, Inputs k, Inputs v,
                                                            Inputs same_logits, Inputs opposite_logits, Inputs state,
                                                            Inputs key_mean, Inputs key_shift, int64_t height,
                                                            int64_t width) {
  check_inputs(at::kCPU, q, k, v, same_logits, opposite_logits, height, width);
  check_saved(grad_out, q, state, key_mean, key_shift);
  const KernelInputs inputs(q, k, v, same_logits, opposite_logits);
  const Tensor grad_same = at::zeros_like(inputs.same_logits), grad_opposite = at::zeros_like(inputs.opposite_logits);
  const Tensor grad_q = empty_bnhd(inputs.q), grad_k = empty_bnhd(inputs.q), grad_v = empty_bnhd(inputs.q);
  if (q.numel() > 0) {
    const Tensor grad_rows = to_kernel_layout(grad_out), saved_state = state.contiguous();
    const Tensor saved_mean = key_mean.contiguous(), saved_shift = key_shift.contiguous();
    TorchRuntime runtime;
    kernels().backward({inputs.params(height, width), strided(grad_rows), strided(grad_q), strided(grad_k),
                        strided(grad_v), saved_state.data_ptr(), saved_mean.data_ptr(), saved_shift.data_ptr(),
                        grad_same.data_ptr(), grad_opposite.data_ptr()},
                       runtime);
  }
  const auto type = q.scalar_type();
  return {clamp_to_dtype(grad_q, type), clamp_to_dtype(grad_k, type), clamp_to_dtype(grad_v, type),
          grad_same.to(same_logits.scalar_type()), grad_opposite.to(opposite_logits.scalar_type())};
}

}  // namespace

TORCH_LIBRARY_IMPL(polaformer, CPU, library) {
  library.impl("polarity_attention", forward);
  library.impl("polarity_attention_backward", backward);
}

}  // namespace polaformer
