// Program that runs the attention's kernels once on emulated threads: emulate REQUEST ANSWER, files of conftest.py.
#include "exchange.h"
#include "kernels.cuh"
#include "launch_params.h"

namespace {

using namespace polaformer;

StridedTensor read_strided(Request& request, Dtype dtype) {
  const auto offset = request.read<int64_t>(), batch = request.read<int64_t>(), head = request.read<int64_t>(),
             token = request.read<int64_t>();
  return {request.read_bytes() + offset * bytes_of(dtype), batch, head, token};
}

}  // namespace

int main(int, char** arguments) {
  Request request{std::ifstream(arguments[1], std::ios::binary), {}};
  Answer answer{std::ofstream(arguments[2], std::ios::binary)};
  emulator::randomness.seed(static_cast<unsigned>(request.read<int64_t>()));
  const auto sm_count = static_cast<int>(request.read<int64_t>());
  const bool allows_warpgroups = request.read<int64_t>() != 0,
             has_warpgroups = allows_warpgroups && bf16::has_warpgroups();
  const auto differentiate = request.read<int64_t>();

  Shape shape;
  shape.batch = request.read<int64_t>();
  for (int* field : {&shape.heads, &shape.height, &shape.width, &shape.head_dim}) *field = request.read<int64_t>();
  shape.dtype = static_cast<Dtype>(request.read<int64_t>());
  const int64_t elements = shape.batch_heads() * shape.tokens() * shape.head_dim, bytes = bytes_of(shape.dtype);
  const int64_t state = shape.batch_heads() * shape.state_size(), features = shape.batch_heads() * shape.features();

  ForwardParams forward{};
  forward.shape = shape;
  forward.q = read_strided(request, shape.dtype);
  forward.k = read_strided(request, shape.dtype);
  forward.v = read_strided(request, shape.dtype);
  forward.same_logits = request.read_floats();
  forward.opposite_logits = request.read_floats();
  std::copy_n(request.read_floats(), shape.head_dim / 2, forward.frequencies);
  const Path path = choose_path(shape, {forward.q, forward.k, forward.v});
  forward.plan = make_plan(shape, path, sm_count, has_warpgroups);
  forward.out = request.make<char>(elements, bytes);
  forward.state = request.make<float>(state);
  forward.key_mean = request.make<float>(features);
  forward.key_shift = request.make<float>(features / 2);
  forward.assign_workspaces([&](int64_t floats) { return request.make<float>(floats); });
  check(run_forward(forward, nullptr));
  answer.write(&path, sizeof path);
  answer.write(&forward.plan.keys.splits_per_head, sizeof(int));
  answer.write(&forward.plan.queries.splits_per_head, sizeof(int));
  answer.write(&forward.plan.query_grads.splits_per_head, sizeof(int));
  answer.write(&forward.plan.key_grads.splits_per_head, sizeof(int));
  answer.write(forward.out, elements * bytes);
  answer.write(forward.state, state * sizeof(float));
  answer.write(forward.key_mean, features * sizeof(float));
  answer.write(forward.key_shift, features / 2 * sizeof(float));
  if (!differentiate) return 0;

  BackwardParams backward{};
  backward.shape = shape;
  backward.grad_out = read_strided(request, shape.dtype);
  backward.q = forward.q, backward.k = forward.k, backward.v = forward.v;
  backward.same_logits = forward.same_logits, backward.opposite_logits = forward.opposite_logits;
  backward.state = forward.state, backward.key_mean = forward.key_mean, backward.key_shift = forward.key_shift;
  std::copy(std::begin(forward.frequencies), std::end(forward.frequencies), backward.frequencies);
  backward.plan = make_plan(shape, choose_path(shape, {backward.grad_out, forward.q, forward.k, forward.v}), sm_count,
                            has_warpgroups);
  backward.grad_q = request.make<char>(elements, bytes);
  backward.grad_k = request.make<char>(elements, bytes);
  backward.grad_v = request.make<char>(elements, bytes);
  backward.grad_same_logits = request.make<float>(shape.heads * shape.features());
  backward.grad_opposite_logits = request.make<float>(shape.heads * shape.features());
  backward.assign_workspaces([&](int64_t floats) { return request.make<float>(floats); });
  check(run_backward(backward, nullptr));
  answer.write(&emulator::warpgroup_products, sizeof(int64_t));
  for (const void* grad : {backward.grad_q, backward.grad_k, backward.grad_v}) answer.write(grad, elements * bytes);
  for (const float* grad : {backward.grad_same_logits, backward.grad_opposite_logits}) {
    answer.write(grad, shape.heads * shape.features() * sizeof(float));
  }
}
