// A stable counting sort of rows by class: every block counts a range of rows, then places them.
#pragma once

#include "groups.cuh"

namespace cem_fast::cuda {

struct Sort {
  const int64_t* labels;  // [rows], or null: class 0
  int64_t rows;
  int64_t classes;
  int64_t blocks;
  int64_t rows_of_block;
  int64_t run_size;    // most rows of a run
  bool every_class;    // classes without rows have an empty run
  int32_t* counts;     // [blocks, classes + 1]: rows of each group in each block
  int32_t* next;       // [blocks, classes + 1]: where the block's next row of each group goes; null: in shared memory
  int32_t* order;      // [rows]
  int64_t* offsets;    // [classes + 2]
  int64_t* first_run;  // [classes + 2]
  Run* runs;
  unsigned* tickets;  // [classes + 1], set to 0; or null
};

__device__ inline int32_t group_of(const Sort& s, int64_t n) {
  const int64_t label = s.labels == nullptr ? 0 : s.labels[n];
  return static_cast<int32_t>(static_cast<uint64_t>(label) < static_cast<uint64_t>(s.classes) ? label : s.classes);
}

static __global__ void __launch_bounds__(kThreads, kBlocks) count_kernel(Sort s) {
  DYNAMIC_SHARED(room);
  int32_t* of_block = s.counts + blockIdx.x * (s.classes + 1);
  int32_t* histogram = s.next == nullptr ? reinterpret_cast<int32_t*>(room) : of_block;
  for (int64_t g = threadIdx.x; g <= s.classes; g += kThreads) {
    histogram[g] = 0;
    if (s.tickets != nullptr && blockIdx.x == 0) s.tickets[g] = 0;
  }
  __syncthreads();
  const int64_t first = blockIdx.x * s.rows_of_block;
  const int64_t last = first + s.rows_of_block < s.rows ? first + s.rows_of_block : s.rows;
  for (int64_t n = first + threadIdx.x; n < last; n += kThreads) atomicAdd(&histogram[group_of(s, n)], 1);
  if (s.next != nullptr) return;
  __syncthreads();
  for (int64_t g = threadIdx.x; g <= s.classes; g += kThreads) of_block[g] = histogram[g];
}

// Rows of a group, and those in the blocks before this one.
struct GroupSize {
  int64_t size;
  int64_t before;
};

__device__ inline GroupSize group_size(const Sort& s, int64_t g) {
  int64_t size = 0, before = 0;
  UNROLL_BY(8)
  for (int64_t b = 0; b < s.blocks; ++b) {
    const int32_t count = s.counts[b * (s.classes + 1) + g];
    before += b < blockIdx.x ? count : 0;
    size += count;
  }
  return {size, before};
}

// Places the block's rows: warps take turns, so that rows of a group keep their order.
__device__ inline void place_rows(const Sort& s, int32_t* next) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t first = blockIdx.x * s.rows_of_block;
  const int64_t last = first + s.rows_of_block < s.rows ? first + s.rows_of_block : s.rows;
  for (int64_t start = first; start < last; start += kThreads) {
    const int64_t n = start + threadIdx.x;
    const int32_t group = n < last ? group_of(s, n) : -1;
    const unsigned same = __match_any_sync(kAllLanes, group);
    const int rank = __popc(same & ((1u << lane) - 1));
    for (int turn = 0; turn < kWarps; ++turn) {
      __syncthreads();  // `next` is complete, and the warp before has had its turn
      if (turn != warp) continue;
      const int32_t place = group < 0 ? 0 : next[group] + rank;
      __syncwarp();  // all lanes have read `next`
      if (group < 0) continue;
      if (rank == 0) next[group] = place + __popc(same);
      s.order[place] = static_cast<int32_t>(n);
    }
  }
}

static __global__ void __launch_bounds__(kThreads, kBlocks) place_kernel(Sort s) {
  DYNAMIC_SHARED(room);
  int32_t* next = s.next == nullptr ? reinterpret_cast<int32_t*>(room) : s.next + blockIdx.x * (s.classes + 1);
  int64_t position = 0, run = 0;
  for (int64_t start = 0; start <= s.classes; start += kThreads) {
    const int64_t g = start + threadIdx.x;
    const GroupSize group = g <= s.classes ? group_size(s, g) : GroupSize{0, 0};
    int64_t parts = (group.size + s.run_size - 1) / s.run_size;
    if (s.every_class && parts == 0 && g < s.classes) parts = 1;
    const int64_t base = position, base_run = run;
    const int64_t offset = base + block_scan(group.size, &position);
    const int64_t first = base_run + block_scan(parts, &run);
    if (g > s.classes) continue;
    next[g] = static_cast<int32_t>(offset + group.before);
    if (blockIdx.x > 0) continue;
    s.offsets[g] = offset;
    s.first_run[g] = first;
    for (int64_t i = 0; i < parts; ++i) {
      s.runs[first + i] = {static_cast<int32_t>(g), static_cast<int32_t>(offset + group.size * i / parts),
                           static_cast<int32_t>(offset + group.size * (i + 1) / parts), static_cast<int32_t>(i),
                           static_cast<int32_t>(parts)};
    }
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    s.offsets[s.classes + 1] = position;
    s.first_run[s.classes + 1] = run;
  }
  place_rows(s, next);
}

}  // namespace cem_fast::cuda
