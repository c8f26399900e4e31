// A call of the statistics, and the rows that each of its blocks answers for.
#pragma once

#include "entropy_bound.cuh"
#include "sort.cuh"

namespace cem_fast::cuda {

constexpr int kSearched = 512;  // rows that every block can search for those of its class

template <class T>
struct Statistics {
  Features x;
  Mixture mixture;
  const double* normalizers;  // [classes, components]: assign by posterior; or null
  int64_t* assignment;        // [rows]
  bool scatter;               // per dimension
  bool sums;
  // one block for a run, or for each of so many parts of every class
  Groups groups;  // sorted; else order is null
  int64_t parts;
  Tickets tickets;  // 0: classes; 1 + c: parts of a class
  Sort sort;        // that the kernel begins with; or of no blocks
  Tickets turns;    // of the sort
  // sums of a block: in shared memory, by the warp or by all of them together; or in `run`
  int32_t pitch;  // numbers of a component
  bool together;  // whether all warps share a row
  // of every run
  double* run_totals;   // [runs, components]
  int32_t* run_counts;  // [runs, components]
  T* run_planes;        // [runs, scatter + sums, components, dimension]
  double* room;         // [classes, kWarps, 2, components]: where shared memory does not suffice
  // results, or the bound
  T* counts;
  T* totals;
  T* sum;
  bool bounded;
  Bound bound;
  double* terms;         // [classes, components]
  double* class_counts;  // [classes, components] for the hinge
  double* class_totals;

  __device__ __host__ int32_t planes() const { return scatter + sums; }
};

// The rows of a block.
struct Part {
  int32_t group;
  int32_t size;
  int32_t index;  // of the run
  int32_t part;   // of the class
  int32_t parts;
  int32_t strangers;    // whether any row of the batch has no class
  const int32_t* rows;  // or null: consecutive ones from `first`
  int64_t first;

  __device__ int64_t row(int32_t i) const { return rows == nullptr ? first + i : rows[i]; }
  __device__ double poison() const { return strangers != 0 ? nan("") : 0; }
};

// Finds part `part` of the rows of a class among all rows, at most kSearched. Block 0 answers for rows without a class.
// The list is complete after the next barrier.
template <class T>
__device__ Part search(const Statistics<T>& p, int32_t* list) {
  constexpr int kPieces = kSearched / kWarp;
  __shared__ int of_piece[kPieces];
  __shared__ int strangers[kPieces];
  const int64_t group = blockIdx.x / p.parts, part = blockIdx.x % p.parts, N = p.x.rows;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  unsigned mine[kPieces / kWarps];
  UNROLL
  for (int i = 0; i < kPieces / kWarps; ++i) {
    const int piece = i * kWarps + warp, n = piece * kWarp + lane;
    const int64_t label = n < N ? p.mixture.labels[n] : 0;
    const bool known = static_cast<uint64_t>(label) < static_cast<uint64_t>(p.mixture.classes);
    if (!known && blockIdx.x == 0) p.assignment[n] = -1;
    mine[i] = __ballot_sync(kAllLanes, n < N && label == group);
    const unsigned unknown = __ballot_sync(kAllLanes, !known);
    if (lane > 0) continue;
    of_piece[piece] = __popc(mine[i]);
    strangers[piece] = unknown != 0;
  }
  __syncthreads();
  int64_t size = 0, unknown = 0;
  int before[kPieces / kWarps] = {};
  UNROLL
  for (int piece = 0; piece < kPieces; ++piece) {
    if (piece % kWarps == warp) before[piece / kWarps] = static_cast<int>(size);
    size += of_piece[piece];
    unknown += strangers[piece];
  }
  UNROLL
  for (int i = 0; i < kPieces / kWarps; ++i) {
    const unsigned below = mine[i] & ((1u << lane) - 1);
    if ((mine[i] >> lane & 1) != 0) list[before[i] + __popc(below)] = (i * kWarps + warp) * kWarp + lane;
  }
  const int64_t begin = size * part / p.parts, end = size * (part + 1) / p.parts;
  return {static_cast<int32_t>(group),
          static_cast<int32_t>(end - begin),
          static_cast<int32_t>(blockIdx.x),
          static_cast<int32_t>(part),
          static_cast<int32_t>(p.parts),
          unknown > 0,
          list + begin,
          0};
}

template <class T>
__device__ Part part_of_block(const Statistics<T>& p, int32_t* list) {
  const Groups& g = p.groups;
  const auto index = static_cast<int32_t>(blockIdx.x);
  if (g.order != nullptr) {
    if (index >= g.first_segment[g.classes + 1]) return {static_cast<int32_t>(g.classes), 0, 0, 0, 0, 0, nullptr, 0};
    const Run run = g.runs[index];
    return {run.group, run.end - run.begin, index, run.part, run.parts, g.has_stranger(), g.order + run.begin, 0};
  }
  if (p.mixture.labels != nullptr) return search(p, list);
  const auto parts = static_cast<int32_t>(p.parts);
  const int64_t begin = p.x.rows * index / parts, end = p.x.rows * (index + 1) / parts;
  return {0, static_cast<int32_t>(end - begin), index, index, parts, 0, nullptr, begin};
}

}  // namespace cem_fast::cuda
