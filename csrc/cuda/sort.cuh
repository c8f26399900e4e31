// A stable counting sort of rows by class, a range of rows by the block.
#pragma once

#include "groups.cuh"
#include "ticket.cuh"

namespace cem_fast::cuda {

__device__ inline int32_t group_of(const Sort& s, int64_t n) {
  const int64_t label = s.labels == nullptr ? 0 : s.labels[n];
  return static_cast<int32_t>(static_cast<uint64_t>(label) < static_cast<uint64_t>(s.classes) ? label : s.classes);
}

// What a block knows of every group.
struct Places {
  int32_t* next;   // rows in the ranges before this one, then the place of the range's next row
  int32_t* size;   // rows of all ranges
  int32_t* first;  // the first place
  int32_t* run;    // the first run

  __device__ Places(const Sort& s, int64_t range, unsigned char* shared) {
    const int64_t groups = s.classes + 1;
    next = s.room == nullptr ? reinterpret_cast<int32_t*>(shared) : s.room + range * 4 * groups;
    size = next + groups;
    first = size + groups;
    run = first + groups;
  }
};

__device__ inline int32_t parts_of(const Sort& s, int64_t g, int32_t size) {
  const auto run = static_cast<uint32_t>(s.run_size);
  const auto parts = static_cast<int32_t>((static_cast<uint32_t>(size) + run - 1) / run);
  return s.every_class && parts == 0 && g < s.classes ? 1 : parts;
}

// Neighboring groups, whose places a thread finds.
struct Neighbors {
  int64_t begin, end;

  __device__ explicit Neighbors(int64_t groups) {
    const int64_t each = (groups + kThreads - 1) / kThreads;
    begin = threadIdx.x * each;
    end = begin + each < groups ? begin + each : groups;
  }
};

// The first place and the first run of every group, from `next` and `size`.
__device__ inline void find_places(const Sort& s, int64_t range, const Places& of) {
  const int64_t groups = s.classes + 1;
  const auto [begin, end] = Neighbors(groups);
  int64_t own = 0;  // rows, and runs in the upper half
  for (int64_t g = begin; g < end; ++g) own += of.size[g] + (int64_t{parts_of(s, g, of.size[g])} << 32);
  int64_t total = 0, before = block_scan(own, &total);
  for (int64_t g = begin; g < end; ++g) {
    of.first[g] = static_cast<int32_t>(before);
    of.run[g] = static_cast<int32_t>(before >> 32);
    of.next[g] += of.first[g];
    before += of.size[g] + (int64_t{parts_of(s, g, of.size[g])} << 32);
  }
  if (range == 0 && threadIdx.x == 0) {
    s.offsets[groups] = static_cast<int32_t>(total);
    s.first_run[groups] = total >> 32;
  }
}

// Writes every group and its runs: the warps of all ranges take turns.
__device__ inline void write_groups(const Sort& s, int64_t range, const Places& of) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  for (int64_t g = range * kWarps + warp; g <= s.classes; g += s.ranges * kWarps) {
    const int64_t size = of.size[g], first = of.first[g], run = of.run[g], parts = parts_of(s, g, of.size[g]);
    if (lane == 0) {
      s.offsets[g] = first;
      s.first_run[g] = run;
    }
    for (int64_t i = lane; i < parts; i += kWarp) {
      s.runs[run + i] = {static_cast<int32_t>(g), static_cast<int32_t>(first + size * i / parts),
                         static_cast<int32_t>(first + size * (i + 1) / parts), static_cast<int32_t>(i),
                         static_cast<int32_t>(parts)};
    }
  }
}

// Places the rows of a range: warps take turns, so that rows of a group keep their order.
__device__ inline void place_rows(const Sort& s, int64_t range, int32_t* next) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t first = range * s.rows_of_range;
  const int64_t last = first + s.rows_of_range < s.rows ? first + s.rows_of_range : s.rows;
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

__device__ inline void finish_sort(const Sort& s, int64_t range, const Places& of) {
  find_places(s, range, of);
  __syncthreads();  // the places of all groups are complete
  write_groups(s, range, of);
  place_rows(s, range, of.next);
}

// Sorts the rows of a range without what others have counted: every range counts all rows.
__device__ inline void sort_range(const Sort& s, int64_t range, unsigned char* room) {
  constexpr int kBatch = 16;  // loads that are under way at a time
  const Places of(s, range, room);
  for (int64_t g = threadIdx.x; g <= s.classes; g += kThreads) {
    of.size[g] = of.next[g] = 0;
    if (s.tickets != nullptr && range == 0) s.tickets[g] = 0;
  }
  __syncthreads();
  const int64_t first = range * s.rows_of_range;
  for (int64_t start = threadIdx.x; start < s.rows; start += kBatch * kThreads) {
    int32_t group[kBatch];
    UNROLL
    for (int i = 0; i < kBatch; ++i) {
      const int64_t n = start + i * kThreads;
      group[i] = n < s.rows ? group_of(s, n) : -1;
    }
    UNROLL
    for (int i = 0; i < kBatch; ++i) {
      if (group[i] >= 0) atomicAdd((start + i * kThreads < first ? of.next : of.size) + group[i], 1);
    }
  }
  __syncthreads();  // all rows are counted
  const auto [begin, end] = Neighbors(s.classes + 1);
  for (int64_t g = begin; g < end; ++g) of.size[g] += of.next[g];
  finish_sort(s, range, of);
}

// The sort inside another kernel, which saves a launch: the blocks that come first sort a range each, or more where few
// run at a time, and all wait for the last range. No block waits for one that has not begun. Blocks that come late look
// once. The counters, of ranges that are taken and of ranges that are sorted, are 0 before, and again after the last
// block.
__device__ inline void sort_in_turns(const Sort& s, const Tickets& turns, unsigned char* room) {
  __shared__ unsigned range;
  const auto ranges = static_cast<unsigned>(s.ranges);
  unsigned *const taken = turns.at(0), *const sorted = turns.at(1);
  const auto is_sorted = [&] { return *static_cast<volatile unsigned*>(sorted) >= ranges; };
  bool ready = false;
  if (threadIdx.x == 0) {
    ready = is_sorted();
    range = ready ? ranges : atomicAdd(taken, 1u);
  }
  __syncthreads();  // `range` is known
  while (range < ranges) {
    sort_range(s, range, room);
    __threadfence();
    __syncthreads();  // for other blocks: all threads have written
    if (threadIdx.x == 0) {
      atomicAdd(sorted, 1u);
      range = atomicAdd(taken, 1u);
    }
    __syncthreads();  // `range` is known
  }
  if (threadIdx.x == 0) {
    while (!ready) ready = is_sorted();
    if (atomicAdd(sorted, 1u) + 1 == ranges + gridDim.x) *taken = *sorted = 0;  // nobody waits any more
  }
  __syncthreads();  // for other blocks: all rows are sorted
  __threadfence();
}

}  // namespace cem_fast::cuda
