// GEMM of small matrices that are in the cache: in the compute type by register blocks of our own, in bfloat16 by
// PyTorch's kernel for this CPU.

namespace polaformer {
namespace POLAFORMER_ISA {

// Register block of rows × columns vectors of C: C = A B, or C += A B if `add`.
template <class R, int rows, int columns>
inline void micro_kernel(const R* a, int64_t a_row, int64_t a_column, const R* b, int64_t b_row, R* c, int64_t c_row,
                         int depth, bool add) {
  constexpr int lanes = Simd<R>::lanes;
  Vec<R> sums[rows][columns];
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < columns; ++j) sums[i][j] = add ? load(c + i * c_row + j * lanes) : Vec<R>{};
  for (int k = 0; k < depth; ++k) {
    Vec<R> b_vectors[columns];
    for (int j = 0; j < columns; ++j) b_vectors[j] = load(b + k * b_row + j * lanes);
    for (int i = 0; i < rows; ++i) {
      const R a_value = a[i * a_row + k * a_column];
      for (int j = 0; j < columns; ++j) sums[i][j] += a_value * b_vectors[j];
    }
  }
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < columns; ++j) store(c + i * c_row + j * lanes, sums[i][j]);
}

template <class R, int columns>
void gemm_panel(const R* a, int64_t a_row, int64_t a_column, const R* b, int64_t b_row, R* c, int64_t c_row, int m,
                int depth, bool add) {
  constexpr int rows = POLAFORMER_BLOCK_ROWS;
  int i = 0;
  for (; i + rows <= m; i += rows)
    micro_kernel<R, rows, columns>(a + i * a_row, a_row, a_column, b, b_row, c + i * c_row, c_row, depth, add);
  for (; i < m; ++i)
    micro_kernel<R, 1, columns>(a + i * a_row, a_row, a_column, b, b_row, c + i * c_row, c_row, depth, add);
}

// GEMM in the compute type: operands are used in place, "packing" copies nothing.
template <class R>
struct DirectGemm {
  using Real = R;
  struct OperandA {
    const R* data;
    int64_t row, column;
  };
  struct OperandB {
    const R* data;
    int64_t row;
  };
  explicit DirectGemm(Runtime&) {}
  static constexpr int64_t packed_a_bytes(int, int) { return 0; }
  static constexpr int64_t packed_b_bytes(int, int) { return 0; }
  static OperandA pack_a(const R* x, int, int depth, void*) { return {x, depth, 1}; }
  static OperandA pack_a_transposed(const R* x, int m, int, void*) { return {x, 1, m}; }
  static OperandB pack_b(const R* x, int row, int, int, void*) { return {x, row}; }

  void multiply(OperandA a, OperandB b, R* c, int c_row, int m, int n, int depth, bool add) const {
    constexpr int lanes = Simd<R>::lanes;
    int j = 0;
    for (; j + 3 * lanes <= n; j += 3 * lanes)
      gemm_panel<R, 3>(a.data, a.row, a.column, b.data + j, b.row, c + j, c_row, m, depth, add);
    for (; j + 2 * lanes <= n; j += 2 * lanes)
      gemm_panel<R, 2>(a.data, a.row, a.column, b.data + j, b.row, c + j, c_row, m, depth, add);
    for (; j < n; j += lanes) gemm_panel<R, 1>(a.data, a.row, a.column, b.data + j, b.row, c + j, c_row, m, depth, add);
  }
};

// Bits of floats rounded to bfloat16 (to nearest even), in the upper halves of the words.
inline Words rounded(Vec<float> x) {
  const Words bits = __builtin_bit_cast(Words, x);
  return bits + 0x7fff + ((bits >> 16) & 1);
}

// GEMM in bfloat16 with float32 accumulation by PyTorch's kernel: packing rounds operands into buffers.
struct Bf16Gemm {
  using Real = float;
  struct OperandA {
    const uint16_t* data;
    int row;
  };
  struct OperandB {
    const uint16_t* data;
    int row;
  };
  Runtime& runtime;
  explicit Bf16Gemm(Runtime& runtime) : runtime(runtime) {}
  static constexpr int64_t packed_a_bytes(int m, int depth) { return 2L * m * depth; }
  static constexpr int64_t packed_b_bytes(int depth, int n) { return 2L * depth * n; }

  // A = x, (M, depth) contiguous.
  static OperandA pack_a(const float* x, int m, int depth, void* buffer) {
    auto* out = static_cast<uint16_t*>(buffer);
    for (int64_t i = 0; i < int64_t(m) * depth; i += Simd<float>::lanes)
      *reinterpret_cast<HalfWords*>(out + i) = __builtin_convertvector(rounded(load(x + i)) >> 16, HalfWords);
    return {out, depth};
  }

  // A = the transpose of x, (depth, M) contiguous.
  static OperandA pack_a_transposed(const float* x, int m, int depth, void* buffer) {
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

  // B = x, (depth, N) with rows `row` apart.
  static OperandB pack_b(const float* x, int row, int depth, int n, void* buffer) {
    auto* out = static_cast<int32_t*>(buffer);
    for (int k = 0; k < depth; k += 2)
      for (int j = 0; j < n; j += Simd<float>::lanes)
        *reinterpret_cast<Words*>(out + k / 2 * n + j) = interleaved(x + k * row + j, row);
    return {static_cast<uint16_t*>(buffer), n};
  }

  // Pairs of elements of x and of the row below, in the lower and upper halves of each word, as brgemm's B needs them.
  static Words interleaved(const float* x, int64_t row) {
    return (rounded(load(x + row)) & -65536) | ((rounded(load(x)) >> 16) & 0xffff);
  }

  void multiply(OperandA a, OperandB b, float* c, int c_row, int m, int n, int depth, bool add) const {
    runtime.multiply_bf16(m, n, depth, a.data, a.row, b.data, b.row, c, c_row, add);
  }
};

}  // namespace POLAFORMER_ISA
}  // namespace polaformer
