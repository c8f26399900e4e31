// The gradient of the scatter.
#pragma once

#include "kernels.h"
#include "row.cuh"

namespace cem_fast::cuda {

// Blocks of a multiprocessor: enough loads in flight, in 40 registers.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr int kGradientBlocks = 8;
#else
constexpr int kGradientBlocks = 12;
#endif
constexpr int kHalfGradientBlocks = 8;  // of half types, whose loads hold more elements

// dx = 2 scale g (x - mu) with the row's own component; one warp for a piece of a row.
template <class X, bool kAligned>
__global__ void __launch_bounds__(kThreads, sizeof(X) == 2 ? kHalfGradientBlocks : kGradientBlocks)
    scatter_gradient_kernel(ScatterGradient p, int64_t pieces) {
  using T = Parameter<X>;
  using Row = Piece<X, kAligned, 4>;
  constexpr int kVector = Row::kVector;
  const int64_t D = p.x.dimension, item = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  const int64_t n = pieces == 1 ? item : item / pieces, start = (item - n * pieces) * Row::kDims;
  if (n >= p.x.rows) return;
  Row x;
  x.read(static_cast<const X*>(p.x.data) + n * p.x.stride, start, D);
  const int64_t c = p.mixture.labels == nullptr ? 0 : p.mixture.labels[n], k = p.assignment[n];
  const bool valid = static_cast<uint64_t>(c) < static_cast<uint64_t>(p.mixture.classes) &&
                     static_cast<uint64_t>(k) < static_cast<uint64_t>(p.mixture.components);
  const int64_t ck = valid ? c * p.mixture.components + k : 0;
  const T* mean = static_cast<const T*>(p.mixture.means) + ck * D;
  const T* grad = static_cast<const T*>(p.grad_scatter) + (p.mixture.diagonal ? ck * D : ck);
  const T scale = p.scale == nullptr ? T(2) : 2 * *static_cast<const T*>(p.scale);
  const T poison = valid ? T(0) : static_cast<T>(nan(""));
  const T own = p.mixture.diagonal ? T(0) : scale * grad[0];
  UNROLL
  for (int i = 0; i < 4; ++i) {
    const int64_t d = Row::dimension(start, i);
    if (d >= D) break;
    X value[kVector];
    T mu[kVector], slope[kVector];
    x.elements(i, value);
    read_vector<kAligned>(mean + d, mu);
    if (p.mixture.diagonal) read_vector<kAligned>(grad + d, slope);
    UNROLL
    for (int e = 0; e < kVector; ++e) {
      const T factor = p.mixture.diagonal ? scale * slope[e] : own;
      narrow(factor * (widen(value[e]) - mu[e]) + poison, &value[e]);
    }
    memcpy(&x.load[i], value, sizeof value);
    *reinterpret_cast<typename Row::Load*>(static_cast<X*>(p.dx) + n * D + d) = x.load[i];
  }
}

}  // namespace cem_fast::cuda
