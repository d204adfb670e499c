// Program that prints the plans of depthwise_params.h for shapes on standard input, one per line: batch, height, width,
// channels, kernel size, dtype, then the GPU: SMs, major compute capability, bytes of shared memory per block and per
// SM. For each a line: forward and backward threads, blocks, steps, splits and bytes of shared memory; the reason.
#include <iostream>

#include "depthwise_params.h"

int main() {
  using namespace polaformer;
  DepthwiseShape shape;
  int dtype, sm_count, major;
  int64_t per_block, per_sm;
  while (std::cin >> shape.batch >> shape.height >> shape.width >> shape.channels >> shape.kernel_size >> dtype >>
         sm_count >> major >> per_block >> per_sm) {
    shape.dtype = static_cast<Dtype>(dtype);
    const char* reason = unsupported_reason(shape, major, per_block);
    for (const bool backward : {false, true}) {
      const bool reads_center = backward || shape.kernel_size == 5;  // as the models do
      const auto plan = reason ? DepthwisePlan{} : make_depthwise_plan(shape, backward, reads_center, sm_count, per_sm);
      const int64_t bytes = reason ? 0 : shared_bytes(shape, backward, reads_center, plan.row_bytes);
      std::cout << plan.threads() << ' ' << plan.blocks() << ' ' << plan.steps << ' ' << plan.splits << ' ' << bytes
                << ' ';
    }
    std::cout << (reason ? reason : "") << '\n';
  }
}
