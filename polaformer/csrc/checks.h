// Checks of the operators' arguments in both bindings: callers through torch.ops or a traced graph bypass those in
// Python. reference.py (check_inputs, check_saved) has the same.
#pragma once

#include <ATen/core/Tensor.h>

#include <initializer_list>
#include <limits>

namespace polaformer {

struct NamedTensor {
  const char* name;
  const at::Tensor& tensor;
};

inline void check_tensor(const NamedTensor& x, const at::Tensor& q) {
  const auto type = x.tensor.scalar_type();
  TORCH_CHECK_VALUE((type == at::kDouble || type == at::kFloat || type == at::kBFloat16 || type == at::kHalf) &&
                        x.tensor.layout() == at::kStrided,
                    x.name, " is ", type, ", ", x.tensor.layout(),
                    "; pass a dense tensor of float64, float32, bfloat16 or float16");
  TORCH_CHECK_VALUE(x.tensor.device() == q.device(), x.name, " is on ", x.tensor.device(), ", q on ", q.device(),
                    "; move them to one device");
}

// Afterwards heads, height, width and head dimension fit an int. `device_type`: where the kernels run.
inline void check_inputs(at::DeviceType device_type, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                         const at::Tensor& same_logits, const at::Tensor& opposite_logits, int64_t height,
                         int64_t width) {
  TORCH_CHECK_VALUE(q.dim() == 4 && k.sizes() == q.sizes() && v.sizes() == q.sizes(), "q ", q.sizes(), ", k ",
                    k.sizes(), " and v ", v.sizes(), " must have one shape (B, H, N, D)");
  const int64_t heads = q.size(1), tokens = q.size(2), head_dim = q.size(3);
  constexpr int64_t kMaxInt = std::numeric_limits<int>::max();
  TORCH_CHECK_VALUE(height >= 0 && width >= 0 && height <= kMaxInt && width <= kMaxInt && tokens == height * width,
                    tokens, " tokens are not height ", height, " × width ", width, "; pass the image's own size");
  TORCH_CHECK_VALUE(head_dim % 2 == 0, "head dimension ", head_dim, " is odd; the two flows need an even one");
  TORCH_CHECK_VALUE(heads <= kMaxInt && head_dim <= kMaxInt, "q has ", heads, " heads of width ", head_dim,
                    "; pass fewer than 2^31 of each");
  TORCH_CHECK_VALUE(k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type(), "q, k, v have dtypes ",
                    q.scalar_type(), ", ", k.scalar_type(), ", ", v.scalar_type(), "; cast them to one");
  const NamedTensor logits[] = {{"same_logits", same_logits}, {"opposite_logits", opposite_logits}};
  for (const auto& [name, logit] : logits) {
    TORCH_CHECK_VALUE(logit.sizes() == at::IntArrayRef({heads, 2 * head_dim}), name, " has shape ", logit.sizes(),
                      ", needs (H, 2D) = (", heads, ", ", 2 * head_dim, ")");
  }
  TORCH_CHECK_VALUE(q.device().type() == device_type, "q is on ", q.device(), ", another tensor on ", device_type,
                    "; move them to one device");
  for (const auto& x : {NamedTensor{"q", q}, {"k", k}, {"v", v}, logits[0], logits[1]}) check_tensor(x, q);
}

// Requires check_inputs(): checks the gradient of the output and the tensors saved by forward.
inline void check_saved(const at::Tensor& grad_out, const at::Tensor& q, const at::Tensor& state,
                        const at::Tensor& key_mean, const at::Tensor& key_shift) {
  TORCH_CHECK_VALUE(grad_out.sizes() == q.sizes() && grad_out.scalar_type() == q.scalar_type(), "grad_out is ",
                    grad_out.sizes(), " in ", grad_out.scalar_type(), ", q ", q.sizes(), " in ", q.scalar_type(),
                    "; they must agree");
  check_tensor({"grad_out", grad_out}, q);
  const int64_t batch = q.size(0), heads = q.size(1), head_dim = q.size(3);
  const auto compute_dtype = q.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const auto check = [&](const NamedTensor& x, at::IntArrayRef sizes) {
    TORCH_CHECK_VALUE(x.tensor.sizes() == sizes && x.tensor.scalar_type() == compute_dtype, x.name, " is ",
                      x.tensor.sizes(), " in ", x.tensor.scalar_type(), ", needs ", sizes, " in ", compute_dtype,
                      "; pass on what forward gave");
    check_tensor(x, q);
  };
  check({"state", state}, {batch, heads, 2 * head_dim, head_dim});
  check({"key_mean", key_mean}, {batch, heads, 2 * head_dim});
  check({"key_shift", key_shift}, {batch, heads, head_dim});
}

}  // namespace polaformer
