// Launch parameters of the CUDA kernels and the host's decisions before a launch; free of CUDA and PyTorch headers.
//
// Axes: B batch, H heads, N = height·width tokens, D head dimension (even, at most 128), padded to W = 32, 64, 96 or
// 128 columns; 2D features. A "head" below is one of the B·H.
//
// A plan is a pure function of the shape, of the number of multiprocessors (SMs) and of whether warpgroups multiply, so
// results are bit-identical on every run and on every GPU of one model. The tokens of a head are divided among several
// splits, one thread block each, so that the splits fill the GPU; partial sums of splits go to a workspace and are
// added in a fixed order.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>

#include "../polarity_attention.h"

namespace polaformer {

constexpr int64_t kMaxTokens = 1 << 24;  // per head: byte offsets into the rotary table have 32 bits

enum class Dtype : int { kBfloat16, kHalf, kFloat };

constexpr int64_t bytes_of(Dtype dtype) { return dtype == Dtype::kFloat ? 4 : 2; }

struct Shape {
  int64_t batch;
  int heads, height, width, head_dim;
  Dtype dtype;

  POLAFORMER_INLINE int64_t batch_heads() const { return batch * heads; }
  POLAFORMER_INLINE int tokens() const { return height * width; }
  POLAFORMER_INLINE int even_tokens() const { return (tokens() + 1) / 2 * 2; }
  POLAFORMER_INLINE int64_t features() const { return 2 * head_dim; }
  POLAFORMER_INLINE int64_t state_size() const { return features() * head_dim; }  // elements of one head's state
  POLAFORMER_INLINE int padded_head_dim() const { return (head_dim + 31) / 32 * 32; }
  int64_t cos_sin_size() const { return int64_t{height + width} * padded_head_dim(); }  // floats: cosine and sine
};

// A (B, H, N, D) tensor; strides in elements, not bytes; the last stride is 1.
struct StridedTensor {
  const void* data;
  int64_t batch, head, token;

  // Whether rows can be read by 16-byte vectors.
  bool aligned(Dtype dtype) const {
    const int64_t elements = 16 / bytes_of(dtype);
    return reinterpret_cast<uintptr_t>(data) % 16 == 0 && batch % elements == 0 && head % elements == 0 &&
           token % elements == 0;
  }
};

// Which kernels run: those of bf16.cuh, or those of tf32.cuh with one of its operand types. fp16 has no packed kernels:
// its features need three more mantissa bits than bf16 keeps, and its range is too small for them.
enum class Path : int { kBfloat16, kFloat32, kGenericFloat32, kGeneric16Bit };

inline Path choose_path(const Shape& shape, std::initializer_list<StridedTensor> inputs) {
  bool aligned = shape.head_dim % 16 == 0;
  for (const auto& input : inputs) aligned = aligned && input.aligned(shape.dtype);
  if (shape.dtype == Dtype::kFloat) return aligned ? Path::kFloat32 : Path::kGenericFloat32;
  return aligned && shape.dtype == Dtype::kBfloat16 ? Path::kBfloat16 : Path::kGeneric16Bit;
}

// Shared memory that a block may use: up to W = 96 what compute capabilities 8.6, 8.9 and 12.0 offer, above what an
// A100 offers; each reserves 1 KB of it.
constexpr int64_t max_shared_bytes(int padded_head_dim) { return (padded_head_dim <= 96 ? 99 : 163) * 1024; }

// Why no kernel supports a shape on a GPU, or null. The reference runs instead.
inline const char* unsupported_reason(const Shape& shape, int compute_capability_major,
                                      int64_t shared_bytes_per_block) {
  if (compute_capability_major < 8) return "the kernels need a GPU of compute capability 8.0 or higher";
  if (shape.head_dim > kMaxHeadDim) return "the kernels serve D up to 128";
  if (int64_t{shape.height} * shape.width > kMaxTokens) return "the kernels serve up to 2^24 tokens";
  if (shared_bytes_per_block < max_shared_bytes(shape.padded_head_dim())) {
    return "D above 96 needs more shared memory than a block of this GPU may take";
  }
  return nullptr;
}

// How the tokens of every head are divided among splits.
struct Splits {
  int splits_per_head, tokens_per_split;
  int64_t splits;

  int64_t partial_count() const { return splits_per_head > 1 ? splits : 0; }
};

struct Plan {
  Path path;
  bool uses_warpgroups;  // whether warpgroups multiply in the kernels that have both ways, see wgmma.cuh
  int sm_count;
  float inv_tokens;               // 1/N
  Splits keys, queries;           // forward: sums over keys; outputs of queries
  Splits query_grads, key_grads;  // backward: gradients of queries and sums over them; gradients of keys and values
};

// A kernel's use of a multiprocessor, in tokens and bytes.
struct KernelTraits {
  int tokens_per_step;  // a split has a multiple of this, except the last one of a head
  int min_tokens;       // per split, if the head has as many
  int blocks_per_sm;
  int64_t bytes_per_token, bytes_per_split;  // moved through global memory
};

// The splits of least estimated time: waves of resident blocks × bytes that a block moves.
inline Splits choose_splits(const Shape& shape, const KernelTraits& traits, int sm_count) {
  const int64_t heads = std::max<int64_t>(shape.batch_heads(), 1);
  const int64_t slots = int64_t{traits.blocks_per_sm} * sm_count;
  const int64_t steps = std::max((shape.tokens() + traits.tokens_per_step - 1) / traits.tokens_per_step, 1);
  const int64_t max_splits = std::clamp<int64_t>(
      std::min<int64_t>(2 * slots / heads, shape.tokens() / std::max(traits.min_tokens, traits.tokens_per_step)), 1,
      steps);
  int64_t best_steps = steps, best_cost = -1;
  for (int64_t candidate = 1; candidate <= max_splits; ++candidate) {
    const int64_t steps_per_split = (steps + candidate - 1) / candidate;
    const int64_t splits = heads * ((steps + steps_per_split - 1) / steps_per_split);
    const int64_t moved = steps_per_split * traits.tokens_per_step * traits.bytes_per_token + traits.bytes_per_split;
    const int64_t cost = (splits + slots - 1) / slots * moved;
    if (best_cost < 0 || cost < best_cost) best_cost = cost, best_steps = steps_per_split;
  }
  const int splits_per_head = static_cast<int>((steps + best_steps - 1) / best_steps);
  return {splits_per_head, static_cast<int>(best_steps * traits.tokens_per_step),
          shape.batch_heads() * splits_per_head};
}

// Tokens that a block of each kernel processes per step.
constexpr int kSumTokens = 32, kQueryTokens = 64, kQueryGradTokens = 16, kKeyGradTokens = 64;

// Resident blocks per multiprocessor at W = 32, 64, 96, 128, as registers and shared memory permit.
struct BlocksPerSm {
  int bf16[4], tf32[4];
  int warpgroups[4] = {};  // of the bf16 path where warpgroups multiply, if that differs
  constexpr int at(bool is_bf16, int padded_head_dim, bool uses_warpgroups = false) const {
    const int i = padded_head_dim / 32 - 1;
    return !is_bf16 ? tf32[i] : uses_warpgroups && warpgroups[i] > 0 ? warpgroups[i] : bf16[i];
  }
};
// Whether that many blocks fit into the 164 KB of an A100, or the 228 KB of an H100; each takes 1 KB more than it asks
// for.
constexpr bool fits_in_shared_memory(int blocks, int64_t shared_bytes, bool uses_warpgroups = false) {
  return blocks * (shared_bytes + 1024) <= (uses_warpgroups ? 228 : 164) * 1024;
}
constexpr BlocksPerSm kKeyBlocksPerSm = {{8, 3, 2, 1}, {6, 2, 1, 1}};
constexpr BlocksPerSm kQueryBlocksPerSm = {{3, 2, 2, 2}, {2, 2, 2, 1}, {4, 3, 3, 2}};
constexpr BlocksPerSm kQueryGradBlocksPerSm = {{6, 3, 2, 1}, {2, 1, 1, 1}};
constexpr BlocksPerSm kKeyGradBlocksPerSm = {{4, 3, 3, 2}, {2, 2, 1, 1}};

// has_warpgroups: whether the code for this GPU has their products.
inline Plan make_plan(const Shape& shape, Path path, int sm_count, bool has_warpgroups) {
  const int64_t token_bytes = shape.head_dim * bytes_of(shape.dtype), state_bytes = 4 * shape.state_size();
  const bool is_bf16 = path == Path::kBfloat16, uses_warpgroups = is_bf16 && has_warpgroups;
  const auto split = [&](int tokens_per_step, int min_tokens, const BlocksPerSm& blocks_per_sm, int64_t bytes_per_token,
                         int64_t bytes_per_split) {
    const int blocks = blocks_per_sm.at(is_bf16, shape.padded_head_dim(), uses_warpgroups);
    return choose_splits(shape, {tokens_per_step, min_tokens, blocks, bytes_per_token, bytes_per_split}, sm_count);
  };
  // A split's sums have 8·D² bytes: with 2·D tokens no more than the two bf16 inputs that it reads.
  const int min_tokens = 2 * shape.head_dim;
  return {
      .path = path,
      .uses_warpgroups = uses_warpgroups,
      .sm_count = sm_count,
      .inv_tokens = 1.f / static_cast<float>(shape.tokens()),
      .keys = split(kSumTokens, min_tokens, kKeyBlocksPerSm, 2 * token_bytes, 2 * state_bytes),
      .queries = split(kQueryTokens, 1, kQueryBlocksPerSm, 2 * token_bytes, state_bytes),
      .query_grads = split(is_bf16 ? kSumTokens : kQueryGradTokens, min_tokens, kQueryGradBlocksPerSm,
                           (is_bf16 ? 5 : 3) * token_bytes, 3 * state_bytes),
      .key_grads = split(kKeyGradTokens, 1, kKeyGradBlocksPerSm, 4 * token_bytes, state_bytes),
  };
}

// Cosines and sines of two neighbouring pairs, two bf16 each. A table holds 16 columns of all positions together, so
// that what a warp reads for eight neighbouring tokens is contiguous.
struct alignas(8) CosSin {
  uint32_t cosine, sine;
};

// Byte offsets of a token's row and column in such a table.
struct alignas(8) RotaryOffsets {
  uint32_t by_row, by_column;
};

// What a query's gradient passes on to the sums over queries, per flow: z·dz as the sum of two bf16, and 1/z.
struct alignas(16) NormalizerStats {
  uint32_t grad_normalizers[2];
  float inverses[2];
};

// Parameters of every kernel. The shape of each buffer stands beside it; elements are floats unless stated otherwise.
struct CommonParams {
  Shape shape;
  Plan plan;
  StridedTensor q, k, v;
  const float *same_logits, *opposite_logits;  // (H, 2D)
  float frequencies[kMaxHeadDim / 2];          // angle per unit of distance of each of the D/2 pairs

  // Workspaces of the rotary embedding, see rotary.cu.
  float* cos_sin;                 // (height + width, W/2, 2): cosine and sine
  CosSin* packed_cos_sin;         // (W/16, height + width, 4): the same for two pairs at a time, in bf16
  RotaryOffsets* rotary_offsets;  // (N, rounded up to an even number): each token's row and column in packed_cos_sin

  // take(floats) returns a workspace of that size, aligned to 16 bytes.
  template <class Take>
  void assign_rotary_workspaces(Take take) {
    const bool is_bf16 = plan.path == Path::kBfloat16;
    cos_sin = take(shape.cos_sin_size());
    packed_cos_sin = reinterpret_cast<CosSin*>(take(is_bf16 ? shape.cos_sin_size() / 2 : 0));
    rotary_offsets = reinterpret_cast<RotaryOffsets*>(take(is_bf16 ? 2 * int64_t{shape.even_tokens()} : 0));
  }
};

struct ForwardParams : CommonParams {
  void* out;         // (B, N, H, D) in the shape's dtype
  float* state;      // (B·H, 2D, D)
  float* key_mean;   // (B·H, 2D)
  float* key_shift;  // (B·H, D)

  // Workspaces, meaningless before and after the call.
  float* split_state;    // (key splits, 2D, D); unused with one split per head, which writes `state`
  float* split_mean;     // (key splits, 2D); likewise
  float* split_max_abs;  // (key splits): max |k|
  float* needs_shift;    // (query splits): not 0 where an exponent exceeds kMaxUnshiftedExponent

  template <class Take>
  void assign_workspaces(Take take) {
    assign_rotary_workspaces(take);
    split_state = take(plan.keys.partial_count() * shape.state_size());
    split_mean = take(plan.keys.partial_count() * shape.features());
    split_max_abs = take(plan.keys.splits);
    needs_shift = take(plan.queries.splits);
  }
};

struct BackwardParams : CommonParams {
  StridedTensor grad_out;
  const float *state, *key_mean, *key_shift;  // as forward wrote them

  void *grad_q, *grad_k, *grad_v;                  // (B, N, H, D) in the shape's dtype
  float *grad_same_logits, *grad_opposite_logits;  // (H, 2D)

  // Workspaces, meaningless before and after the call.
  float* grad_state;                  // (B·H, 2D, D)
  float* grad_mean;                   // (B·H, 2D)
  float* split_grad_state;            // (query splits, 2D, D); unused with one split per head
  float* split_grad_mean;             // (query splits, 2 flows, 2D)
  float* split_grad_logits;           // (query splits, 2 flows, 2D)
  float* needs_shift;                 // (query splits), as in forward
  NormalizerStats* normalizer_stats;  // (B·H, N), on the bf16 path only

  template <class Take>
  void assign_workspaces(Take take) {
    assign_rotary_workspaces(take);
    grad_state = take(shape.batch_heads() * shape.state_size());
    grad_mean = take(shape.batch_heads() * shape.features());
    split_grad_state = take(plan.query_grads.partial_count() * shape.state_size());
    split_grad_mean = take(plan.query_grads.splits * 2 * shape.features());
    split_grad_logits = take(plan.query_grads.splits * 2 * shape.features());
    needs_shift = take(plan.query_grads.splits);
    const bool is_bf16 = plan.path == Path::kBfloat16;
    normalizer_stats = reinterpret_cast<NormalizerStats*>(take(is_bf16 ? 4 * shape.batch_heads() * shape.tokens() : 0));
  }
};

// Launch every kernel of a pass on the stream; return null or an error message.
const char* run_forward(const ForwardParams& params, void* stream);
const char* run_backward(const BackwardParams& params, void* stream);

}  // namespace polaformer
