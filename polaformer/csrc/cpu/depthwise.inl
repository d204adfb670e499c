// Depthwise convolution of channels-last images with 3×3 or 5×5 kernels, forward and backward (K × K, P = (K − 1) / 2):
//
//   out[y, x, c] = bias[c] + residual[y, x, c] + Σ_ij weight[i, j, c] in[y + i − P, x + j − P, c]
//
// Vectors lie along channels. The outputs of a tile, a few neighbours in a row, are summed in registers: each input is
// loaded once for all columns that it contributes to. Taps beyond the image are left out, not multiplied by zero, so a
// 3×3 kernel on a 1×1 image is one product.
//
// The gradient of the input is the same convolution of grad_out with the flipped kernel. The gradient of the weights is
// arranged by inputs, grad_weight[i, j] = Σ_yx in[y, x] grad_out[y − i + P, x − j + P], so that a tile of inputs needs
// the very numbers of grad_out that the gradient of the same tile is summed from: they are loaded once.

namespace polaformer {
namespace POLAFORMER_ISA {

constexpr int kColumns = 7;                 // of a tile: images of 224² have maps of 56, 28, 14 and 7 columns
constexpr int64_t kBlockBytes = 1024;       // of a pixel: its block of channels, whose rows stay in the cache
constexpr int64_t kEnoughTasks = 64;        // to keep any CPU busy
constexpr int64_t kTasksPerThread = 4;      // where the division does not change results
constexpr int64_t kPartialSumsShare = 100;  // of the input's memory, one part may hold partial sums

// Bits of a float, or of a vector of them, as bfloat16 in their upper half; the lower half is arbitrary.
template <class Numbers, class BitsOfNumbers>
inline BitsOfNumbers round_to_bf16(Numbers x, BitsOfNumbers bits) {
  const auto even = bits + 0x7fff + ((bits >> 16) & 1);
  return x == x ? even : bits | 0x400000;
}

// Arithmetic in Real on a step of neighbouring channels of tensors that store their numbers as Stored, in one part, or
// two of bfloat16: channels with even numbers and with odd ones, which are the halves of words.
template <class Real_, class Stored_>
struct VectorOfChannels {
  using Real = Real_;
  using Stored = Stored_;
  using Numbers = Vec<Real>;
  static constexpr int lanes = Simd<Real>::lanes, parts = sizeof(Real) / sizeof(Stored);
  typedef uint32_t Words __attribute__((vector_size(POLAFORMER_VECTOR_BYTES), aligned(2), may_alias));

  template <int part>
  static Numbers load(const Real* from) {
    return POLAFORMER_ISA::load(from);
  }
  static void store(Real* to, Numbers x) { POLAFORMER_ISA::store(to, x); }
  template <int part>
  static Numbers load(const uint16_t* from) {
    const UnsignedWords words = *reinterpret_cast<const Words*>(from);
    return (Numbers)(part == 0 ? words << 16 : words & 0xffff0000);
  }

  // Writes a part of an output. Of two, the first waits in `even` for the second: where the last step overlaps the one
  // before, which may be another thread's, nothing but final numbers may be written.
  template <int part>
  static void write(Real* to, Numbers x, Numbers&) {
    store(to, x);
  }
  template <int part>
  static void write(uint16_t* to, Numbers x, Numbers& even) {
    const UnsignedWords rounded = round_to_bf16(x, (UnsignedWords)x);
    if (part == 0)
      even = (Numbers)(rounded >> 16);
    else
      *reinterpret_cast<Words*>(to) = (rounded & 0xffff0000) | (UnsignedWords)even;
  }
};

// The same, one channel at a time, for tensors of fewer channels than a step.
template <class Real_, class Stored_>
struct SingleChannel {
  using Real = Real_;
  using Stored = Stored_;
  using Numbers = Real;
  static constexpr int lanes = 1, parts = 1;
  template <int part>
  static Real load(const Real* from) {
    return *from;
  }
  static void store(Real* to, Real x) { *to = x; }
  template <int part>
  static Real load(const uint16_t* from) {
    return __builtin_bit_cast(float, uint32_t(*from) << 16);
  }
  template <int part>
  static void write(Real* to, Real x, Real&) {
    *to = x;
  }
  template <int part>
  static void write(uint16_t* to, Real x, Real&) {
    *to = uint16_t(round_to_bf16(x, __builtin_bit_cast(uint32_t, x)) >> 16);
  }
};

template <int value_>
struct Constant {
  static constexpr int value = value_;
};

// Calls body(Constant<count>) for a count of 1 to `most`.
template <int most, class Body>
inline void with_constant(int64_t count, Body&& body) {
  if constexpr (most > 1)
    if (count < most) return with_constant<most - 1>(count, body);
  body(Constant<most>{});
}

// Calls body(x, Constant<n>) for each tile of n ≤ kColumns neighbours in a row; their sizes differ by one at most.
template <class Body>
inline void for_each_tile(int64_t width, Body&& body) {
  const int64_t tiles = (width + kColumns - 1) / kColumns;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t x = tile * width / tiles;
    with_constant<kColumns>((tile + 1) * width / tiles - x, [&](auto count) { body(x, count); });
  }
}

// One image of a tensor.
template <class Stored>
struct Plane {
  Stored* data;
  int64_t row, column;  // strides in elements
  Plane(const Image& images, int64_t number)
      : data(static_cast<Stored*>(images.data) + (images.data ? number * images.batch : 0)),
        row(images.row),
        column(images.column) {}
  Stored* at(int64_t y, int64_t x) const { return data + y * row + x * column; }
};

template <class Io, int K>
struct Depthwise {
  using Real = typename Io::Real;
  using Stored = typename Io::Stored;
  using Numbers = typename Io::Numbers;
  static constexpr int P = K / 2, kTaps = K * K;
  static constexpr int kStep = Io::lanes * Io::parts;    // channels
  static constexpr int kSums = (kTaps + 1) * Io::lanes;  // numbers of a part: one vector per tap, and the bias
  static constexpr int64_t kBlockSteps = kBlockBytes / (kStep * sizeof(Stored));

  // What a tile's outputs are computed from. Backward: `in` and `residual` are grad_out, `out` is grad_x.
  struct Images {
    Plane<const Stored> in, residual, x;  // x: in backward
    Plane<Stored> out;
    bool adds_residual;
  };

  const DepthwiseSize& size;
  const int64_t steps, blocks;

  Depthwise(const DepthwiseSize& size, int64_t least_blocks)
      : size(size), steps((size.channels + kStep - 1) / kStep), blocks(count_blocks(least_blocks)) {}

  int64_t count_blocks(int64_t least) const {
    const int64_t count = (steps + kBlockSteps - 1) / kBlockSteps;
    return count >= least ? count : least < steps ? least : steps;
  }

  // Numbers of all steps' kernels and biases, or of the sums of their gradients: (steps, parts, kSums).
  int64_t numbers() const { return steps * Io::parts * kSums; }

  // Calls body(channel, step) for each step of a block; the image's last one may overlap the one before.
  template <class Body>
  void for_each_step(int64_t block, Body&& body) const {
    const int64_t last_channel = size.channels - kStep;
    for (int64_t step = block * steps / blocks; step < (block + 1) * steps / blocks; ++step)
      body(step * kStep < last_channel ? step * kStep : last_channel, step);
  }

  // Rows and columns of the kernel that meet the image: first_tap(y) … end_tap(y, height) − 1.
  static int first_tap(int64_t y) { return y < P ? int(P - y) : 0; }
  static int end_tap(int64_t y, int64_t height) { return height - y + P < K ? int(height - y + P) : K; }

  // Kernels and biases as `convolve` reads them. `flipped`: last tap first. bias: may be null.
  void pack(const Real* weight, const Real* bias, bool flipped, Real* to) const {
    for (int64_t block = 0; block < blocks; ++block)
      for_each_step(block, [&](int64_t channel, int64_t step) {
        for (int i = 0; i < kStep; ++i) {
          const int64_t c = channel + i;
          Real* of_lane = to + (step * Io::parts + i % Io::parts) * kSums + i / Io::parts;
          for (int tap = 0; tap < kTaps; ++tap)
            of_lane[tap * Io::lanes] = weight[c * kTaps + (flipped ? kTaps - 1 - tap : tap)];
          of_lane[kTaps * Io::lanes] = bias ? bias[c] : 0;
        }
      });
  }

  // A tile of the convolution, for one part of a step of channels. `backward`: also adds the tile's part to the
  // gradients of weights, last tap first, and bias.
  template <int T, bool backward, int part>
  __attribute__((always_inline)) inline void convolve(const Images& images, int64_t y, int64_t x, int64_t c,
                                                      const Real* kernel, Real* sums, Numbers* even) const {
    const int first = first_tap(y), end = end_tap(y, size.height);
    const Stored* residual = images.residual.at(y, x) + c;
    Numbers outputs[T], inputs[T], total{};
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) {
      outputs[t] = backward ? Numbers{} : Io::template load<0>(kernel + kTaps * Io::lanes);
      if (backward || images.adds_residual) {
        const Numbers added = Io::template load<part>(residual + t * images.residual.column);
        if (backward) total += added;
        if (images.adds_residual) outputs[t] += added;
      }
      if (backward) inputs[t] = Io::template load<part>(images.x.at(y, x + t) + c);
    }
    if (backward) Io::store(sums + kTaps * Io::lanes, Io::template load<0>(sums + kTaps * Io::lanes) + total);
    if (Io::lanes > 1 && part == 0 && y + P + 1 < size.height)  // what the next row's tile loads for the first time
#pragma GCC unroll 16
      for (int t = 0; t < T; ++t) {
        __builtin_prefetch(images.in.at(y + P + 1, x + t) + c);
        if (backward) __builtin_prefetch(images.x.at(y + 1, x + t) + c);
      }
    const Stored* from = images.in.at(y + first - P, x - P) + c;
    for (int i = first; i < end; ++i, from += images.in.row) {
      const Real* kernel_row = kernel + i * K * Io::lanes;
      Real* sums_row = sums + i * K * Io::lanes;
      Numbers weights[K], products[K];
#pragma GCC unroll 16
      for (int j = 0; j < K; ++j) {
        weights[j] = Io::template load<0>(kernel_row + j * Io::lanes);
        if (backward) products[j] = Io::template load<0>(sums_row + j * Io::lanes);
      }
#pragma GCC unroll 16
      for (int column = 0; column < T + K - 1; ++column) {
        if (uint64_t(x - P + column) >= uint64_t(size.width)) continue;
        const Numbers value = Io::template load<part>(from + column * images.in.column);
#pragma GCC unroll 16
        for (int j = 0; j < K; ++j) {
          const int t = column - j;
          if (t < 0 || t >= T) continue;
          outputs[t] += weights[j] * value;
          if (backward) products[j] += inputs[t] * value;
        }
      }
      if (backward)
#pragma GCC unroll 16
        for (int j = 0; j < K; ++j) Io::store(sums_row + j * Io::lanes, products[j]);
    }
    Stored* out = images.out.at(y, x) + c;
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) Io::template write<part>(out + t * images.out.column, outputs[t], even[t]);
  }

  template <bool backward>
  void convolve_row(const Images& images, int64_t y, int64_t block, const Real* kernels, Real* sums) const {
    for_each_tile(size.width, [&](int64_t x, auto count) {
      constexpr int T = decltype(count)::value;
      for_each_step(block, [&](int64_t c, int64_t step) __attribute__((always_inline)) {
        const Real* kernel = kernels + step * Io::parts * kSums;
        Real* of_step = sums + step * Io::parts * kSums;
        Numbers even[T];  // outputs
        convolve<T, backward, 0>(images, y, x, c, kernel, of_step, even);
        if constexpr (Io::parts == 2) convolve<T, backward, 1>(images, y, x, c, kernel + kSums, of_step + kSums, even);
      });
    });
  }

  static void forward(const DepthwiseForwardParams& params, Runtime& runtime) {
    const DepthwiseSize& size = params.size;
    const Depthwise self(size, 1);
    const int64_t wanted = (kEnoughTasks + size.batch - 1) / size.batch;
    const int64_t ranges = wanted < size.height ? wanted : size.height;  // of an image's rows
    Real* kernels = static_cast<Real*>(runtime.allocate(self.numbers() * sizeof(Real)));
    self.pack(static_cast<const Real*>(params.weight), static_cast<const Real*>(params.bias), false, kernels);
    run_parallel(runtime, size.batch * ranges, [&](int64_t task, int) {
      const int64_t image = task / ranges, range = task % ranges;
      const Images images{{params.x, image},
                          {params.residual, image},
                          {Image{}, 0},
                          {params.out, image},
                          params.residual.data != nullptr};
      for (int64_t block = 0; block < self.blocks; ++block)
        for (int64_t y = range * size.height / ranges; y < (range + 1) * size.height / ranges; ++y)
          self.template convolve_row<false>(images, y, block, kernels, nullptr);
    });
  }

  // Number of ranges of rows, over all images, that have sums of weights' gradients of their own, added at the end.
  int64_t count_splits() const {
    const int64_t rows = size.batch * size.height;
    const int64_t input = rows * size.width * size.channels * int64_t(sizeof(Stored));
    const int64_t affordable = input / (kPartialSumsShare * numbers() * int64_t(sizeof(Real)));
    const int64_t useful = (kEnoughTasks + blocks - 1) / blocks;
    int64_t count = affordable < useful ? affordable : useful;
    count = count < rows ? count : rows;
    return count > 1 ? count : 1;
  }

  static void backward(const DepthwiseBackwardParams& params, Runtime& runtime) {
    const DepthwiseSize& size = params.size;
    const int64_t splits = Depthwise(size, 1).count_splits();
    const Depthwise self(size, (kTasksPerThread * runtime.threads() + splits - 1) / splits);
    const int64_t rows = size.batch * size.height;
    Real* kernels = static_cast<Real*>(runtime.allocate((1 + splits) * self.numbers() * sizeof(Real)));
    Real* sums = kernels + self.numbers();  // (splits, steps, parts, kSums)
    self.pack(static_cast<const Real*>(params.weight), nullptr, true, kernels);
    run_parallel(runtime, splits * self.blocks, [&](int64_t task, int) {
      const int64_t split = task / self.blocks, block = task % self.blocks;
      Real* of_split = sums + split * self.numbers();
      self.for_each_step(block, [&](int64_t, int64_t step) {
        for (int i = 0; i < Io::parts * kSums; ++i) of_split[step * Io::parts * kSums + i] = 0;
      });
      for (int64_t row = split * rows / splits; row < (split + 1) * rows / splits; ++row) {
        const int64_t image = row / size.height;
        const Images images{{params.grad_out, image},
                            {params.grad_out, image},
                            {params.x, image},
                            {params.grad_x, image},
                            params.adds_input};
        self.template convolve_row<true>(images, row % size.height, block, kernels, of_split);
      }
    });
    run_parallel(runtime, self.blocks, [&](int64_t block, int) {
      self.for_each_step(block, [&](int64_t channel, int64_t step) {
        self.add_splits(sums + step * Io::parts * kSums, splits, channel, static_cast<Real*>(params.grad_weight),
                        static_cast<Real*>(params.grad_bias));
      });
    });
  }

  // Adds the sums of all splits for a step of channels.
  void add_splits(Real* sums, int64_t splits, int64_t channel, Real* grad_weight, Real* grad_bias) const {
    for (int64_t split = 1; split < splits; ++split)
      for (int i = 0; i < Io::parts * kSums; ++i) sums[i] += sums[split * numbers() + i];
    for (int i = 0; i < kStep; ++i) {
      const Real* of_lane = sums + i % Io::parts * kSums + i / Io::parts;
      Real* to = grad_weight + (channel + i) * kTaps;
      for (int tap = 0; tap < kTaps; ++tap) to[tap] = of_lane[(kTaps - 1 - tap) * Io::lanes];
      grad_bias[channel + i] = of_lane[kTaps * Io::lanes];
    }
  }
};

// Runs Depthwise<…>::forward or ::backward for the dtype, the size of the kernel, and few channels or many.
template <template <class, int> class Pass, class Real, class Stored, class Params>
void run_depthwise(const Params& params, Runtime& runtime) {
  using Wide = VectorOfChannels<Real, Stored>;
  using Narrow = SingleChannel<Real, Stored>;
  const bool wide = params.size.channels >= Wide::lanes * Wide::parts, is_small = params.size.kernel_size == 3;
  if (wide)
    is_small ? Pass<Wide, 3>::run(params, runtime) : Pass<Wide, 5>::run(params, runtime);
  else
    is_small ? Pass<Narrow, 3>::run(params, runtime) : Pass<Narrow, 5>::run(params, runtime);
}
template <template <class, int> class Pass, class Params>
void run_depthwise(const Params& params, Runtime& runtime) {
  switch (params.x.type) {
    case Type::float32:
      return run_depthwise<Pass, float, float>(params, runtime);
    case Type::bfloat16:
      return run_depthwise<Pass, float, uint16_t>(params, runtime);
    case Type::float64:
      return run_depthwise<Pass, double, double>(params, runtime);
  }
}

template <class Io, int K>
struct DepthwiseForward {
  static void run(const DepthwiseForwardParams& params, Runtime& runtime) {
    Depthwise<Io, K>::forward(params, runtime);
  }
};
template <class Io, int K>
struct DepthwiseBackward {
  static void run(const DepthwiseBackwardParams& params, Runtime& runtime) {
    Depthwise<Io, K>::backward(params, runtime);
  }
};

inline void depthwise_forward(const DepthwiseForwardParams& params, Runtime& runtime) {
  run_depthwise<DepthwiseForward>(params, runtime);
}
inline void depthwise_backward(const DepthwiseBackwardParams& params, Runtime& runtime) {
  run_depthwise<DepthwiseBackward>(params, runtime);
}

}  // namespace POLAFORMER_ISA
}  // namespace polaformer
