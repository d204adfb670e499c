// The launches that forward.cu and backward.cu are made of: those for aligned bf16, and those in tf32 for all else,
// which also compute with a shift for everything. Each returns null, or what went wrong.
#pragma once

#include "launch_params.h"

namespace polaformer {

// Fills the rotary table; of Forward and of Backward.
template <class Arguments>
const char* make_rotary_tables(const Arguments& f, void* stream);

namespace bf16 {
const char* launch_sum_keys(const Forward& f, void* stream);
const char* launch_attend(const Forward& f, void* stream);
const char* launch_differentiate_queries(const Backward& f, void* stream);
const char* launch_sum_queries(const Backward& f, void* stream);
const char* launch_differentiate_keys(const Backward& f, void* stream);
}  // namespace bf16

namespace tf32 {
const char* launch_sum_keys(const Forward& f, void* stream);
const char* launch_attend(const Forward& f, void* stream);
const char* launch_attend_shifted(const Forward& f, void* stream);
const char* launch_differentiate_queries(const Backward& f, void* stream);
const char* launch_differentiate_queries_shifted(const Backward& f, void* stream);
const char* launch_differentiate_keys(const Backward& f, void* stream);
const char* launch_differentiate_keys_shifted(const Backward& f, void* stream);
}  // namespace tf32

}  // namespace polaformer
