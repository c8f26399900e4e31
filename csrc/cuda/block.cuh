// Threads of a block and their collective operations. All orders are fixed, so results are the same bits on every run.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#ifndef DYNAMIC_SHARED  // the host has its own
#define DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#endif

#ifdef __CUDACC__
#define UNROLL _Pragma("unroll")
#define PRAGMA(text) _Pragma(#text)
#define UNROLL_BY(count) PRAGMA(unroll count)
#else
#define UNROLL
#define UNROLL_BY(count)
#endif

namespace cem_fast::cuda {

constexpr int kThreads = 128;
constexpr int kBlocks = 4;  // minimum per multiprocessor; by default the compiler fits more, and spills registers
constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;
constexpr unsigned kAllLanes = 0xffffffffu;

// Sum over the warp, returned to each of its lanes.
template <class T>
__device__ T warp_sum(T value) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(kAllLanes, value, offset);
  return value;
}

// Sum over the block, returned to each of its threads.
template <class T>
__device__ T block_sum(T value) {
  __shared__ T of_warp[kWarps];
  value = warp_sum(value);
  __syncthreads();  // the sums of the call before have been read
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = value;
  __syncthreads();
  T total = of_warp[0];
  for (int w = 1; w < kWarps; ++w) total += of_warp[w];
  return total;
}

// Returns the sum over the threads before this one; adds that over all of them to `total`.
__device__ inline int64_t block_scan(int64_t value, int64_t* total) {
  __shared__ int64_t of_warp[kWarps];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  int64_t sum = value;
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const int64_t below = __shfl_up_sync(kAllLanes, sum, offset);
    if (lane >= offset) sum += below;
  }
  __syncthreads();  // the sums of the call before have been read
  if (lane == kWarp - 1) of_warp[warp] = sum;
  __syncthreads();
  int64_t before = sum - value;
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp) before += of_warp[w];
    *total += of_warp[w];
  }
  return before;
}

// Whether this is the last of `blocks` blocks to get here. It then sees what all of them have written. The counter is 0
// before, and again after the last block.
__device__ inline bool is_last(unsigned* ticket, int64_t blocks) {
  __shared__ bool last;
  __threadfence();
  __syncthreads();  // for other blocks: all threads have written
  if (threadIdx.x == 0) {
    last = atomicAdd(ticket, 1u) + 1 == static_cast<unsigned>(blocks);
    if (last) *ticket = 0;
  }
  __syncthreads();  // `last` is known
  __threadfence();
  return last;
}

}  // namespace cem_fast::cuda
