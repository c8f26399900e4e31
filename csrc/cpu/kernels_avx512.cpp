// The kernels for x86-64-v4: vectors of 64 bytes.
#if defined(__x86_64__)
#include "kernels_prologue.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512cd,avx512dq,avx512vl,fma,f16c,bmi,bmi2"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512cd,avx512dq,avx512vl,fma,f16c,bmi,bmi2")
#endif

#define CEM_FAST_CAPABILITY avx512
#define CEM_FAST_CAPABILITY_NAME "avx512"
#define CEM_FAST_WIDTH 64
#include "kernels-inl.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
