// Program that prints what every lane of a warp receives from each function of ptx.cuh for fixed inputs, and every
// thread of a warpgroup from wgmma.cuh, if the code for the GPU has that: on a GPU if built by nvcc, from the emulator
// if built by g++. One line per function and lane: name, lane, words in hex.
#include <cstdio>
#include <cstdlib>

#include "ptx.cuh"

namespace {

using namespace polaformer;

constexpr int kWords = 16;  // inputs of a lane, and maximum outputs of a function
constexpr const char* kNames[] = {
    "low_signs",         "high_signs",    "low_halves",     "high_halves",       "fma_bf16x2",       "negate_bf16x2",
    "absolute_bf16x2",   "max_bf16x2",    "nonzero_bf16x2", "pack_bf16",         "pack_bf16_finite", "round_to_tf32",
    "half_to_float",     "float_to_half", "min_or_nan",     "max_or_nan",        "movmatrix_trans",  "ldmatrix_x4",
    "ldmatrix_x4_trans", "cp_async",      "load_words",     "mma_m16n8k16_bf16", "mma_m16n8k8_tf32", "ex2_approx",
    "lg2_approx",        "reciprocal",
};
constexpr int kCount = sizeof kNames / sizeof kNames[0];

struct Arguments {
  const uint32_t* given;  // (32, kWords)
  uint32_t* received;     // (kCount, 32, kWords)
};

__device__ __forceinline__ float as_float(uint32_t x) { return __builtin_bit_cast(float, x); }
__device__ __forceinline__ uint32_t as_word(float x) { return __builtin_bit_cast(uint32_t, x); }

struct Shared {
  alignas(16) uint32_t words[32 * 8];
};

__global__ void run(const Arguments a) {
  Shared& shared = shared_memory<Shared>();
  const int lane = threadIdx.x;
  uint32_t w[kWords];
  for (int i = 0; i < kWords; ++i) w[i] = a.given[lane * kWords + i];
  int next = 0;
  const auto receive = [&](auto... words) {
    uint32_t* next_word = a.received + (next++ * 32 + lane) * kWords;
    ((*next_word++ = words), ...);
  };
  receive(low_signs(w[0], w[1]));
  receive(high_signs(w[0], w[1]));
  receive(low_halves(w[0], w[1]));
  receive(high_halves(w[0], w[1]));
  receive(fma_bf16x2(w[0], w[1], w[2]));
  receive(negate_bf16x2(w[0]));
  receive(absolute_bf16x2(w[0]));
  receive(max_bf16x2(w[0], w[1]));
  receive(nonzero_bf16x2(w[3]), nonzero_bf16x2(w[0]));
  const float x = as_float(w[4]), y = as_float(w[5]);
  receive(pack_bf16(x, y));
  receive(pack_bf16_finite(x * 1e38f, y));
  receive(round_to_tf32(x));
  receive(as_word(half_to_float(static_cast<uint16_t>(w[0]))));
  receive(uint32_t{float_to_half(x)});
  receive(as_word(min_or_nan(x, y)));
  receive(as_word(max_or_nan(x, y)));
  receive(movmatrix_trans(w[0]));
  for (int i = 0; i < 4; ++i) shared.words[lane * 4 + i] = w[i];
  __syncthreads();
  uint32_t matrices[4];
  ldmatrix_x4(matrices, SmemPointer(shared.words + lane * 4));
  receive(matrices[0], matrices[1], matrices[2], matrices[3]);
  ldmatrix_x4_trans(matrices, SmemPointer(shared.words + lane * 4));
  receive(matrices[0], matrices[1], matrices[2], matrices[3]);
  cp_async(SmemPointer(shared.words + (32 + lane) * 4), a.given + (31 - lane) * kWords, lane % 3 != 0);
  cp_async_commit_group();
  cp_async_wait_group<0>();
  __syncthreads();
  const uint32_t* copied = shared.words + (32 + lane) * 4;
  receive(copied[0], copied[1], copied[2], copied[3]);
  store_words(SmemPointer(shared.words + lane * 4), {w[3], w[2], w[1], w[0]});
  __syncthreads();
  const uint4 loaded = load_words(SmemPointer(shared.words + (lane ^ 5) * 4));
  receive(loaded.x, loaded.y, loaded.z, loaded.w);
  float sum[4] = {x, y, x, y};
  mma_m16n8k16_bf16(sum, {w[0], w[1], w[2], w[6]}, {w[7], w[8]});
  receive(as_word(sum[0]), as_word(sum[1]), as_word(sum[2]), as_word(sum[3]));
  float tf32_sum[4] = {x, y, x, y};
  const uint32_t rounded[6] = {round_to_tf32(as_float(w[9])),  round_to_tf32(as_float(w[10])),
                               round_to_tf32(as_float(w[11])), round_to_tf32(as_float(w[12])),
                               round_to_tf32(as_float(w[13])), round_to_tf32(as_float(w[14]))};
  mma_m16n8k8_tf32(tf32_sum, {rounded[0], rounded[1], rounded[2], rounded[3]}, {rounded[4], rounded[5]});
  receive(as_word(tf32_sum[0]), as_word(tf32_sum[1]), as_word(tf32_sum[2]), as_word(tf32_sum[3]));
  receive(as_word(ex2_approx(x)), as_word(ex2_approx(0.f)), as_word(ex2_approx(-0.f)));
  receive(as_word(lg2_approx(y * y + 1e-3f)));
  receive(as_word(reciprocal(y * y + 1e-3f)));
}

constexpr int kThreads = 128, kSums = 24;  // of a warpgroup; of a thread, for 48 columns
constexpr const char* kWarpgroupNames[] = {"wgmma_k_major", "wgmma_n_major"};

// The i-th operand of two: 96 words repeat.
__device__ __forceinline__ uint32_t operand(const uint32_t* given, int i) { return given[i / 3 % 32 * kWords + i % 3]; }

struct Operands {
  alignas(16) uint16_t b[2 * 6 * 64];  // core matrices of 16 rows × 48 columns
};

template <Major kMajor>
__device__ __forceinline__ void multiply(uint32_t* received, const uint32_t (&a)[4], const MatrixDescriptor& b) {
  float sum[6][4];
  warpgroup_arrive();
  wgmma_m64k16_bf16<kMajor>(sum, a, b, false);
  wgmma_m64k16_bf16<kMajor>(sum, a, b, true);
  warpgroup_commit_batch();
  warpgroup_wait<0>();
  warpgroup_fence(sum);
  for (int i = 0; i < kSums; ++i) received[i] = as_word(sum[i / 4][i % 4]);
}

__global__ void run_warpgroup(const Arguments arguments) {
  choose_products(true, [&](auto has_warpgroups) {
    if constexpr (has_warpgroups()) {
      Operands& shared = shared_memory<Operands>();
      const int thread = threadIdx.x;
      for (int i = thread; i < 2 * 6 * 64; i += kThreads) shared.b[i] = operand(arguments.given, i) >> i / 96 % 2 * 16;
      fence_shared_for_products();
      __syncthreads();
      uint32_t a[4];
      for (int i = 0; i < 4; ++i) a[i] = operand(arguments.given, 4 * thread + i);
      // The core matrices' order differs, so that a mistaken stride would show.
      multiply<Major::kK>(arguments.received + thread * kSums, a, {shared.b, 6 * 128, 128});
      multiply<Major::kN>(arguments.received + (kThreads + thread) * kSums, a, {shared.b, 128, 2 * 128});
    }
  });
}

void* make(size_t bytes) {
  void* memory = nullptr;
#ifdef __CUDACC__
  if (cudaMallocManaged(&memory, bytes) != cudaSuccess) return nullptr;
#else
  memory = std::aligned_alloc(16, bytes);
#endif
  return memory;
}

// Draws a number of either sign between 2^-8 and 16, as the upper half of its bits.
uint32_t draw(uint32_t& state) {
  state = state * 1664525u + 1013904223u;
  const uint32_t sign = state >> 31, exponent = 119 + state % 12, mantissa = state >> 20 & 127;
  return sign << 15 | exponent << 7 | mantissa;
}

}  // namespace

int main() {
  auto* given = static_cast<uint32_t*>(make(sizeof(uint32_t[32][kWords])));
  auto* received = static_cast<uint32_t*>(make(sizeof(uint32_t[kCount][32][kWords])));
  if (!given || !received) return std::fprintf(stderr, "no memory on the GPU\n"), 1;
  uint32_t state = 1;
  for (int i = 0; i < 32 * kWords; ++i) {
    const uint32_t low = draw(state), high = draw(state);
    given[i] = low | high << 16;
    // Inputs of nonzero_bf16x2: zeros of either sign, and bits that are NaN or infinite in fp16.
    const uint32_t special[] = {0, 0x8000, 0x7c00, 0x7e01, 1, 0x3f80, 0xfc00, 0x8001};
    if (i % kWords == 3) given[i] = special[i / kWords % 8] | special[i / kWords / 4 % 8] << 16;
  }
  for (int i = 0; i < kCount * 32 * kWords; ++i) received[i] = 0;
  auto* sums = static_cast<uint32_t*>(make(sizeof(uint32_t[2][kThreads][kSums])));
  const char* error = launch(run, {1, 32, sizeof(Shared)}, nullptr, Arguments{given, received});
  const int warpgroup_functions = has_warpgroup_code() ? 2 : 0;
  if (!error && warpgroup_functions > 0) {
    error = launch(run_warpgroup, {1, kThreads, sizeof(Operands)}, nullptr, Arguments{given, sums});
  }
#ifdef __CUDACC__
  if (!error) error = error_message(cudaDeviceSynchronize());
#endif
  if (error) return std::fprintf(stderr, "%s\n", error), 1;
  for (int lane = 0; lane < 32; ++lane) {
    std::printf("given %d", lane);
    for (int j = 0; j < kWords; ++j) std::printf(" %08x", given[lane * kWords + j]);
    std::printf("\n");
  }
  for (int i = 0; i < warpgroup_functions * kThreads; ++i) {
    std::printf("%s %d", kWarpgroupNames[i / kThreads], i % kThreads);
    for (int j = 0; j < kSums; ++j) std::printf(" %08x", sums[i * kSums + j]);
    std::printf("\n");
  }
  for (int i = 0; i < kCount; ++i) {
    for (int lane = 0; lane < 32; ++lane) {
      std::printf("%s %d", kNames[i], lane);
      for (int j = 0; j < 4; ++j) std::printf(" %08x", received[(i * 32 + lane) * kWords + j]);
      std::printf("\n");
    }
  }
}
