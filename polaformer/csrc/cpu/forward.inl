namespace polaformer {
namespace POLAFORMER_ISA {

// Forward pass: state = Σ rotate(φ_k)ᵀ v / N, key_mean = Σ φ_k / N, out = rotate(φ_q) state / (φ_q key_mean + ε).
template <class Gemm>
struct ForwardPass {
  using R = typename Gemm::Real;
  const ForwardParams& params;
  Runtime& runtime;
  const Sizes s;
  const Gemm gemm;
  const RotaryTables<R> rotary;
  const R* temperatures;
  R *states, *sums, *largest;  // per split: (V, F), (F), the largest key exponent
  int64_t workspace_bytes;
  char* workspace;

  struct KeyBuffers {
    R *k, *v;
    Features<R> features;
    void *a_buffer, *b_buffer;
    KeyBuffers(const Sizes& s, Arena& arena)
        : k(arena.take<R>(kTile * s.W)),
          v(arena.take<R>(kTile * s.V)),
          features{arena.take<R>(kTile * s.F), nullptr, arena.take<R>(kTile * s.W)},
          a_buffer(arena.bytes(Gemm::packed_a_bytes(s.V, kTile))),
          b_buffer(arena.bytes(Gemm::packed_b_bytes(kTile, s.F))) {}
  };
  struct QueryBuffers {
    SavedHead<R> saved;
    R *state, *q, *product;
    Features<R> features;
    void *a_buffer, *b_buffer[2];
    QueryBuffers(const ForwardParams& params, const Sizes& s, int64_t head, Arena& arena)
        : saved(s, params.key_mean, params.key_shift, head, arena),
          state(arena.take<R>(s.F * s.V)),
          q(arena.take<R>(kTile * s.W)),
          product(arena.take<R>(kTile * s.M)),
          features{arena.take<R>(kTile * s.F), arena.take<R>(kTile * s.W), arena.take<R>(kTile * s.W)},
          a_buffer(arena.bytes(Gemm::packed_a_bytes(kTile, s.F))),
          b_buffer{arena.bytes(Gemm::packed_b_bytes(s.F, s.M)), arena.bytes(Gemm::packed_b_bytes(s.F, s.M))} {}
  };

  ForwardPass(const ForwardParams& params, Runtime& runtime)
      : params(params),
        runtime(runtime),
        s(params.problem, Simd<R>::lanes),
        gemm(runtime),
        rotary{RotaryTables<R>::table(s, params.problem.frequencies, s.height, runtime),
               RotaryTables<R>::table(s, params.problem.frequencies, s.width, runtime)},
        temperatures(make_temperatures<R>(s, params.same_logits, params.opposite_logits, runtime)) {
    const int64_t splits = s.batch_heads() * s.splits;
    states = static_cast<R*>(runtime.allocate(splits * s.V * s.F * sizeof(R)));
    sums = static_cast<R*>(runtime.allocate(splits * s.F * sizeof(R)));
    largest = static_cast<R*>(runtime.allocate(splits * sizeof(R)));
    Arena keys{nullptr}, queries{nullptr};
    KeyBuffers{s, keys};
    QueryBuffers{params, s, 0, queries};
    workspace_bytes = keys.used > queries.used ? keys.used : queries.used;
    workspace = static_cast<char*>(runtime.allocate(runtime.threads() * workspace_bytes));
  }

  void run() {
    run_parallel(runtime, s.batch_heads() * s.splits, [this](int64_t task, int thread) {
      Arena arena{workspace + thread * workspace_bytes};
      const int64_t first = task % s.splits * s.tokens_per_split, end = first + s.tokens_per_split;
      R *state = states + task * s.V * s.F, *sum = sums + task * s.F;
      largest[task] = accumulate(task / s.splits, first, end < s.tokens ? end : s.tokens, nullptr, arena, state, sum);
    });
    run_parallel(runtime, s.batch_heads(), [this](int64_t head, int thread) {
      Arena arena{workspace + thread * workspace_bytes};
      combine_splits(head, arena);
    });
    run_parallel(runtime, s.batch_heads() * s.tasks_per_head, [this](int64_t task, int thread) {
      Arena arena{workspace + thread * workspace_bytes};
      const int64_t first = task % s.tasks_per_head * s.tokens_per_task, end = first + s.tokens_per_task;
      attend(task / s.tasks_per_head, first, end < s.tokens ? end : s.tokens, arena);
    });
  }

  // Sums over tokens first … end − 1: state (V, F), sum (F). With a shift (F), exponents may be of any size.
  R accumulate(int64_t head, int64_t first, int64_t end, const R* shift, Arena& arena, R* state, R* sum) const {
    const KeyBuffers b(s, arena);
    R largest = 0;
    for (int i = 0; i < s.F; ++i) sum[i] = 0;
    if (first >= end)
      for (int64_t i = 0; i < int64_t(s.V) * s.F; ++i) state[i] = 0;
    for (int64_t at = first; at < end; at += kTile) {
      const Tile<R> tile(s, rotary, head, at, end, params.k, params.v);
      load_tile(params.k, tile, s, b.k);
      for (int half = 0; half < 2; ++half) load_half(params.v, tile, s, half, b.v + half * s.M, s.V);
      if (shift) {
        shifted_key_features(tile, s, b.k, shift, b.features, sum);
      } else {
        const R here = key_features<R, false>(tile, s, b.k, b.features, sum);
        largest = here > largest ? here : largest;
      }
      const auto values = gemm.pack_a_transposed(b.v, s.V, tile.rows, b.a_buffer);
      const auto features = gemm.pack_b(b.features.rotated, s.F, tile.rows, s.F, b.b_buffer);
      gemm.multiply(values, features, state, s.F, s.V, s.F, tile.rows, at > first);
    }
    return largest;
  }

  void combine_splits(int64_t head, Arena& arena) const {
    R *state = states + head * s.splits * s.V * s.F, *sum = sums + head * s.splits * s.F;
    R top = largest[head * s.splits];
    for (int64_t split = 1; split < s.splits; ++split) {
      for (int64_t i = 0; i < int64_t(s.V) * s.F; ++i) state[i] += state[split * s.V * s.F + i];
      for (int i = 0; i < s.F; ++i) sum[i] += sum[split * s.F + i];
      top = largest[head * s.splits + split] > top ? largest[head * s.splits + split] : top;
    }
    R* shift = arena.take<R>(s.F);
    for (int i = 0; i < s.F; ++i) shift[i] = 0;
    if (top > R(kMaxUnshiftedExponent)) {
      find_shift(head, arena, shift);
      accumulate(head, 0, s.tokens, shift, arena, state, sum);
    }
    for (int f = 0; f < 2 * s.D; ++f) {
      const int from = s.feature(f);
      static_cast<R*>(params.key_mean)[head * 2 * s.D + f] = sum[from] / R(s.tokens);
      static_cast<R*>(params.key_shift)[head * s.D + f / 2] = shift[from];
      for (int d = 0; d < s.D; ++d)
        static_cast<R*>(params.state)[(head * 2 * s.D + f) * s.D + d] = state[s.value(d) * s.F + from] / R(s.tokens);
    }
  }

  // Excess of the largest exponent of each pair of key features over kMaxUnshiftedExponent: (F).
  void find_shift(int64_t head, Arena arena, R* shift) const {
    R* k = arena.take<R>(kTile * s.W);
    for (int64_t at = 0; at < s.tokens; at += kTile) {
      const Tile<R> tile(s, rotary, head, at, s.tokens, params.k, params.k);
      load_tile(params.k, tile, s, k);
      for (int t = 0; t < tile.count; ++t)
        for (int i = 0; i < s.W; ++i) {
          const R x = k[t * s.W + i], excess = (x > 0 ? x : -x) - R(kMaxUnshiftedExponent);
          const int first = (x > 0 ? i : s.W + i) & ~1;
          if (excess > shift[first]) shift[first] = shift[first + 1] = excess;
        }
    }
  }

  void attend(int64_t head, int64_t first, int64_t end, Arena& arena) const {
    const QueryBuffers b(params, s, head, arena);
    unpack_state(s, static_cast<const R*>(params.state) + head * 2 * s.D * s.D, false, b.state);
    const typename Gemm::OperandB halves[2] = {gemm.pack_b(b.state, s.V, s.F, s.M, b.b_buffer[0]),
                                               gemm.pack_b(b.state + s.M, s.V, s.F, s.M, b.b_buffer[1])};
    R normalizer[kTile];
    for (int64_t at = first; at < end; at += kTile) {
      const Tile<R> tile(s, rotary, head, at, end, params.q, params.q);
      load_tile(params.q, tile, s, b.q);
      for (int half = 0; half < 2; ++half) {
        const R* temperature = temperatures + (tile.head * 2 + half) * s.F;
        const Flow<R> flow{half == 1, temperature, b.saved.key_mean, b.saved.key_shift, b.saved.shifted};
        any_query_features<R, false>(tile, s, b.q, flow, b.features, normalizer);
        const auto features = gemm.pack_a(b.features.rotated, tile.rows, s.F, b.a_buffer);
        gemm.multiply(features, halves[half], b.product, s.M, tile.rows, s.M, s.F, false);
        divide(tile, b.product, normalizer);
        store_half(b.product, s.M, params.out, tile, s, half);
      }
    }
  }

  // Divides the products of a tile (kTile, M) by their normalizers.
  void divide(const Tile<R>& tile, R* products, const R* normalizer) const {
    for (int t = 0; t < tile.rows; ++t) {
      const R inverse = R(1) / normalizer[t];
      for (int i = 0; i < s.M; i += Simd<R>::lanes)
        store(products + t * s.M + i, load(products + t * s.M + i) * inverse);
    }
  }
};

}  // namespace POLAFORMER_ISA
}  // namespace polaformer
