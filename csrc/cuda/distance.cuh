// Squared distances of rows to the components of their class, in direct form: sum_d (x_d - mu_d)^2 (/ v_d).
#pragma once

#include "groups.cuh"
#include "row.cuh"

namespace cem_fast::cuda {

constexpr int kTileComponents = 8;
constexpr int kTileDims = 64;  // whose partial sums are widened to double
constexpr int kRowsOfThread = kTileRows * kTileComponents / kThreads;

// Some consecutive segments, and room for what is computed of their rows. Slot i of a slab belongs to row i % size of
// its segment i / size; slots beyond the end of a segment stay empty.
struct Slab {
  int64_t first;  // segment
  int64_t segments;
  int64_t slots;
  int64_t splits;      // shares that the dimensions are cut into
  int64_t split_dims;  // dimensions of a share
  double* distance;    // [splits, components, slots]
};

// The row in a slot.
struct Occupant {
  int64_t group;
  int64_t position;
  int64_t row;  // -1: none
};

__device__ inline Occupant occupant(const Groups& g, const Slab& slab, int64_t slot) {
  if (slot >= slab.slots) return {g.classes, 0, -1};
  const Segment segment = segment_at(g, slab.first + slot / g.size);
  const int64_t position = segment.begin + slot % g.size;
  return {segment.group, position, position < segment.end ? g.order[position] : -1};
}

__device__ inline double total_distance(const Slab& slab, int64_t components, int64_t slot, int64_t k) {
  double total = 0;
  for (int64_t s = 0; s < slab.splits; ++s) total += slab.distance[(s * components + k) * slab.slots + slot];
  return total;
}

// One block: kTileRows rows, kTileComponents components, one share of the dimensions.
template <bool kWeighted, class X>
__global__ void __launch_bounds__(kThreads, kBlocks)
    distance_kernel(Features x, Mixture mixture, Groups groups, Slab slab) {
  using T = Parameter<X>;
  constexpr int kStride = kTileDims + 1;  // rows in different banks
  __shared__ T row[kTileRows][kStride];
  __shared__ T mean[kTileComponents][kStride];
  __shared__ T inverse[kWeighted ? kTileComponents : 1][kStride];
  __shared__ int64_t offset[kTileRows];

  const int64_t D = x.dimension, K = mixture.components, tiles_of_segment = groups.size / kTileRows;
  const int64_t component_tiles = (K + kTileComponents - 1) / kTileComponents;
  const int64_t split = blockIdx.x % slab.splits, rest = blockIdx.x / slab.splits;
  const int64_t k0 = rest % component_tiles * kTileComponents, tile = rest / component_tiles;
  const Segment segment = segment_at(groups, slab.first + tile / tiles_of_segment);
  const int64_t begin = segment.begin + tile % tiles_of_segment * kTileRows;
  if (segment.group == groups.classes || begin >= segment.end) return;

  const X* features = static_cast<const X*>(x.data);
  const T* means = static_cast<const T*>(mixture.means) + segment.group * K * D;
  const T* variances = static_cast<const T*>(mixture.variances) + (kWeighted ? segment.group * K * D : 0);
  const int thread = threadIdx.x, q = thread % kTileComponents, r0 = thread / kTileComponents;
  // rows and components that are not there repeat the last
  if (thread < kTileRows) {
    const int64_t position = begin + thread < segment.end ? begin + thread : segment.end - 1;
    offset[thread] = groups.order[position] * x.stride;
  }
  __syncthreads();

  double total[kRowsOfThread] = {};
  const int64_t last = (split + 1) * slab.split_dims < D ? (split + 1) * slab.split_dims : D;
  for (int64_t start = split * slab.split_dims; start < last; start += kTileDims) {
    const int dims = static_cast<int>(last - start < kTileDims ? last - start : kTileDims);
    for (int i = thread; i < kTileRows * kTileDims; i += kThreads) {
      const int r = i / kTileDims, d = i % kTileDims;
      if (d < dims) row[r][d] = widen(features[offset[r] + start + d]);
    }
    for (int i = thread; i < kTileComponents * kTileDims; i += kThreads) {
      const int j = i / kTileDims, d = i % kTileDims;
      if (d >= dims) continue;
      const int64_t at = (k0 + j < K ? k0 + j : K - 1) * D + start + d;
      mean[j][d] = means[at];
      if constexpr (kWeighted) inverse[j][d] = T(1) / variances[at];
    }
    __syncthreads();
    T sum[kRowsOfThread] = {};
    for (int d = 0; d < dims; ++d) {
      const T m = mean[q][d];
      T weight = 1;
      if constexpr (kWeighted) weight = inverse[q][d];
      for (int i = 0; i < kRowsOfThread; ++i) {
        const T deviation = row[r0 + i * (kTileRows / kRowsOfThread)][d] - m;
        sum[i] += deviation * weight * deviation;
      }
    }
    for (int i = 0; i < kRowsOfThread; ++i) {
      double squares = static_cast<double>(sum[i]);
      if constexpr (!kWeighted && std::is_same_v<T, float>) {
        const int r = r0 + i * (kTileRows / kRowsOfThread);
        if (sum[i] == INFINITY) squares = wide_distance(row[r], mean[q], dims);
      }
      total[i] += squares;
    }
    __syncthreads();
  }
  if (k0 + q >= K) return;
  for (int i = 0; i < kRowsOfThread; ++i) {
    const int r = r0 + i * (kTileRows / kRowsOfThread);
    if (begin + r >= segment.end) continue;
    slab.distance[(split * K + k0 + q) * slab.slots + tile * kTileRows + r] = total[i];
  }
}

// Cuts the segments into slabs that need little memory whatever the size of the problem. The distances of one slab are
// overwritten by those of the next.
class Slabs {
 public:
  Slabs(Queue& queue, const Features& x, const Mixture& mixture, const Groups& groups);

  // Calls f(slab) for every slab, with the distances on their way: one launch a slab.
  template <class F>
  void for_each(bool weighted, const F& f) {
    for (int64_t first = 0; first < groups_.segments; first += segments_) {
      const int64_t segments = segments_ < groups_.segments - first ? segments_ : groups_.segments - first;
      const Slab slab{first, segments, segments * groups_.size, splits_, split_dims_, distance_};
      measure(slab, weighted);
      f(slab);
    }
  }

  int64_t most_slots() const { return segments_ * groups_.size; }

 private:
  void measure(const Slab& slab, bool weighted);

  Queue& queue_;
  Features x_;
  Mixture mixture_;
  Groups groups_;
  int64_t segments_;  // of a slab, at most
  int64_t splits_;
  int64_t split_dims_;
  double* distance_;
};

}  // namespace cem_fast::cuda
