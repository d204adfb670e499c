// Emulator of a GPU on the CPU, for tests: replaces polaformer/csrc/cuda/ptx.cuh, whose include guard it defines, so
// that g++ compiles the kernels unchanged. Blocks run one after another in random order. Every thread of a block is a
// fiber; whenever one waits for others, at a block barrier or a warp-wide instruction, a random runnable one continues.
// Behaviour that CUDA leaves undefined fails or becomes visible:
//
//   shared memory    exactly the size of the launch, filled with NaN before every block
//   cp.async         the target is NaN until the wait that makes it visible to the thread; no other copy may go there
//                    until then; none may be left at the end
//   barriers         every thread of the block must arrive and none may have exited; likewise lanes of a warp
//   mma, ldmatrix    all lanes must execute the same instruction; unrounded tf32 operands are errors
//   wgmma            the sums are NaN until the wait that completes them; all threads must have fenced registers and,
//                    once before a barrier, shared memory; none may be left at the end
//   accumulation     rounds towards zero, as tensor cores do; products are exact
//
// Not seen: registers of A that are written while wgmma still reads them; shared memory that is written after the fence
// for wgmma; and a missing __syncwarp() between lanes'
// reads and later writes of others, where a warp-wide instruction lies in between. Here these let lanes wait for each
// other; on a GPU they order no memory.
//
// With -fsanitize=address,undefined every access is checked as well; give each tensor its own buffer.
#pragma once
#define POLAFORMER_PTX_CUH

#include <algorithm>
#include <array>
#include <bit>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <type_traits>
#include <unordered_set>
#include <utility>
#include <vector>

#include <ucontext.h>
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct alignas(8) int2 {
  int x, y;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline int2 make_int2(int x, int y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
template <class T>
T __ldg(const T* address) {
  return *address;
}
using std::max;
using std::min;

namespace emulator {

constexpr size_t kStackBytes = 256 * 1024;

// Saved execution context of a fiber; the stack bounds are for the address sanitizer.
struct Context {
  ucontext_t registers;
  const void* stack = nullptr;
  size_t stack_bytes = 0;
};

inline void switch_context(Context& from, Context& to) {
#if defined(__SANITIZE_ADDRESS__)
  void* keep = nullptr;
  __sanitizer_start_switch_fiber(&keep, to.stack, to.stack_bytes);
  swapcontext(&from.registers, &to.registers);
  __sanitizer_finish_switch_fiber(keep, nullptr, nullptr);
#else
  swapcontext(&from.registers, &to.registers);
#endif
}

struct Copy {
  char* target;
  const char* source;
  bool valid;
};

// Sums of a warpgroup's asynchronous products in one thread.
struct PendingSums {
  std::vector<float> values;
  int batch;  // number of the last batch that adds to them
};

struct Fiber {
  Context context;
  std::unique_ptr<char[]> stack;
  std::vector<std::vector<Copy>> copies{1};  // committed groups, then the open one
  std::map<float*, PendingSums> products;
  int batch = 0;  // of products that is open
  bool fenced_registers = false, fenced_shared = false;
  bool shared_is_visible = false;  // to products: fenced before a barrier
};

// Rendezvous of threads: of a block at a barrier, or of a warp at an instruction.
struct Meeting {
  std::string name;
  std::vector<int> waiting;
};

// Operands and results of an instruction for all lanes of a warp.
struct Lanes {
  alignas(16) char given[32][64], received[32][32];
};

struct Block {
  unsigned index, blocks;
  std::vector<Fiber> fibers;
  std::vector<int> ready;
  std::vector<Meeting> meetings;  // of the block, then of each warp
  std::vector<Meeting> warpgroup_meetings;
  std::vector<Lanes> lanes;
  std::unordered_set<const char*> copied_to;  // targets of copies in flight
  std::function<void()> body;
  char* shared;
  size_t shared_bytes;
  Context scheduler;
  int current = -1, exited = 0, votes = 0, vote_result = 0;
};

inline std::mt19937 randomness;
inline int64_t warpgroup_products = 0;  // that all threads have issued
inline Block* block;

[[noreturn]] inline void fail(const std::string& what) {
  std::fprintf(stderr, "emulator: %s\n", what.c_str());
  std::exit(1);
}

// Picks a random runnable thread.
inline int choose_ready() {
  Block& b = *block;
  if (b.ready.empty()) {
    std::string where;
    for (const auto* meetings : {&b.meetings, &b.warpgroup_meetings}) {
      for (const auto& meeting : *meetings) {
        if (meeting.waiting.empty()) continue;
        where += " " + std::to_string(meeting.waiting.size()) + " at " + meeting.name + ";";
      }
    }
    fail("threads wait for others that never come:" + where);
  }
  std::swap(b.ready[randomness() % b.ready.size()], b.ready.back());
  const int chosen = b.ready.back();
  b.ready.pop_back();
  return chosen;
}

// Yields; returns when this thread is scheduled again.
inline void let_others_run() {
  Block& b = *block;
  const int self = b.current, next = choose_ready();
  b.current = next;
  if (next != self) switch_context(b.fibers[self].context, b.fibers[next].context);
}

// Blocks until `count` threads have arrived; the last one calls work().
template <class Work>
void meet(Meeting& meeting, const std::string& name, size_t count, Work work) {
  Block& b = *block;
  if (meeting.waiting.empty()) meeting.name = name;
  if (meeting.name != name) fail("threads that should do the same do " + meeting.name + " and " + name);
  meeting.waiting.push_back(b.current);
  if (meeting.waiting.size() == count) {
    work();
    b.ready.insert(b.ready.end(), meeting.waiting.begin(), meeting.waiting.end());
    meeting.waiting.clear();
  }
  let_others_run();
}

// Block barrier; returns the number of threads with a true vote.
inline int barrier(const char* name, bool vote) {
  Block& b = *block;
  if (b.exited > 0) fail(std::string(name) + " after threads of the block have exited");
  b.votes += vote;
  meet(b.meetings[0], name, b.fibers.size(), [&] {
    b.vote_result = std::exchange(b.votes, 0);
    for (Fiber& fiber : b.fibers) fiber.shared_is_visible |= fiber.fenced_shared;
  });
  return b.vote_result;
}

// Warp-wide instruction: work(given, received) computes all lanes' results from all lanes' operands.
template <class Received, class Given, class Work>
Received warp_instruction(const char* name, const Given& given, Work work) {
  static_assert(sizeof(Given) <= sizeof(Lanes::given[0]) && sizeof(Received) <= sizeof(Lanes::received[0]));
  Block& b = *block;
  const int warp = b.current / 32, lane = b.current % 32;
  Lanes& lanes = b.lanes[warp];
  std::memcpy(lanes.given[lane], &given, sizeof(Given));
  meet(b.meetings[1 + warp], name, 32, [&] {
    std::array<Given, 32> all;
    std::array<Received, 32> results;
    for (int i = 0; i < 32; ++i) std::memcpy(&all[i], lanes.given[i], sizeof(Given));
    work(all, results);
    for (int i = 0; i < 32; ++i) std::memcpy(lanes.received[i], &results[i], sizeof(Received));
  });
  Received received;
  std::memcpy(&received, lanes.received[lane], sizeof(Received));
  return received;
}

inline void run_fiber() {
  Block& b = *block;
#if defined(__SANITIZE_ADDRESS__)
  const void* stack;
  size_t bytes;
  __sanitizer_finish_switch_fiber(nullptr, &stack, &bytes);
  if (!b.scheduler.stack) b.scheduler.stack = stack, b.scheduler.stack_bytes = bytes;
#endif
  b.body();
  for (const auto& group : b.fibers[b.current].copies)
    if (!group.empty()) fail("a thread exits while copies of its own are in flight");
  if (!b.fibers[b.current].products.empty()) fail("a thread exits while products of its warpgroup run");
  Context& self = b.fibers[b.current].context;
  if (++b.exited == static_cast<int>(b.fibers.size())) switch_context(self, b.scheduler);
  b.current = choose_ready();
  switch_context(self, b.fibers[b.current].context);
}

inline void run_block(unsigned index, unsigned blocks, int threads, size_t shared_bytes, std::function<void()> body) {
  Block b{index, blocks};
  b.fibers = std::vector<Fiber>(threads);
  b.meetings.resize(1 + threads / 32);
  b.warpgroup_meetings.resize(threads / 128);
  b.lanes.resize(threads / 32);
  b.body = std::move(body);
  b.shared = static_cast<char*>(std::malloc(shared_bytes));
  b.shared_bytes = shared_bytes;
  std::memset(b.shared, 0xff, shared_bytes);
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = b.fibers[i];
    fiber.stack = std::make_unique_for_overwrite<char[]>(kStackBytes);
    fiber.context.stack = fiber.stack.get();
    fiber.context.stack_bytes = kStackBytes;
    getcontext(&fiber.context.registers);
    fiber.context.registers.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.registers.uc_stack.ss_size = kStackBytes;
    makecontext(&fiber.context.registers, run_fiber, 0);
    b.ready.push_back(i);
  }
  block = &b;
  b.current = choose_ready();
  switch_context(b.scheduler, b.fibers[b.current].context);
  std::free(b.shared);
}

}  // namespace emulator

struct EmulatedIndex {
  unsigned x;
};
#define threadIdx (EmulatedIndex{static_cast<unsigned>(emulator::block->current)})
#define blockIdx (EmulatedIndex{emulator::block->index})
#define gridDim (EmulatedIndex{emulator::block->blocks})

inline void __syncthreads() { emulator::barrier("__syncthreads", false); }
inline int __syncthreads_or(int vote) { return emulator::barrier("__syncthreads_or", vote) > 0; }

inline void __syncwarp() {
  emulator::meet(emulator::block->meetings[1 + emulator::block->current / 32], "__syncwarp", 32, [] {});
}

inline float __shfl_sync(unsigned, float x, int from) {
  struct Given {
    float x;
    int from;
  };
  return emulator::warp_instruction<float>("shfl.idx", Given{x, from}, [](const auto& given, auto& received) {
    for (int i = 0; i < 32; ++i) received[i] = given[given[i].from % 32].x;
  });
}

inline float __shfl_xor_sync(unsigned, float x, int mask) {
  const std::string name = "shfl.bfly " + std::to_string(mask);
  return emulator::warp_instruction<float>(name.c_str(), x, [mask](const auto& given, auto& received) {
    for (int i = 0; i < 32; ++i) received[i] = given[i ^ mask];
  });
}

namespace polaformer {

constexpr unsigned kFullWarpMask = 0xffffffffu;

template <class T>
T& shared_memory() {
  if (sizeof(T) > emulator::block->shared_bytes) emulator::fail("the launch gives too little shared memory");
  return *reinterpret_cast<T*>(emulator::block->shared);
}

inline float float_of(uint32_t bits) { return std::bit_cast<float>(bits); }
inline void check_aligned(const void* pointer, const char* what) {
  if (reinterpret_cast<uintptr_t>(pointer) % 16) emulator::fail(std::string(what) + " of an address not aligned to 16");
}

// PTX ISA, ldmatrix: "Each address corresponds to the start of a matrix row. Addresses addr0–addr7 correspond to the
// rows of the first matrix, addresses addr8–addr15 correspond to the rows of the second matrix, and so on"; for .x4
// they come from threads 0–7, 8–15, 16–23, 24–31. "A group of four threads loads an entire row of the matrix", thread 0
// "receiving the first fragment in its register r, and so on" (two 16-bit elements each): matrix element
// (lane / 4, 2 · (lane % 4) + i) is half i of a lane's register. With .trans "the matrix is loaded in column-major
// format": the same of the transposed matrix.
inline void ldmatrix_x4(uint32_t (&fragment)[4], const void* row, bool transposed) {
  check_aligned(row, "ldmatrix");
  using Words = std::array<uint32_t, 4>;
  const auto words = emulator::warp_instruction<Words>(
      transposed ? "ldmatrix.trans" : "ldmatrix", static_cast<const uint16_t*>(row),
      [transposed](const auto& rows, auto& received) {
        for (int matrix = 0; matrix < 4; ++matrix) {
          for (int lane = 0; lane < 32; ++lane) {
            uint32_t word = 0;
            for (int i = 0; i < 2; ++i) {
              const int r = lane / 4, c = 2 * (lane % 4) + i;
              const uint16_t element = transposed ? rows[8 * matrix + c][r] : rows[8 * matrix + r][c];
              word |= uint32_t{element} << (16 * i);
            }
            received[lane][matrix] = word;
          }
        }
      });
  std::copy(words.begin(), words.end(), fragment);
}

struct SmemPointer {
  char* address;

  explicit SmemPointer(const void* pointer) : address(static_cast<char*>(const_cast<void*>(pointer))) {
    const emulator::Block& b = *emulator::block;
    if (address < b.shared || address >= b.shared + b.shared_bytes) emulator::fail("a pointer is not of shared memory");
  }
  SmemPointer operator+(int bytes) const {
    SmemPointer moved = *this;
    moved.address += bytes;
    return moved;
  }
};

inline void ldmatrix_x4(uint32_t (&fragment)[4], SmemPointer row) { ldmatrix_x4(fragment, row.address, false); }
inline void ldmatrix_x4_trans(uint32_t (&fragment)[4], SmemPointer row) { ldmatrix_x4(fragment, row.address, true); }
inline uint4 load_words(SmemPointer pointer) {
  check_aligned(pointer.address, "ld.shared.v4");
  return *reinterpret_cast<const uint4*>(pointer.address);
}
inline uint2 load_two_words(SmemPointer pointer) {
  if (reinterpret_cast<uintptr_t>(pointer.address) % 8) emulator::fail("ld.shared.v2 of an unaligned address");
  return *reinterpret_cast<const uint2*>(pointer.address);
}
inline void store_words(SmemPointer pointer, uint4 words) {
  check_aligned(pointer.address, "st.shared.v4");
  *reinterpret_cast<uint4*>(pointer.address) = words;
}

// PTX ISA, movmatrix: "Move a row-major matrix across all threads in a warp, reading elements from source a, and
// writing the transposed elements to destination d"; fragments as of ldmatrix.
inline uint32_t movmatrix_trans(uint32_t fragment) {
  return emulator::warp_instruction<uint32_t>("movmatrix", fragment, [](const auto& given, auto& received) {
    const auto element = [&](int row, int column) {
      return given[4 * row + column / 2] >> (16 * (column % 2)) & 0xffff;
    };
    for (int lane = 0; lane < 32; ++lane) {
      received[lane] = element(2 * (lane % 4), lane / 4) | element(2 * (lane % 4) + 1, lane / 4) << 16;
    }
  });
}

// One mma of shape 16×8×K. PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type" and "… mma.m16n8k8":
//
//   groupID = %laneid >> 2        threadID_in_group = %laneid % 4
//   C, D of both: row = groupID for c0, c1, groupID + 8 for c2, c3; col = threadID_in_group * 2 + (i & 0x1)
//
// `Layout` defines the positions and values of the elements of A and B.
template <class Layout>
void multiply(const char* name, float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  struct Given {
    uint32_t a[4], b[2];
    float sum[4];
  };
  Given given;
  std::copy(a, a + 4, given.a);
  std::copy(b, b + 2, given.b);
  std::copy(sum, sum + 4, given.sum);
  using Floats = std::array<float, 4>;
  const auto result = emulator::warp_instruction<Floats>(name, given, [](const auto& lanes, auto& received) {
    double matrix_a[16][Layout::kInner], matrix_b[Layout::kInner][8];
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < Layout::kAElements; ++i) {
        matrix_a[Layout::a_row(lane, i)][Layout::a_column(lane, i)] = Layout::element(lanes[lane].a, i);
      }
      for (int i = 0; i < Layout::kBElements; ++i) {
        matrix_b[Layout::b_row(lane, i)][lane >> 2] = Layout::element(lanes[lane].b, i);
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < 4; ++i) {
        const int row = (lane >> 2) + (i < 2 ? 0 : 8), column = (lane % 4) * 2 + (i & 1);
        double exact = lanes[lane].sum[i];
        for (int k = 0; k < Layout::kInner; ++k) exact += matrix_a[row][k] * matrix_b[k][column];
        const float nearest = static_cast<float>(exact);
        received[lane][i] = std::fabs(nearest) > std::fabs(exact) ? std::nextafterf(nearest, 0.f) : nearest;
      }
    }
  });
  std::copy(result.begin(), result.end(), sum);
}

// m16n8k16, .bf16. A: row = groupID for ai where 0 <= i < 2 || 4 <= i < 6, groupID + 8 otherwise;
// col = (threadID_in_group * 2) + (i & 0x1) for ai where i < 4, … + 8 for ai where i >= 4.
// B: row = (threadID_in_group * 2) + (i & 0x1) for bi where i < 2, … + 8 for bi where i >= 2; col = groupID.
struct LayoutBf16 {
  static constexpr int kInner = 16, kAElements = 8, kBElements = 4;
  static int a_row(int lane, int i) { return (0 <= i && i < 2) || (4 <= i && i < 6) ? lane >> 2 : (lane >> 2) + 8; }
  static int a_column(int lane, int i) { return (lane % 4) * 2 + (i & 1) + (i < 4 ? 0 : 8); }
  static int b_row(int lane, int i) { return (lane % 4) * 2 + (i & 1) + (i < 2 ? 0 : 8); }
  static double element(const uint32_t* words, int i) { return float_of(words[i / 2] >> (16 * (i % 2)) << 16); }
};

// m16n8k8, .tf32. A: row = groupID for a0 and a2, groupID + 8 for a1 and a3; col = threadID_in_group for a0 and a1,
// threadID_in_group + 4 for a2 and a3. B: row = threadID_in_group for b0, threadID_in_group + 4 for b1; col = groupID.
struct LayoutTf32 {
  static constexpr int kInner = 8, kAElements = 4, kBElements = 2;
  static int a_row(int lane, int i) { return i == 0 || i == 2 ? lane >> 2 : (lane >> 2) + 8; }
  static int a_column(int lane, int i) { return i == 0 || i == 1 ? lane % 4 : lane % 4 + 4; }
  static int b_row(int lane, int i) { return i == 0 ? lane % 4 : lane % 4 + 4; }
  static double element(const uint32_t* words, int i) {
    if (words[i] & 0x1fff && !std::isnan(float_of(words[i]))) emulator::fail("a tf32 operand is not rounded");
    return float_of(words[i]);
  }
};

inline void mma_m16n8k16_bf16(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  multiply<LayoutBf16>("mma.m16n8k16.bf16", sum, a, b);
}
inline void mma_m16n8k8_tf32(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  multiply<LayoutTf32>("mma.m16n8k8.tf32", sum, a, b);
}

// Both ways of multiplying run here, as the plan says.
constexpr bool kIsWarpgroupCode = false;
inline bool has_warpgroup_code() { return true; }
template <class Visitor>
void choose_products(bool planned, Visitor visit) {
  planned ? visit(std::true_type()) : visit(std::false_type());
}

// PTX ISA, "Asynchronous Warpgroup Level Matrix Shared Memory Layout", without swizzling: core matrices of 8 rows of 16
// bytes, 128 contiguous bytes each. K-major, the leading dimension's byte offset is that "from the first column to the
// second columns of the 8x2 tile in the 128-bit element type normalized matrix", that is along K, and the stride
// dimension's is that "from the first 8 rows to the next 8 rows", along N. MN-major ("interleave"), they are "from the
// first 8 columns to the next 8 columns", again along K, and "from the first row to the next row" of 128-bit elements,
// along N. CUTLASS (make_gmma_desc) has the same: ((8,n),(T,2)):((1T,SBO),(1,LBO)) and
// ((T,1,m),(8,k)):((1,T,SBO),(1T,LBO)).
enum class Major { kK, kN };
struct MatrixDescriptor {
  const char* start;
  int k_bytes, n_bytes;

  MatrixDescriptor(const void* shared, int k_bytes, int n_bytes)
      : start(SmemPointer(shared).address), k_bytes(k_bytes), n_bytes(n_bytes) {
    check_aligned(shared, "wgmma");
    if (k_bytes % 16 || n_bytes % 16) emulator::fail("a matrix descriptor counts in 16 bytes");
  }
  MatrixDescriptor operator+(int bytes) const {
    if (bytes % 16) emulator::fail("a matrix descriptor moves by 16 bytes");
    MatrixDescriptor moved = *this;
    moved.start += bytes;
    return moved;
  }
  double at(Major major, int k, int n) const {
    const emulator::Block& b = *emulator::block;
    const int row = major == Major::kK ? n : k, within = major == Major::kK ? k : n;
    const char* element = start + k / 8 * k_bytes + n / 8 * n_bytes + row % 8 * 16 + within % 8 * 2;
    if (element < b.shared || element + 2 > b.shared + b.shared_bytes) emulator::fail("wgmma beyond shared memory");
    return float_of(uint32_t{*reinterpret_cast<const uint16_t*>(element)} << 16);
  }
};

// wgmma.mma_async of shape m64nNk16. "Register Fragments": rows 16i … 16i + 15 of A and D belong to warp i of the
// warpgroup, in the layout of mma.m16n8k16, D with eight columns for each four registers.
template <Major kMajor, int kCount>
void wgmma_m64k16_bf16(float (&sum)[kCount][4], const uint32_t (&a)[4], MatrixDescriptor b, bool accumulate) {
  struct Given {
    uint32_t a[4];
    float sum[kCount][4];
  };
  static std::vector<std::array<Given, 128>> given;  // by warpgroup
  static std::vector<MatrixDescriptor> descriptors;
  emulator::Block& block = *emulator::block;
  const int self = block.current, group = self / 128;
  emulator::Fiber& fiber = block.fibers[self];
  if (!fiber.fenced_registers) emulator::fail("wgmma without wgmma.fence before it in its batch");
  if (!fiber.shared_is_visible) emulator::fail("wgmma without fence.proxy.async and then a barrier before it");
  if (block.fibers.size() % 128) emulator::fail("wgmma in a block without whole warpgroups");
  given.resize(block.fibers.size() / 128);
  descriptors.resize(given.size(), b);
  float* const target = &sum[0][0];
  auto pending = fiber.products.find(target);
  Given& own = given[group][self % 128];
  std::copy(a, a + 4, own.a);
  for (int i = 0; i < 4 * kCount; ++i) {
    own.sum[i / 4][i % 4] = !accumulate ? 0.f : pending == fiber.products.end() ? target[i] : pending->second.values[i];
  }
  auto& meeting = block.warpgroup_meetings[group];
  if (meeting.waiting.empty()) descriptors[group] = b;
  const MatrixDescriptor& others = descriptors[group];
  if (others.start != b.start || others.k_bytes != b.k_bytes || others.n_bytes != b.n_bytes) {
    emulator::fail("threads of a warpgroup multiply different matrices");
  }
  ++emulator::warpgroup_products;
  const std::string name = "wgmma.m64n" + std::to_string(8 * kCount) + (kMajor == Major::kK ? " K-major" : " N-major") +
                           (accumulate ? "" : " anew");
  emulator::meet(meeting, name, 128, [&] {
    double matrix_a[64][16];
    for (int thread = 0; thread < 128; ++thread) {
      for (int i = 0; i < LayoutBf16::kAElements; ++i) {
        matrix_a[thread / 32 * 16 + LayoutBf16::a_row(thread % 32, i)][LayoutBf16::a_column(thread % 32, i)] =
            LayoutBf16::element(given[group][thread].a, i);
      }
    }
    for (int thread = 0; thread < 128; ++thread) {
      for (int i = 0; i < 4 * kCount; ++i) {
        const int row = thread / 32 * 16 + thread % 32 / 4 + (i % 4 < 2 ? 0 : 8);
        const int column = i / 4 * 8 + thread % 4 * 2 + i % 2;
        float& value = given[group][thread].sum[i / 4][i % 4];
        double exact = value;
        for (int k = 0; k < 16; ++k) exact += matrix_a[row][k] * b.at(kMajor, k, column);
        const float nearest = static_cast<float>(exact);
        value = std::fabs(nearest) > std::fabs(exact) ? std::nextafterf(nearest, 0.f) : nearest;
      }
    }
  });
  const float* const results = &given[group][self % 128].sum[0][0];
  fiber.products[target] = {{results, results + 4 * kCount}, fiber.batch};
  std::fill_n(target, 4 * kCount, NAN);
}
inline void warpgroup_arrive() { emulator::block->fibers[emulator::block->current].fenced_registers = true; }
inline void warpgroup_commit_batch() {
  emulator::Fiber& fiber = emulator::block->fibers[emulator::block->current];
  fiber.fenced_registers = false;
  ++fiber.batch;
}
template <int kPending>
void warpgroup_wait() {
  emulator::Fiber& fiber = emulator::block->fibers[emulator::block->current];
  for (auto each = fiber.products.begin(); each != fiber.products.end();) {
    auto& [target, sums] = *each;
    const bool completed = sums.batch < fiber.batch - kPending;
    if (completed) std::copy(sums.values.begin(), sums.values.end(), target);
    each = completed ? fiber.products.erase(each) : std::next(each);
  }
}
template <int kCount>
void warpgroup_fence(float (&)[kCount][4]) {}
inline void fence_shared_for_products() { emulator::block->fibers[emulator::block->current].fenced_shared = true; }

// PTX ISA, cvt: ".rna: round to nearest with ties away from zero". Half of the 13 dropped bits' unit is added to the
// magnitude; a carry into the exponent is right.
inline uint32_t round_to_tf32(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  return std::isfinite(x) ? (bits + 0x1000u) & ~0x1fffu : bits;
}

inline uint16_t round_to_bf16(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if (std::isnan(x)) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}
inline uint32_t pack_bf16(float low, float high) { return round_to_bf16(low) | uint32_t{round_to_bf16(high)} << 16; }

// ".satfinite: … If the absolute value of input is greater than MAX_NORM, then the result is sign-preserved MAX_NORM",
// of NaN NaN.
inline uint32_t pack_bf16_finite(float low, float high) {
  const auto limit = [](float x) { return std::isnan(x) ? x : std::clamp(x, -0x1.fep127f, 0x1.fep127f); };
  return pack_bf16(limit(low), limit(high));
}

using Bf16x2 = uint32_t;

// Applies `one` to the low halves and to the high halves, as bf16.
template <class One, class... Words>
Bf16x2 each_half(One one, Words... words) {
  return round_to_bf16(one(float_of(words << 16)...)) | uint32_t{round_to_bf16(one(float_of(words & 0xffff0000u)...))}
                                                            << 16;
}
// Rounded once: a product of bf16 is exact in double, and a sum's double rounding would take 37 zeros or ones in a row.
inline Bf16x2 fma_bf16x2(Bf16x2 a, Bf16x2 b, Bf16x2 c) {
  return each_half([](float x, float y, float z) { return std::fma(x, y, z); }, a, b, c);
}
inline Bf16x2 negate_bf16x2(Bf16x2 a) { return a ^ 0x80008000u; }
inline Bf16x2 absolute_bf16x2(Bf16x2 a) { return a & 0x7fff7fffu; }
inline Bf16x2 max_bf16x2(Bf16x2 a, Bf16x2 b) {
  return each_half([](float x, float y) { return std::fmax(x, y); }, a, b);
}
inline uint32_t nonzero_bf16x2(Bf16x2 a) { return (a & 0x7fffu ? 0xffffu : 0u) | (a & 0x7fff0000u ? 0xffff0000u : 0u); }
inline Bf16x2 low_halves(Bf16x2 a, Bf16x2 b) { return (a & 0xffffu) | b << 16; }
inline Bf16x2 high_halves(Bf16x2 a, Bf16x2 b) { return a >> 16 | (b & 0xffff0000u); }
inline uint32_t low_signs(Bf16x2 a, Bf16x2 b) { return (a >> 15 & 1) * 0xffffu | (b >> 15 & 1) * 0xffff0000u; }
inline uint32_t high_signs(Bf16x2 a, Bf16x2 b) { return low_signs(a >> 16, b >> 16); }

template <class T>
T opaque(T x) {
  return x;
}
// PTX ISA, lg2: "max absolute error 2^-22 when the input operand is in the range (0.5, 2); … relative error 2^-22".
inline float lg2_approx(float x) { return static_cast<float>(std::log2(static_cast<double>(x)) * (1 + 0x1p-22)); }
// "ex2.approx.ftz.f32 implements a fast approximation … max relative error 2^-22": so far off, either way.
// Of ±0 it is 1 exactly.
inline float ex2_approx(float x) {
  if (x == 0) return 1.f;
  const double error = std::bit_cast<uint32_t>(x) & 1 ? 0x1p-22 : -0x1p-22;
  return static_cast<float>(std::exp2(static_cast<double>(x)) * (1 + error));
}
inline float min_or_nan(float x, float y) { return std::isnan(x) || std::isnan(y) ? NAN : std::fmin(x, y); }
inline float max_or_nan(float x, float y) { return std::isnan(x) || std::isnan(y) ? NAN : std::fmax(x, y); }
inline float reciprocal(float x) { return 1.f / x; }

inline float half_to_float(uint16_t bits) {
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  const float magnitude = exponent == 31 ? (mantissa ? NAN : INFINITY)
                          : exponent     ? std::ldexp(1024.f + mantissa, exponent - 25)
                                         : std::ldexp(static_cast<float>(mantissa), -24);
  return bits >> 15 ? -magnitude : magnitude;
}

inline uint16_t float_to_half(float x) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const float magnitude = std::fabs(x);
  if (std::isnan(x)) return 0x7fff;
  if (magnitude >= 65520.f) return sign | 0x7c00;
  int exponent = magnitude > 0 ? std::max(std::ilogb(magnitude), -14) : -14;
  const auto mantissa = static_cast<int>(std::nearbyint(std::ldexp(magnitude, 10 - exponent)));  // ties to even
  return static_cast<uint16_t>(sign + ((exponent + 14) << 10) + mantissa);  // subnormals and carries included
}

template <int kCount>
void store_words(void* global, const uint32_t (&words)[kCount]) {
  if (reinterpret_cast<uintptr_t>(global) % sizeof words) emulator::fail("a vector is stored to an unaligned address");
  std::copy(words, words + kCount, static_cast<uint32_t*>(global));
}

inline void cp_async(SmemPointer target, const void* global, bool valid) {
  char* const shared = target.address;
  check_aligned(shared, "cp.async");
  if (valid) check_aligned(global, "cp.async");
  std::memset(shared, 0xff, 16);
  emulator::Block& b = *emulator::block;
  if (!b.copied_to.insert(shared).second) emulator::fail("two copies to one address are in flight");
  b.fibers[b.current].copies.back().push_back({shared, static_cast<const char*>(global), valid});
}
inline void prefetch_to_l2(const void* global) {
  volatile char byte = *static_cast<const char*>(global);  // for the address sanitizer
  static_cast<void>(byte);
}
inline void cp_async_commit_group() {
  emulator::Block& b = *emulator::block;
  b.fibers[b.current].copies.emplace_back();
}
template <int kPending>
void cp_async_wait_group() {
  emulator::Block& b = *emulator::block;
  auto& groups = b.fibers[b.current].copies;
  while (groups.size() > kPending + 1) {
    for (const auto& copy : groups.front()) {
      b.copied_to.erase(copy.target);
      if (copy.valid) {
        std::memcpy(copy.target, copy.source, 16);
      } else {
        std::memset(copy.target, 0, 16);
      }
    }
    groups.erase(groups.begin());
  }
}

struct LaunchConfig {
  int64_t blocks;
  int threads, shared_bytes;
};

template <class Params>
const char* launch(void (*kernel)(Params), LaunchConfig config, void*, const Params& params) {
  std::vector<unsigned> order(config.blocks);
  std::iota(order.begin(), order.end(), 0u);
  std::shuffle(order.begin(), order.end(), emulator::randomness);
  for (const unsigned index : order) {
    emulator::run_block(index, static_cast<unsigned>(config.blocks), config.threads, config.shared_bytes,
                        [&] { kernel(params); });
  }
  return nullptr;
}

}  // namespace polaformer
