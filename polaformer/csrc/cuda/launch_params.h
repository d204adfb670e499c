// What the host decides before a launch, and what it hands to the kernels: no CUDA and no torch in here.
//
// Axes: B batch, H heads, N = height·width tokens, D head dimension (even, at most 128), padded to W = 32, 64, 96 or 128
// columns; 2D features. A *head* below is one of the B·H.
//
// A plan is a pure function of the shape and of the number of multiprocessors: the same bits on every run, and on
// every GPU of one kind. The tokens of a head are dealt to several *splits*, one block each, so that the splits fill
// the chip; what they sum goes to a workspace and is added in order.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>

#include "../polarity_attention.h"

namespace polaformer {

constexpr int64_t kMaxTokens = 1 << 24;  // of a head: places in the rotary table have 32 bits

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
  POLAFORMER_INLINE int64_t state_size() const { return features() * head_dim; }  // of one head
  POLAFORMER_INLINE int padded_head_dim() const { return (head_dim + 31) / 32 * 32; }
  int64_t cos_sin_size() const { return int64_t{height + width} * padded_head_dim(); }  // floats: cosine and sine
};

// A (B, H, N, D) tensor; strides in elements, not bytes; that of the last axis is 1.
struct StridedTensor {
  const void* data;
  int64_t batch, head, token;

  // Whether every 16 bytes of its rows are aligned.
  bool aligned(Dtype dtype) const {
    const int64_t elements = 16 / bytes_of(dtype);
    return reinterpret_cast<uintptr_t>(data) % 16 == 0 && batch % elements == 0 && head % elements == 0 &&
           token % elements == 0;
  }
};

// Which kernels serve: those of bf16.cuh, or a family of operands of tf32.cuh. fp16 has no packed kernels: it needs
// three more mantissa bits than bf16 keeps of the features, and has not the range for them.
enum class Path : int { kBfloat16, kFloat32, kGenericFloat32, kGeneric16Bit };

inline Path choose_path(const Shape& shape, std::initializer_list<StridedTensor> inputs) {
  bool aligned = shape.head_dim % 16 == 0;
  for (const auto& input : inputs) aligned = aligned && input.aligned(shape.dtype);
  if (shape.dtype == Dtype::kFloat) return aligned ? Path::kFloat32 : Path::kGenericFloat32;
  return aligned && shape.dtype == Dtype::kBfloat16 ? Path::kBfloat16 : Path::kGeneric16Bit;
}

// Shared memory that a block may take: on cards of compute capability 8.6, 8.9 and 12.0, or on an A100, of which each
// keeps 1 KB.
constexpr int64_t max_shared_bytes(int padded_head_dim) { return (padded_head_dim <= 96 ? 99 : 163) * 1024; }

// Why no kernel serves a shape on a card, or null. Then the reference does.
inline const char* unsupported_reason(const Shape& shape, int compute_capability_major, int64_t shared_bytes_per_block) {
  if (compute_capability_major < 8) return "the kernels need a GPU of compute capability 8.0 or higher";
  if (shape.head_dim > kMaxHeadDim) return "the kernels serve D up to 128";
  if (int64_t{shape.height} * shape.width > kMaxTokens) return "the kernels serve up to 2^24 tokens";
  if (shared_bytes_per_block < max_shared_bytes(shape.padded_head_dim())) {
    return "D above 96 needs more shared memory than a block of this GPU may take";
  }
  return nullptr;
}

// How the tokens of every head are dealt to splits.
struct Splits {
  int splits_per_head, tokens_per_split;
  int64_t splits;

  int64_t partial_count() const { return splits_per_head > 1 ? splits : 0; }
};

struct Plan {
  Path path;
  int sm_count;
  float inv_tokens;              // 1/N
  Splits keys, queries;           // forward: sums over keys; outputs of queries
  Splits query_grads, key_grads;  // backward, in the same roles
};

// How a kernel uses a multiprocessor, in tokens and bytes.
struct KernelTraits {
  int tokens_per_step;  // a split has a multiple of this, but the last one of a head
  int min_tokens;     // of a split, if the head has so many
  int blocks_per_sm;
  int64_t bytes_per_token, bytes_per_split;  // moved through memory
};

// The split of least estimated time: rounds of resident blocks, times what a block moves.
inline Splits choose_splits(const Shape& shape, const KernelTraits& traits, int sm_count) {
  const int64_t heads = std::max<int64_t>(shape.batch_heads(), 1);
  const int64_t slots = int64_t{traits.blocks_per_sm} * sm_count;
  const int64_t steps = std::max((shape.tokens() + traits.tokens_per_step - 1) / traits.tokens_per_step, 1);
  const int64_t most = std::clamp<int64_t>(
      std::min<int64_t>(2 * slots / heads, shape.tokens() / std::max(traits.min_tokens, traits.tokens_per_step)), 1,
      steps);
  int64_t best_steps = steps, best_cost = -1;
  for (int64_t parts = 1; parts <= most; ++parts) {
    const int64_t steps_per_split = (steps + parts - 1) / parts;
    const int64_t splits = heads * ((steps + steps_per_split - 1) / steps_per_split);
    const int64_t moved = steps_per_split * traits.tokens_per_step * traits.bytes_per_token + traits.bytes_per_split;
    const int64_t cost = (splits + slots - 1) / slots * moved;
    if (best_cost < 0 || cost < best_cost) best_cost = cost, best_steps = steps_per_split;
  }
  const int splits_per_head = static_cast<int>((steps + best_steps - 1) / best_steps);
  return {splits_per_head, static_cast<int>(best_steps * traits.tokens_per_step), shape.batch_heads() * splits_per_head};
}

// Tokens that a block of each kernel works on at a time.
constexpr int kSumTokens = 32, kQueryTokens = 64, kQueryGradTokens = 16, kKeyGradTokens = 64;

// Blocks of a kernel that share a multiprocessor, at W = 32, 64, 96, 128: registers and shared memory allow as many.
struct BlocksPerSm {
  int bf16[4], tf32[4];
  constexpr int at(bool is_bf16, int padded_head_dim) const { return (is_bf16 ? bf16 : tf32)[padded_head_dim / 32 - 1]; }
};
// Whether so many blocks of such shared memory do, of which every block takes 1 KB more: of an A100, which has 164 KB.
constexpr bool fits_in_shared_memory(int blocks, int64_t shared_bytes) { return blocks * (shared_bytes + 1024) <= 164 * 1024; }
constexpr BlocksPerSm kKeyBlocksPerSm = {{8, 3, 2, 1}, {6, 2, 1, 1}};
constexpr BlocksPerSm kQueryBlocksPerSm = {{3, 2, 2, 2}, {2, 2, 2, 1}};
constexpr BlocksPerSm kQueryGradBlocksPerSm = {{6, 3, 2, 1}, {2, 1, 1, 1}};
constexpr BlocksPerSm kKeyGradBlocksPerSm = {{4, 3, 3, 2}, {2, 2, 1, 1}};

inline Plan make_plan(const Shape& shape, Path path, int sm_count) {
  const int64_t token = shape.head_dim * bytes_of(shape.dtype), state = 4 * shape.state_size();
  const bool is_bf16 = path == Path::kBfloat16;
  const auto split = [&](int tokens, int least, const BlocksPerSm& blocks_per_sm, int64_t per_token,
                         int64_t per_split) {
    const int blocks = blocks_per_sm.at(is_bf16, shape.padded_head_dim());
    return choose_splits(shape, {tokens, least, blocks, per_token, per_split}, sm_count);
  };
  // Of what a split sums there are 8·D² bytes: with 2·D tokens no more than of the two bf16 inputs that it reads.
  const int least = 2 * shape.head_dim;
  return {
      .path = path,
      .sm_count = sm_count,
      .inv_tokens = 1.f / static_cast<float>(shape.tokens()),
      .keys = split(kSumTokens, least, kKeyBlocksPerSm, 2 * token, 2 * state),
      .queries = split(kQueryTokens, 1, kQueryBlocksPerSm, 2 * token, state),
      .query_grads = split(is_bf16 ? kSumTokens : kQueryGradTokens, least, kQueryGradBlocksPerSm,
                           (is_bf16 ? 5 : 3) * token, 3 * state),
      .key_grads = split(kKeyGradTokens, 1, kKeyGradBlocksPerSm, 4 * token, state),
  };
}

// Cosines and sines of two neighbouring pairs, two bf16 each. Tables of them have 16 columns of all positions together,
// so that what a warp reads of eight neighbouring tokens lies side by side.
struct alignas(8) CosSin {
  uint32_t cosine, sine;
};

// Where a token's row and column lie in such a table, in bytes.
struct alignas(8) RotaryOffsets {
  uint32_t by_row, by_column;
};

// What a query's gradient hands on to the sums over queries, of either flow: z·dz as the sum of two bf16, and 1/z.
struct alignas(16) NormalizerStats {
  uint32_t grad_normalizers[2];
  float inverses[2];
};

// Arguments of all forward kernels; (shape) of each buffer beside it, floats unless said otherwise.
struct Forward {
  Shape shape;
  Plan plan;
  StridedTensor q, k, v;
  const float *same_logits, *opposite_logits;  // (H, 2D)
  float frequencies[kMaxHeadDim / 2];             // per unit of distance, for each of the D/2 pairs

  void* out;         // (B, N, H, D) of the shape's dtype
  float* state;      // (B·H, 2D, D)
  float* key_mean;   // (B·H, 2D)
  float* key_shift;  // (B·H, D)

  // Workspaces, of no meaning before or after.
  float* cos_sin;                // (height + width, W/2, 2): cosine and sine
  CosSin* packed_cos_sin;        // (W/16, height + width, 4): the same of two pairs at a time, in bf16
  RotaryOffsets* rotary_offsets;  // (N, rounded up to an even number): where each token's row and column lie there
  float* split_state;          // (key splits, 2D, D); with one split per head they are the state
  float* split_mean;           // (key splits, 2D); likewise
  float* split_max_abs;        // (key splits): the largest |k|
  float* needs_shift;          // (query splits): not 0 where exponents above kMaxUnshiftedExponent were met

  // Places the workspaces: `take` gives room for so many floats, aligned to 16 bytes.
  template <class Take>
  void assign_workspaces(Take take) {
    cos_sin = take(shape.cos_sin_size());
    const bool is_bf16 = plan.path == Path::kBfloat16;
    packed_cos_sin = reinterpret_cast<CosSin*>(take(is_bf16 ? shape.cos_sin_size() / 2 : 0));
    rotary_offsets = reinterpret_cast<RotaryOffsets*>(take(is_bf16 ? 2 * int64_t{shape.even_tokens()} : 0));
    split_state = take(plan.keys.partial_count() * shape.state_size());
    split_mean = take(plan.keys.partial_count() * shape.features());
    split_max_abs = take(plan.keys.splits);
    needs_shift = take(plan.queries.splits);
  }
};

struct Backward {
  Shape shape;
  Plan plan;
  StridedTensor grad_out, q, k, v;
  const float *same_logits, *opposite_logits;
  const float *state, *key_mean, *key_shift;
  float frequencies[kMaxHeadDim / 2];

  void *grad_q, *grad_k, *grad_v;                  // (B, N, H, D) of the shape's dtype
  float *grad_same_logits, *grad_opposite_logits;  // (H, 2D)

  float* cos_sin;  // as in forward
  CosSin* packed_cos_sin;
  RotaryOffsets* rotary_offsets;
  float* grad_state;            // (B·H, 2D, D)
  float* grad_mean;             // (B·H, 2D)
  float* split_grad_state;      // (query splits, 2D, D); with one split per head they are grad_state
  float* split_grad_mean;       // (query splits, 2 flows, 2D)
  float* split_grad_logits;     // (query splits, 2 flows, 2D)
  float* needs_shift;           // (query splits)
  NormalizerStats* normalizer_stats;  // (B·H, N), of aligned bf16

  template <class Take>
  void assign_workspaces(Take take) {
    cos_sin = take(shape.cos_sin_size());
    const bool is_bf16 = plan.path == Path::kBfloat16;
    packed_cos_sin = reinterpret_cast<CosSin*>(take(is_bf16 ? shape.cos_sin_size() / 2 : 0));
    rotary_offsets = reinterpret_cast<RotaryOffsets*>(take(is_bf16 ? 2 * int64_t{shape.even_tokens()} : 0));
    grad_state = take(shape.batch_heads() * shape.state_size());
    grad_mean = take(shape.batch_heads() * shape.features());
    split_grad_state = take(plan.query_grads.partial_count() * shape.state_size());
    split_grad_mean = take(plan.query_grads.splits * 2 * shape.features());
    split_grad_logits = take(plan.query_grads.splits * 2 * shape.features());
    needs_shift = take(plan.query_grads.splits);
    normalizer_stats = reinterpret_cast<NormalizerStats*>(take(is_bf16 ? 4 * shape.batch_heads() * shape.tokens() : 0));
  }
};

// Each runs everything on the stream and returns null, or what went wrong.
const char* run_forward(const Forward& arguments, void* stream);
const char* run_backward(const Backward& arguments, void* stream);

}  // namespace polaformer
