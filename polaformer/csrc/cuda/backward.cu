// Gradients of polarity attention. Per head, for both flows, with z = φ(q)·m + ε and u = dout / z:
//
//   dR(φ(q)) = S u     dz = −R(φ(q))·dR(φ(q)) / z     dφ(q) = R⁻¹(dR(φ(q))) + dz m     (without the output)
//   dS = Σ_queries R(φ(q)) uᵀ / N                     dm = Σ_queries dz φ(q) / N
//   dφ(k) = R⁻¹(dS v) + dm                            dv = R(φ(k)) dS
//
// and from there to q, k and logits through the exponents, as φ' = e^x. Features are recomputed. Dtypes as in
// forward.cu.
//
// Call graph; kernels launch in this order. "bf16" is backward_bf16.cu, for aligned bf16; "tf32" is backward_tf32.cu.
//
// run_backward
// ├─ fill_rotary_tables             rotary.cu      as in forward
// ├─ differentiate_queries          bf16 or tf32   dq, and each split's sums for the logits; tf32: also dS and dm
// ├─ sum_queries                    bf16           dS and dm of each split
// ├─ differentiate_queries_shifted  tf32           recomputes all of these for splits that need a shift
// ├─ combine_query_splits           this file      adds up the splits
// ├─ differentiate_keys             bf16 or tf32   dk and dv of heads whose keys are not shifted
// └─ differentiate_keys_shifted     tf32           dk and dv of the other heads
#include "combine.cuh"
#include "features_tf32.cuh"
#include "kernels.cuh"

namespace polaformer {
namespace {

__device__ __forceinline__ float logistic_slope(float x) {
  const float y = logistic(x);
  return y * (1.f - y);
}

// Gradients of logits: sums over all splits of all images, times the slope of the logistic function. A row has D
// vectors, half of them for each flow.
struct LogitSums {
  SumThreads threads;
  unsigned splits, heads;  // per head, per image
  int rows, head_dim, blocks_per_head;
  const float* split_sums;  // (B, H, splits, 2 flows, 2D)
  const float* logits[2];   // (H, 2D)
  float* grads[2];          // (H, 2D)

  explicit LogitSums(const BackwardParams& params)
      : threads(params.shape.batch * params.plan.query_grads.splits_per_head),
        splits(params.plan.query_grads.splits_per_head),
        heads(params.shape.heads),
        rows(static_cast<int>(params.shape.batch * splits)),
        head_dim(params.shape.head_dim),
        blocks_per_head((head_dim + threads.vectors - 1) / threads.vectors),
        split_sums(params.split_grad_logits),
        logits{params.same_logits, params.opposite_logits},
        grads{params.grad_same_logits, params.grad_opposite_logits} {}

  int blocks() const { return static_cast<int>(heads) * blocks_per_head; }

  __device__ __forceinline__ void compute(int block) const {
    const int head = block / blocks_per_head;
    const int vector = (block - head * blocks_per_head) * threads.vectors + threads.vector();
    const bool inside = vector < head_dim, opposite = vector >= head_dim / 2;
    const float4 sum = threads.sum(inside ? rows : 0, [&](unsigned row) {
      const unsigned image = row / splits, split = (image * heads + head) * splits + (row - image * splits);
      return split_sums + int64_t{split} * (4 * head_dim) + 4 * vector;
    });
    if (!inside || threads.sharer() > 0) return;
    const int index = (head - opposite) * (2 * head_dim) + 4 * vector;
    const float4 at = __ldg(reinterpret_cast<const float4*>((opposite ? logits[1] : logits[0]) + index));
    *reinterpret_cast<float4*>((opposite ? grads[1] : grads[0]) + index) = {
        sum.x * logistic_slope(at.x), sum.y * logistic_slope(at.y), sum.z * logistic_slope(at.z),
        sum.w * logistic_slope(at.w)};
  }
};

struct CombineParams {
  LogitSums logits;
  HeadSums heads;
  int logit_blocks, blocks_per_head;
};

__global__ void __launch_bounds__(kCombineThreads) combine_query_splits(const CombineParams params) {
  const int block = static_cast<int>(blockIdx.x) - params.logit_blocks;
  if (block < 0) return params.logits.compute(static_cast<int>(blockIdx.x));
  const unsigned head = unsigned(block) / params.blocks_per_head;
  params.heads.compute(head, block - static_cast<int>(head * params.blocks_per_head));
}

const char* launch_combine_query_splits(const BackwardParams& params, void* stream) {
  const Shape& shape = params.shape;
  const int splits = params.plan.query_grads.splits_per_head, mean_size = static_cast<int>(shape.features());
  const int state_size = splits > 1 ? mean_size * shape.head_dim : 0;
  const HeadSums heads = {.threads = SumThreads(splits),
                          .mean = {params.split_grad_mean, params.grad_mean, 2 * splits, mean_size},
                          .state = {params.split_grad_state, params.grad_state, splits, state_size}};
  const LogitSums logits(params);
  const CombineParams combine = {logits, heads, logits.blocks(), heads.blocks()};
  return launch(combine_query_splits,
                {combine.logit_blocks + shape.batch_heads() * combine.blocks_per_head, kCombineThreads,
                 sizeof(float4[kCombineThreads])},
                stream, combine);
}

}  // namespace

const char* run_backward(const BackwardParams& params, void* stream) {
  const bool is_bf16 = params.plan.path == Path::kBfloat16;
  const char* error = make_rotary_tables(params, stream);
  if (!error) {
    error = is_bf16 ? bf16::launch_differentiate_queries(params, stream)
                    : tf32::launch_differentiate_queries(params, stream);
  }
  if (!error && is_bf16) error = bf16::launch_sum_queries(params, stream);
  if (!error) error = tf32::launch_differentiate_queries_shifted(params, stream);
  if (!error) error = launch_combine_query_splits(params, stream);
  if (!error)
    error = is_bf16 ? bf16::launch_differentiate_keys(params, stream) : tf32::launch_differentiate_keys(params, stream);
  if (!error) error = tf32::launch_differentiate_keys_shifted(params, stream);
  return error;
}

}  // namespace polaformer
