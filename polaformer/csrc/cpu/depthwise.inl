// Depthwise convolution of channels-last images with 3×3 or 5×5 kernels, forward and backward (K × K, P = (K − 1) / 2):
//
//   out[y, x, c] = bias[c] + residual[y, x, c] + Σ_ij weight[i, j, c] in[y + i − P, x + j − P, c]
//
// Vectors lie along channels. The outputs of a tile, up to kColumns neighbours in a row, are summed in registers: each
// input is loaded once for all columns that it contributes to. Taps beyond the image are left out, not multiplied by
// zero, so a 3×3 kernel on a 1×1 image is one product. The gradient of the input is the same convolution with the
// kernel turned around; the gradients of weights and bias are summed beside it, while both operands are in the cache.

namespace polaformer {
namespace POLAFORMER_ISA {

constexpr int kColumns = 7;                 // images of 224² have maps of 56, 28, 14 and 7 columns
constexpr int64_t kChannels = 128;          // of a block, whose rows stay in the cache until the kernel has passed them
constexpr int64_t kEnoughTasks = 64;        // to keep any CPU busy
constexpr int64_t kPartialSumsShare = 100;  // of the input's memory, one part may hold partial sums

// Arithmetic on `lanes` channels at a time, in Real, of tensors that store their numbers as Stored.
template <class Real_, class Stored_>
struct VectorOfChannels {
  using Real = Real_;
  using Stored = Stored_;
  using Numbers = Vec<Real>;
  static constexpr int lanes = Simd<Real>::lanes;
  static Numbers load(const Real* from) { return POLAFORMER_ISA::load(from); }
  static void store(Real* to, Numbers x) { POLAFORMER_ISA::store(to, x); }
  static Numbers load(const uint16_t* from) {
    const auto words = __builtin_convertvector(*reinterpret_cast<const HalfWords*>(from), UnsignedWords) << 16;
    return (Numbers)words;
  }
  static void store(uint16_t* to, Numbers x) {
    const auto bits = (UnsignedWords)x;
    const auto even = bits + 0x7fff + ((bits >> 16) & 1);
    const auto rounded = (x == x ? even : bits | 0x400000) >> 16;
    *reinterpret_cast<HalfWords*>(to) = __builtin_convertvector(rounded, HalfWords);
  }
};

// The same, one channel at a time.
template <class Real_, class Stored_>
struct SingleChannel {
  using Real = Real_;
  using Stored = Stored_;
  using Numbers = Real;
  static constexpr int lanes = 1;
  static Real load(const Real* from) { return *from; }
  static void store(Real* to, Real x) { *to = x; }
  static Real load(const uint16_t* from) { return __builtin_bit_cast(float, uint32_t(*from) << 16); }
  static void store(uint16_t* to, Real x) { store_numbers(&x, Type::bfloat16, reinterpret_cast<char*>(to), 1); }
};

template <int columns_>
struct Columns {
  static constexpr int count = columns_;
};

// Calls body(x, Columns<n>) for each tile of n ≤ kColumns neighbours in a row; the tiles' sizes differ by one at most.
template <class Body>
inline void for_each_tile(int64_t width, Body&& body) {
  static_assert(kColumns == 7, "one case per number of columns");
  const int64_t tiles = (width + kColumns - 1) / kColumns;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t x = tile * width / tiles;
    switch ((tile + 1) * width / tiles - x) {
      case 1:
        body(x, Columns<1>{});
        break;
      case 2:
        body(x, Columns<2>{});
        break;
      case 3:
        body(x, Columns<3>{});
        break;
      case 4:
        body(x, Columns<4>{});
        break;
      case 5:
        body(x, Columns<5>{});
        break;
      case 6:
        body(x, Columns<6>{});
        break;
      default:
        body(x, Columns<7>{});
        break;
    }
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
  static constexpr int P = K / 2, kTaps = K * K, kSums = kTaps + 1;  // sums of a channel: one per tap, then the bias
  static constexpr int64_t kRow = kChannels + Io::lanes;             // of sums: numbers per tap

  const DepthwiseSize& size;
  const int64_t blocks;

  explicit Depthwise(const DepthwiseSize& size) : size(size), blocks((size.channels + kChannels - 1) / kChannels) {}

  // First channel of a block: a multiple of the vector's length.
  int64_t first_channel(int64_t block) const {
    return block < blocks ? size.channels / Io::lanes * block / blocks * Io::lanes : size.channels;
  }

  // Calls body(channel, number) for each vector of a block; the last one may overlap the one before.
  template <class Body>
  void for_each_vector(int64_t block, Body&& body) const {
    const int64_t end = first_channel(block + 1);
    int64_t number = 0, c = first_channel(block);
    for (; c + Io::lanes <= end; c += Io::lanes) body(c, number++);
    if (c < end) body(end - Io::lanes, number);
  }

  // Rows and columns of the kernel that meet the image: first_tap(y) … end_tap(y, height) − 1.
  static int first_tap(int64_t y) { return y < P ? int(P - y) : 0; }
  static int end_tap(int64_t y, int64_t height) { return height - y + P < K ? int(height - y + P) : K; }

  // A tile of the convolution of `in` with the taps at weight + i · tap. `inner`: all taps' columns are in the image.
  template <int T, bool inner>
  void convolve(const Plane<const Stored> in, const Plane<const Stored> residual, const Plane<Stored> out,
                const Real* weight, int64_t tap, const Real* bias, int64_t y, int64_t x, int64_t block) const {
    const int first = first_tap(y), end = end_tap(y, size.height);
    const uint64_t width = size.width;
    const Stored* in_tile = in.at(y + first - P, x - P);
    const Stored* residual_tile = residual.data ? residual.at(y, x) : nullptr;
    Stored* out_tile = out.at(y, x);
    const Real* first_weight = weight + first * K * tap;
    for_each_vector(block, [=](int64_t c, int64_t) __attribute__((always_inline)) {
      Numbers sums[T];
#pragma GCC unroll 16
      for (int t = 0; t < T; ++t) {
        sums[t] = bias ? Io::load(bias + c) : Numbers{};
        if (residual_tile) sums[t] += Io::load(residual_tile + t * residual.column + c);
      }
      const Stored* from = in_tile + c;
      const Real* taps = first_weight + c;
      for (int i = first; i < end; ++i, from += in.row, taps += K * tap) {
        Numbers weights[K];
#pragma GCC unroll 16
        for (int j = 0; j < K; ++j) weights[j] = Io::load(taps + j * tap);
#pragma GCC unroll 16
        for (int column = 0; column < T + K - 1; ++column) {
          if (!inner && uint64_t(x - P + column) >= width) continue;
          const Numbers value = Io::load(from + column * in.column);
#pragma GCC unroll 16
          for (int j = 0; j < K; ++j)
            if (column - j >= 0 && column - j < T) sums[column - j] += weights[j] * value;
        }
      }
#pragma GCC unroll 16
      for (int t = 0; t < T; ++t) Io::store(out_tile + t * out.column + c, sums[t]);
    });
  }

  // Adds a tile's part to the gradients of weights and bias: sums (kSums, vectors of the block).
  template <int T, bool inner>
  void add_products(const Plane<const Stored> in, const Plane<const Stored> grad_out, int64_t y, int64_t x,
                    int64_t block, Real* sums) const {
    const int first = first_tap(y), end = end_tap(y, size.height);
    const uint64_t width = size.width;
    const Stored *in_tile = in.at(y + first - P, x - P), *grad_tile = grad_out.at(y, x);
    for_each_vector(block, [=](int64_t c, int64_t number) __attribute__((always_inline)) {
      Real* of_vector = sums + number * Io::lanes;
      Numbers grads[T], total{};
#pragma GCC unroll 16
      for (int t = 0; t < T; ++t) total += grads[t] = Io::load(grad_tile + t * grad_out.column + c);
      Io::store(of_vector + kTaps * kRow, Io::load(of_vector + kTaps * kRow) + total);
      const Stored* from = in_tile + c;
      Real* of_row = of_vector + first * K * kRow;
      for (int i = first; i < end; ++i, from += in.row, of_row += K * kRow) {
        Numbers products[K];
#pragma GCC unroll 16
        for (int j = 0; j < K; ++j) products[j] = Io::load(of_row + j * kRow);
#pragma GCC unroll 16
        for (int column = 0; column < T + K - 1; ++column) {
          if (!inner && uint64_t(x - P + column) >= width) continue;
          const Numbers value = Io::load(from + column * in.column);
#pragma GCC unroll 16
          for (int j = 0; j < K; ++j)
            if (column - j >= 0 && column - j < T) products[j] += grads[column - j] * value;
        }
#pragma GCC unroll 16
        for (int j = 0; j < K; ++j) Io::store(of_row + j * kRow, products[j]);
      }
    });
  }

  template <int T>
  bool is_inner(int64_t x) const {
    return x >= P && x + T + P <= size.width;
  }

  static void forward(const DepthwiseForwardParams& params, Runtime& runtime) {
    const Depthwise self(params.size);
    const DepthwiseSize& size = params.size;
    const int64_t wanted = (kEnoughTasks + size.batch - 1) / size.batch;
    const int64_t parts = wanted < size.height ? wanted : size.height;  // of the rows of an image
    run_parallel(runtime, size.batch * parts, [&](int64_t task, int) {
      const int64_t image = task / parts, part = task % parts;
      const Plane<const Stored> in(params.x, image), residual(params.residual, image);
      const Plane<Stored> out(params.out, image);
      const Real *weight = static_cast<const Real*>(params.weight), *bias = static_cast<const Real*>(params.bias);
      for (int64_t block = 0; block < self.blocks; ++block)
        for (int64_t y = part * size.height / parts; y < (part + 1) * size.height / parts; ++y)
          for_each_tile(size.width, [&](int64_t x, auto columns) {
            constexpr int T = decltype(columns)::count;
            if (self.template is_inner<T>(x))
              self.template convolve<T, true>(in, residual, out, weight, size.channels, bias, y, x, block);
            else
              self.template convolve<T, false>(in, residual, out, weight, size.channels, bias, y, x, block);
          });
    });
  }

  // Number of ranges of rows, over all images, that have sums of weights' gradients of their own, added at the end.
  int64_t splits() const {
    const int64_t input = size.batch * size.height * size.width * int64_t(sizeof(Stored));
    const int64_t affordable = input / (kPartialSumsShare * kSums * int64_t(sizeof(Real)));
    const int64_t useful = (kEnoughTasks + blocks - 1) / blocks;
    int64_t count = affordable < useful ? affordable : useful;
    count = count < size.batch * size.height ? count : size.batch * size.height;
    return count > 1 ? count : 1;
  }

  static void backward(const DepthwiseBackwardParams& params, Runtime& runtime) {
    const Depthwise self(params.size);
    const DepthwiseSize& size = params.size;
    const int64_t splits = self.splits(), sums_of_split = kSums * size.channels;
    Real* total = static_cast<Real*>(params.grad_sums);
    Real* partial = splits > 1 ? static_cast<Real*>(runtime.allocate(splits * sums_of_split * sizeof(Real))) : total;
    Real* workspace = static_cast<Real*>(runtime.allocate(runtime.threads() * kSums * kRow * sizeof(Real)));
    run_parallel(runtime, splits * self.blocks, [&](int64_t task, int thread) {
      const int64_t split = task / self.blocks, block = task % self.blocks;
      Real* sums = workspace + thread * kSums * kRow;
      for (int64_t i = 0; i < kSums * kRow; ++i) sums[i] = 0;
      const int64_t rows = size.batch * size.height;
      for (int64_t row = split * rows / splits; row < (split + 1) * rows / splits; ++row)
        self.differentiate_row(params, row / size.height, row % size.height, block, sums);
      Real* to = partial + split * sums_of_split;
      self.for_each_vector(block, [&](int64_t c, int64_t number) {
        for (int i = 0; i < kSums; ++i)
          Io::store(to + i * size.channels + c, Io::load(sums + i * kRow + number * Io::lanes));
      });
    });
    if (splits > 1)
      run_parallel(runtime, kSums, [&](int64_t i, int) {
        for (int64_t c = i * size.channels; c < (i + 1) * size.channels; ++c) {
          Real sum = partial[c];
          for (int64_t split = 1; split < splits; ++split) sum += partial[split * sums_of_split + c];
          total[c] = sum;
        }
      });
  }

  void differentiate_row(const DepthwiseBackwardParams& params, int64_t image, int64_t y, int64_t block,
                         Real* sums) const {
    const Plane<const Stored> in(params.x, image), grad_out(params.grad_out, image);
    const Plane<const Stored> residual(params.adds_input ? params.grad_out : Image{}, image);
    const Plane<Stored> grad_in(params.grad_x, image);
    const Real* last_tap = static_cast<const Real*>(params.weight) + (kTaps - 1) * size.channels;
    for_each_tile(size.width, [&](int64_t x, auto columns) {
      constexpr int T = decltype(columns)::count;
      if (is_inner<T>(x)) {
        convolve<T, true>(grad_out, residual, grad_in, last_tap, -size.channels, nullptr, y, x, block);
        add_products<T, true>(in, grad_out, y, x, block, sums);
      } else {
        convolve<T, false>(grad_out, residual, grad_in, last_tap, -size.channels, nullptr, y, x, block);
        add_products<T, false>(in, grad_out, y, x, block, sums);
      }
    });
  }
};

// Runs Depthwise<…>::forward or ::backward for the dtype, the size of the kernel, and few channels or many.
template <template <class, int> class Pass, class Real, class Stored, class Params>
void run_depthwise(const Params& params, Runtime& runtime) {
  using Wide = VectorOfChannels<Real, Stored>;
  using Narrow = SingleChannel<Real, Stored>;
  const bool wide = params.size.channels >= Wide::lanes, is_small = params.size.kernel_size == 3;
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
