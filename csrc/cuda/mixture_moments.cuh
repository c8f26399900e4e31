// Moments of rows about the means of their class, weighted by their posterior.
#pragma once

#include "mixture_log_prob.cuh"
#include "partials.cuh"

namespace cem_fast::cuda {

constexpr int kMomentComponents = 8;
constexpr int kMomentRows = 64;

// Partial moments of the segments. If s2 is summed over the dimensions, it has one number per block.
template <class T>
struct MomentPartials {
  T* s0;            // [segments, components]
  T* s1;            // [segments, components, dimension]
  T* s2;            // [segments, components, dimension or column blocks]
  int64_t columns;  // blocks of kThreads dimensions
};

// One block: one segment, kThreads dimensions, all components.
template <class X>
__global__ void __launch_bounds__(kThreads, kBlocks)
    moments_kernel(MixtureMoments p, Groups groups, Slab slab, const Parameter<X>* responsibilities, bool by_slot,
                   MomentPartials<Parameter<X>> out) {
  using T = Parameter<X>;
  __shared__ T a[kMomentComponents][kMomentRows];
  __shared__ int64_t row[kMomentRows];

  const int64_t D = p.x.dimension, K = p.mixture.components;
  const int64_t column = blockIdx.x % out.columns, index = slab.first + blockIdx.x / out.columns;
  const int64_t d = column * kThreads + threadIdx.x;
  const Segment segment = segment_at(groups, index);
  if (segment.group == groups.classes) return;
  const X* features = static_cast<const X*>(p.x.data);
  const T* row_weights = static_cast<const T*>(p.row_weights);
  const T* means = static_cast<const T*>(p.mixture.means) + segment.group * K * D;
  const int thread = threadIdx.x;
  for (int64_t k0 = 0; k0 < K; k0 += kMomentComponents) {
    const int components = static_cast<int>(K - k0 < kMomentComponents ? K - k0 : kMomentComponents);
    T mean[kMomentComponents] = {}, s0 = 0, s1[kMomentComponents] = {}, s2[kMomentComponents] = {};
    for (int j = 0; j < kMomentComponents; ++j) {
      if (j < components && d < D) mean[j] = means[(k0 + j) * D + d];
    }
    for (int64_t begin = segment.begin; begin < segment.end; begin += kMomentRows) {
      const int rows = static_cast<int>(segment.end - begin < kMomentRows ? segment.end - begin : kMomentRows);
      __syncthreads();  // the rows before have been used
      for (int i = thread; i < rows; i += kThreads) row[i] = groups.order[begin + i];
      for (int i = thread; i < rows * kMomentComponents; i += kThreads) {
        const int r = i / kMomentComponents, j = i % kMomentComponents;
        const int64_t n = groups.order[begin + r];
        const int64_t slot = (index - slab.first) * groups.size + begin + r - segment.begin;
        a[j][r] = j < components ? row_weights[n] * responsibilities[(by_slot ? slot : n) * K + k0 + j] : T(0);
      }
      __syncthreads();
      for (int r = 0; r < rows; ++r) {
        const T value = d < D ? widen(features[row[r] * p.x.stride + d]) : T(0);
        for (int j = 0; j < kMomentComponents; ++j) {
          const T deviation = value - mean[j], moment = a[j][r] * deviation;
          s1[j] += moment;
          s2[j] += moment * deviation;
        }
        if (thread < kMomentComponents) s0 += a[thread][r];
      }
    }
    const int64_t at = index * K + k0;
    if (column == 0 && thread < components) out.s0[at + thread] = s0;
    for (int j = 0; j < kMomentComponents; ++j) {
      if (j >= components) break;
      if (d < D) out.s1[(at + j) * D + d] = s1[j];
      if (p.mixture.diagonal) {
        if (d < D) out.s2[(at + j) * D + d] = s2[j];
      } else {
        const T total = block_sum(d < D ? s2[j] : T(0));
        if (thread == 0) out.s2[(at + j) * out.columns + column] = total;
      }
    }
  }
}

}  // namespace cem_fast::cuda
