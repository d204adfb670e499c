// Depthwise convolution of channels-last images with 3×3 or 5×5 kernels (K × K, P = (K − 1) / 2), forward and backward:
//
//   out[y, x, c]     = bias[c] + residual[y, x, c] + Σ_ij weight[c, i, j] in[y + i − P, x + j − P, c]
//   grad_in[y, x, c] = grad_residual[y, x, c]      + Σ_ij weight[c, i, j] grad_out[y − i + P, x − j + P, c]
//   grad_weight[c, i, j] = Σ_yx in[y, x, c] grad_out[y − i + P, x − j + P, c],  grad_bias[c] = Σ_yx grad_out[y, x, c]
//
// In the second and third line a thread that has in[y, x] multiplies it with the same window of grad_out: backward
// reads both tensors once. So both passes are one computation: a window of one tensor around each position, and another
// tensor at its center. Forward: window in, center residual; backward: window grad_out, center in.
//
// A block walks down its range of rows, in steps of one or two. Copies bring the next ones to a ring in shared memory;
// columns, rows and images that do not exist are zeros there. A thread computes kDepthwiseColumns neighbours of two
// channels in float32; its sums of the weights' gradients stay in registers until the block adds them up, in a fixed
// order. A number that is not finite next to such a zero makes gradients of weights NaN beyond the taps that touch it.
//
//   run_depthwise_forward    depthwise_forward
//   run_depthwise_backward   depthwise_backward → sum_depthwise_splits
#include "depthwise_params.h"
#include "ptx.cuh"

namespace polaformer {
namespace {

constexpr int kT = kDepthwiseColumns, kPairs = kDepthwiseChannels / 2;
constexpr int kMaxThreads = kPairs * kMaxDepthwiseTiles, kMinBlocksPerSm = kDepthwiseThreadsPerSm / kMaxThreads;

// Two neighbouring channels of one position, as stored.
template <Dtype kDtype>
struct PairOf {
  using Word = uint32_t;
  static __device__ __forceinline__ float2 unpack(uint32_t word) {
    if constexpr (kDtype == Dtype::kHalf)
      return make_float2(half_to_float(word & 0xffff), half_to_float(word >> 16));
    else
      return make_float2(__builtin_bit_cast(float, word << 16), __builtin_bit_cast(float, word & 0xffff0000u));
  }
  static __device__ __forceinline__ uint32_t pack(float2 pair) {
    if constexpr (kDtype == Dtype::kHalf)
      return float_to_half(pair.x) | uint32_t{float_to_half(pair.y)} << 16;
    else
      return pack_bf16(pair.x, pair.y);
  }
};
template <>
struct PairOf<Dtype::kFloat> {
  using Word = float2;
  static __device__ __forceinline__ float2 unpack(float2 word) { return word; }
  static __device__ __forceinline__ float2 pack(float2 pair) { return pair; }
};

__device__ __forceinline__ void add(float2& sum, float2 x) { sum.x += x.x, sum.y += x.y; }
__device__ __forceinline__ void add_product(float2& sum, float2 a, float2 b) { sum.x += a.x * b.x, sum.y += a.y * b.y; }

// This thread's part in copying rows of one operand, in the order of the sequence, to shared memory.
template <Dtype kDtype>
struct RowCopy {
  static constexpr int kNone = INT32_MAX;
  static constexpr int kVectors = kPairs * 2 * bytes_of(kDtype) / 16;   // of 16 bytes in a position
  static constexpr int kCount = (kT * kVectors + kPairs - 1) / kPairs;  // kPairs threads per tile copy kT columns
  const char* from[kCount];                                             // in the next row
  int to[kCount];                                                       // bytes from the row's start in shared memory
  int image[kCount];  // of those side by side; kNone for positions that do not exist
  int y, padded_height, images_left;

  // row: the first one, a row that does not exist included in the rows of an image.
  __device__ __forceinline__ RowCopy(const DepthwiseParams& params, const Images& operand, int first_channel, int row,
                                     int padded_height)
      : padded_height(padded_height) {
    const DepthwisePlan& plan = params.plan;
    const int tile_columns = plan.tiles_per_image * kT, padding = params.shape.kernel_size - 1;
    const int vector = threadIdx.x % kVectors, channel = first_channel + vector * (16 / bytes_of(kDtype));
    const int group = row / padded_height, first_image = group * plan.images_per_block;
    y = row - group * padded_height;
    images_left = static_cast<int>(params.shape.batch) - first_image;
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      const int number = threadIdx.x / kVectors + k * (plan.threads() / kVectors);
      const int of_group = number / tile_columns, column = number - of_group * tile_columns;
      const bool exists =
          of_group < plan.images_per_block && column < params.shape.width && channel < params.shape.channels;
      image[k] = exists ? of_group : kNone;
      to[k] = ((of_group * (tile_columns + padding) + padding / 2 + column) * kVectors + vector) * 16;
      from[k] = operand.data + int64_t{first_image + of_group} * operand.batch +
                min(y, params.shape.height - 1) * operand.row + column * operand.column + channel * bytes_of(kDtype);
    }
  }

  // Starts the copies of the next row. What does not exist becomes zeros. Some
  // threads have fewer positions in the tiles than others: they skip their last copy.
  __device__ __forceinline__ void start(const DepthwiseParams& params, const Images& operand, SmemPointer row) {
    const int images = y < params.shape.height ? images_left : 0;
    const bool is_last = ++y == padded_height;
    const int64_t step = is_last ? operand.next_images : y < params.shape.height ? operand.row : 0;
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      if (k < kCount - 1 || image[k] != kNone) cp_async(row + to[k], from[k], image[k] < images);
      from[k] += step;
    }
    if (is_last) y = 0, images_left -= params.plan.images_per_block;
  }
};

// The weights of the block's channels, then the bias, (K² + 1, channels): forward as they are, backward flipped.
// The window's own center is added by adding 1 to the middle tap.
template <int K, bool kBackward>
__device__ __forceinline__ void load_weights(const DepthwiseParams& params, int first_channel, float* shared) {
  for (int i = threadIdx.x; i < (K * K + 1) * kDepthwiseChannels; i += params.plan.threads()) {
    const int tap = i / kDepthwiseChannels, channel = first_channel + i % kDepthwiseChannels;
    float value = tap == K * K / 2 && params.adds_window ? 1.f : 0.f;
    if (channel < params.shape.channels) {
      if (tap < K * K)
        value += params.weight[int64_t{channel} * (K * K) + (kBackward ? K * K - 1 - tap : tap)];
      else if (!kBackward)
        value = params.bias[channel];
    }
    shared[i] = value;
  }
}

// Sums of one thread: one step of its tile, and gradients of the flipped kernel and of the bias.
template <int K, bool kBackward>
struct Sums {
  float2 results[rows_per_step(K, kBackward)][kT];
  float2 weights[kBackward ? K : 1][kBackward ? K : 1];
  float2 bias;
};

// One step of a thread's tile, of the rows from y on. window_row(i), center_row(i): row i of the window and of the
// centers, at the thread's first column and channels.
template <Dtype kDtype, int K, bool kCenter, bool kBackward, class WindowRow, class CenterRow>
__device__ __forceinline__ void compute_step(const DepthwiseParams& params, int y, const float2* weights,
                                             WindowRow window_row, CenterRow center_row, Sums<K, kBackward>& sums) {
  using Pair = PairOf<kDtype>;
  constexpr int P = K / 2, kRows = rows_per_step(K, kBackward);
  float2 own[kRows][kT];
#pragma unroll
  for (int o = 0; o < kRows; ++o)
#pragma unroll
    for (int t = 0; t < kT; ++t) {
      sums.results[o][t] = kBackward ? make_float2(0.f, 0.f) : weights[K * K * kPairs];
      if constexpr (kCenter) own[o][t] = Pair::unpack(center_row(o)[t * kPairs]);
      if constexpr (kCenter && !kBackward) add(sums.results[o][t], own[o][t]);
    }
#pragma unroll
  for (int number = 0; number < K + kRows - 1; ++number) {
    const int of_window = number == 0 ? P : number <= P ? number - 1 : number;  // y first, which always exists
    if (y + of_window < P || y + of_window - P >= params.shape.height) continue;
    const typename Pair::Word* row = window_row(of_window);
#pragma unroll
    for (int column = 0; column < kT + K - 1; ++column) {
      const float2 value = Pair::unpack(row[column * kPairs]);
#pragma unroll
      for (int o = 0; o < kRows; ++o) {
        const int i = of_window - o;
        if (i < 0 || i >= K) continue;
#pragma unroll
        for (int j = 0; j < K; ++j) {
          const int t = column - j;
          if (t < 0 || t >= kT) continue;
          add_product(sums.results[o][t], weights[(i * K + j) * kPairs], value);
          if constexpr (kBackward) add_product(sums.weights[i][j], own[o][t], value);
        }
        if (kBackward && i == P && column >= P && column < P + kT) add(sums.bias, value);
      }
    }
  }
}

// Adds the tiles' sums in shared memory, that of the rings, and writes them to split_sums.
template <int K>
__device__ __forceinline__ void write_split_sums(const DepthwiseParams& params, int split, int first_channel, int tile,
                                                 int pair, const Sums<K, true>& sums, float2* shared) {
  constexpr int kCount = (K * K + 1) * kPairs;  // of one tile
  static_assert(kCount * sizeof(float2) <= (window_rows(K, true) + center_rows(K, true)) * kT * kDepthwiseChannels * 2);
  __syncthreads();  // the rings are neither read nor written any more
#pragma unroll
  for (int tap = 0; tap <= K * K; ++tap)
    shared[tile * kCount + tap * kPairs + pair] =
        tap == K * K ? sums.bias : sums.weights[(K * K - 1 - tap) / K][(K * K - 1 - tap) % K];
  __syncthreads();
  for (int i = threadIdx.x; i < kCount; i += params.plan.threads()) {
    float2 sum = shared[i];
    for (int other = 1; other < params.plan.tiles(); ++other) add(sum, shared[other * kCount + i]);
    const int tap = i / kPairs, channel = first_channel + 2 * (i % kPairs);
    float* to = params.split_sums + (int64_t{split} * (K * K + 1) + tap) * params.shape.channels + channel;
    if (channel < params.shape.channels) *reinterpret_cast<float2*>(to) = sum;
  }
}

// slot modulo kSlots, for a slot below 2 · kSlots.
template <int kSlots>
__device__ __forceinline__ int wrap(int slot) {
  return slot < kSlots ? slot : slot - kSlots;
}

template <Dtype kDtype, int K, bool kCenter, bool kBackward>
__device__ __forceinline__ void convolve(const DepthwiseParams& params) {
  using Pair = PairOf<kDtype>;
  using Word = typename Pair::Word;
  constexpr int P = K / 2, kRows = rows_per_step(K, kBackward);
  constexpr int kWindowRows = window_rows(K, kBackward), kCenterRows = center_rows(K, kBackward);
  const DepthwiseShape& shape = params.shape;
  const DepthwisePlan& plan = params.plan;
  const int split = blockIdx.x / plan.channel_blocks;
  const int first_channel = (blockIdx.x - split * plan.channel_blocks) * kDepthwiseChannels;
  const int begin = static_cast<int>(int64_t{split} * plan.steps / plan.splits) * kRows;
  const int end = static_cast<int>((int64_t{split} + 1) * plan.steps / plan.splits) * kRows;
  const int padded_height = plan.steps_per_image * kRows;

  float2* const weights = &shared_memory<float2>();
  char* const window = reinterpret_cast<char*>(weights + (K * K + 1) * kPairs);
  char* const center = window + kWindowRows * plan.row_bytes;
  const int ring_bytes = (kWindowRows + (kCenter ? kCenterRows : 0)) * plan.row_bytes;
  const SmemPointer rings(window);
  for (int i = 16 * threadIdx.x; i < ring_bytes; i += 16 * plan.threads()) store_words(rings + i, uint4{0, 0, 0, 0});
  load_weights<K, kBackward>(params, first_channel, reinterpret_cast<float*>(weights));
  __syncthreads();

  // This thread's tile and channels.
  const int tile = threadIdx.x / kPairs, pair = threadIdx.x % kPairs;
  const int image = tile / plan.tiles_per_image, x = (tile - image * plan.tiles_per_image) * kT;
  const int channel = first_channel + 2 * pair;
  const int offset = ((image * (plan.tiles_per_image * kT + K - 1) + x) * kPairs + pair) * sizeof(Word);
  const int columns = channel < shape.channels ? shape.width - x : 0;  // that exist

  // Copies run kAhead rows ahead; `slot` and `center_slot` hold the first rows of the window and of the centers. A row
  // takes the slot of one that is no longer needed.
  constexpr int kAhead = kCenterRows - kRows;
  const int window_end = min(end + P, plan.steps * kRows);
  RowCopy<kDtype> window_copy(params, params.window, first_channel, max(begin - P, 0), padded_height);
  RowCopy<kDtype> center_copy(params, kCenter ? params.center : params.window, first_channel, begin, padded_height);
  const auto copy_window = [&](int row, int slot) {
    if (row >= 0 && row < window_end) window_copy.start(params, params.window, rings + slot * plan.row_bytes);
  };
  const auto copy_center = [&](int row, int slot) {
    if (kCenter && row < end) center_copy.start(params, params.center, rings + (kWindowRows + slot) * plan.row_bytes);
  };
#pragma unroll 1
  for (int i = 0; i < K - 1; ++i) copy_window(begin - P + i, i);
#pragma unroll 1
  for (int i = 0; i < kAhead; ++i) {
    copy_window(begin + P + i, K - 1 + i);
    copy_center(begin + i, i);
    if (i % kRows == kRows - 1) cp_async_commit_group();
  }

  Sums<K, kBackward> sums{};
  const int group = begin / padded_height, first_image = group * plan.images_per_block + image;
  int slot = 0, center_slot = 0, y = begin - group * padded_height,
      images_left = static_cast<int>(shape.batch) - first_image;
  char* to = params.result.data + first_image * params.result.batch + y * params.result.row + x * params.result.column +
             channel * bytes_of(kDtype);
#pragma unroll 1
  for (int row = begin; row < end; row += kRows) {
    cp_async_wait_group<kAhead / kRows - 1>();
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      copy_window(row + kAhead + P + i, wrap<kWindowRows>(slot + kWindowRows - kRows + i));
      copy_center(row + kAhead + i, wrap<kCenterRows>(center_slot + kAhead + i));
    }
    cp_async_commit_group();

    const auto window_row = [&](int i) {
      return reinterpret_cast<const Word*>(window + wrap<kWindowRows>(slot + i) * plan.row_bytes + offset);
    };
    const auto center_row = [&](int i) {
      return reinterpret_cast<const Word*>(center + wrap<kCenterRows>(center_slot + i) * plan.row_bytes + offset) +
             P * kPairs;
    };
    compute_step<kDtype, K, kCenter, kBackward>(params, y, weights + pair, window_row, center_row, sums);
#pragma unroll
    for (int o = 0; o < kRows; ++o, ++y) {
      const int existing = images_left > 0 && y < shape.height ? columns : 0;
#pragma unroll
      for (int t = 0; t < kT; ++t)
        if (t < existing) *reinterpret_cast<Word*>(to + t * params.result.column) = Pair::pack(sums.results[o][t]);
      if (y + 1 < shape.height) to += params.result.row;
    }
    slot = wrap<kWindowRows>(slot + kRows);
    center_slot = wrap<kCenterRows>(center_slot + kRows);
    if (y == padded_height) {
      y = 0, images_left -= plan.images_per_block;
      to += params.result.next_images;
    }
  }
  if constexpr (kBackward)
    write_split_sums<K>(params, split, first_channel, tile, pair, sums, reinterpret_cast<float2*>(window));
}

template <Dtype kDtype, int K, bool kResidual>
__global__ void __launch_bounds__(kMaxThreads, kMinBlocksPerSm) depthwise_forward(const DepthwiseParams params) {
  convolve<kDtype, K, kResidual, false>(params);
}
template <Dtype kDtype, int K>
__global__ void __launch_bounds__(kMaxThreads, kMinBlocksPerSm) depthwise_backward(const DepthwiseParams params) {
  convolve<kDtype, K, true, true>(params);
}

// Gradients of weights and bias: the sums of all splits. A block has 32 channels of one tap; eight threads share one.
constexpr int kChannelsOfSum = 32, kThreadsOfSum = 8;
__global__ void __launch_bounds__(kChannelsOfSum* kThreadsOfSum) sum_depthwise_splits(const DepthwiseParams params) {
  const int taps = params.shape.taps(), channels = params.shape.channels;
  const int tap = blockIdx.x % (taps + 1), lane = threadIdx.x % kChannelsOfSum, part = threadIdx.x / kChannelsOfSum;
  const int channel = blockIdx.x / (taps + 1) * kChannelsOfSum + lane;
  float* const parts = &shared_memory<float>();
  float sum = 0.f;
  if (channel < channels)
    for (int split = part; split < params.plan.splits; split += kThreadsOfSum)
      sum += params.split_sums[(int64_t{split} * (taps + 1) + tap) * channels + channel];
  parts[threadIdx.x] = sum;
  __syncthreads();
  if (part > 0 || channel >= channels) return;
  for (int other = 1; other < kThreadsOfSum; ++other) sum += parts[other * kChannelsOfSum + lane];
  if (tap < taps)
    params.grad_weight[int64_t{channel} * taps + tap] = sum;
  else
    params.grad_bias[channel] = sum;
}

template <Dtype kDtype, int K, bool kBackward>
const char* launch_pass(const DepthwiseParams& params, void* stream) {
  const bool reads_center = kBackward || params.center.data;
  const auto bytes = static_cast<int>(shared_bytes(params.shape, kBackward, reads_center, params.plan.row_bytes));
  const LaunchConfig config{params.plan.blocks(), params.plan.threads(), bytes};
  const auto kernel = kBackward      ? depthwise_backward<kDtype, K>
                      : reads_center ? depthwise_forward<kDtype, K, true>
                                     : depthwise_forward<kDtype, K, false>;
  return launch(kernel, config, stream, params);
}
template <bool kBackward>
const char* launch_pass(const DepthwiseParams& params, void* stream) {
  const bool is_small = params.shape.kernel_size == 3;
  switch (params.shape.dtype) {
    case Dtype::kBfloat16:
      return (is_small ? launch_pass<Dtype::kBfloat16, 3, kBackward>
                       : launch_pass<Dtype::kBfloat16, 5, kBackward>)(params, stream);
    case Dtype::kHalf:
      return (is_small ? launch_pass<Dtype::kHalf, 3, kBackward> : launch_pass<Dtype::kHalf, 5, kBackward>)(params,
                                                                                                            stream);
    default:
      return (is_small ? launch_pass<Dtype::kFloat, 3, kBackward> : launch_pass<Dtype::kFloat, 5, kBackward>)(params,
                                                                                                              stream);
  }
}

}  // namespace

const char* run_depthwise_forward(const DepthwiseParams& params, void* stream) {
  return launch_pass<false>(params, stream);
}

const char* run_depthwise_backward(const DepthwiseParams& params, void* stream) {
  if (const char* error = launch_pass<true>(params, stream)) return error;
  const int64_t blocks =
      int64_t{params.shape.taps() + 1} * ((params.shape.channels + kChannelsOfSum - 1) / kChannelsOfSum);
  constexpr int kThreads = kChannelsOfSum * kThreadsOfSum;
  return launch(sum_depthwise_splits, {blocks, kThreads, kThreads * int{sizeof(float)}}, stream, params);
}

}  // namespace polaformer
