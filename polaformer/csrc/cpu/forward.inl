namespace polaformer {
namespace POLAFORMER_ISA {

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

}  // namespace POLAFORMER_ISA
}  // namespace polaformer
