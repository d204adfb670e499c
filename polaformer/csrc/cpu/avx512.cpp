#if defined(__x86_64__)
#include "cpu/interface.h"
#include "polarity_attention.h"

#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512")
#define POLAFORMER_ISA avx512
#define POLAFORMER_VECTOR_BYTES 64
#define POLAFORMER_BLOCK_ROWS 8
#include "cpu/kernels.inl"

namespace polaformer {
const Kernels kAvx512{"avx512", avx512::forward, avx512::backward, avx512::depthwise_forward,
                      avx512::depthwise_backward};
}
#endif
