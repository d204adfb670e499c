#include "cpu/interface.h"
#include "polarity_attention.h"

#define POLAFORMER_ISA baseline
#define POLAFORMER_VECTOR_BYTES 16
#define POLAFORMER_BLOCK_ROWS 4
#include "cpu/kernels.inl"

namespace polaformer {
const Kernels kBaseline{"baseline", baseline::forward, baseline::backward, baseline::depthwise_forward,
                        baseline::depthwise_backward};
}
