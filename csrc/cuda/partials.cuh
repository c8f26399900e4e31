// Second half of every sum over the rows of a class: adds the partial sums of its segments in order, in double.
#pragma once

#include "groups.cuh"

namespace cem_fast::cuda {

// partial [segments, components, width].
template <class T>
__device__ double sum_of_segments(const Groups& groups, const T* partial, int64_t components, int64_t width, int64_t ck,
                                  int64_t column) {
  const int64_t c = ck / components, k = ck % components;
  double total = groups.poison<double>();
  for (int64_t s = groups.first_segment[c]; s < groups.first_segment[c + 1]; ++s) {
    total += static_cast<double>(partial[(s * components + k) * width + column]);
  }
  return total;
}

// out [classes, components, width], or, folded, [classes, components].
template <class P, class T>
__global__ void __launch_bounds__(kThreads, kBlocks)
    reduce_kernel(Groups groups, const P* partial, int64_t components, int64_t width, bool fold, T* out) {
  const int64_t i = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x, outputs = fold ? 1 : width;
  if (i >= groups.classes * components * outputs) return;
  double total = 0;
  for (int64_t column = i % outputs; column < width; column += outputs) {
    total += sum_of_segments(groups, partial, components, width, i / outputs, column);
  }
  out[i] = static_cast<T>(total);
}

template <class P, class T>
void reduce(Queue& queue, const Groups& groups, const P* partial, int64_t components, int64_t width, bool fold,
            T* out) {
  const int64_t outputs = groups.classes * components * (fold ? 1 : width);
  queue.launch(reduce_kernel<P, T>, divide_up(outputs, kThreads), groups, partial, components, width, fold, out);
}

}  // namespace cem_fast::cuda
