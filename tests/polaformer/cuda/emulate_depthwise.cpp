// Program that runs the depthwise convolution's kernels once on emulated threads: emulate_depthwise REQUEST ANSWER,
// files of conftest.py.
#include "depthwise_params.h"
#include "exchange.h"

namespace {

using namespace polaformer;

Images read_images(Request& request, Dtype dtype) {
  const int64_t bytes = bytes_of(dtype), offset = request.read<int64_t>() * bytes;
  const auto batch = request.read<int64_t>(), row = request.read<int64_t>(), column = request.read<int64_t>();
  return {request.read_bytes() + offset, batch * bytes, row * bytes, column * bytes, 0};
}

}  // namespace

int main(int, char** arguments) {
  Request request{std::ifstream(arguments[1], std::ios::binary), {}};
  Answer answer{std::ofstream(arguments[2], std::ios::binary)};
  emulator::randomness.seed(static_cast<unsigned>(request.read<int64_t>()));
  const auto sm_count = static_cast<int>(request.read<int64_t>());
  const int64_t shared_bytes_per_sm = 164 << 10;
  const auto has_residual = request.read<int64_t>(), differentiate = request.read<int64_t>();

  DepthwiseParams forward{};
  forward.adds_window = request.read<int64_t>();
  DepthwiseShape& shape = forward.shape;
  shape.batch = request.read<int64_t>();
  for (int* field : {&shape.height, &shape.width, &shape.channels, &shape.kernel_size})
    *field = request.read<int64_t>();
  shape.dtype = static_cast<Dtype>(request.read<int64_t>());
  check(unsupported_reason(shape, 8, 227 << 10));
  const int64_t image_bytes = shape.elements() * bytes_of(shape.dtype);
  const int64_t weights = int64_t{shape.taps()} * shape.channels;

  const Images x = read_images(request, shape.dtype);
  forward.window = x;
  forward.weight = request.read_floats();
  forward.bias = request.read_floats();
  if (has_residual) forward.center = read_images(request, shape.dtype);
  char* const out = request.make<char>(image_bytes);
  forward.result = contiguous_images(out, shape);
  forward.set_plan(make_depthwise_plan(shape, false, has_residual, sm_count, shared_bytes_per_sm));
  check(run_depthwise_forward(forward, nullptr));
  answer.write(&forward.plan.images_per_block, sizeof(int));
  answer.write(&forward.plan.splits, sizeof(int));
  answer.write(out, image_bytes);
  if (!differentiate) return 0;

  DepthwiseParams backward{};
  backward.shape = shape;
  backward.adds_window = forward.adds_window;
  backward.window = read_images(request, shape.dtype);
  backward.center = x;
  backward.weight = forward.weight;
  char* const grad_x = request.make<char>(image_bytes);
  backward.result = contiguous_images(grad_x, shape);
  backward.set_plan(make_depthwise_plan(shape, true, true, sm_count, shared_bytes_per_sm));
  backward.split_sums = request.make<float>(backward.plan.splits * (weights + shape.channels));
  backward.grad_weight = request.make<float>(weights);
  backward.grad_bias = request.make<float>(shape.channels);
  check(run_depthwise_backward(backward, nullptr));
  answer.write(&backward.plan.images_per_block, sizeof(int));
  answer.write(&backward.plan.splits, sizeof(int));
  answer.write(grad_x, image_bytes);
  answer.write(backward.grad_weight, weights * sizeof(float));
  answer.write(backward.grad_bias, shape.channels * sizeof(float));
}
