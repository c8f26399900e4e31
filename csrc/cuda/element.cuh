// The types of features, and the type that their parameters and sums have.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "../common/problem.h"

namespace cem_fast::cuda {

template <class X>
struct ParameterOf {
  using Type = float;
};
template <>
struct ParameterOf<double> {
  using Type = double;
};
template <class X>
using Parameter = typename ParameterOf<X>::Type;

__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }
__device__ inline float widen(__half x) { return __half2float(x); }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

__device__ inline void narrow(float value, float* out) { *out = value; }
__device__ inline void narrow(double value, double* out) { *out = value; }
__device__ inline void narrow(float value, __half* out) { *out = __float2half_rn(value); }
__device__ inline void narrow(float value, __nv_bfloat16* out) { *out = __float2bfloat16_rn(value); }

// Calls f with a null pointer to the features' element type.
template <class F>
void for_element(Element element, const F& f) {
  switch (element) {
    case Element::kFloat:
      return f(static_cast<const float*>(nullptr));
    case Element::kDouble:
      return f(static_cast<const double*>(nullptr));
    case Element::kBFloat16:
      return f(static_cast<const __nv_bfloat16*>(nullptr));
    case Element::kHalf:
      return f(static_cast<const __half*>(nullptr));
  }
}

}  // namespace cem_fast::cuda
