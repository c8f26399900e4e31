// The kernels for x86-64-v3: vectors of 32 bytes.
#if defined(__x86_64__)
#include "kernels_prologue.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,bmi,bmi2"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,bmi,bmi2")
#endif

#define CEM_FAST_CAPABILITY avx2
#define CEM_FAST_CAPABILITY_NAME "avx2"
#define CEM_FAST_WIDTH 32
#include "kernels-inl.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
