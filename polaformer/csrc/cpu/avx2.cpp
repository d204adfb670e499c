#if defined(__x86_64__)
#include "cpu/interface.h"
#include "polarity_attention.h"

#pragma GCC target("avx2,fma,f16c")
#define POLAFORMER_ISA avx2
#define POLAFORMER_VECTOR_BYTES 32
#define POLAFORMER_BLOCK_ROWS 4
#include "cpu/kernels.inl"

namespace polaformer {
const Kernels kAvx2{"avx2", avx2::forward, avx2::backward, avx2::depthwise_forward, avx2::depthwise_backward};
}
#endif
