// Polarity attention, forward and backward, for one instruction set: the including file names it (POLAFORMER_ISA) and
// sets the compiler's target. No header of the standard library or of PyTorch may be included below that point, lest
// its inline functions be compiled for a processor that the rest of the program cannot assume.
//
// Both passes go over tiles of kTile tokens whose features live in the cache: elementwise work on vectors, then
// products of matrices. A row of D numbers is padded with zeros to W, whole vectors; 2D features to F = 2W, positive
// poles first; the two halves of a value row to M each, V = 2M. The state is kept transposed, (V, F), since then every
// product over tokens reads rows. Work is cut by the shape alone and sums are formed in a fixed order: the same bits
// on any number of threads.

namespace polaformer {
namespace POLAFORMER_ISA {

constexpr int kTile = 64;  // tokens; a last tile may have fewer, its rows beyond the last token are zeros
constexpr int kRowsTogether = 32;  // a tile's rows are a multiple of these, as matrix units want it
constexpr int64_t kTokensPerTask = 1024;

// ---- vectors -------------------------------------------------------------------------------------------------------

template <class R>
struct Simd {
  typedef R Vec __attribute__((vector_size(POLAFORMER_VECTOR_BYTES)));
  typedef R Unaligned __attribute__((vector_size(POLAFORMER_VECTOR_BYTES), aligned(sizeof(R)), may_alias));
  static constexpr int lanes = POLAFORMER_VECTOR_BYTES / sizeof(R);
};
template <class R>
using Vec = typename Simd<R>::Vec;
typedef int32_t Words __attribute__((vector_size(POLAFORMER_VECTOR_BYTES)));
typedef uint16_t HalfWords __attribute__((vector_size(POLAFORMER_VECTOR_BYTES / 2), aligned(2), may_alias));

template <class R>
inline Vec<R> load(const R* from) {
  return *reinterpret_cast<const typename Simd<R>::Unaligned*>(from);
}
template <class R>
inline void store(R* to, Vec<R> x) {
  *reinterpret_cast<typename Simd<R>::Unaligned*>(to) = x;
}
template <class R>
inline Vec<R> broadcast(R x) {
  return x - Vec<R>{};
}

template <class V>
inline V swap_pairs(V x);
template <>
inline Vec<float> swap_pairs(Vec<float> x) {
#if POLAFORMER_VECTOR_BYTES == 64
  return __builtin_shuffle(x, Words{1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14});
#elif POLAFORMER_VECTOR_BYTES == 32
  return __builtin_shuffle(x, Words{1, 0, 3, 2, 5, 4, 7, 6});
#else
  return __builtin_shuffle(x, Words{1, 0, 3, 2});
#endif
}
template <>
inline Vec<double> swap_pairs(Vec<double> x) {
  Vec<double> swapped;
  for (int i = 0; i < Simd<double>::lanes; ++i) swapped[i] = x[i ^ 1];
  return swapped;
}

template <class R>
inline R sum_of(Vec<R> x) {
  R sums[Simd<R>::lanes];
  store(sums, x);
  for (int half = Simd<R>::lanes / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
  return sums[0];
}
template <class R>
inline R max_of(Vec<R> x) {
  R largest = x[0];
  for (int i = 1; i < Simd<R>::lanes; ++i) largest = x[i] > largest ? x[i] : largest;
  return largest;
}

inline Vec<double> expm1_of(Vec<double> x) {
  for (int i = 0; i < Simd<double>::lanes; ++i) x[i] = __builtin_expm1(x[i]);
  return x;
}
inline Vec<float> expm1_of(Vec<float> x) { return expm1_of_exponent(x); }

}  // namespace POLAFORMER_ISA

template <>
struct Bits<POLAFORMER_ISA::Vec<float>> {
  using type = POLAFORMER_ISA::Words;
};

namespace POLAFORMER_ISA {

constexpr int padded(int count, int lanes) { return (count + lanes - 1) / lanes * lanes; }

template <class R>
inline R at_most(R x, R limit) {
  return x > limit ? limit : x < -limit ? -limit : x;
}

// ---- products of matrices ------------------------------------------------------------------------------------------

// A block of `rows` × `columns` vectors of C, held in registers: C = A B or C += A B.
template <class R, int rows, int columns>
inline void multiply_block(const R* a, int64_t a_row, int64_t a_column, const R* b, int64_t b_row, R* c, int64_t c_row,
                           int depth, bool add) {
  constexpr int lanes = Simd<R>::lanes;
  Vec<R> sums[rows][columns];
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < columns; ++j) sums[i][j] = add ? load(c + i * c_row + j * lanes) : Vec<R>{};
  for (int k = 0; k < depth; ++k) {
    Vec<R> right[columns];
    for (int j = 0; j < columns; ++j) right[j] = load(b + k * b_row + j * lanes);
    for (int i = 0; i < rows; ++i) {
      const R left = a[i * a_row + k * a_column];
      for (int j = 0; j < columns; ++j) sums[i][j] += left * right[j];
    }
  }
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < columns; ++j) store(c + i * c_row + j * lanes, sums[i][j]);
}

template <class R, int columns>
void multiply_panel(const R* a, int64_t a_row, int64_t a_column, const R* b, int64_t b_row, R* c, int64_t c_row, int m,
                    int depth, bool add) {
  constexpr int rows = POLAFORMER_BLOCK_ROWS;
  int i = 0;
  for (; i + rows <= m; i += rows)
    multiply_block<R, rows, columns>(a + i * a_row, a_row, a_column, b, b_row, c + i * c_row, c_row, depth, add);
  for (; i < m; ++i)
    multiply_block<R, 1, columns>(a + i * a_row, a_row, a_column, b, b_row, c + i * c_row, c_row, depth, add);
}

// Products in the compute type: operands are used where they lie.
template <class R>
struct DirectProducts {
  using Real = R;
  struct Left {
    const R* data;
    int64_t row, column;
  };
  struct Right {
    const R* data;
    int64_t row;
  };
  explicit DirectProducts(Services&) {}
  static constexpr int64_t left_bytes(int, int) { return 0; }
  static constexpr int64_t right_bytes(int, int) { return 0; }
  static Left rows(const R* x, int, int depth, void*) { return {x, depth, 1}; }
  static Left columns(const R* x, int m, int, void*) { return {x, 1, m}; }
  static Right right(const R* x, int row, int, int, void*) { return {x, row}; }

  void multiply(Left a, Right b, R* c, int c_row, int m, int n, int depth, bool add) const {
    constexpr int lanes = Simd<R>::lanes;
    int j = 0;
    for (; j + 3 * lanes <= n; j += 3 * lanes)
      multiply_panel<R, 3>(a.data, a.row, a.column, b.data + j, b.row, c + j, c_row, m, depth, add);
    for (; j + 2 * lanes <= n; j += 2 * lanes)
      multiply_panel<R, 2>(a.data, a.row, a.column, b.data + j, b.row, c + j, c_row, m, depth, add);
    for (; j < n; j += lanes)
      multiply_panel<R, 1>(a.data, a.row, a.column, b.data + j, b.row, c + j, c_row, m, depth, add);
  }
};

// The bits of floats rounded to bfloat16 (nearest, ties to even), in the upper halves of the words.
inline Words rounded(Vec<float> x) {
  const Words bits = __builtin_bit_cast(Words, x);
  return bits + 0x7fff + ((bits >> 16) & 1);
}

// Products in bfloat16 with float32 sums, by PyTorch's kernel for this processor: operands are rounded into buffers.
struct Bf16Products {
  using Real = float;
  struct Left {
    const uint16_t* data;
    int row;
  };
  struct Right {
    const uint16_t* data;
    int row;
  };
  Services& services;
  explicit Bf16Products(Services& services) : services(services) {}
  static constexpr int64_t left_bytes(int m, int depth) { return 2L * m * depth; }
  static constexpr int64_t right_bytes(int depth, int n) { return 2L * depth * n; }

  // x (M, depth), contiguous
  static Left rows(const float* x, int m, int depth, void* buffer) {
    auto* out = static_cast<uint16_t*>(buffer);
    for (int64_t i = 0; i < int64_t(m) * depth; i += Simd<float>::lanes)
      *reinterpret_cast<HalfWords*>(out + i) =
          __builtin_convertvector(rounded(load(x + i)) >> 16, HalfWords);
    return {out, depth};
  }

  // The transpose of x (depth, M), contiguous
  static Left columns(const float* x, int m, int depth, void* buffer) {
    alignas(64) int32_t block[16][16];
    auto* out = static_cast<int32_t*>(buffer);
    for (int i = 0; i < m; i += Simd<float>::lanes)
      for (int k = 0; k < depth; k += 32) {
        for (int pair = 0; pair < 16; ++pair)
          *reinterpret_cast<Words*>(block[pair]) = interleaved(x + (k + 2 * pair) * m + i, m);
        for (int lane = 0; lane < Simd<float>::lanes; ++lane)
          for (int pair = 0; pair < 16; ++pair) out[(i + lane) * (depth / 2) + k / 2 + pair] = block[pair][lane];
      }
    return {static_cast<uint16_t*>(buffer), depth};
  }

  // x (depth, N) with rows `row` apart
  static Right right(const float* x, int row, int depth, int n, void* buffer) {
    auto* out = static_cast<int32_t*>(buffer);
    for (int k = 0; k < depth; k += 2)
      for (int j = 0; j < n; j += Simd<float>::lanes)
        *reinterpret_cast<Words*>(out + k / 2 * n + j) = interleaved(x + k * row + j, row);
    return {static_cast<uint16_t*>(buffer), n};
  }

  // Pairs of x and of the row below it, in the lower and the upper half of each word.
  static Words interleaved(const float* x, int64_t row) {
    return (rounded(load(x + row)) & -65536) | ((rounded(load(x)) >> 16) & 0xffff);
  }

  void multiply(Left a, Right b, float* c, int c_row, int m, int n, int depth, bool add) const {
    services.multiply_bf16(m, n, depth, a.data, a.row, b.data, b.row, c, c_row, add);
  }
};

// ---- one problem's sizes and tables --------------------------------------------------------------------------------

struct Sizes {
  int64_t batch, heads, tokens, height, width;
  int D, W, F, M, V;
  int64_t tasks_per_head, tokens_per_task;  // of work without sums over tokens
  int64_t parts, tokens_per_part;           // of work with them: each part has its own sums

  Sizes(const Problem& p, int lanes)
      : batch(p.batch), heads(p.heads), tokens(p.height * p.width), height(p.height), width(p.width), D(p.head_width),
        W(padded(D, lanes)), F(2 * W), M(padded(D / 2, lanes)), V(2 * M) {
    constexpr int64_t enough = 256;  // tasks to keep any processor busy
    tasks_per_head = ceil(tokens, kTokensPerTask);
    const int64_t wanted = ceil(enough, batch * heads);
    parts = tasks_per_head < wanted ? tasks_per_head : wanted;
    tokens_per_task = padded_to_tile(ceil(tokens, tasks_per_head));
    tokens_per_part = padded_to_tile(ceil(tokens, parts));
  }
  static int64_t ceil(int64_t a, int64_t b) { return (a + b - 1) / b; }
  static int64_t padded_to_tile(int64_t count) { return ceil(count, kTile) * kTile; }
  int64_t all_heads() const { return batch * heads; }
  // Of 2D features, or of D values, where the padded layout keeps number `i`.
  int feature(int i) const { return i < D ? i : W + i - D; }
  int value(int i) const { return i < D / 2 ? i : M + i - D / 2; }
};

// Hands out pieces of one thread's workspace. First asked with no memory, it counts.
struct Arena {
  char* memory;
  int64_t used = 0;
  void* bytes(int64_t count) {
    void* piece = memory + used;
    used += (count + 63) / 64 * 64;
    return piece;
  }
  template <class R>
  R* take(int64_t count) {
    return static_cast<R*>(bytes(count * int64_t(sizeof(R))));
  }
};

// The cosine and the signed sine of each feature's turn: turned[i] = x[i]·cosine[i] + x[i ^ 1]·sine[i].
template <class R>
struct Turns {
  const R *rows, *columns;  // (height, 2W), (width, 2W): W cosines, W sines

  static const R* table(const Sizes& s, const float* angles, int64_t length, Services& services) {
    R* table = static_cast<R*>(services.allocate(length * 2 * s.W * sizeof(R)));
    for (int64_t place = 0; place < length; ++place)
      for (int i = 0; i < s.W; i += 2) {
        const R turn = i < s.D ? R(place) * R(angles[i / 2]) : R(0);
        const R cosine = sizeof(R) == 4 ? __builtin_cosf(turn) : __builtin_cos(turn);
        const R sine = sizeof(R) == 4 ? __builtin_sinf(turn) : __builtin_sin(turn);
        R* pair = table + place * 2 * s.W + i;
        pair[0] = pair[1] = cosine;
        pair[s.W] = -sine;
        pair[s.W + 1] = sine;
      }
    return table;
  }
};

inline int bytes_of(Type type) { return type == Type::float32 ? 4 : type == Type::bfloat16 ? 2 : 8; }

inline char* address(const Rows& rows, int64_t batch, int64_t head, int64_t token) {
  const int64_t number = batch * rows.batch + head * rows.head + token * rows.token;
  return static_cast<char*>(rows.data) + number * bytes_of(rows.type);
}

// Some tokens of one head, and how each of them turns.
template <class R>
struct Tile {
  int64_t batch, head, first;
  int count, rows;  // tokens, and rows of the tile
  const R *row[kTile], *column[kTile];
  const char *ahead[2];  // where the next tile begins in two of the tensors that are read
  int64_t ahead_bytes[2];  // from one of its tokens to the next

  Tile(const Sizes& s, const Turns<R>& turns, int64_t of_head, int64_t first, int64_t end, const Rows& read,
       const Rows& read_too)
      : batch(of_head / s.heads), head(of_head % s.heads), first(first),
        count(end - first < kTile ? end - first : kTile), rows(padded(count, kRowsTogether)),
        ahead{address(read, batch, head, first + kTile), address(read_too, batch, head, first + kTile)},
        ahead_bytes{read.token * bytes_of(read.type), read_too.token * bytes_of(read_too.type)} {
    int64_t y = first / s.width, x = first % s.width;
    for (int t = 0; t < kTile; ++t) {
      row[t] = turns.rows + (t < count ? y : 0) * 2 * s.W;
      column[t] = turns.columns + (t < count ? x : 0) * 2 * s.W;
      if (++x == s.width) x = 0, ++y;
    }
  }

  // Called for every vector of every token, asks for the next tile's numbers while this one is worked on: the rows
  // lie too far apart for the processor to foresee them. Asking beyond the tensor does no harm.
  void prefetch(int t, int i) const {
    for (int tensor = 0; tensor < 2; ++tensor)
      __builtin_prefetch(ahead[tensor] + t * ahead_bytes[tensor] + i * sizeof(R), 0, 2);
  }
};

template <class R>
inline Vec<R> turned(Vec<R> x, const R* turns, int i, int W) {
  return x * load(turns + i) + swap_pairs(x) * load(turns + W + i);
}
template <class R>
inline Vec<R> turned_back(Vec<R> x, const R* turns, int i, int W) {
  return x * load(turns + i) - swap_pairs(x) * load(turns + W + i);
}

// ---- rows in and out -----------------------------------------------------------------------------------------------

template <class R>
void load_numbers(const char* from, Type type, R* to, int count, int padded_count) {
  if (type == Type::bfloat16) {
    auto* bits = reinterpret_cast<const uint16_t*>(from);
    for (int i = 0; i < count; ++i) to[i] = __builtin_bit_cast(float, uint32_t(bits[i]) << 16);
  } else {  // the compute type itself
    auto* numbers = reinterpret_cast<const R*>(from);
    for (int i = 0; i < count; ++i) to[i] = numbers[i];
  }
  for (int i = count; i < padded_count; ++i) to[i] = 0;
}

constexpr float kLargestBf16 = 3.38953139e38f;

template <class R>
void store_numbers(const R* from, Type type, char* to, int count) {
  if (type == Type::bfloat16) {
    auto* out = reinterpret_cast<uint16_t*>(to);
    for (int i = 0; i < count; ++i) {
      const float limited = at_most(float(from[i]), kLargestBf16);
      const uint32_t bits = __builtin_bit_cast(uint32_t, limited);
      const uint32_t even = bits + 0x7fff + ((bits >> 16) & 1);
      out[i] = uint16_t((limited == limited ? even : bits | 0x400000) >> 16);
    }
  } else {
    auto* out = reinterpret_cast<R*>(to);
    for (int i = 0; i < count; ++i) out[i] = at_most(from[i], sizeof(R) == 4 ? R(FLT_MAX) : R(DBL_MAX));
  }
}

// A tile of queries or keys: (kTile, W).
template <class R>
void load_tile(const Rows& rows, const Tile<R>& tile, const Sizes& s, R* to) {
  for (int t = 0; t < tile.count; ++t)
    load_numbers(address(rows, tile.batch, tile.head, tile.first + t), rows.type, to + t * s.W, s.D, s.W);
  for (int i = tile.count * s.W; i < tile.rows * s.W; ++i) to[i] = 0;
}

template <class R>
void store_tile(const R* from, const Rows& rows, const Tile<R>& tile, const Sizes& s) {
  for (int t = 0; t < tile.count; ++t)
    store_numbers(from + t * s.W, rows.type, address(rows, tile.batch, tile.head, tile.first + t), s.D);
}

// A tile of one half (0 or 1) of values: (kTile, M) with rows `row` apart.
template <class R>
void load_half(const Rows& rows, const Tile<R>& tile, const Sizes& s, int half, R* to, int row) {
  const int64_t skipped = half * (s.D / 2) * bytes_of(rows.type);
  for (int t = 0; t < tile.count; ++t) {
    const char* from = address(rows, tile.batch, tile.head, tile.first + t) + skipped;
    load_numbers(from, rows.type, to + t * row, s.D / 2, s.M);
  }
  for (int t = tile.count; t < tile.rows; ++t)
    for (int i = 0; i < s.M; ++i) to[t * row + i] = 0;
}

template <class R>
void store_half(const R* from, int row, const Rows& rows, const Tile<R>& tile, const Sizes& s, int half) {
  const int64_t skipped = half * (s.D / 2) * bytes_of(rows.type);
  for (int t = 0; t < tile.count; ++t) {
    char* to = address(rows, tile.batch, tile.head, tile.first + t) + skipped;
    store_numbers(from + t * row, rows.type, to, s.D / 2);
  }
}

// ---- features ------------------------------------------------------------------------------------------------------

// What a tile's elementwise work leaves for the products and for backward.
template <class R>
struct Features {
  R* turned;  // (kTile, F), ready for the product with the state
  R* active;  // (kTile, W): the feature of the pole that is not zero
  R* slope;   // (kTile, W): its derivative
};

// e^(x − shift) − e^(−shift) for a positive exponent; reference.py says why in this way.
template <class R>
inline R shifted_feature(R x, R shift) {
  const R small = x < R(kFreeExponent) ? x : R(kFreeExponent);
  const R feature = R(__builtin_expm1(small) * __builtin_exp(-shift));
  return x <= R(kFreeExponent) ? feature
                               : feature + R(__builtin_exp(x - shift) - __builtin_exp(R(kFreeExponent) - shift));
}

template <class R>
void turn_tile(const Tile<R>& tile, const Sizes& s, R* features) {
  for (int t = 0; t < tile.rows; ++t)
    for (int i = 0; i < s.W; i += Simd<R>::lanes) {
      R* positive = features + t * s.F + i;
      store(positive, turned(load(positive), tile.row[t], i, s.W));
      store(positive + s.W, turned(load(positive + s.W), tile.column[t], i, s.W));
    }
}

// Features of keys without a shift. Adds them to sums (F); returns the largest exponent: above kFreeExponent the
// result is of no use, and shifted_key_features has to be called.
template <class R, bool for_backward>
R key_features(const Tile<R>& tile, const Sizes& s, const R* k, const Features<R>& out, R* sums) {
  Vec<R> largest{};
  for (int i = 0; i < s.W; i += Simd<R>::lanes) {
    Vec<R> positive_sum{}, negative_sum{};
    for (int t = 0; t < tile.rows; ++t) {
      tile.prefetch(t, i);
      const Vec<R> x = load(k + t * s.W + i);
      const Vec<R> exponent = x > 0 ? x : -x;
      largest = exponent > largest ? exponent : largest;
      const Vec<R> feature = expm1_of(exponent);
      const Vec<R> positive = x > 0 ? feature : Vec<R>{};
      const Vec<R> negative = x > 0 ? Vec<R>{} : feature;
      store(out.turned + t * s.F + i, turned(positive, tile.row[t], i, s.W));
      store(out.turned + t * s.F + s.W + i, turned(negative, tile.column[t], i, s.W));
      if (for_backward) {
        store(out.slope + t * s.W + i, feature + R(1));
      } else {
        positive_sum += positive;
        negative_sum += negative;
      }
    }
    if (!for_backward) {
      store(sums + i, load(sums + i) + positive_sum);
      store(sums + s.W + i, load(sums + s.W + i) + negative_sum);
    }
  }
  return max_of<R>(largest);
}

// The same for any exponents; shift: (F).
template <class R>
void shifted_key_features(const Tile<R>& tile, const Sizes& s, const R* k, const R* shift, const Features<R>& out,
                          R* sums) {
  for (int t = 0; t < tile.rows; ++t)
    for (int i = 0; i < s.W; ++i) {
      const R x = k[t * s.W + i], exponent = x > 0 ? x : -x;
      const int pole = x > 0 ? i : s.W + i, other = x > 0 ? s.W + i : i;
      const R feature = exponent > 0 ? shifted_feature(exponent, shift[pole]) : R(0);
      out.turned[t * s.F + pole] = feature;
      out.turned[t * s.F + other] = 0;
      out.slope[t * s.W + i] = R(__builtin_exp(exponent - shift[pole]));
      if (sums) sums[pole] += feature;
    }
  turn_tile(tile, s, out.turned);
}

// What a query's features are made with: one flow of one head.
template <class R>
struct Flow {
  bool swap;             // the opposite flow takes the poles of −q
  const R* temperature;  // (F): the logistic function of the logits
  const R* key_mean;     // (F)
  const R* key_shift;    // (F)
  bool shifted;          // whether any of it is not 0
};

// Features of queries without a shift, and their normalizers (kTile). Returns as key_features does.
template <class R, bool for_backward>
R query_features(const Tile<R>& tile, const Sizes& s, const R* q, const Flow<R>& flow, const Features<R>& out,
                 R* normalizer) {
  Vec<R> largest{};
  for (int t = 0; t < tile.rows; ++t) {
    Vec<R> z{};
    for (int i = 0; i < s.W; i += Simd<R>::lanes) {
      if (flow.swap) tile.prefetch(t, i);
      const Vec<R> x = flow.swap ? -load(q + t * s.W + i) : load(q + t * s.W + i);
      const Vec<R> heat = x > 0 ? load(flow.temperature + i) : -load(flow.temperature + s.W + i);
      const Vec<R> exponent = x * heat;
      largest = exponent > largest ? exponent : largest;
      const Vec<R> feature = expm1_of(exponent);
      const Vec<R> positive = x > 0 ? feature : Vec<R>{};
      const Vec<R> negative = x > 0 ? Vec<R>{} : feature;
      z += feature * (x > 0 ? load(flow.key_mean + i) : load(flow.key_mean + s.W + i));
      store(out.turned + t * s.F + i, turned(positive, tile.row[t], i, s.W));
      store(out.turned + t * s.F + s.W + i, turned(negative, tile.column[t], i, s.W));
      if (for_backward) {
        store(out.active + t * s.W + i, feature);
        store(out.slope + t * s.W + i, feature + R(1));
      }
    }
    normalizer[t] = sum_of<R>(z) + R(kEpsilon);
  }
  return max_of<R>(largest);
}

// The same for any exponents of queries and keys.
template <class R>
void shifted_query_features(const Tile<R>& tile, const Sizes& s, const R* q, const Flow<R>& flow,
                            const Features<R>& out, R* normalizer) {
  for (int t = 0; t < tile.rows; ++t) {
    R token_shift = 0;
    for (int i = 0; i < s.W; ++i) {
      const R x = flow.swap ? -q[t * s.W + i] : q[t * s.W + i];
      const int pole = x > 0 ? i : s.W + i;
      const R exponent = (x > 0 ? x : -x) * flow.temperature[pole];
      const R excess = exponent + flow.key_shift[pole] - R(kFreeExponent);
      if (exponent > 0 && excess > token_shift) token_shift = excess;
    }
    R z = 0;
    for (int i = 0; i < s.W; ++i) {
      const R x = flow.swap ? -q[t * s.W + i] : q[t * s.W + i];
      const int pole = x > 0 ? i : s.W + i, other = x > 0 ? s.W + i : i;
      const R exponent = (x > 0 ? x : -x) * flow.temperature[pole];
      const R shift = exponent > 0 ? token_shift - flow.key_shift[pole] : R(0);
      const R feature = exponent > 0 ? shifted_feature(exponent, shift) : R(0);
      out.turned[t * s.F + pole] = feature;
      out.turned[t * s.F + other] = 0;
      out.active[t * s.W + i] = feature;
      out.slope[t * s.W + i] = R(__builtin_exp(exponent - shift));
      z += feature * flow.key_mean[pole];
    }
    const R epsilon = R(kEpsilon * __builtin_exp(-token_shift));
    normalizer[t] = z + (epsilon > R(kLeastNormalizer) ? epsilon : R(kLeastNormalizer));
  }
  turn_tile(tile, s, out.turned);
}

template <class R, bool for_backward>
void any_query_features(const Tile<R>& tile, const Sizes& s, const R* q, const Flow<R>& flow, const Features<R>& out,
                        R* normalizer) {
  if (!flow.shifted && query_features<R, for_backward>(tile, s, q, flow, out, normalizer) <= R(kFreeExponent)) return;
  shifted_query_features(tile, s, q, flow, out, normalizer);
}

// ---- what both passes prepare --------------------------------------------------------------------------------------

// Lets `services` run body(task, thread) for each task.
template <class Body>
void run_parallel(Services& services, int64_t tasks, Body&& body) {
  auto call = [](void* context, int64_t task, int thread) { (*static_cast<Body*>(context))(task, thread); };
  services.parallel(tasks, call, &body);
}

// Temperatures of all heads in the padded layout: (H, 2, F), the same flow first.
template <class R>
R* make_temperatures(const Sizes& s, const void* same_logits, const void* opposite_logits, Services& services) {
  R* all = static_cast<R*>(services.allocate(s.heads * 2 * s.F * sizeof(R)));
  for (int64_t i = 0; i < s.heads * 2 * s.F; ++i) all[i] = 0;
  for (int64_t head = 0; head < s.heads; ++head)
    for (int flow = 0; flow < 2; ++flow) {
      const R* logits = static_cast<const R*>(flow ? opposite_logits : same_logits) + head * 2 * s.D;
      for (int i = 0; i < 2 * s.D; ++i)
        all[(head * 2 + flow) * s.F + s.feature(i)] = R(1) / (R(1) + R(__builtin_exp(-logits[i])));
    }
  return all;
}

// One head's saved numbers in the padded layout.
template <class R>
struct SavedHead {
  R *key_mean, *key_shift;  // (F)
  bool shifted = false;

  SavedHead(const Sizes& s, const void* means, const void* shifts, int64_t head, Arena& arena)
      : key_mean(arena.take<R>(s.F)), key_shift(arena.take<R>(s.F)) {
    if (!arena.memory) return;
    for (int i = 0; i < s.F; ++i) key_mean[i] = key_shift[i] = 0;
    for (int i = 0; i < 2 * s.D; ++i) {
      key_mean[s.feature(i)] = static_cast<const R*>(means)[head * 2 * s.D + i];
      key_shift[s.feature(i)] = static_cast<const R*>(shifts)[head * s.D + i / 2];
      shifted |= key_shift[s.feature(i)] > 0;
    }
  }
};

// The state of a head, (2D, D), in the padded layout: as it is, (F, V), or transposed, (V, F).
template <class R>
void unpack_state(const Sizes& s, const R* state, bool transposed, R* out) {
  for (int64_t i = 0; i < int64_t(s.F) * s.V; ++i) out[i] = 0;
  for (int f = 0; f < 2 * s.D; ++f)
    for (int d = 0; d < s.D; ++d)
      out[transposed ? s.value(d) * s.F + s.feature(f) : s.feature(f) * s.V + s.value(d)] = state[f * s.D + d];
}

// ---- forward -------------------------------------------------------------------------------------------------------

// state = Σ turned(φ_k)ᵀ v / N and key_mean = Σ φ_k / N over tokens, then out = turned(φ_q) state / (φ_q key_mean + ε).
template <class Products>
struct ForwardPass {
  using R = typename Products::Real;
  const Forward& call;
  Services& services;
  const Sizes s;
  const Products products;
  const Turns<R> turns;
  const R* temperatures;
  R *states, *sums, *largest;  // of each part: (V, F), (F), the largest exponent of its keys
  int64_t workspace_bytes;
  char* workspace;

  struct KeyBuffers {
    R *k, *v;
    Features<R> features;
    void *left, *right;
    KeyBuffers(const Sizes& s, Arena& arena)
        : k(arena.take<R>(kTile * s.W)), v(arena.take<R>(kTile * s.V)),
          features{arena.take<R>(kTile * s.F), nullptr, arena.take<R>(kTile * s.W)},
          left(arena.bytes(Products::left_bytes(s.V, kTile))), right(arena.bytes(Products::right_bytes(kTile, s.F))) {}
  };
  struct QueryBuffers {
    SavedHead<R> saved;
    R *state, *q, *product;
    Features<R> features;
    void *left, *right[2];
    QueryBuffers(const Forward& call, const Sizes& s, int64_t head, Arena& arena)
        : saved(s, call.key_mean, call.key_shift, head, arena), state(arena.take<R>(s.F * s.V)),
          q(arena.take<R>(kTile * s.W)), product(arena.take<R>(kTile * s.M)),
          features{arena.take<R>(kTile * s.F), arena.take<R>(kTile * s.W), arena.take<R>(kTile * s.W)},
          left(arena.bytes(Products::left_bytes(kTile, s.F))),
          right{arena.bytes(Products::right_bytes(s.F, s.M)), arena.bytes(Products::right_bytes(s.F, s.M))} {}
  };

  ForwardPass(const Forward& call, Services& services)
      : call(call), services(services), s(call.problem, Simd<R>::lanes), products(services),
        turns{Turns<R>::table(s, call.problem.angles, s.height, services),
              Turns<R>::table(s, call.problem.angles, s.width, services)},
        temperatures(make_temperatures<R>(s, call.same_logits, call.opposite_logits, services)) {
    const int64_t parts = s.all_heads() * s.parts;
    states = static_cast<R*>(services.allocate(parts * s.V * s.F * sizeof(R)));
    sums = static_cast<R*>(services.allocate(parts * s.F * sizeof(R)));
    largest = static_cast<R*>(services.allocate(parts * sizeof(R)));
    Arena keys{nullptr}, queries{nullptr};
    KeyBuffers{s, keys};
    QueryBuffers{call, s, 0, queries};
    workspace_bytes = keys.used > queries.used ? keys.used : queries.used;
    workspace = static_cast<char*>(services.allocate(services.threads() * workspace_bytes));
  }

  void run() {
    run_parallel(services, s.all_heads() * s.parts, [this](int64_t task, int thread) {
      Arena arena{workspace + thread * workspace_bytes};
      const int64_t first = task % s.parts * s.tokens_per_part, end = first + s.tokens_per_part;
      R *state = states + task * s.V * s.F, *sum = sums + task * s.F;
      largest[task] = accumulate(task / s.parts, first, end < s.tokens ? end : s.tokens, nullptr, arena, state, sum);
    });
    run_parallel(services, s.all_heads(), [this](int64_t head, int thread) {
      Arena arena{workspace + thread * workspace_bytes};
      combine(head, arena);
    });
    run_parallel(services, s.all_heads() * s.tasks_per_head, [this](int64_t task, int thread) {
      Arena arena{workspace + thread * workspace_bytes};
      const int64_t first = task % s.tasks_per_head * s.tokens_per_task, end = first + s.tokens_per_task;
      attend(task / s.tasks_per_head, first, end < s.tokens ? end : s.tokens, arena);
    });
  }

  // Sums over the tokens from `first` to `end`: state (V, F), sum (F). With a shift (F) exponents may be any.
  R accumulate(int64_t head, int64_t first, int64_t end, const R* shift, Arena& arena, R* state, R* sum) const {
    const KeyBuffers b(s, arena);
    R largest = 0;
    for (int i = 0; i < s.F; ++i) sum[i] = 0;
    if (first >= end)
      for (int64_t i = 0; i < int64_t(s.V) * s.F; ++i) state[i] = 0;
    for (int64_t at = first; at < end; at += kTile) {
      const Tile<R> tile(s, turns, head, at, end, call.k, call.v);
      load_tile(call.k, tile, s, b.k);
      for (int half = 0; half < 2; ++half) load_half(call.v, tile, s, half, b.v + half * s.M, s.V);
      if (shift) {
        shifted_key_features(tile, s, b.k, shift, b.features, sum);
      } else {
        const R here = key_features<R, false>(tile, s, b.k, b.features, sum);
        largest = here > largest ? here : largest;
      }
      const auto values = products.columns(b.v, s.V, tile.rows, b.left);
      const auto features = products.right(b.features.turned, s.F, tile.rows, s.F, b.right);
      products.multiply(values, features, state, s.F, s.V, s.F, tile.rows, at > first);
    }
    return largest;
  }

  void combine(int64_t head, Arena& arena) const {
    R *state = states + head * s.parts * s.V * s.F, *sum = sums + head * s.parts * s.F;
    R top = largest[head * s.parts];
    for (int64_t part = 1; part < s.parts; ++part) {
      for (int64_t i = 0; i < int64_t(s.V) * s.F; ++i) state[i] += state[part * s.V * s.F + i];
      for (int i = 0; i < s.F; ++i) sum[i] += sum[part * s.F + i];
      top = largest[head * s.parts + part] > top ? largest[head * s.parts + part] : top;
    }
    R* shift = arena.take<R>(s.F);
    for (int i = 0; i < s.F; ++i) shift[i] = 0;
    if (top > R(kFreeExponent)) {
      find_shift(head, arena, shift);
      accumulate(head, 0, s.tokens, shift, arena, state, sum);
    }
    for (int f = 0; f < 2 * s.D; ++f) {
      const int from = s.feature(f);
      static_cast<R*>(call.key_mean)[head * 2 * s.D + f] = sum[from] / R(s.tokens);
      static_cast<R*>(call.key_shift)[head * s.D + f / 2] = shift[from];
      for (int d = 0; d < s.D; ++d)
        static_cast<R*>(call.state)[(head * 2 * s.D + f) * s.D + d] = state[s.value(d) * s.F + from] / R(s.tokens);
    }
  }

  // By how much the largest exponent of each pair of key features exceeds what needs no shift: (F).
  void find_shift(int64_t head, Arena arena, R* shift) const {
    R* k = arena.take<R>(kTile * s.W);
    for (int64_t at = 0; at < s.tokens; at += kTile) {
      const Tile<R> tile(s, turns, head, at, s.tokens, call.k, call.k);
      load_tile(call.k, tile, s, k);
      for (int t = 0; t < tile.count; ++t)
        for (int i = 0; i < s.W; ++i) {
          const R x = k[t * s.W + i], excess = (x > 0 ? x : -x) - R(kFreeExponent);
          const int first = (x > 0 ? i : s.W + i) & ~1;
          if (excess > shift[first]) shift[first] = shift[first + 1] = excess;
        }
    }
  }

  void attend(int64_t head, int64_t first, int64_t end, Arena& arena) const {
    const QueryBuffers b(call, s, head, arena);
    unpack_state(s, static_cast<const R*>(call.state) + head * 2 * s.D * s.D, false, b.state);
    const typename Products::Right halves[2] = {products.right(b.state, s.V, s.F, s.M, b.right[0]),
                                                products.right(b.state + s.M, s.V, s.F, s.M, b.right[1])};
    R normalizer[kTile];
    for (int64_t at = first; at < end; at += kTile) {
      const Tile<R> tile(s, turns, head, at, end, call.q, call.q);
      load_tile(call.q, tile, s, b.q);
      for (int half = 0; half < 2; ++half) {
        const R* temperature = temperatures + (tile.head * 2 + half) * s.F;
        const Flow<R> flow{half == 1, temperature, b.saved.key_mean, b.saved.key_shift, b.saved.shifted};
        any_query_features<R, false>(tile, s, b.q, flow, b.features, normalizer);
        const auto features = products.rows(b.features.turned, tile.rows, s.F, b.left);
        products.multiply(features, halves[half], b.product, s.M, tile.rows, s.M, s.F, false);
        divide(tile, b.product, normalizer);
        store_half(b.product, s.M, call.out, tile, s, half);
      }
    }
  }

  // A tile's products (kTile, M) by their normalizers.
  void divide(const Tile<R>& tile, R* products, const R* normalizer) const {
    for (int t = 0; t < tile.rows; ++t) {
      const R inverse = R(1) / normalizer[t];
      for (int i = 0; i < s.M; i += Simd<R>::lanes)
        store(products + t * s.M + i, load(products + t * s.M + i) * inverse);
    }
  }
};

// ---- backward ------------------------------------------------------------------------------------------------------

// First over queries: with u = grad_out / z, for each flow
//     grad of turned(φ_q) = u Sᵀ,  grad of z = −(turned(φ_q) · u Sᵀ) / z,  grad of S = Σ turned(φ_q)ᵀ u,
// and the sums for key_mean and the logits; then over keys with those sums.
template <class Products>
struct BackwardPass {
  using R = typename Products::Real;
  const Backward& call;
  Services& services;
  const Sizes s;
  const Products products;
  const Turns<R> turns;
  const R* temperatures;
  R *grad_states, *grad_means, *grad_heats;  // of each part: (V, F), (F), (2, F)
  int64_t workspace_bytes;
  char* workspace;

  struct QueryBuffers {
    SavedHead<R> saved;
    R *state, *q, *grad_q, *u, *grad_turned;
    Features<R> features;
    void *u_rows, *u_columns, *turned, *right[2];
    QueryBuffers(const Backward& call, const Sizes& s, int64_t head, Arena& arena)
        : saved(s, call.key_mean, call.key_shift, head, arena), state(arena.take<R>(s.F * s.V)),
          q(arena.take<R>(kTile * s.W)), grad_q(arena.take<R>(kTile * s.W)), u(arena.take<R>(kTile * s.M)),
          grad_turned(arena.take<R>(kTile * s.F)),
          features{arena.take<R>(kTile * s.F), arena.take<R>(kTile * s.W), arena.take<R>(kTile * s.W)},
          u_rows(arena.bytes(Products::left_bytes(kTile, s.M))),
          u_columns(arena.bytes(Products::left_bytes(s.M, kTile))),
          turned(arena.bytes(Products::right_bytes(kTile, s.F))),
          right{arena.bytes(Products::right_bytes(s.M, s.F)), arena.bytes(Products::right_bytes(s.M, s.F))} {}
  };
  struct KeyBuffers {
    SavedHead<R> saved;
    R *grad_state, *k, *grad_k, *v, *grad_v, *grad_turned;
    Features<R> features;
    void *v_rows, *turned_rows, *state_right, *transposed_right;
    KeyBuffers(const Backward& call, const Sizes& s, int64_t head, Arena& arena)
        : saved(s, call.key_mean, call.key_shift, head, arena), grad_state(arena.take<R>(s.F * s.V)),
          k(arena.take<R>(kTile * s.W)), grad_k(arena.take<R>(kTile * s.W)), v(arena.take<R>(kTile * s.V)),
          grad_v(arena.take<R>(kTile * s.V)), grad_turned(arena.take<R>(kTile * s.F)),
          features{arena.take<R>(kTile * s.F), nullptr, arena.take<R>(kTile * s.W)},
          v_rows(arena.bytes(Products::left_bytes(kTile, s.V))),
          turned_rows(arena.bytes(Products::left_bytes(kTile, s.F))),
          state_right(arena.bytes(Products::right_bytes(s.F, s.V))),
          transposed_right(arena.bytes(Products::right_bytes(s.V, s.F))) {}
  };

  BackwardPass(const Backward& call, Services& services)
      : call(call), services(services), s(call.problem, Simd<R>::lanes), products(services),
        turns{Turns<R>::table(s, call.problem.angles, s.height, services),
              Turns<R>::table(s, call.problem.angles, s.width, services)},
        temperatures(make_temperatures<R>(s, call.same_logits, call.opposite_logits, services)) {
    const int64_t parts = s.all_heads() * s.parts;
    grad_states = static_cast<R*>(services.allocate(parts * s.V * s.F * sizeof(R)));
    grad_means = static_cast<R*>(services.allocate(parts * s.F * sizeof(R)));
    grad_heats = static_cast<R*>(services.allocate(parts * 2 * s.F * sizeof(R)));
    Arena keys{nullptr}, queries{nullptr};
    KeyBuffers{call, s, 0, keys};
    QueryBuffers{call, s, 0, queries};
    workspace_bytes = keys.used > queries.used ? keys.used : queries.used;
    workspace = static_cast<char*>(services.allocate(services.threads() * workspace_bytes));
  }

  void run() {
    run_parallel(services, s.all_heads() * s.parts, [this](int64_t task, int thread) {
      Arena arena{workspace + thread * workspace_bytes};
      const int64_t first = task % s.parts * s.tokens_per_part, end = first + s.tokens_per_part;
      differentiate_queries(task, first, end < s.tokens ? end : s.tokens, arena);
    });
    run_parallel(services, s.all_heads(), [this](int64_t head, int) { combine(head); });
    run_parallel(services, s.heads, [this](int64_t head, int) { differentiate_logits(head); });
    run_parallel(services, s.all_heads() * s.tasks_per_head, [this](int64_t task, int thread) {
      Arena arena{workspace + thread * workspace_bytes};
      const int64_t first = task % s.tasks_per_head * s.tokens_per_task, end = first + s.tokens_per_task;
      differentiate_keys(task / s.tasks_per_head, first, end < s.tokens ? end : s.tokens, arena);
    });
  }

  void differentiate_queries(int64_t part, int64_t first, int64_t end, Arena& arena) const {
    const int64_t head = part / s.parts;
    const QueryBuffers b(call, s, head, arena);
    R *grad_state = grad_states + part * s.V * s.F, *grad_mean = grad_means + part * s.F;
    R* grad_heat = grad_heats + part * 2 * s.F;
    for (int i = 0; i < s.F; ++i) grad_mean[i] = grad_heat[i] = grad_heat[s.F + i] = 0;
    if (first >= end)
      for (int64_t i = 0; i < int64_t(s.V) * s.F; ++i) grad_state[i] = 0;
    unpack_state(s, static_cast<const R*>(call.state) + head * 2 * s.D * s.D, true, b.state);
    const typename Products::Right halves[2] = {products.right(b.state, s.F, s.M, s.F, b.right[0]),
                                                products.right(b.state + s.M * s.F, s.F, s.M, s.F, b.right[1])};
    R normalizer[kTile], grad_normalizer[kTile];
    for (int64_t at = first; at < end; at += kTile) {
      const Tile<R> tile(s, turns, head, at, end, call.q, call.grad_out);
      load_tile(call.q, tile, s, b.q);
      for (int i = 0; i < tile.rows * s.W; ++i) b.grad_q[i] = 0;
      for (int half = 0; half < 2; ++half) {
        const R* temperature = temperatures + (tile.head * 2 + half) * s.F;
        const Flow<R> flow{half == 1, temperature, b.saved.key_mean, b.saved.key_shift, b.saved.shifted};
        any_query_features<R, true>(tile, s, b.q, flow, b.features, normalizer);
        load_half(call.grad_out, tile, s, half, b.u, s.M);
        divide(tile, b.u, normalizer);
        products.multiply(products.rows(b.u, tile.rows, s.M, b.u_rows), halves[half], b.grad_turned, s.F, tile.rows, s.F, s.M,
                          false);
        products.multiply(products.columns(b.u, s.M, tile.rows, b.u_columns),
                          products.right(b.features.turned, s.F, tile.rows, s.F, b.turned), grad_state + half * s.M * s.F,
                          s.F, s.M, s.F, tile.rows, at > first);
        differentiate_normalizers(tile, b, normalizer, grad_normalizer);
        differentiate_features(tile, flow, b, grad_normalizer, grad_mean, grad_heat + half * s.F);
      }
      store_tile(b.grad_q, call.grad_q, tile, s);
    }
  }

  void divide(const Tile<R>& tile, R* u, R* normalizer) const {
    for (int t = 0; t < tile.rows; ++t) {
      if (normalizer[t] < R(kLeastGradientNormalizer)) normalizer[t] = R(kLeastGradientNormalizer);
      const R inverse = R(1) / normalizer[t];
      for (int i = 0; i < s.M; ++i) u[t * s.M + i] *= inverse;
    }
  }

  void differentiate_normalizers(const Tile<R>& tile, const QueryBuffers& b, const R* normalizer, R* grad) const {
    for (int t = 0; t < tile.rows; ++t) {
      Vec<R> dot{};
      for (int i = 0; i < s.F; i += Simd<R>::lanes)
        dot += load(b.features.turned + t * s.F + i) * load(b.grad_turned + t * s.F + i);
      grad[t] = at_most(-sum_of<R>(dot) / normalizer[t], R(kLargestNormalizerGradient));
    }
  }

  // From the gradients of turned features and normalizers to those of q, key_mean and the temperatures.
  void differentiate_features(const Tile<R>& tile, const Flow<R>& flow, const QueryBuffers& b,
                              const R* grad_normalizer, R* grad_mean, R* grad_heat) const {
    for (int i = 0; i < s.W; i += Simd<R>::lanes) {
      Vec<R> mean_positive{}, mean_negative{}, heat_positive{}, heat_negative{};
      const Vec<R> zero{};
      for (int t = 0; t < tile.rows; ++t) {
        const Vec<R> x = flow.swap ? -load(b.q + t * s.W + i) : load(b.q + t * s.W + i);
        const R* grad_turned = b.grad_turned + t * s.F + i;
        const Vec<R> positive = turned_back(load(grad_turned), tile.row[t], i, s.W);
        const Vec<R> negative = turned_back(load(grad_turned + s.W), tile.column[t], i, s.W);
        const Vec<R> of_mean = grad_normalizer[t] * load(b.features.active + t * s.W + i);
        const Vec<R> mean = x > 0 ? load(flow.key_mean + i) : load(flow.key_mean + s.W + i);
        const Vec<R> grad_feature = (x > 0 ? positive : negative) + grad_normalizer[t] * mean;
        const Vec<R> grad_exponent = grad_feature * load(b.features.slope + t * s.W + i);
        mean_positive += x > 0 ? of_mean : zero;
        mean_negative += x > 0 ? zero : of_mean;
        const Vec<R> of_heat = grad_exponent * x;  // of −temperature for a negative pole
        heat_positive += x > 0 ? of_heat : zero;
        heat_negative -= x > 0 ? zero : of_heat;
        const Vec<R> heat = x > 0 ? load(flow.temperature + i) : -load(flow.temperature + s.W + i);
        const Vec<R> grad = x == 0 ? zero : grad_exponent * heat;
        store(b.grad_q + t * s.W + i, flow.swap ? load(b.grad_q + t * s.W + i) - grad : grad);
      }
      store(grad_mean + i, load(grad_mean + i) + mean_positive);
      store(grad_mean + s.W + i, load(grad_mean + s.W + i) + mean_negative);
      store(grad_heat + i, load(grad_heat + i) + heat_positive);
      store(grad_heat + s.W + i, load(grad_heat + s.W + i) + heat_negative);
    }
  }

  // The sums of a head's parts, divided by N, in the first part's place.
  void combine(int64_t head) const {
    R *grad_state = grad_states + head * s.parts * s.V * s.F, *grad_mean = grad_means + head * s.parts * s.F;
    const R share = R(1) / R(s.tokens);
    for (int64_t part = 1; part < s.parts; ++part) {
      for (int64_t i = 0; i < int64_t(s.V) * s.F; ++i) grad_state[i] += grad_state[part * s.V * s.F + i];
      for (int i = 0; i < s.F; ++i) grad_mean[i] += grad_mean[part * s.F + i];
    }
    for (int64_t i = 0; i < int64_t(s.V) * s.F; ++i) grad_state[i] *= share;
    for (int i = 0; i < s.F; ++i) grad_mean[i] *= share;
  }

  void differentiate_logits(int64_t head) const {
    for (int flow = 0; flow < 2; ++flow)
      for (int i = 0; i < 2 * s.D; ++i) {
        R sum = 0;
        for (int64_t batch = 0; batch < s.batch; ++batch)
          for (int64_t part = 0; part < s.parts; ++part)
            sum += grad_heats[(((batch * s.heads + head) * s.parts + part) * 2 + flow) * s.F + s.feature(i)];
        const R heat = temperatures[(head * 2 + flow) * s.F + s.feature(i)];
        static_cast<R*>(flow ? call.grad_opposite : call.grad_same)[head * 2 * s.D + i] = sum * heat * (R(1) - heat);
      }
  }

  void differentiate_keys(int64_t head, int64_t first, int64_t end, Arena& arena) const {
    const KeyBuffers b(call, s, head, arena);
    const R* transposed = grad_states + head * s.parts * s.V * s.F;
    const R* grad_mean = grad_means + head * s.parts * s.F;
    for (int v = 0; v < s.V; ++v)
      for (int f = 0; f < s.F; ++f) b.grad_state[f * s.V + v] = transposed[v * s.F + f];
    const auto of_features = products.right(transposed, s.F, s.V, s.F, b.transposed_right);
    const auto of_values = products.right(b.grad_state, s.V, s.F, s.V, b.state_right);
    for (int64_t at = first; at < end; at += kTile) {
      const Tile<R> tile(s, turns, head, at, end, call.k, call.v);
      load_tile(call.k, tile, s, b.k);
      for (int half = 0; half < 2; ++half) load_half(call.v, tile, s, half, b.v + half * s.M, s.V);
      if (b.saved.shifted)
        shifted_key_features<R>(tile, s, b.k, b.saved.key_shift, b.features, nullptr);
      else
        key_features<R, true>(tile, s, b.k, b.features, nullptr);
      products.multiply(products.rows(b.v, tile.rows, s.V, b.v_rows), of_features, b.grad_turned, s.F, tile.rows, s.F, s.V,
                        false);
      products.multiply(products.rows(b.features.turned, tile.rows, s.F, b.turned_rows), of_values, b.grad_v, s.V, kTile,
                        s.V, s.F, false);
      for (int t = 0; t < tile.rows; ++t)
        for (int i = 0; i < s.W; i += Simd<R>::lanes) {
          const Vec<R> x = load(b.k + t * s.W + i), slope = load(b.features.slope + t * s.W + i), zero{};
          const R* grad_turned = b.grad_turned + t * s.F + i;
          const Vec<R> positive = turned_back(load(grad_turned), tile.row[t], i, s.W) + load(grad_mean + i);
          const Vec<R> negative =
              turned_back(load(grad_turned + s.W), tile.column[t], i, s.W) + load(grad_mean + s.W + i);
          const Vec<R> grad = x > 0 ? positive * slope : -(negative * slope);
          store(b.grad_k + t * s.W + i, x == 0 ? zero : grad);
        }
      store_tile(b.grad_k, call.grad_k, tile, s);
      for (int half = 0; half < 2; ++half) store_half(b.grad_v + half * s.M, s.V, call.grad_v, tile, s, half);
    }
  }
};

// ---- the entry points ----------------------------------------------------------------------------------------------

inline void forward(const Forward& call, Services& services) {
  if (call.q.type == Type::float64)
    ForwardPass<DirectProducts<double>>(call, services).run();
  else if (call.problem.bf16_products)
    ForwardPass<Bf16Products>(call, services).run();
  else
    ForwardPass<DirectProducts<float>>(call, services).run();
}

inline void backward(const Backward& call, Services& services) {
  if (call.q.type == Type::float64)
    BackwardPass<DirectProducts<double>>(call, services).run();
  else if (call.problem.bf16_products)
    BackwardPass<Bf16Products>(call, services).run();
  else
    BackwardPass<DirectProducts<float>>(call, services).run();
}

}  // namespace POLAFORMER_ISA
}  // namespace polaformer
