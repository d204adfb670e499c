// What the host decides before a launch, and what it hands to the kernels: no CUDA and no torch in here.
//
// Axes: B batch, H heads, N = height·width tokens, D head width (even, at most 128), padded to W = 32, 64, 96 or 128
// columns; 2D features. A *head* below is one of the B·H.
//
// A plan is a pure function of the shape and of the number of multiprocessors: the same bits on every run, and on
// every GPU of one kind. The tokens of a head are dealt to several *items*, one block each, so that the items fill the
// chip; what they sum goes to a workspace and is added in order.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>

#include "../polarity_attention.h"

namespace polaformer {

constexpr int64_t kMaxTokens = 1 << 24;  // of a head: places in the table of turns are ints

enum class Dtype : int { kBfloat16, kHalf, kFloat };

constexpr int64_t bytes_of(Dtype dtype) { return dtype == Dtype::kFloat ? 4 : 2; }

struct Shape {
  int64_t batch;
  int heads, height, width, head_width;
  Dtype dtype;

  POLAFORMER_INLINE int64_t all_heads() const { return batch * heads; }
  POLAFORMER_INLINE int tokens() const { return height * width; }
  POLAFORMER_INLINE int64_t features() const { return 2 * head_width; }
  POLAFORMER_INLINE int64_t state_size() const { return features() * head_width; }  // of one head
  POLAFORMER_INLINE int padded_width() const { return (head_width + 31) / 32 * 32; }
  int64_t turns_size() const { return int64_t{height + width} * padded_width(); }  // floats: cosine and sine
};

// A (B, H, N, D) tensor; strides in elements, not bytes; that of the last axis is 1.
struct Strided {
  const void* data;
  int64_t batch, head, token;

  // Whether every 16 bytes of its rows are aligned.
  bool aligned(Dtype dtype) const {
    const int64_t elements = 16 / bytes_of(dtype);
    return reinterpret_cast<uintptr_t>(data) % 16 == 0 && batch % elements == 0 && head % elements == 0 &&
           token % elements == 0;
  }
};

// Which operands the kernels multiply: those of operands.cuh.
enum class Path : int { kBfloat16, kFloat32, kAnyFloat32, kAny16 };

inline Path choose_path(const Shape& shape, std::initializer_list<Strided> inputs) {
  bool aligned = shape.head_width % 16 == 0;
  for (const auto& input : inputs) aligned = aligned && input.aligned(shape.dtype);
  if (shape.dtype == Dtype::kFloat) return aligned ? Path::kFloat32 : Path::kAnyFloat32;
  return aligned && shape.dtype == Dtype::kBfloat16 ? Path::kBfloat16 : Path::kAny16;
}

// How the tokens of every head are dealt to items.
struct Split {
  int items_per_head, tokens_per_item;
  int64_t items;

  int64_t items_to_add() const { return items_per_head > 1 ? items : 0; }
};

struct Plan {
  Path path;
  int multiprocessors;
  float mean_weight;              // 1/N
  Split keys, queries;            // forward: sums over keys; outputs of queries
  Split query_grads, key_grads;   // backward, in the same roles
};

// How a kernel uses a multiprocessor, in tokens and bytes.
struct Load {
  int tokens_per_step;  // an item has a multiple of this, but the last one of a head
  int blocks_per_multiprocessor;
  int64_t bytes_per_token, bytes_per_item;  // moved through memory
};

// The split of least estimated time: rounds of resident blocks, times what a block moves.
inline Split split_tokens(const Shape& shape, const Load& load, int multiprocessors) {
  const int64_t heads = std::max<int64_t>(shape.all_heads(), 1);
  const int64_t slots = int64_t{load.blocks_per_multiprocessor} * multiprocessors;
  const int64_t steps = std::max((shape.tokens() + load.tokens_per_step - 1) / load.tokens_per_step, 1);
  const int64_t most = std::clamp<int64_t>(2 * slots / heads, 1, steps);
  int64_t best_steps = steps, best_cost = -1;
  for (int64_t parts = 1; parts <= most; ++parts) {
    const int64_t steps_per_item = (steps + parts - 1) / parts;
    const int64_t items = heads * ((steps + steps_per_item - 1) / steps_per_item);
    const int64_t moved = steps_per_item * load.tokens_per_step * load.bytes_per_token + load.bytes_per_item;
    const int64_t cost = (items + slots - 1) / slots * moved;
    if (best_cost < 0 || cost < best_cost) best_cost = cost, best_steps = steps_per_item;
  }
  const int items_per_head = static_cast<int>((steps + best_steps - 1) / best_steps);
  return {items_per_head, static_cast<int>(best_steps * load.tokens_per_step), shape.all_heads() * items_per_head};
}

// Tokens that a block of each kernel works on at a time.
constexpr int kKeyTokens = 32, kQueryTokens = 64, kQueryGradTokens = 16, kKeyGradTokens = 64;

// Blocks of a kernel that share a multiprocessor, at W = 32, 64, 96, 128: registers and shared memory allow as many.
struct Residents {
  int bf16[4], tf32[4];
  constexpr int at(bool narrow, int padded_width) const { return (narrow ? bf16 : tf32)[padded_width / 32 - 1]; }
};
// Whether so many blocks of such shared memory do, of which every block takes 1 KB more: of an A100, which has 164 KB.
constexpr bool fit(int blocks, int64_t shared_bytes) { return blocks * (shared_bytes + 1024) <= 164 * 1024; }
constexpr Residents kKeyResidents = {{8, 3, 2, 1}, {6, 2, 1, 1}};
constexpr Residents kQueryResidents = {{4, 3, 3, 2}, {2, 2, 2, 1}};
constexpr Residents kQueryGradResidents = {{4, 2, 1, 1}, {2, 1, 1, 1}};
constexpr Residents kKeyGradResidents = {{4, 3, 3, 2}, {2, 2, 1, 1}};

inline Plan make_plan(const Shape& shape, Path path, int multiprocessors) {
  const int64_t token = shape.head_width * bytes_of(shape.dtype), state = 4 * shape.state_size();
  const auto split = [&](int tokens, const Residents& residents, int64_t per_token, int64_t per_item) {
    const int blocks = residents.at(path == Path::kBfloat16, shape.padded_width());
    return split_tokens(shape, {tokens, blocks, per_token, per_item}, multiprocessors);
  };
  return {
      .path = path,
      .multiprocessors = multiprocessors,
      .mean_weight = 1.f / static_cast<float>(shape.tokens()),
      .keys = split(kKeyTokens, kKeyResidents, 2 * token, 2 * state),
      .queries = split(kQueryTokens, kQueryResidents, 2 * token, state),
      .query_grads = split(kQueryGradTokens, kQueryGradResidents, 3 * token, 3 * state),
      .key_grads = split(kKeyGradTokens, kKeyGradResidents, 4 * token, state),
  };
}

// Arguments of all forward kernels; (shape) of each buffer beside it, floats unless said otherwise.
struct Forward {
  Shape shape;
  Plan plan;
  Strided q, k, v;
  const float *same_logits, *opposite_logits;  // (H, 2D)
  float angles[kMaxHeadWidth / 2];             // per unit of distance, for each of the D/2 pairs

  void* out;          // (B, N, H, D) of the shape's dtype
  float* state;       // (B·H, 2D, D)
  float* key_mean;    // (B·H, 2D)
  float* key_shift;   // (B·H, D)

  // Workspaces, of no meaning before or after.
  float* turns;          // (height + width, W/2, 2): cosine and sine
  float* item_state;     // (key items, 2D, D); with one item per head they are the state
  float* item_mean;      // (key items, 2D); likewise
  float* item_loudness;  // (key items): the largest |k|
  float* item_spoiled;   // (query items): not 0 where exponents above the free ones were met

  // Places the workspaces: `take` gives room for so many floats, aligned to 16 bytes.
  template <class Take>
  void take_workspaces(Take take) {
    turns = take(shape.turns_size());
    item_state = take(plan.keys.items_to_add() * shape.state_size());
    item_mean = take(plan.keys.items_to_add() * shape.features());
    item_loudness = take(plan.keys.items);
    item_spoiled = take(plan.queries.items);
  }
};

struct Backward {
  Shape shape;
  Plan plan;
  Strided grad_out, q, k, v;
  const float *same_logits, *opposite_logits;
  const float *state, *key_mean, *key_shift;
  float angles[kMaxHeadWidth / 2];

  void *grad_q, *grad_k, *grad_v;                          // (B, N, H, D) of the shape's dtype
  float *grad_same_logits, *grad_opposite_logits;          // (H, 2D)

  float* turns;             // as in forward
  float* grad_state;        // (B·H, 2D, D)
  float* grad_mean;         // (B·H, 2D)
  float* item_grad_state;   // (query items, 2D, D); with one item per head they are grad_state
  float* item_grad_mean;    // (query items, 2 flows, 2D)
  float* item_grad_logits;  // (query items, 2 flows, 2D)
  float* item_spoiled;      // (query items)

  template <class Take>
  void take_workspaces(Take take) {
    turns = take(shape.turns_size());
    grad_state = take(shape.all_heads() * shape.state_size());
    grad_mean = take(shape.all_heads() * shape.features());
    item_grad_state = take(plan.query_grads.items_to_add() * shape.state_size());
    item_grad_mean = take(plan.query_grads.items * 2 * shape.features());
    item_grad_logits = take(plan.query_grads.items * 2 * shape.features());
    item_spoiled = take(plan.query_grads.items);
  }
};

// Each runs everything on the stream and returns null, or what went wrong.
const char* run_forward(const Forward& arguments, void* stream);
const char* run_backward(const Backward& arguments, void* stream);

}  // namespace polaformer
