// The kernels of the sort: two launches, or one for few rows.
#pragma once

#include "sort.cuh"

namespace cem_fast::cuda {

// Counts the rows of every range.
static __global__ void __launch_bounds__(kThreads, kBlocks) count_kernel(Sort s) {
  DYNAMIC_SHARED(room);
  int32_t* of_block = s.counts + blockIdx.x * (s.classes + 1);
  int32_t* histogram = s.room == nullptr ? reinterpret_cast<int32_t*>(room) : of_block;
  for (int64_t g = threadIdx.x; g <= s.classes; g += kThreads) {
    histogram[g] = 0;
    if (s.tickets != nullptr && blockIdx.x == 0) s.tickets[g] = 0;
  }
  __syncthreads();
  const int64_t first = blockIdx.x * s.rows_of_range;
  const int64_t last = first + s.rows_of_range < s.rows ? first + s.rows_of_range : s.rows;
  for (int64_t n = first + threadIdx.x; n < last; n += kThreads) atomicAdd(&histogram[group_of(s, n)], 1);
  if (s.room != nullptr) return;
  __syncthreads();
  for (int64_t g = threadIdx.x; g <= s.classes; g += kThreads) of_block[g] = histogram[g];
}

// Then every range counts those before it, and places its rows.
static __global__ void __launch_bounds__(kThreads, kBlocks) place_kernel(Sort s) {
  DYNAMIC_SHARED(room);
  const Places of(s, blockIdx.x, room);
  for (int64_t g = threadIdx.x; g <= s.classes; g += kThreads) {
    int32_t size = 0, before = 0;
    UNROLL_BY(8)
    for (int64_t b = 0; b < s.ranges; ++b) {
      const int32_t count = s.counts[b * (s.classes + 1) + g];
      before += b < blockIdx.x ? count : 0;
      size += count;
    }
    of.size[g] = size;
    of.next[g] = before;
  }
  __syncthreads();  // the sizes of all groups are complete
  finish_sort(s, blockIdx.x, of);
}

// Few rows take one launch.
static __global__ void __launch_bounds__(kThreads, kBlocks) sort_kernel(Sort s) {
  DYNAMIC_SHARED(room);
  sort_range(s, blockIdx.x, room);
}

}  // namespace cem_fast::cuda
