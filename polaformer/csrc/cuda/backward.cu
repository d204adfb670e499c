// Gradients of polarity attention. Per head, of either flow, with z = φ(q)·m + ε and u = dout / z:
//
//   dR(φ(q)) = S u    dz = −R(φ(q))·dR(φ(q)) / z    dφ(q) = R⁻¹(dR(φ(q))) + dz m    (no output is needed)
//   dS = Σ_queries R(φ(q)) uᵀ / N                    dm = Σ_queries dz φ(q) / N
//   dφ(k) = R⁻¹(dS v) + dm                           dv = R(φ(k)) dS
//
// and from there by the exponents: φ' = e^x. Features are computed again from q and k. Types as in forward.cu.
//
// run_backward                           of aligned bf16: backward_bf16.cu; of all else: backward_tf32.cu
// ├─ make_turns                   turns.cu
// ├─ differentiate_queries        bf16 · tf32   dq, and the logits' sums over each split; of tf32 dS and dm, too
// ├─ sum_queries                  bf16          dS and dm over each split's tokens
// ├─ differentiate_queries_shifted   tf32       all of them again for splits with exponents above the free ones
// ├─ finish_queries               here          adds the splits up in order
// ├─ differentiate_keys           bf16 · tf32   dk and dv
// └─ differentiate_keys_shifted   tf32          the same of heads whose keys are shifted
#include "features.cuh"
#include "kernels.cuh"

namespace polaformer {
namespace {

constexpr int kFinishThreads = 256;
constexpr int kFinishMembers = kFinishThreads / 32;  // that share the sum for one feature of the logits

// The blocks of finish_queries, in this order.
struct FinishBlocks {
  int64_t logits, mean, state;
  int chunks;  // of 32 features

  POLAFORMER_INLINE explicit FinishBlocks(const Backward& f)
      : logits(0),
        mean((f.shape.all_heads() * f.shape.features() + kFinishThreads - 1) / kFinishThreads),
        state(0),
        chunks(static_cast<int>(f.shape.features() + 31) / 32) {
    logits = 2 * f.shape.heads * chunks;
    if (f.plan.query_grads.splits_per_head > 1) {
      state = (f.shape.all_heads() * f.shape.state_size() + kFinishThreads - 1) / kFinishThreads;
    }
  }
};

// A logit's gradient: over all splits of all images, times the logistic function's slope.
__device__ __forceinline__ void finish_logits(const Backward& f, int block, int chunks) {
  auto& parts = shared_memory<float[kFinishMembers][32]>();
  const int head = block / chunks % f.shape.heads, flow = block / chunks / f.shape.heads;
  const int features = static_cast<int>(f.shape.features()), feature = block % chunks * 32 + threadIdx.x % 32;
  const int splits = f.plan.query_grads.splits_per_head, member = threadIdx.x / 32;
  float sum = 0.f;
  if (feature < features) {
#pragma unroll 4
    for (int64_t i = member; i < f.shape.batch * splits; i += kFinishMembers) {
      const int64_t split = (i / splits * f.shape.heads + head) * splits + i % splits;
      sum += f.split_grad_logits[(split * 2 + flow) * features + feature];
    }
  }
  parts[member][threadIdx.x % 32] = sum;
  __syncthreads();
  if (member > 0 || feature >= features) return;
  for (int i = 1; i < kFinishMembers; ++i) sum += parts[i][threadIdx.x];
  const int64_t index = int64_t{head} * features + feature;
  const float temperature = logistic((flow ? f.opposite_logits : f.same_logits)[index]);
  (flow ? f.grad_opposite_logits : f.grad_same_logits)[index] = sum * (temperature * (1.f - temperature));
}

__global__ void __launch_bounds__(kFinishThreads) finish_queries(const Backward f) {
  const FinishBlocks blocks(f);
  const int splits = f.plan.query_grads.splits_per_head;
  if (blockIdx.x < blocks.logits) return finish_logits(f, blockIdx.x, blocks.chunks);
  const int64_t block = blockIdx.x - blocks.logits;
  if (block < blocks.mean) {
    const int64_t index = block * kFinishThreads + threadIdx.x, head = index / f.shape.features();
    if (head >= f.shape.all_heads()) return;
    const float* part = f.split_grad_mean + head * (2 * splits) * f.shape.features() + index % f.shape.features();
    float sum = 0.f;
#pragma unroll 8
    for (int i = 0; i < 2 * splits; ++i) sum += part[i * f.shape.features()];
    f.grad_mean[index] = sum;
  } else {
    const int64_t index = (block - blocks.mean) * kFinishThreads + threadIdx.x, size = f.shape.state_size();
    const int64_t head = index / size;
    if (head >= f.shape.all_heads()) return;
    const float* part = f.split_grad_state + head * splits * size + index % size;
    float sum = 0.f;
#pragma unroll 8
    for (int i = 0; i < splits; ++i) sum += part[i * size];
    f.grad_state[index] = sum;
  }
}

const char* launch_finish_queries(const Backward& f, void* stream) {
  const FinishBlocks blocks(f);
  const Grid grid{blocks.logits + blocks.mean + blocks.state, kFinishThreads, sizeof(float[kFinishMembers][32])};
  return launch(finish_queries, grid, stream, f);
}

}  // namespace

const char* run_backward(const Backward& f, void* stream) {
  const bool is_bf16 = f.plan.path == Path::kBfloat16;
  const char* error = make_turns(f, stream);
  if (!error) {
    error = is_bf16 ? bf16::launch_differentiate_queries(f, stream) : tf32::launch_differentiate_queries(f, stream);
  }
  if (!error && is_bf16) error = bf16::launch_sum_queries(f, stream);
  if (!error) error = tf32::launch_differentiate_queries_shifted(f, stream);
  if (!error) error = launch_finish_queries(f, stream);
  if (!error) error = is_bf16 ? bf16::launch_differentiate_keys(f, stream) : tf32::launch_differentiate_keys(f, stream);
  if (!error) error = tf32::launch_differentiate_keys_shifted(f, stream);
  return error;
}

}  // namespace polaformer
