// Calls of the operators of polaformer/ops.py that compute in PyTorch, for what a binding has no kernels for.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <utility>

namespace polaformer {

template <class Results, class... Arguments>
Results call_reference(const char* name, Arguments&&... arguments) {
  const auto reference = c10::Dispatcher::singleton().findSchemaOrThrow(name, "");
  return reference.typed<Results(Arguments...)>().call(std::forward<Arguments>(arguments)...);
}

}  // namespace polaformer
