// Declarations of the launches that forward.cu and backward.cu sequence: namespace bf16 for aligned bf16, tf32 for
// everything else and for every computation with a shift. Each returns null or an error message.
#pragma once

#include "launch_params.h"

namespace polaformer {

const char* make_rotary_tables(const CommonParams& params, void* stream);

namespace bf16 {
// Whether the code for the current GPU has warpgroups multiply.
bool has_warpgroups();
const char* launch_sum_keys(const ForwardParams& params, void* stream);
const char* launch_attend(const ForwardParams& params, void* stream);
const char* launch_differentiate_queries(const BackwardParams& params, void* stream);
const char* launch_sum_queries(const BackwardParams& params, void* stream);
const char* launch_differentiate_keys(const BackwardParams& params, void* stream);
}  // namespace bf16

namespace tf32 {
const char* launch_sum_keys(const ForwardParams& params, void* stream);
const char* launch_attend(const ForwardParams& params, void* stream);
const char* launch_attend_shifted(const ForwardParams& params, void* stream);
const char* launch_differentiate_queries(const BackwardParams& params, void* stream);
const char* launch_differentiate_queries_shifted(const BackwardParams& params, void* stream);
const char* launch_differentiate_keys(const BackwardParams& params, void* stream);
const char* launch_differentiate_keys_shifted(const BackwardParams& params, void* stream);
}  // namespace tf32

}  // namespace polaformer
