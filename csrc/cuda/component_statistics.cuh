// Counts, scatter and sums of every component, and the gradient of the scatter.
#pragma once

#include "mixture_log_prob.cuh"
#include "partials.cuh"
#include "row.cuh"

namespace cem_fast::cuda {

// Partial statistics of the segments of a batch.
template <class T>
struct StatisticsPartials {
  Groups groups;
  int64_t components;
  int64_t dimension;
  T* counts;         // [segments, components]
  double* distance;  // [segments, components]: scatter summed over the dimensions
  T* scatter;        // [segments, components, dimension], or null: only `distance` is wanted
  T* sums;           // [segments, components, dimension] or null: sums of deviations from the mean
};

// One thread for a row: its best component, in torch's order (NaN before every number, then the lowest index), and its
// distance by position.
template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks)
    choose_kernel(Mixture mixture, Groups groups, Slab slab, const double* normalizers, int64_t* assignment,
                  double* distance) {
  const int64_t K = mixture.components, slot = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  const Occupant own = occupant(groups, slab, slot);
  if (own.row < 0) return;
  if (own.group == groups.classes) {
    assignment[own.row] = -1;
    return;
  }
  int64_t best = 0;
  double best_score = 0, best_distance = 0;
  for (int64_t k = 0; k < K; ++k) {
    const double candidate = total_distance(slab, K, slot, k);
    const double score =
        normalizers == nullptr ? candidate : -log_joint<T>(mixture, normalizers, own.group * K + k, candidate);
    if (k > 0 && !(score < best_score || (score != score && best_score == best_score))) continue;
    best = k;
    best_score = score;
    best_distance = candidate;
  }
  assignment[own.row] = best;
  distance[own.position] = best_distance;
}

// Unweighted distance of every row to its component, if a weighted one chose it. One block per row.
template <class X>
__global__ void __launch_bounds__(kThreads, kBlocks)
    own_distance_kernel(Features x, Mixture mixture, Groups groups, const int64_t* assignment, double* distance) {
  using T = Parameter<X>;
  const int64_t position = blockIdx.x, n = groups.order[position];
  if (position >= groups.offsets[groups.classes]) return;
  const int64_t c = mixture.labels == nullptr ? 0 : mixture.labels[n], D = x.dimension;
  const T* mean = static_cast<const T*>(mixture.means) + (c * mixture.components + assignment[n]) * D;
  const X* row = static_cast<const X*>(x.data) + n * x.stride;
  double total = 0;
  for (int64_t d = threadIdx.x; d < D; d += kThreads) {
    const T deviation = widen(row[d]) - mean[d];
    total += static_cast<double>(deviation * deviation);
  }
  total = block_sum(total);
  if (threadIdx.x == 0) distance[position] = total;
}

// One block: one segment and kThreads dimensions, or, as the segment's last block, its counts and summed distances.
template <class X>
__global__ void __launch_bounds__(kThreads, kBlocks)
    partial_statistics_kernel(Features x, Mixture mixture, const int64_t* assignment, const double* distance,
                              int64_t columns, StatisticsPartials<Parameter<X>> out) {
  using T = Parameter<X>;
  __shared__ int64_t row[kThreads];
  __shared__ int64_t component[kThreads];
  const Groups& groups = out.groups;
  const int64_t D = x.dimension, K = mixture.components, index = blockIdx.x / (columns + 1);
  const int64_t column = blockIdx.x % (columns + 1), d = column * kThreads + threadIdx.x;
  const Segment segment = segment_at(groups, index);
  if (segment.group == groups.classes) return;

  const T* means = static_cast<const T*>(mixture.means) + segment.group * K * D;
  const int64_t at = index * K;
  const int thread = threadIdx.x;
  const bool wide = column < columns;
  for (int64_t k = 0; k < K && wide && d < D; ++k) {
    if (out.scatter != nullptr) out.scatter[(at + k) * D + d] = 0;
    if (out.sums != nullptr) out.sums[(at + k) * D + d] = 0;
  }
  for (int64_t k = thread; k < K && !wide; k += kThreads) {
    out.counts[at + k] = 0;
    out.distance[at + k] = 0;
  }
  for (int64_t begin = segment.begin; begin < segment.end; begin += kThreads) {
    const int rows = static_cast<int>(segment.end - begin < kThreads ? segment.end - begin : kThreads);
    __syncthreads();  // the rows before have been used
    if (thread < rows) {
      const int64_t n = groups.order[begin + thread];
      row[thread] = n;
      component[thread] = assignment[n];
    }
    __syncthreads();
    if (wide) {
      for (int r = 0; r < rows && d < D; ++r) {
        const int64_t k = component[r], sum = (at + k) * D + d;
        const T deviation = widen(static_cast<const X*>(x.data)[row[r] * x.stride + d]) - means[k * D + d];
        if (out.scatter != nullptr) out.scatter[sum] += deviation * deviation;
        if (out.sums != nullptr) out.sums[sum] += deviation;
      }
    } else {
      for (int64_t k = thread; k < K; k += kThreads) {
        int count = 0;
        double total = 0;
        for (int r = 0; r < rows; ++r) {
          if (component[r] != k) continue;
          ++count;
          total += distance[begin + r];
        }
        out.counts[at + k] += static_cast<T>(count);
        out.distance[at + k] += total;
      }
    }
  }
}

// Blocks of a multiprocessor: enough loads in flight, in 40 registers.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr int kGradientBlocks = 8;
#else
constexpr int kGradientBlocks = 12;
#endif

// dx = 2 scale g (x - mu) with the row's own component; one warp for a piece of a row.
template <class X, bool kAligned>
__global__ void __launch_bounds__(kThreads, kGradientBlocks)
    scatter_gradient_kernel(ScatterGradient p, int64_t pieces) {
  using T = Parameter<X>;
  using Row = Piece<X, kAligned, 4>;
  constexpr int kVector = Row::kVector;
  const int64_t D = p.x.dimension, item = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  const int64_t n = pieces == 1 ? item : item / pieces, start = (item - n * pieces) * Row::kDims;
  if (n >= p.x.rows) return;
  Row x;
  x.read(static_cast<const X*>(p.x.data) + n * p.x.stride, start, D);
  const int64_t c = p.mixture.labels == nullptr ? 0 : p.mixture.labels[n], k = p.assignment[n];
  const bool valid = static_cast<uint64_t>(c) < static_cast<uint64_t>(p.mixture.classes) &&
                     static_cast<uint64_t>(k) < static_cast<uint64_t>(p.mixture.components);
  const int64_t ck = valid ? c * p.mixture.components + k : 0;
  const T* mean = static_cast<const T*>(p.mixture.means) + ck * D;
  const T* grad = static_cast<const T*>(p.grad_scatter) + (p.mixture.diagonal ? ck * D : ck);
  const T scale = p.scale == nullptr ? T(2) : 2 * *static_cast<const T*>(p.scale);
  const T poison = valid ? T(0) : static_cast<T>(nan(""));
  const T own = p.mixture.diagonal ? T(0) : scale * grad[0];
  UNROLL
  for (int i = 0; i < 4; ++i) {
    const int64_t d = Row::dimension(start, i);
    if (d >= D) break;
    X value[kVector];
    T mu[kVector], slope[kVector];
    x.elements(i, value);
    read_vector<kAligned>(mean + d, mu);
    if (p.mixture.diagonal) read_vector<kAligned>(grad + d, slope);
    UNROLL
    for (int e = 0; e < kVector; ++e) {
      const T factor = p.mixture.diagonal ? scale * slope[e] : own;
      narrow(factor * (widen(value[e]) - mu[e]) + poison, &value[e]);
    }
    memcpy(&x.load[i], value, sizeof value);
    *reinterpret_cast<typename Row::Load*>(static_cast<X*>(p.dx) + n * D + d) = x.load[i];
  }
}

// Converts sums of deviations to sums of rows. Sums of raw values with a common offset would lose a small spread.
template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks)
    add_means_kernel(int64_t size, int64_t dimension, const T* counts, const T* means, T* sums) {
  const int64_t i = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  if (i < size) sums[i] += counts[i / dimension] * means[i];
}

// Assigns rows, and gathers their statistics in partial sums.
template <class X>
StatisticsPartials<Parameter<X>> partial_statistics(Queue& queue, const Features& x, const Mixture& mixture,
                                                    bool per_dimension, bool sums, int64_t* assignment);

}  // namespace cem_fast::cuda
