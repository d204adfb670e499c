// Features of a tile of keys or queries: exponentials, rotation, normalizers; with and without a shift.

namespace polaformer {
namespace POLAFORMER_ISA {

// Output of the elementwise work on a tile, for the matrix products and for backward.
template <class R>
struct Features {
  R* rotated;  // (kTile, F): rotated features, to be multiplied by the state
  R* active;   // (kTile, W): the feature of the nonzero part
  R* slope;    // (kTile, W): its derivative
};

// e^(x − shift) − e^(−shift) for a positive exponent, without cancellation or overflow; see reference.py.
template <class R>
inline R shifted_feature(R x, R shift) {
  const R small = x < R(kMaxUnshiftedExponent) ? x : R(kMaxUnshiftedExponent);
  const R feature = R(__builtin_expm1(small) * __builtin_exp(-shift));
  return x <= R(kMaxUnshiftedExponent)
             ? feature
             : feature + R(__builtin_exp(x - shift) - __builtin_exp(R(kMaxUnshiftedExponent) - shift));
}

template <class R>
void rotate_tile(const Tile<R>& tile, const Sizes& s, R* features) {
  for (int t = 0; t < tile.rows; ++t)
    for (int i = 0; i < s.W; i += Simd<R>::lanes) {
      R* positive = features + t * s.F + i;
      store(positive, rotate(load(positive), tile.row[t], i, s.W));
      store(positive + s.W, rotate(load(positive + s.W), tile.column[t], i, s.W));
    }
}

// Features of keys without a shift. Adds them to sums (F) unless for_backward. Returns the largest exponent; if it
// exceeds kMaxUnshiftedExponent, discard the results and call shifted_key_features.
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
      store(out.rotated + t * s.F + i, rotate(positive, tile.row[t], i, s.W));
      store(out.rotated + t * s.F + s.W + i, rotate(negative, tile.column[t], i, s.W));
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

// Features of keys with exponents of any size, divided by e^shift. shift: (F).
template <class R>
void shifted_key_features(const Tile<R>& tile, const Sizes& s, const R* k, const R* shift, const Features<R>& out,
                          R* sums) {
  for (int t = 0; t < tile.rows; ++t)
    for (int i = 0; i < s.W; ++i) {
      const R x = k[t * s.W + i], exponent = x > 0 ? x : -x;
      const int nonzero = x > 0 ? i : s.W + i, other = x > 0 ? s.W + i : i;
      const R feature = exponent > 0 ? shifted_feature(exponent, shift[nonzero]) : R(0);
      out.rotated[t * s.F + nonzero] = feature;
      out.rotated[t * s.F + other] = 0;
      out.slope[t * s.W + i] = R(__builtin_exp(exponent - shift[nonzero]));
      if (sums) sums[nonzero] += feature;
    }
  rotate_tile(tile, s, out.rotated);
}

// Parameters of the query features of one head in one flow.
template <class R>
struct Flow {
  bool swap;             // the opposite-sign flow takes the features of −q
  const R* temperature;  // (F): logistic function of the logits
  const R* key_mean;     // (F)
  const R* key_shift;    // (F)
  bool shifted;          // whether key_shift has any element that is not 0
};

// Features of queries without a shift, and their normalizers (kTile). Returns the largest exponent, as above.
template <class R, bool for_backward>
R query_features(const Tile<R>& tile, const Sizes& s, const R* q, const Flow<R>& flow, const Features<R>& out,
                 R* normalizer) {
  Vec<R> largest{};
  for (int t = 0; t < tile.rows; ++t) {
    Vec<R> z{};
    for (int i = 0; i < s.W; i += Simd<R>::lanes) {
      if (flow.swap) tile.prefetch(t, i);
      const Vec<R> x = flow.swap ? -load(q + t * s.W + i) : load(q + t * s.W + i);
      const Vec<R> signed_temperature = x > 0 ? load(flow.temperature + i) : -load(flow.temperature + s.W + i);
      const Vec<R> exponent = x * signed_temperature;
      largest = exponent > largest ? exponent : largest;
      const Vec<R> feature = expm1_of(exponent);
      const Vec<R> positive = x > 0 ? feature : Vec<R>{};
      const Vec<R> negative = x > 0 ? Vec<R>{} : feature;
      z += feature * (x > 0 ? load(flow.key_mean + i) : load(flow.key_mean + s.W + i));
      store(out.rotated + t * s.F + i, rotate(positive, tile.row[t], i, s.W));
      store(out.rotated + t * s.F + s.W + i, rotate(negative, tile.column[t], i, s.W));
      if (for_backward) {
        store(out.active + t * s.W + i, feature);
        store(out.slope + t * s.W + i, feature + R(1));
      }
    }
    normalizer[t] = sum_of<R>(z) + R(kEpsilon);
  }
  return max_of<R>(largest);
}

// Features of queries, and their normalizers, for exponents of queries and keys of any size.
template <class R>
void shifted_query_features(const Tile<R>& tile, const Sizes& s, const R* q, const Flow<R>& flow,
                            const Features<R>& out, R* normalizer) {
  for (int t = 0; t < tile.rows; ++t) {
    R token_shift = 0;
    for (int i = 0; i < s.W; ++i) {
      const R x = flow.swap ? -q[t * s.W + i] : q[t * s.W + i];
      const int nonzero = x > 0 ? i : s.W + i;
      const R exponent = (x > 0 ? x : -x) * flow.temperature[nonzero];
      const R excess = exponent + flow.key_shift[nonzero] - R(kMaxUnshiftedExponent);
      if (exponent > 0 && excess > token_shift) token_shift = excess;
    }
    R z = 0;
    for (int i = 0; i < s.W; ++i) {
      const R x = flow.swap ? -q[t * s.W + i] : q[t * s.W + i];
      const int nonzero = x > 0 ? i : s.W + i, other = x > 0 ? s.W + i : i;
      const R exponent = (x > 0 ? x : -x) * flow.temperature[nonzero];
      const R shift = exponent > 0 ? token_shift - flow.key_shift[nonzero] : R(0);
      const R feature = exponent > 0 ? shifted_feature(exponent, shift) : R(0);
      out.rotated[t * s.F + nonzero] = feature;
      out.rotated[t * s.F + other] = 0;
      out.active[t * s.W + i] = feature;
      out.slope[t * s.W + i] = R(__builtin_exp(exponent - shift));
      z += feature * flow.key_mean[nonzero];
    }
    const R epsilon = R(kEpsilon * __builtin_exp(-token_shift));
    normalizer[t] = z + (epsilon > R(kMinNormalizer) ? epsilon : R(kMinNormalizer));
  }
  rotate_tile(tile, s, out.rotated);
}

template <class R, bool for_backward>
void any_query_features(const Tile<R>& tile, const Sizes& s, const R* q, const Flow<R>& flow, const Features<R>& out,
                        R* normalizer) {
  if (!flow.shifted && query_features<R, for_backward>(tile, s, q, flow, out, normalizer) <= R(kMaxUnshiftedExponent))
    return;
  shifted_query_features(tile, s, q, flow, out, normalizer);
}

// Runs body(task, thread) for every task on the threads of `runtime`.
template <class Body>
void run_parallel(Runtime& runtime, int64_t tasks, Body&& body) {
  auto call = [](void* context, int64_t task, int thread) { (*static_cast<Body*>(context))(task, thread); };
  runtime.parallel(tasks, call, &body);
}

// Temperatures of all heads in the padded layout: (H, 2, F), the same-sign flow first.
template <class R>
R* make_temperatures(const Sizes& s, const void* same_logits, const void* opposite_logits, Runtime& runtime) {
  R* all = static_cast<R*>(runtime.allocate(s.heads * 2 * s.F * sizeof(R)));
  for (int64_t i = 0; i < s.heads * 2 * s.F; ++i) all[i] = 0;
  for (int64_t head = 0; head < s.heads; ++head)
    for (int flow = 0; flow < 2; ++flow) {
      const R* logits = static_cast<const R*>(flow ? opposite_logits : same_logits) + head * 2 * s.D;
      for (int i = 0; i < 2 * s.D; ++i)
        all[(head * 2 + flow) * s.F + s.feature(i)] = R(1) / (R(1) + R(__builtin_exp(-logits[i])));
    }
  return all;
}

// Saved tensors of one head in the padded layout.
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

// Copies the (2D, D) state of a head to the padded layout: (F, V), or (V, F) if transposed.
template <class R>
void unpack_state(const Sizes& s, const R* state, bool transposed, R* out) {
  for (int64_t i = 0; i < int64_t(s.F) * s.V; ++i) out[i] = 0;
  for (int f = 0; f < 2 * s.D; ++f)
    for (int d = 0; d < s.D; ++d)
      out[transposed ? s.value(d) * s.F + s.feature(f) : s.feature(f) * s.V + s.value(d)] = state[f * s.D + d];
}

}  // namespace POLAFORMER_ISA
}  // namespace polaformer
