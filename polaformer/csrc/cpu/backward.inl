namespace polaformer {
namespace POLAFORMER_ISA {

// Backward pass of polarity attention. First over queries, with u = grad_out / z, for each flow
//     grad of rotate(φ_q) = u Sᵀ,  grad of z = −(rotate(φ_q) · u Sᵀ) / z,  grad of S = Σ rotate(φ_q)ᵀ u,
// and the sums for key_mean and the logits; then over keys, with those sums.
template <class Gemm>
struct BackwardPass {
  using R = typename Gemm::Real;
  const BackwardParams& params;
  Runtime& runtime;
  const Sizes s;
  const Gemm gemm;
  const RotaryTables<R> rotary;
  const R* temperatures;
  R *grad_states, *grad_means, *grad_temperatures;  // per split: (V, F), (F), (2, F)
  int64_t workspace_bytes;
  char* workspace;

  struct QueryBuffers {
    SavedHead<R> saved;
    R *state, *q, *grad_q, *u, *grad_rotated;
    Features<R> features;
    void *u_rows, *u_columns, *rotated, *b_buffer[2];
    QueryBuffers(const BackwardParams& params, const Sizes& s, int64_t head, Arena& arena)
        : saved(s, params.key_mean, params.key_shift, head, arena),
          state(arena.take<R>(s.F * s.V)),
          q(arena.take<R>(kTile * s.W)),
          grad_q(arena.take<R>(kTile * s.W)),
          u(arena.take<R>(kTile * s.M)),
          grad_rotated(arena.take<R>(kTile * s.F)),
          features{arena.take<R>(kTile * s.F), arena.take<R>(kTile * s.W), arena.take<R>(kTile * s.W)},
          u_rows(arena.bytes(Gemm::packed_a_bytes(kTile, s.M))),
          u_columns(arena.bytes(Gemm::packed_a_bytes(s.M, kTile))),
          rotated(arena.bytes(Gemm::packed_b_bytes(kTile, s.F))),
          b_buffer{arena.bytes(Gemm::packed_b_bytes(s.M, s.F)), arena.bytes(Gemm::packed_b_bytes(s.M, s.F))} {}
  };
  struct KeyBuffers {
    SavedHead<R> saved;
    R *grad_state, *k, *grad_k, *v, *grad_v, *grad_rotated;
    Features<R> features;
    void *v_rows, *rotated_rows, *state_buffer, *transposed_buffer;
    KeyBuffers(const BackwardParams& params, const Sizes& s, int64_t head, Arena& arena)
        : saved(s, params.key_mean, params.key_shift, head, arena),
          grad_state(arena.take<R>(s.F * s.V)),
          k(arena.take<R>(kTile * s.W)),
          grad_k(arena.take<R>(kTile * s.W)),
          v(arena.take<R>(kTile * s.V)),
          grad_v(arena.take<R>(kTile * s.V)),
          grad_rotated(arena.take<R>(kTile * s.F)),
          features{arena.take<R>(kTile * s.F), nullptr, arena.take<R>(kTile * s.W)},
          v_rows(arena.bytes(Gemm::packed_a_bytes(kTile, s.V))),
          rotated_rows(arena.bytes(Gemm::packed_a_bytes(kTile, s.F))),
          state_buffer(arena.bytes(Gemm::packed_b_bytes(s.F, s.V))),
          transposed_buffer(arena.bytes(Gemm::packed_b_bytes(s.V, s.F))) {}
  };

  BackwardPass(const BackwardParams& params, Runtime& runtime)
      : params(params),
        runtime(runtime),
        s(params.problem, Simd<R>::lanes),
        gemm(runtime),
        rotary{RotaryTables<R>::table(s, params.problem.frequencies, s.height, runtime),
               RotaryTables<R>::table(s, params.problem.frequencies, s.width, runtime)},
        temperatures(make_temperatures<R>(s, params.same_logits, params.opposite_logits, runtime)) {
    const int64_t splits = s.batch_heads() * s.splits;
    grad_states = static_cast<R*>(runtime.allocate(splits * s.V * s.F * sizeof(R)));
    grad_means = static_cast<R*>(runtime.allocate(splits * s.F * sizeof(R)));
    grad_temperatures = static_cast<R*>(runtime.allocate(splits * 2 * s.F * sizeof(R)));
    Arena keys{nullptr}, queries{nullptr};
    KeyBuffers{params, s, 0, keys};
    QueryBuffers{params, s, 0, queries};
    workspace_bytes = keys.used > queries.used ? keys.used : queries.used;
    workspace = static_cast<char*>(runtime.allocate(runtime.threads() * workspace_bytes));
  }

  void run() {
    run_parallel(runtime, s.batch_heads() * s.splits, [this](int64_t task, int thread) {
      Arena arena{workspace + thread * workspace_bytes};
      const int64_t first = task % s.splits * s.tokens_per_split, end = first + s.tokens_per_split;
      differentiate_queries(task, first, end < s.tokens ? end : s.tokens, arena);
    });
    run_parallel(runtime, s.batch_heads(), [this](int64_t head, int) { combine_splits(head); });
    run_parallel(runtime, s.heads, [this](int64_t head, int) { differentiate_logits(head); });
    run_parallel(runtime, s.batch_heads() * s.tasks_per_head, [this](int64_t task, int thread) {
      Arena arena{workspace + thread * workspace_bytes};
      const int64_t first = task % s.tasks_per_head * s.tokens_per_task, end = first + s.tokens_per_task;
      differentiate_keys(task / s.tasks_per_head, first, end < s.tokens ? end : s.tokens, arena);
    });
  }

  void differentiate_queries(int64_t split, int64_t first, int64_t end, Arena& arena) const {
    const int64_t head = split / s.splits;
    const QueryBuffers b(params, s, head, arena);
    R *grad_state = grad_states + split * s.V * s.F, *grad_mean = grad_means + split * s.F;
    R* grad_temperature = grad_temperatures + split * 2 * s.F;
    for (int i = 0; i < s.F; ++i) grad_mean[i] = grad_temperature[i] = grad_temperature[s.F + i] = 0;
    if (first >= end)
      for (int64_t i = 0; i < int64_t(s.V) * s.F; ++i) grad_state[i] = 0;
    unpack_state(s, static_cast<const R*>(params.state) + head * 2 * s.D * s.D, true, b.state);
    const typename Gemm::OperandB halves[2] = {gemm.pack_b(b.state, s.F, s.M, s.F, b.b_buffer[0]),
                                               gemm.pack_b(b.state + s.M * s.F, s.F, s.M, s.F, b.b_buffer[1])};
    R normalizer[kTile], grad_normalizer[kTile];
    for (int64_t at = first; at < end; at += kTile) {
      const Tile<R> tile(s, rotary, head, at, end, params.q, params.grad_out);
      load_tile(params.q, tile, s, b.q);
      for (int i = 0; i < tile.rows * s.W; ++i) b.grad_q[i] = 0;
      for (int half = 0; half < 2; ++half) {
        const R* temperature = temperatures + (tile.head * 2 + half) * s.F;
        const Flow<R> flow{half == 1, temperature, b.saved.key_mean, b.saved.key_shift, b.saved.shifted};
        any_query_features<R, true>(tile, s, b.q, flow, b.features, normalizer);
        load_half(params.grad_out, tile, s, half, b.u, s.M);
        divide(tile, b.u, normalizer);
        gemm.multiply(gemm.pack_a(b.u, tile.rows, s.M, b.u_rows), halves[half], b.grad_rotated, s.F, tile.rows, s.F,
                      s.M, false);
        const auto features = gemm.pack_b(b.features.rotated, s.F, tile.rows, s.F, b.rotated);
        gemm.multiply(gemm.pack_a_transposed(b.u, s.M, tile.rows, b.u_columns), features, grad_state + half * s.M * s.F,
                      s.F, s.M, s.F, tile.rows, at > first);
        differentiate_normalizers(tile, b, normalizer, grad_normalizer);
        differentiate_features(tile, flow, b, grad_normalizer, grad_mean, grad_temperature + half * s.F);
      }
      store_tile(b.grad_q, params.grad_q, tile, s);
    }
  }

  void divide(const Tile<R>& tile, R* u, R* normalizer) const {
    for (int t = 0; t < tile.rows; ++t) {
      if (normalizer[t] < R(kMinGradientNormalizer)) normalizer[t] = R(kMinGradientNormalizer);
      const R inverse = R(1) / normalizer[t];
      for (int i = 0; i < s.M; ++i) u[t * s.M + i] *= inverse;
    }
  }

  void differentiate_normalizers(const Tile<R>& tile, const QueryBuffers& b, const R* normalizer, R* grad) const {
    for (int t = 0; t < tile.rows; ++t) {
      Vec<R> dot{};
      for (int i = 0; i < s.F; i += Simd<R>::lanes)
        dot += load(b.features.rotated + t * s.F + i) * load(b.grad_rotated + t * s.F + i);
      grad[t] = clamp_magnitude(-sum_of<R>(dot) / normalizer[t], R(kMaxNormalizerGradient));
    }
  }

  // Backpropagates from rotated features and normalizers to q, key_mean and the temperatures.
  void differentiate_features(const Tile<R>& tile, const Flow<R>& flow, const QueryBuffers& b, const R* grad_normalizer,
                              R* grad_mean, R* grad_temperature) const {
    for (int i = 0; i < s.W; i += Simd<R>::lanes) {
      Vec<R> mean_positive{}, mean_negative{}, temperature_positive{}, temperature_negative{};
      const Vec<R> zero{};
      for (int t = 0; t < tile.rows; ++t) {
        const Vec<R> x = flow.swap ? -load(b.q + t * s.W + i) : load(b.q + t * s.W + i);
        const R* grad_rotated = b.grad_rotated + t * s.F + i;
        const Vec<R> positive = rotate_back(load(grad_rotated), tile.row[t], i, s.W);
        const Vec<R> negative = rotate_back(load(grad_rotated + s.W), tile.column[t], i, s.W);
        const Vec<R> of_mean = grad_normalizer[t] * load(b.features.active + t * s.W + i);
        const Vec<R> mean = x > 0 ? load(flow.key_mean + i) : load(flow.key_mean + s.W + i);
        const Vec<R> grad_feature = (x > 0 ? positive : negative) + grad_normalizer[t] * mean;
        const Vec<R> grad_exponent = grad_feature * load(b.features.slope + t * s.W + i);
        mean_positive += x > 0 ? of_mean : zero;
        mean_negative += x > 0 ? zero : of_mean;
        const Vec<R> of_temperature = grad_exponent * x;  // for a negative part, the gradient of −temperature
        temperature_positive += x > 0 ? of_temperature : zero;
        temperature_negative -= x > 0 ? zero : of_temperature;
        const Vec<R> signed_temperature = x > 0 ? load(flow.temperature + i) : -load(flow.temperature + s.W + i);
        const Vec<R> grad = x == 0 ? zero : grad_exponent * signed_temperature;
        store(b.grad_q + t * s.W + i, flow.swap ? load(b.grad_q + t * s.W + i) - grad : grad);
      }
      store(grad_mean + i, load(grad_mean + i) + mean_positive);
      store(grad_mean + s.W + i, load(grad_mean + s.W + i) + mean_negative);
      store(grad_temperature + i, load(grad_temperature + i) + temperature_positive);
      store(grad_temperature + s.W + i, load(grad_temperature + s.W + i) + temperature_negative);
    }
  }

  // Adds up the splits of a head, divides by N, and leaves the sums in the first split's buffers.
  void combine_splits(int64_t head) const {
    R *grad_state = grad_states + head * s.splits * s.V * s.F, *grad_mean = grad_means + head * s.splits * s.F;
    const R share = R(1) / R(s.tokens);
    for (int64_t split = 1; split < s.splits; ++split) {
      for (int64_t i = 0; i < int64_t(s.V) * s.F; ++i) grad_state[i] += grad_state[split * s.V * s.F + i];
      for (int i = 0; i < s.F; ++i) grad_mean[i] += grad_mean[split * s.F + i];
    }
    for (int64_t i = 0; i < int64_t(s.V) * s.F; ++i) grad_state[i] *= share;
    for (int i = 0; i < s.F; ++i) grad_mean[i] *= share;
  }

  void differentiate_logits(int64_t head) const {
    for (int flow = 0; flow < 2; ++flow)
      for (int i = 0; i < 2 * s.D; ++i) {
        R sum = 0;
        for (int64_t batch = 0; batch < s.batch; ++batch)
          for (int64_t split = 0; split < s.splits; ++split)
            sum += grad_temperatures[(((batch * s.heads + head) * s.splits + split) * 2 + flow) * s.F + s.feature(i)];
        const R temperature = temperatures[(head * 2 + flow) * s.F + s.feature(i)];
        static_cast<R*>(flow ? params.grad_opposite : params.grad_same)[head * 2 * s.D + i] =
            sum * temperature * (R(1) - temperature);
      }
  }

  void differentiate_keys(int64_t head, int64_t first, int64_t end, Arena& arena) const {
    const KeyBuffers b(params, s, head, arena);
    const R* transposed = grad_states + head * s.splits * s.V * s.F;
    const R* grad_mean = grad_means + head * s.splits * s.F;
    for (int v = 0; v < s.V; ++v)
      for (int f = 0; f < s.F; ++f) b.grad_state[f * s.V + v] = transposed[v * s.F + f];
    const auto of_features = gemm.pack_b(transposed, s.F, s.V, s.F, b.transposed_buffer);
    const auto of_values = gemm.pack_b(b.grad_state, s.V, s.F, s.V, b.state_buffer);
    for (int64_t at = first; at < end; at += kTile) {
      const Tile<R> tile(s, rotary, head, at, end, params.k, params.v);
      load_tile(params.k, tile, s, b.k);
      for (int half = 0; half < 2; ++half) load_half(params.v, tile, s, half, b.v + half * s.M, s.V);
      if (b.saved.shifted)
        shifted_key_features<R>(tile, s, b.k, b.saved.key_shift, b.features, nullptr);
      else
        key_features<R, true>(tile, s, b.k, b.features, nullptr);
      gemm.multiply(gemm.pack_a(b.v, tile.rows, s.V, b.v_rows), of_features, b.grad_rotated, s.F, tile.rows, s.F, s.V,
                    false);
      gemm.multiply(gemm.pack_a(b.features.rotated, tile.rows, s.F, b.rotated_rows), of_values, b.grad_v, s.V,
                    tile.rows, s.V, s.F, false);
      for (int t = 0; t < tile.rows; ++t)
        for (int i = 0; i < s.W; i += Simd<R>::lanes) {
          const Vec<R> x = load(b.k + t * s.W + i), slope = load(b.features.slope + t * s.W + i), zero{};
          const R* grad_rotated = b.grad_rotated + t * s.F + i;
          const Vec<R> positive = rotate_back(load(grad_rotated), tile.row[t], i, s.W) + load(grad_mean + i);
          const Vec<R> negative =
              rotate_back(load(grad_rotated + s.W), tile.column[t], i, s.W) + load(grad_mean + s.W + i);
          const Vec<R> grad = x > 0 ? positive * slope : -(negative * slope);
          store(b.grad_k + t * s.W + i, x == 0 ? zero : grad);
        }
      store_tile(b.grad_k, params.grad_k, tile, s);
      for (int half = 0; half < 2; ++half) store_half(b.grad_v + half * s.M, s.V, params.grad_v, tile, s, half);
    }
  }
};

}  // namespace POLAFORMER_ISA
}  // namespace polaformer
