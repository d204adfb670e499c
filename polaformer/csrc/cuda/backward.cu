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
#include "features_tf32.cuh"
#include "kernels.cuh"

namespace polaformer {
namespace {

constexpr int kCombineThreads = 256;
constexpr int kReducers = kCombineThreads / 32;  // threads that share the sum of one feature's logit

// Numbers of blocks of combine_query_splits that sum logits, means and states, in this order.
struct CombineBlocks {
  int64_t logits, mean, state;
  int chunks;  // chunks of 32 features in a head

  POLAFORMER_INLINE explicit CombineBlocks(const BackwardParams& params)
      : logits(0),
        mean((params.shape.batch_heads() * params.shape.features() + kCombineThreads - 1) / kCombineThreads),
        state(0),
        chunks(static_cast<int>(params.shape.features() + 31) / 32) {
    logits = 2 * params.shape.heads * chunks;
    if (params.plan.query_grads.splits_per_head > 1) {
      state = (params.shape.batch_heads() * params.shape.state_size() + kCombineThreads - 1) / kCombineThreads;
    }
  }
};

// Gradient of a logit: sum over all splits of all images, times the derivative of the logistic function.
__device__ __forceinline__ void combine_logits(const BackwardParams& params, int block, int chunks) {
  auto& partial_sums = shared_memory<float[kReducers][32]>();
  const int head = block / chunks % params.shape.heads, flow = block / chunks / params.shape.heads;
  const int features = static_cast<int>(params.shape.features()), feature = block % chunks * 32 + threadIdx.x % 32;
  const int splits = params.plan.query_grads.splits_per_head, reducer = threadIdx.x / 32;
  float sum = 0.f;
  if (feature < features) {
#pragma unroll 4
    for (int64_t i = reducer; i < params.shape.batch * splits; i += kReducers) {
      const int64_t split = (i / splits * params.shape.heads + head) * splits + i % splits;
      sum += params.split_grad_logits[(split * 2 + flow) * features + feature];
    }
  }
  partial_sums[reducer][threadIdx.x % 32] = sum;
  __syncthreads();
  if (reducer > 0 || feature >= features) return;
  for (int i = 1; i < kReducers; ++i) sum += partial_sums[i][threadIdx.x];
  const int64_t index = int64_t{head} * features + feature;
  const float temperature = logistic((flow ? params.opposite_logits : params.same_logits)[index]);
  (flow ? params.grad_opposite_logits : params.grad_same_logits)[index] = sum * (temperature * (1.f - temperature));
}

__global__ void __launch_bounds__(kCombineThreads) combine_query_splits(const BackwardParams params) {
  const CombineBlocks blocks(params);
  const int splits = params.plan.query_grads.splits_per_head;
  if (blockIdx.x < blocks.logits) return combine_logits(params, blockIdx.x, blocks.chunks);
  const int64_t block = blockIdx.x - blocks.logits;
  if (block < blocks.mean) {
    const int64_t index = block * kCombineThreads + threadIdx.x, head = index / params.shape.features();
    if (head >= params.shape.batch_heads()) return;
    const float* partial =
        params.split_grad_mean + head * (2 * splits) * params.shape.features() + index % params.shape.features();
    float sum = 0.f;
#pragma unroll 8
    for (int i = 0; i < 2 * splits; ++i) sum += partial[i * params.shape.features()];
    params.grad_mean[index] = sum;
  } else {
    const int64_t index = (block - blocks.mean) * kCombineThreads + threadIdx.x, size = params.shape.state_size();
    const int64_t head = index / size;
    if (head >= params.shape.batch_heads()) return;
    const float* partial = params.split_grad_state + head * splits * size + index % size;
    float sum = 0.f;
#pragma unroll 8
    for (int i = 0; i < splits; ++i) sum += partial[i * size];
    params.grad_state[index] = sum;
  }
}

const char* launch_combine_query_splits(const BackwardParams& params, void* stream) {
  const CombineBlocks blocks(params);
  const LaunchConfig config{blocks.logits + blocks.mean + blocks.state, kCombineThreads, sizeof(float[kReducers][32])};
  return launch(combine_query_splits, config, stream, params);
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
