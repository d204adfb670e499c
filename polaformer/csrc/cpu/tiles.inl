// Tiling: padded sizes, tasks and splits, tiles of tokens, rotary tables, loads and stores of tiles.

namespace polaformer {
namespace POLAFORMER_ISA {

constexpr int kTile = 64;         // tokens; the last tile may have fewer, with zero rows beyond the last token
constexpr int kRowMultiple = 32;  // rows of a tile are padded to a multiple of this for the matrix units (AMX)
constexpr int64_t kTokensPerTask = 1024;

struct Sizes {
  int64_t batch, heads, tokens, height, width;
  int D, W, F, M, V;
  int64_t tasks_per_head, tokens_per_task;  // for work without sums over tokens
  int64_t splits, tokens_per_split;         // for work with them; each split has its own partial sums

  Sizes(const Problem& p, int lanes)
      : batch(p.batch),
        heads(p.heads),
        tokens(p.height * p.width),
        height(p.height),
        width(p.width),
        D(p.head_dim),
        W(padded(D, lanes)),
        F(2 * W),
        M(padded(D / 2, lanes)),
        V(2 * M) {
    constexpr int64_t enough = 256;  // enough tasks to keep any CPU busy
    tasks_per_head = ceil(tokens, kTokensPerTask);
    const int64_t wanted = ceil(enough, batch * heads);
    splits = tasks_per_head < wanted ? tasks_per_head : wanted;
    tokens_per_task = padded_to_tile(ceil(tokens, tasks_per_head));
    tokens_per_split = padded_to_tile(ceil(tokens, splits));
  }
  static int64_t ceil(int64_t a, int64_t b) { return (a + b - 1) / b; }
  static int64_t padded_to_tile(int64_t count) { return ceil(count, kTile) * kTile; }
  int64_t batch_heads() const { return batch * heads; }
  // Padded index of feature i of 2D, and of value i of D.
  int feature(int i) const { return i < D ? i : W + i - D; }
  int value(int i) const { return i < D / 2 ? i : M + i - D / 2; }
};

// Allocates from one thread's workspace. With null memory it only counts.
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

// Cosine and signed sine of each feature's rotation: rotated[i] = x[i]·cosine[i] + x[i ^ 1]·sine[i].
template <class R>
struct RotaryTables {
  const R *rows, *columns;  // (height, 2W), (width, 2W): W cosines, W sines

  static const R* table(const Sizes& s, const float* frequencies, int64_t length, Runtime& runtime) {
    R* table = static_cast<R*>(runtime.allocate(length * 2 * s.W * sizeof(R)));
    for (int64_t position = 0; position < length; ++position)
      for (int i = 0; i < s.W; i += 2) {
        const R angle = i < s.D ? R(position) * R(frequencies[i / 2]) : R(0);
        const R cosine = sizeof(R) == 4 ? __builtin_cosf(angle) : __builtin_cos(angle);
        const R sine = sizeof(R) == 4 ? __builtin_sinf(angle) : __builtin_sin(angle);
        R* pair = table + position * 2 * s.W + i;
        pair[0] = pair[1] = cosine;
        pair[s.W] = -sine;
        pair[s.W + 1] = sine;
      }
    return table;
  }
};

inline int bytes_of(Type type) { return type == Type::float32 ? 4 : type == Type::bfloat16 ? 2 : 8; }

inline char* address(const StridedTensor& rows, int64_t batch, int64_t head, int64_t token) {
  const int64_t number = batch * rows.batch + head * rows.head + token * rows.token;
  return static_cast<char*>(rows.data) + number * bytes_of(rows.type);
}

// A range of up to kTile tokens of one head, with their rotations.
template <class R>
struct Tile {
  int64_t batch, head, first;
  int count, rows;  // tokens, and padded rows
  const R *row[kTile], *column[kTile];
  const char* ahead[2];    // address of the next tile in two of the tensors that are read
  int64_t ahead_bytes[2];  // stride of tokens in these tensors, in bytes

  Tile(const Sizes& s, const RotaryTables<R>& rotary, int64_t of_head, int64_t first, int64_t end,
       const StridedTensor& read, const StridedTensor& read_too)
      : batch(of_head / s.heads),
        head(of_head % s.heads),
        first(first),
        count(end - first < kTile ? end - first : kTile),
        rows(padded(count, kRowMultiple)),
        ahead{address(read, batch, head, first + kTile), address(read_too, batch, head, first + kTile)},
        ahead_bytes{read.token * bytes_of(read.type), read_too.token * bytes_of(read_too.type)} {
    int64_t y = first / s.width, x = first % s.width;
    for (int t = 0; t < kTile; ++t) {
      row[t] = rotary.rows + (t < count ? y : 0) * 2 * s.W;
      column[t] = rotary.columns + (t < count ? x : 0) * 2 * s.W;
      if (++x == s.width) x = 0, ++y;
    }
  }

  // Prefetches the next tile; called for every vector of every token. The rows are too far apart for the hardware
  // prefetcher. Prefetching beyond the tensor is harmless.
  void prefetch(int t, int i) const {
    for (int tensor = 0; tensor < 2; ++tensor)
      __builtin_prefetch(ahead[tensor] + t * ahead_bytes[tensor] + i * sizeof(R), 0, 2);
  }
};

template <class R>
inline Vec<R> rotate(Vec<R> x, const R* rotary, int i, int W) {
  return x * load(rotary + i) + swap_pairs(x) * load(rotary + W + i);
}
template <class R>
inline Vec<R> rotate_back(Vec<R> x, const R* rotary, int i, int W) {
  return x * load(rotary + i) - swap_pairs(x) * load(rotary + W + i);
}

template <class R>
void load_numbers(const char* from, Type type, R* to, int count, int padded_count) {
  if (type == Type::bfloat16) {
    auto* bits = reinterpret_cast<const uint16_t*>(from);
    for (int i = 0; i < count; ++i) to[i] = __builtin_bit_cast(float, uint32_t(bits[i]) << 16);
  } else {  // already in the compute type
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
      const float limited = clamp_magnitude(float(from[i]), kLargestBf16);
      const uint32_t bits = __builtin_bit_cast(uint32_t, limited);
      const uint32_t even = bits + 0x7fff + ((bits >> 16) & 1);
      out[i] = uint16_t((limited == limited ? even : bits | 0x400000) >> 16);
    }
  } else {
    auto* out = reinterpret_cast<R*>(to);
    for (int i = 0; i < count; ++i) out[i] = clamp_magnitude(from[i], sizeof(R) == 4 ? R(FLT_MAX) : R(DBL_MAX));
  }
}

// Loads a tile of queries or keys: (kTile, W).
template <class R>
void load_tile(const StridedTensor& rows, const Tile<R>& tile, const Sizes& s, R* to) {
  for (int t = 0; t < tile.count; ++t)
    load_numbers(address(rows, tile.batch, tile.head, tile.first + t), rows.type, to + t * s.W, s.D, s.W);
  for (int i = tile.count * s.W; i < tile.rows * s.W; ++i) to[i] = 0;
}

template <class R>
void store_tile(const R* from, const StridedTensor& rows, const Tile<R>& tile, const Sizes& s) {
  for (int t = 0; t < tile.count; ++t)
    store_numbers(from + t * s.W, rows.type, address(rows, tile.batch, tile.head, tile.first + t), s.D);
}

// Loads a tile of one half (0 or 1) of the values: (kTile, M) with rows `row` apart.
template <class R>
void load_half(const StridedTensor& rows, const Tile<R>& tile, const Sizes& s, int half, R* to, int row) {
  const int64_t skipped = half * (s.D / 2) * bytes_of(rows.type);
  for (int t = 0; t < tile.count; ++t) {
    const char* from = address(rows, tile.batch, tile.head, tile.first + t) + skipped;
    load_numbers(from, rows.type, to + t * row, s.D / 2, s.M);
  }
  for (int t = tile.count; t < tile.rows; ++t)
    for (int i = 0; i < s.M; ++i) to[t * row + i] = 0;
}

template <class R>
void store_half(const R* from, int row, const StridedTensor& rows, const Tile<R>& tile, const Sizes& s, int half) {
  const int64_t skipped = half * (s.D / 2) * bytes_of(rows.type);
  for (int t = 0; t < tile.count; ++t) {
    char* to = address(rows, tile.batch, tile.head, tile.first + t) + skipped;
    store_numbers(from + t * row, rows.type, to, s.D / 2);
  }
}

}  // namespace POLAFORMER_ISA
}  // namespace polaformer
