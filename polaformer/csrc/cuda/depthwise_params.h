// Launch parameters of the depthwise convolution's CUDA kernels and the host's decisions before a launch; free of CUDA
// and PyTorch headers.
//
// The rows of all images form one sequence, in which `images_per_block` images lie side by side. A block takes
// kDepthwiseChannels channels of a range of it, as long as any other block's. The plan is a pure function of shape and
// GPU, so results are bit-identical on every run.
#pragma once

#include <algorithm>
#include <cstdint>

#include "launch_params.h"

namespace polaformer {

constexpr int kDepthwiseChannels = 32;  // of a block; a thread has two, so a half-warp has them all
constexpr int kDepthwiseColumns = 7;    // outputs of a thread in a row; images of 224² have 56, 28, 14, 7 columns
constexpr int kDepthwiseTiles = 8;      // of a row, that a block has; one image may have more
constexpr int kMaxDepthwiseTiles = 16;
constexpr int kDepthwiseThreadsPerSm = 512;           // resident, by registers
constexpr int64_t kDepthwiseSharedBytes = 48 * 1024;  // of a block with several images, of which an A100 has room for 3
constexpr int kMinDepthwiseSteps = 2;                 // of a block

struct DepthwiseShape {
  int64_t batch;
  int height, width, channels, kernel_size;
  Dtype dtype;

  POLAFORMER_INLINE int taps() const { return kernel_size * kernel_size; }
  int64_t elements() const { return batch * height * width * channels; }
};

// A (B, height, width, C) tensor of images; strides in bytes; the last one is that of contiguous channels.
struct Images {
  char* data;
  int64_t batch, row, column;
  int64_t next_images;  // from the last row of a block's images to the first row of the next ones

  // Whether channels can be read by 16-byte vectors.
  bool aligned() const {
    return reinterpret_cast<uintptr_t>(data) % 16 == 0 && batch % 16 == 0 && row % 16 == 0 && column % 16 == 0;
  }
};

inline Images contiguous_images(void* data, const DepthwiseShape& shape) {
  const int64_t column = shape.channels * bytes_of(shape.dtype), row = shape.width * column;
  return {static_cast<char*>(data), shape.height * row, row, column, 0};
}

// Rows of outputs that a thread computes in one step: two need fewer loads and conversions than one, twice. The
// gradients of 5×5 weights leave no registers for that.
constexpr int rows_per_step(int kernel_size, bool backward) { return backward && kernel_size == 5 ? 1 : 2; }

// Rows of the two operands that a block has in shared memory, the next ones included, which are copied meanwhile: of
// the centers, and of the window around them.
constexpr int center_rows(int kernel_size, bool backward) { return rows_per_step(kernel_size, backward) == 1 ? 3 : 4; }
constexpr int window_rows(int kernel_size, bool backward) {
  return kernel_size - 1 + center_rows(kernel_size, backward);
}

struct DepthwisePlan {
  int channel_blocks;
  int tiles_per_image;   // tiles of kDepthwiseColumns columns, one per thread, in a row
  int images_per_block;  // side by side
  int steps_per_image;   // of rows_per_step(), the last of which may not exist
  int steps, splits;     // of all images, and ranges of them
  int row_bytes;         // of a row of all these images in shared memory

  POLAFORMER_INLINE int tiles() const { return images_per_block * tiles_per_image; }
  POLAFORMER_INLINE int threads() const { return kDepthwiseChannels / 2 * tiles(); }
  int64_t blocks() const { return int64_t{channel_blocks} * splits; }
};

inline int64_t shared_bytes(const DepthwiseShape& shape, bool backward, bool reads_center, int row_bytes) {
  const int64_t weights = int64_t{shape.taps() + 1} * kDepthwiseChannels * sizeof(float);
  const int rows =
      window_rows(shape.kernel_size, backward) + (reads_center ? center_rows(shape.kernel_size, backward) : 0);
  return weights + int64_t{rows} * row_bytes;
}

// Bytes of an image's row in shared memory, padded with zeros on either side.
inline int image_row_bytes(const DepthwiseShape& shape) {
  const int tiles = (shape.width + kDepthwiseColumns - 1) / kDepthwiseColumns;
  const int columns = tiles * kDepthwiseColumns + shape.kernel_size - 1;
  return columns * kDepthwiseChannels * static_cast<int>(bytes_of(shape.dtype));
}

// Why no kernel supports a shape on a GPU, or null. PyTorch computes it instead.
inline const char* unsupported_reason(const DepthwiseShape& shape, int compute_capability_major,
                                      int64_t shared_bytes_per_block) {
  if (compute_capability_major < 8) return "the kernels need a GPU of compute capability 8.0 or higher";
  if (shape.kernel_size != 3 && shape.kernel_size != 5) return "the kernels serve 3×3 and 5×5";
  if (shape.channels % (16 / bytes_of(shape.dtype))) return "the channels of a position are no multiple of 16 bytes";
  if (shape.width > kDepthwiseColumns * kMaxDepthwiseTiles) return "the kernels serve up to 112 columns";
  if (shared_bytes(shape, false, true, image_row_bytes(shape)) > shared_bytes_per_block)
    return "rows this wide need more shared memory than a block of this GPU may take";
  if (shape.batch * shape.height > INT32_MAX / 2) return "the kernels serve up to 2^30 rows";
  return nullptr;
}

// Splits whose partial sums take no more than 1 % of the input, or 4 MiB.
inline int64_t max_depthwise_splits(const DepthwiseShape& shape) {
  const int64_t input = shape.elements() * bytes_of(shape.dtype);
  const int64_t of_split = int64_t{shape.taps() + 1} * shape.channels * sizeof(float);
  return std::max<int64_t>(std::max<int64_t>(input / 100, 4 << 20) / of_split, 1);
}

// Puts as many images side by side as a block has tiles and shared memory for, and chooses the splits so that all
// blocks are resident at once.
inline DepthwisePlan make_depthwise_plan(const DepthwiseShape& shape, bool backward, bool reads_center, int sm_count,
                                         int64_t shared_bytes_per_sm) {
  DepthwisePlan plan{};
  plan.channel_blocks = (shape.channels + kDepthwiseChannels - 1) / kDepthwiseChannels;
  plan.tiles_per_image = (shape.width + kDepthwiseColumns - 1) / kDepthwiseColumns;
  const int image_bytes = image_row_bytes(shape);
  int images = static_cast<int>(std::clamp<int64_t>(kDepthwiseTiles / plan.tiles_per_image, 1, shape.batch));
  while (images > 1 && shared_bytes(shape, backward, reads_center, images * image_bytes) > kDepthwiseSharedBytes)
    --images;
  plan.images_per_block = images;
  plan.row_bytes = images * image_bytes;
  const int64_t groups = (shape.batch + plan.images_per_block - 1) / plan.images_per_block;
  const int rows = rows_per_step(shape.kernel_size, backward);
  plan.steps_per_image = (shape.height + rows - 1) / rows;
  plan.steps = static_cast<int>(groups * plan.steps_per_image);

  const int64_t room = shared_bytes_per_sm / (shared_bytes(shape, backward, reads_center, plan.row_bytes) + 1024);
  const int64_t blocks_per_sm = std::clamp<int64_t>(room, 1, kDepthwiseThreadsPerSm / plan.threads());
  int64_t most_splits = std::max(plan.steps / kMinDepthwiseSteps, 1);
  if (backward) most_splits = std::min(most_splits, max_depthwise_splits(shape));
  plan.splits = static_cast<int>(std::clamp<int64_t>(sm_count * blocks_per_sm / plan.channel_blocks, 1, most_splits));
  return plan;
}

// Forward: window x, center residual (without data if there is none), result out. Backward: window grad_out, center x,
// result grad_x.
struct DepthwiseParams {
  DepthwiseShape shape;
  DepthwisePlan plan;
  Images window, center, result;
  const float* weight;  // (C, K, K)
  const float* bias;    // (C); forward alone
  bool adds_window;     // forward: the input is added; backward: it was, so grad_out is

  // Backward alone: gradients, and a workspace of partial sums that is meaningless before and after the call.
  float* split_sums;   // (splits, K² + 1, C): of the weights, then of the bias
  float* grad_weight;  // (C, K, K)
  float* grad_bias;    // (C)

  void set_plan(const DepthwisePlan& chosen) {
    plan = chosen;
    for (Images* images : {&window, &center, &result})
      images->next_images = plan.images_per_block * images->batch - (shape.height - 1) * images->row;
  }
};

// Launch the kernels of a pass on the stream; return null or an error message.
const char* run_depthwise_forward(const DepthwiseParams& params, void* stream);
const char* run_depthwise_backward(const DepthwiseParams& params, void* stream);

}  // namespace polaformer
