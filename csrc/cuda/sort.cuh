// A stable counting sort of rows by class: every block counts a range of rows, then places them.
#pragma once

#include "block.cuh"

namespace cem_fast::cuda {

struct Sort {
  const int64_t* labels;  // [rows], or null: class 0
  int64_t rows;
  int64_t classes;
  int64_t blocks;
  int64_t rows_of_block;
  int64_t segment_size;
  int64_t* counts;         // [blocks, classes + 1]: rows of each group in each block
  int64_t* next;           // [blocks, classes + 1]: where the block's next row of each group goes
  int32_t* order;          // [rows]
  int64_t* offsets;        // [classes + 2]
  int64_t* first_segment;  // [classes + 2]
};

__device__ inline int64_t group_of(const Sort& s, int64_t n) {
  const int64_t label = s.labels == nullptr ? 0 : s.labels[n];
  return static_cast<uint64_t>(label) < static_cast<uint64_t>(s.classes) ? label : s.classes;
}

// Assigns the block's rows in order to the places next[group]++, and stores them in `order` unless it is null.
__device__ inline void place_rows(const Sort& s, int64_t* next, int32_t* order) {
  __shared__ int64_t group[kThreads];
  const int thread = threadIdx.x;
  const int64_t first = blockIdx.x * s.rows_of_block;
  const int64_t last = first + s.rows_of_block < s.rows ? first + s.rows_of_block : s.rows;
  for (int64_t start = first; start < last; start += kThreads) {
    const int64_t n = start + thread, own = n < last ? group_of(s, n) : -1;
    group[thread] = own;
    __syncthreads();  // `group` is complete, and so is `next`
    int before = 0, after = 0;
    for (int i = 0; i < kThreads; ++i) {
      before += group[i] == own && i < thread;
      after += group[i] == own && i > thread;
    }
    const int64_t place = own < 0 ? 0 : next[own] + before;
    __syncthreads();  // all have read `next` and `group`
    if (own < 0) continue;
    if (order != nullptr) order[place] = static_cast<int32_t>(n);
    if (after == 0) next[own] = place + 1;
  }
}

static __global__ void __launch_bounds__(kThreads, kBlocks) count_kernel(Sort s) {
  int64_t* counts = s.counts + blockIdx.x * (s.classes + 1);
  for (int64_t g = threadIdx.x; g <= s.classes; g += kThreads) counts[g] = 0;
  place_rows(s, counts, nullptr);
}

static __global__ void __launch_bounds__(kThreads, kBlocks) place_kernel(Sort s) {
  int64_t* next = s.next + blockIdx.x * (s.classes + 1);
  int64_t position = 0, segment = 0;
  for (int64_t start = 0; start <= s.classes; start += kThreads) {
    const int64_t g = start + threadIdx.x;
    int64_t size = 0, before = 0;
    for (int64_t b = 0; b < s.blocks && g <= s.classes; ++b) {
      if (b == blockIdx.x) before = size;
      size += s.counts[b * (s.classes + 1) + g];
    }
    const int64_t base = position, base_segment = segment;
    const int64_t offset = base + block_scan(size, &position);
    const int64_t first = base_segment + block_scan((size + s.segment_size - 1) / s.segment_size, &segment);
    if (g > s.classes) continue;
    next[g] = offset + before;
    if (blockIdx.x > 0) continue;
    s.offsets[g] = offset;
    s.first_segment[g] = first;
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    s.offsets[s.classes + 1] = position;
    s.first_segment[s.classes + 1] = segment;
  }
  place_rows(s, next, s.order);
}

}  // namespace cem_fast::cuda
