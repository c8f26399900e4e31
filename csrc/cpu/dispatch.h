// Selection of the kernels: the widest instruction set of this processor, unless another is requested.
#pragma once

#include "../common/problem.h"

namespace cem_fast {

const Kernels& kernels();

}  // namespace cem_fast

// The C interface of the library, for Python's ctypes.
extern "C" {

// Selected capability: "default", "avx2" or "avx512".
__attribute__((visibility("default"))) const char* cem_fast_cpu_capability();

// Selects a capability. Returns 0 on success, 1 if it was not built or this processor lacks it.
__attribute__((visibility("default"))) int cem_fast_cpu_select(const char* capability);
}
