// Checks of the operators' arguments in both bindings: callers through torch.ops or a traced graph bypass those in
// Python. reference.py (check_inputs, check_saved) has the same.
#pragma once

#include <ATen/core/Tensor.h>

#include <initializer_list>
#include <limits>
#include <optional>

namespace polaformer {

struct NamedTensor {
  const char* name;
  const at::Tensor& tensor;
};

// `first`: an argument whose device all others share, named `first_name`.
inline void check_tensor(const NamedTensor& x, const at::Tensor& first, const char* first_name = "q") {
  const auto type = x.tensor.scalar_type();
  TORCH_CHECK_VALUE((type == at::kDouble || type == at::kFloat || type == at::kBFloat16 || type == at::kHalf) &&
                        x.tensor.layout() == at::kStrided,
                    x.name, " is ", type, ", ", x.tensor.layout(),
                    "; pass a dense tensor of float64, float32, bfloat16 or float16");
  TORCH_CHECK_VALUE(x.tensor.device() == first.device(), x.name, " is on ", x.tensor.device(), ", ", first_name, " on ",
                    first.device(), "; move them to one device");
}

inline void check_like_x(const NamedTensor& other, const at::Tensor& x) {
  TORCH_CHECK_VALUE(other.tensor.sizes() == x.sizes() && other.tensor.scalar_type() == x.scalar_type(), other.name,
                    " is ", other.tensor.sizes(), " in ", other.tensor.scalar_type(), ", x ", x.sizes(), " in ",
                    x.scalar_type(), "; they must agree");
  check_tensor(other, x, "x");
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

// Checks of depthwise_conv2d; reference.py (check_depthwise) has the same. Afterwards the kernel size fits an int.
inline void check_depthwise_sizes(at::DeviceType device_type, const at::Tensor& x, const at::Tensor& weight) {
  TORCH_CHECK_VALUE(x.dim() == 4, "x ", x.sizes(), " must have four dimensions (B, height, width, C)");
  TORCH_CHECK_VALUE(
      weight.dim() == 4 && weight.size(0) == x.size(3) && weight.size(1) == 1 && weight.size(2) == weight.size(3) &&
          weight.size(2) % 2 == 1 && weight.size(2) < 1024,
      "weight ", weight.sizes(), " must be (C, 1, k, k) = (", x.size(3),
      ", 1, k, k) with an odd k below 1024, as nn.Conv2d(C, C, k, groups=C) has it; C is the last size of x ",
      x.sizes(), ": where that is NCHW, pass x.permute(0, 2, 3, 1)");
  TORCH_CHECK_VALUE(x.device().type() == device_type, "x is on ", x.device(), ", another tensor on ", device_type,
                    "; move them to one device");
  check_tensor({"x", x}, x, "x");
  check_tensor({"weight", weight}, x, "x");
}

inline void check_depthwise(at::DeviceType device_type, const at::Tensor& x, const at::Tensor& weight,
                            const at::Tensor& bias, const std::optional<at::Tensor>& residual, bool adds_input) {
  check_depthwise_sizes(device_type, x, weight);
  TORCH_CHECK_VALUE(bias.sizes() == at::IntArrayRef({x.size(3)}) && bias.scalar_type() == weight.scalar_type(),
                    "bias is ", bias.sizes(), " in ", bias.scalar_type(), ", needs (C) = (", x.size(3),
                    ") in weight's ", weight.scalar_type());
  check_tensor({"bias", bias}, x, "x");
  if (!residual) return;
  TORCH_CHECK_VALUE(!adds_input, "either a residual or the input is added, not both");
  check_like_x({"residual", *residual}, x);
}

inline void check_depthwise_gradient(at::DeviceType device_type, const at::Tensor& grad_out, const at::Tensor& x,
                                     const at::Tensor& weight) {
  check_depthwise_sizes(device_type, x, weight);
  check_like_x({"grad_out", grad_out}, x);
}

}  // namespace polaformer
