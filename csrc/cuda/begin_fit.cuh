// The first kernel of a fit.
#pragma once

#include "fit.cuh"

namespace cem_fast::cuda {

// Cuts the classes into segments, and marks those that have rows. One block.
static __global__ void __launch_bounds__(kThreads, kBlocks)
    begin_fit_kernel(Segments groups, int64_t* first, Classes s) {
  int64_t segment = 0, moving = 0;
  for (int64_t start = 0; start < groups.classes; start += kThreads) {
    const int64_t c = start + threadIdx.x;
    const int64_t rows = c < groups.classes ? groups.offsets[c + 1] - groups.offsets[c] : 0;
    const int64_t base = segment, at = base + block_scan((rows + groups.size - 1) / groups.size, &segment);
    block_scan(rows > 0, &moving);
    if (c >= groups.classes) continue;
    first[c] = at;
    s.active[c] = rows > 0;
    s.converged[c] = rows == 0;
    s.iterations[c] = 0;
    s.ticket[c] = 0;
  }
  if (threadIdx.x > 0) return;
  first[groups.classes] = segment;
  *s.remaining = static_cast<int32_t>(moving);
}

}  // namespace cem_fast::cuda
