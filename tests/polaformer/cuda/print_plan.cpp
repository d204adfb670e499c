// Program that prints workspaces and splits of launch_params.h for shapes on standard input, one per line: batch,
// heads, height, width, head dimension, dtype, SMs, major compute capability, bytes of shared memory per block, and
// whether warpgroups multiply.
#include <iostream>

#include "launch_params.h"

int main() {
  using namespace polaformer;
  Shape shape;
  int dtype, sm_count, major;
  bool has_warpgroups;
  int64_t shared_bytes;
  while (std::cin >> shape.batch >> shape.heads >> shape.height >> shape.width >> shape.head_dim >> dtype >> sm_count >>
         major >> shared_bytes >> has_warpgroups) {
    shape.dtype = static_cast<Dtype>(dtype);
    if (const char* reason = unsupported_reason(shape, major, shared_bytes)) {
      std::cout << "0 0 0 0 0 0 0 0 0 0 " << reason << '\n';
      continue;
    }
    const StridedTensor aligned = {nullptr, 0, 0, 0};
    int64_t floats[2] = {};
    ForwardParams forward{};
    BackwardParams backward{};
    forward.shape = backward.shape = shape;
    forward.plan = backward.plan = make_plan(shape, choose_path(shape, {aligned}), sm_count, has_warpgroups);
    const auto count = [&](int64_t& sum) {
      return [&](int64_t size) { return sum += size, static_cast<float*>(nullptr); };
    };
    forward.assign_workspaces(count(floats[0])), backward.assign_workspaces(count(floats[1]));
    std::cout << 4 * floats[0] << ' ' << 4 * floats[1];
    for (const Splits& splits :
         {forward.plan.keys, forward.plan.queries, forward.plan.query_grads, forward.plan.key_grads}) {
      std::cout << ' ' << splits.splits_per_head << ' ' << splits.tokens_per_split;
    }
    std::cout << " \n";
  }
}
