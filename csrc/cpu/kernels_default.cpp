// The kernels in the instruction set that the compiler targets anyway: vectors of 16 bytes (SSE2, NEON, ...).
#include "kernels_prologue.h"

#define CEM_FAST_CAPABILITY baseline
#define CEM_FAST_CAPABILITY_NAME "default"
#define CEM_FAST_WIDTH 16
#include "kernels-inl.h"
