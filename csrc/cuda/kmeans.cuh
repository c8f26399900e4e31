// Iterations of k-means: every row goes to the nearest mean, every mean to the center of its rows, and one mean without
// rows to the row that is farthest from its own.
#pragma once

#include "fit.cuh"
#include "warp_distance.cuh"

namespace cem_fast::cuda {

constexpr int64_t kSharedNumbers = 24 << 10;  // bytes of sums that a block keeps in shared memory

// Statistics of one iteration.
template <class T>
struct KMeansState {
  T* means;           // [classes, components, dimension]
  int32_t* nearest;   // [rows]: the component of the row at each position
  T* counts;          // [segments, components]
  T* sums;            // [segments, components, dimension]: of deviations from the mean
  double* inertia;    // [segments]: squared distances to the nearest means
  double* deviation;  // [classes, components, dimension]: sums of deviations
  double* rows;       // [classes, components]
  double* shift;      // [classes, components, columns]: squared movement of the blocks' means
  double* limit;      // [classes]: largest squared movement that counts as none
  double* farthest;   // [segments]: largest squared distance of a row to its mean
  int64_t* at;        // [segments]: its position
  int64_t columns;    // blocks for the dimensions of one component
  double tol;
};

// In torch's order of scores: NaN before every number, then the lowest index.
__device__ inline bool is_nearer(double a, int64_t k, double b, int64_t other) {
  const bool nan_a = a != a, nan_b = b != b;
  if (nan_a != nan_b) return nan_a;
  return a < b || ((a == b || nan_a) && k < other);
}

// One block: the rows of a segment. A warp assigns kWarpRows rows at a time; then every thread adds the deviations of
// the block's rows in its dimensions.
template <class X>
__global__ void __launch_bounds__(kThreads, kBlocks)
    assign_kernel(Features x, int64_t K, Segments groups, Classes classes, KMeansState<Parameter<X>> s) {
  using T = Parameter<X>;
  constexpr int kRows = kWarpRows<T>, kTile = kRows * kWarps, kFlight = 8;
  __shared__ T sums[kSharedNumbers / sizeof(T)];
  __shared__ int64_t row[kTile];
  __shared__ int64_t component[kTile];

  const Segment segment = segment_at(groups, blockIdx.x);
  if (segment.group == groups.classes || classes.active[segment.group] == 0) return;
  const int64_t D = x.dimension, at = blockIdx.x * K;
  const int thread = threadIdx.x, lane = thread % kWarp, warp = thread / kWarp;
  const X* features = static_cast<const X*>(x.data);
  const T* means = s.means + segment.group * K * D;
  T* const sum = K * D <= kSharedNumbers / static_cast<int64_t>(sizeof(T)) ? sums : s.sums + at * D;
  for (int64_t k = 0; k < K; ++k) {
    for (int64_t d = thread; d < D; d += kThreads) sum[k * D + d] = 0;
  }
  for (int64_t k = thread; k < K; k += kThreads) s.counts[at + k] = 0;
  double inertia = 0;
  for (int64_t begin = segment.begin; begin < segment.end; begin += kTile) {
    const int rows = static_cast<int>(segment.end - begin < kTile ? segment.end - begin : kTile);
    __syncthreads();  // the rows before have been used
    // rows that are not there repeat the last
    const X* own[kRows];
    for (int r = 0; r < kRows; ++r) {
      const int i = warp * kRows + r < rows ? warp * kRows + r : rows - 1;
      const int64_t n = groups.order[begin + i];
      own[r] = features + n * x.stride;
      if (lane == r) row[warp * kRows + r] = n * x.stride;
    }
    double best = 0;
    int64_t chosen = INT64_MAX;
    for_each_distance<false, X, T>(own, means, nullptr, K, D, [&](int, int64_t k, double distance) {
      if (chosen < INT64_MAX && !is_nearer(distance, k, best, chosen)) return;
      best = distance;
      chosen = k;
    });
    for (int step = 1; step < kWarpComponents; step *= 2) {
      const double distance = __shfl_xor_sync(kAllLanes, best, step);
      const int64_t k = __shfl_xor_sync(kAllLanes, chosen, step);
      if (k == INT64_MAX || (chosen < INT64_MAX && !is_nearer(distance, k, best, chosen))) continue;
      best = distance;
      chosen = k;
    }
    const int r = lane / kWarpComponents, i = warp * kRows + r;
    if (lane % kWarpComponents == 0 && r < kRows && i < rows) {
      component[i] = chosen;
      s.nearest[begin + i] = static_cast<int32_t>(chosen);
      inertia += best;
    }
    __syncthreads();  // the components are known
    for (int64_t k = thread; k < K; k += kThreads) {
      int count = 0;
      for (int i = 0; i < rows; ++i) count += component[i] == k;
      s.counts[at + k] += static_cast<T>(count);
    }
    for (int64_t d = thread; d < D; d += kThreads) {
      for (int first = 0; first < rows; first += kFlight) {
        T deviation[kFlight];
        UNROLL
        for (int i = 0; i < kFlight; ++i) {
          const int j = first + i < rows ? first + i : rows - 1;
          deviation[i] = widen(features[row[j] + d]) - means[component[j] * D + d];
        }
        UNROLL
        for (int i = 0; i < kFlight; ++i) {
          if (first + i < rows) sum[component[first + i] * D + d] += deviation[i];
        }
      }
    }
  }
  inertia = block_sum(inertia);
  if (thread == 0) s.inertia[blockIdx.x] = inertia;
  for (int64_t k = 0; k < K && sum == sums; ++k) {
    for (int64_t d = thread; d < D; d += kThreads) s.sums[(at + k) * D + d] = sum[k * D + d];
  }
}

// tol times the mean variance of a class's features, from the statistics about its first means. Called by one block.
template <class T>
__device__ double movement_limit(const KMeansState<T>& s, const T* before, double inertia, double rows, int64_t c,
                                 int64_t K, int64_t D) {
  double spread = 0;
  for (int64_t d = threadIdx.x; d < D; d += kThreads) {
    double center = 0;
    for (int64_t ck = c * K; ck < (c + 1) * K; ++ck) {
      center += s.rows[ck] * static_cast<double>(before[ck * D + d]) + s.deviation[ck * D + d];
    }
    center /= rows;
    for (int64_t ck = c * K; ck < (c + 1) * K; ++ck) {
      const double away = static_cast<double>(before[ck * D + d]) - center;
      spread += away * (2 * s.deviation[ck * D + d] + s.rows[ck] * away);
    }
  }
  return s.tol * (inertia + block_sum(spread)) / (rows * static_cast<double>(D));
}

// One block: some dimensions of one component; the last of a class ends its iteration, unless a mean has no rows.
// `before` are the first means in the first iteration, else null.
template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks)
    move_means_kernel(int64_t K, int64_t D, Segments groups, Shares by, Classes classes, const T* before,
                      KMeansState<T> s) {
  const int64_t ck = blockIdx.x / s.columns, c = ck / K;
  if (classes.active[c] == 0) return;
  const int64_t d = blockIdx.x % s.columns * by.columns() + by.column();
  const int64_t k = ck % K;
  const double rows = segments_sum(groups, c, s.counts + k, K);
  const double total = shared_sum(groups, c, by, s.sums + k * D + d, K * D, d < D);
  double shift = 0;
  if (by.share() == 0 && d < D) {
    T* mean = s.means + ck * D + d;
    const double old = static_cast<double>(*mean);
    if (rows != 0) *mean = static_cast<T>(old + total / rows);
    const double step = static_cast<double>(*mean) - old;
    shift = step * step;
    if (before != nullptr) s.deviation[ck * D + d] = total;
  }
  shift = block_sum(shift);
  if (threadIdx.x == 0) {
    s.shift[blockIdx.x] = shift;
    if (blockIdx.x % s.columns == 0) s.rows[ck] = rows;
  }
  if (!is_last(classes.ticket + c, K * s.columns)) return;
  double empty = 0;
  shift = 0;
  for (int64_t i = threadIdx.x; i < K * s.columns; i += kThreads) shift += s.shift[c * K * s.columns + i];
  for (int64_t i = threadIdx.x; i < K; i += kThreads) empty += s.rows[c * K + i] == 0 ? 1 : 0;
  shift = block_sum(shift);
  empty = block_sum(empty);
  const double of_class = static_cast<double>(groups.offsets[c + 1] - groups.offsets[c]);
  if (before != nullptr) {
    const double inertia = segments_sum(groups, c, s.inertia, 1);
    const double limit = movement_limit(s, before, inertia, of_class, c, K, D);
    if (threadIdx.x == 0) s.limit[c] = limit;
  }
  if (threadIdx.x > 0) return;
  s.shift[c * K * s.columns] = shift;
  if (empty > 0 && of_class > 1) {
    classes.active[c] = 2;  // reseed_kernel ends the iteration
  } else {
    finish_iteration(classes, c, shift > s.limit[c]);
  }
}

// Moves the first mean without rows onto the row that is farthest from its own mean. One block: the rows of a segment.
template <class X>
__global__ void __launch_bounds__(kThreads, kBlocks)
    reseed_kernel(Features x, int64_t K, Segments groups, Classes classes, KMeansState<Parameter<X>> s) {
  using T = Parameter<X>;
  __shared__ double distance[kWarps];
  __shared__ int64_t position[kWarps];
  const Segment segment = segment_at(groups, blockIdx.x);
  const int64_t c = segment.group, D = x.dimension;
  if (c == groups.classes || classes.active[c] != 2) return;
  const X* features = static_cast<const X*>(x.data);
  T* means = s.means + c * K * D;
  const int thread = threadIdx.x, lane = thread % kWarp, warp = thread / kWarp;
  double most = 0;
  int64_t at = -1;
  for (int64_t i = segment.begin + warp; i < segment.end; i += kWarps) {
    const X* row = features + groups.order[i] * x.stride;
    const T* mean = means + s.nearest[i] * D;
    double total = 0;
    for (int64_t d = lane; d < D; d += kWarp) {
      const double deviation = static_cast<double>(widen(row[d])) - static_cast<double>(mean[d]);
      total += deviation * deviation;
    }
    for (int step = kWarp / 2; step > 0; step /= 2) total += __shfl_xor_sync(kAllLanes, total, step);
    if (total > most) most = total, at = i;
  }
  if (lane == 0) distance[warp] = most, position[warp] = at;
  __syncthreads();  // the warps' rows are known
  if (thread == 0) {
    for (int w = 1; w < kWarps; ++w) {
      if (distance[w] > most || (distance[w] == most && position[w] < at)) most = distance[w], at = position[w];
    }
    s.farthest[blockIdx.x] = most;
    s.at[blockIdx.x] = at;
  }
  const int64_t first = groups.first_segment[c], last = groups.first_segment[c + 1];
  if (!is_last(classes.ticket + c, last - first)) return;
  most = 0, at = -1;
  for (int64_t i = first; i < last; ++i) {
    if (s.farthest[i] > most) most = s.farthest[i], at = s.at[i];
  }
  int64_t k = 0;
  while (s.rows[c * K + k] != 0) ++k;
  double shift = 0;
  for (int64_t d = thread; d < D && at >= 0; d += kThreads) {
    T* mean = means + k * D + d;
    const double step =
        static_cast<double>(widen(features[groups.order[at] * x.stride + d])) - static_cast<double>(*mean);
    *mean = static_cast<T>(widen(features[groups.order[at] * x.stride + d]));
    shift += step * step;
  }
  shift = block_sum(shift);
  if (thread > 0) return;
  classes.active[c] = 1;
  finish_iteration(classes, c, s.shift[c * K * s.columns] + shift > s.limit[c]);
}

}  // namespace cem_fast::cuda
