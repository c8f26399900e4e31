// Iterations of EM with spherical or diagonal variances: posteriors of a slab of segments, their moments about the
// means, and the update of the parameters.
#pragma once

#include "fit.cuh"
#include "warp_distance.cuh"

namespace cem_fast::cuda {

constexpr double kLogTwoPi = 1.8378770664093454836;
constexpr int kExpectBlocks = 3;        // of a multiprocessor: four would leave too few registers for weighted sums
constexpr int kExpectRows = 32;         // of one block
constexpr int64_t kJointsOfBlock = 64;  // components whose log-densities fit in shared memory
constexpr int kStagedRows = 64;         // whose posteriors a block of the moments keeps at a time

// Components of one pass over the rows of a segment.
template <class T>
constexpr int kMomentsOfPass = sizeof(T) == 8 ? 8 : 16;

// Parameters and statistics of one iteration.
template <class T>
struct MixtureState {
  T* means;            // [classes, components, dimension]
  T* variances;        // [classes, components], or diagonal, [classes, components, dimension]
  T* weights;          // [classes, components]
  double* counts;      // [classes, components]
  double* bound;       // [classes]: mean log-likelihood of the rows
  T* precisions;       // the shape of variances
  double* constant;    // [classes, components]: log w - 1/2 sum_d log(2 pi v)
  double* joint;       // [rows of a slab, components], or null: shared memory is enough
  T* posterior;        // [rows of a slab, components]
  double* likelihood;  // [segments, blocks of kExpectRows rows]
  T* s0;               // [segments, components]
  T* s1;               // [segments, components, dimension]
  T* s2;               // [segments, components, dimension or blocks of kThreads dimensions]
  double* logs;        // [classes, components, columns]: sums of log v over the block's dimensions
  double* moved;       // [classes, components, columns]: s2 less what the means' movement takes from it
  bool diagonal;
  int64_t wide;     // blocks of kThreads dimensions
  int64_t columns;  // blocks of the update for the dimensions of one component
  double tol, reg_covar, tiny;
};

// Segments whose posteriors are kept at a time.
struct Window {
  int64_t first;
  int64_t segments;
};

// precisions and constants of the first parameters. One block for each component.
template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks) prepare_kernel(int64_t K, int64_t D, MixtureState<T> s) {
  const int64_t i = blockIdx.x, width = s.diagonal ? D : 1;
  double logs = 0;
  for (int64_t d = threadIdx.x; d < width; d += kThreads) {
    const T variance = s.variances[i * width + d];
    s.precisions[i * width + d] = T(1) / variance;
    logs += log(static_cast<double>(variance));
  }
  logs = block_sum(logs) * static_cast<double>(D / width);
  if (threadIdx.x > 0) return;
  s.counts[i] = 0;
  if (i % K == 0) s.bound[i / K] = 0;
  s.constant[i] = log(static_cast<double>(s.weights[i])) - 0.5 * (static_cast<double>(D) * kLogTwoPi + logs);
}

// Posteriors and log-likelihood of kExpectRows rows of a segment. A lane reads no log-density but its own.
template <bool kDiagonal, class X>
__global__ void __launch_bounds__(kThreads, kExpectBlocks)
    expect_kernel(Features x, int64_t K, Segments groups, Classes classes, Window window,
                  MixtureState<Parameter<X>> s) {
  using T = Parameter<X>;
  constexpr int kRows = kWarpRows<T>, kTile = kRows * kWarps;
  __shared__ double joints[kTile][kJointsOfBlock];
  const int64_t parts = (groups.size + kExpectRows - 1) / kExpectRows, D = x.dimension;
  const int64_t part = blockIdx.x % parts, index = window.first + blockIdx.x / parts;
  const Segment segment = segment_at(groups, index);
  if (segment.group == groups.classes || classes.active[segment.group] == 0) return;
  const int64_t c = segment.group, from = segment.begin + part * kExpectRows;
  const int64_t to = from + kExpectRows < segment.end ? from + kExpectRows : segment.end;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int r = lane / kWarpComponents, j = lane % kWarpComponents;
  const X* features = static_cast<const X*>(x.data);
  const T* means = s.means + c * K * D;
  const T* precisions = s.precisions + (kDiagonal ? c * K * D : c * K);
  double likelihood = 0;
  for (int64_t begin = from + warp * kRows; begin < to; begin += kTile) {
    const X* own[kRows];
    for (int i = 0; i < kRows; ++i) {
      own[i] = features + groups.order[begin + i < to ? begin + i : to - 1] * x.stride;  // the last is repeated
    }
    // lanes past the sums of a pass hold copies of them
    const bool valid = r < kRows && begin + r < to;
    const int64_t at = ((index - window.first) * groups.size + begin + r - segment.begin) * K;
    double* const joint = s.joint == nullptr ? joints[warp * kRows + r % kRows] : s.joint + at;
    double highest = -INFINITY, mass = 0;
    for_each_distance<kDiagonal, X, T>(own, means, precisions, K, D, [&](int, int64_t k, double distance) {
      if (!valid) return;
      if (!kDiagonal) distance /= static_cast<double>(s.variances[c * K + k]);
      const double value = s.constant[c * K + k] - 0.5 * distance;
      joint[k] = value;
      highest = value > highest || value != value ? value : highest;
    });
    for (int step = 1; step < kWarpComponents; step *= 2) {
      const double other = __shfl_xor_sync(kAllLanes, highest, step);
      highest = other > highest || other != other ? other : highest;
    }
    for (int64_t k = j; k < K && valid; k += kWarpComponents) {
      joint[k] = static_cast<double>(exp(static_cast<T>(joint[k] - highest)));
      mass += joint[k];
    }
    for (int step = 1; step < kWarpComponents; step *= 2) mass += __shfl_xor_sync(kAllLanes, mass, step);
    for (int64_t k = j; k < K && valid; k += kWarpComponents) s.posterior[at + k] = static_cast<T>(joint[k] / mass);
    if (valid && j == 0) likelihood += isinf(highest) ? highest : highest + log(mass);
  }
  likelihood = block_sum(likelihood);
  if (threadIdx.x == 0) s.likelihood[index * parts + part] = likelihood;
}

// Moments of a segment about the means in kThreads dimensions. Components whose posterior underflows cost little.
template <class X>
__global__ void __launch_bounds__(kThreads, kBlocks)
    fit_moments_kernel(Features x, int64_t K, Segments groups, Classes classes, Window window,
                       MixtureState<Parameter<X>> s) {
  using T = Parameter<X>;
  constexpr int kPass = kMomentsOfPass<T>, kFlight = 4;
  __shared__ T a[kStagedRows][kPass];
  __shared__ int64_t row[kStagedRows];
  const int64_t D = x.dimension, column = blockIdx.x % s.wide, index = window.first + blockIdx.x / s.wide;
  const int64_t d = column * kThreads + threadIdx.x;
  const Segment segment = segment_at(groups, index);
  if (segment.group == groups.classes || classes.active[segment.group] == 0) return;
  const X* features = static_cast<const X*>(x.data) + (d < D ? d : D - 1);
  const T* means = s.means + segment.group * K * D;
  const T* posterior = s.posterior + (index - window.first) * groups.size * K;
  const int thread = threadIdx.x;
  for (int64_t k0 = 0; k0 < K; k0 += kPass) {
    const int components = static_cast<int>(K - k0 < kPass ? K - k0 : kPass);
    T mean[kPass], s0 = 0, s1[kPass] = {}, s2[kPass] = {};
    UNROLL
    for (int j = 0; j < kPass; ++j) mean[j] = j < components && d < D ? means[(k0 + j) * D + d] : T(0);
    for (int64_t begin = segment.begin; begin < segment.end; begin += kStagedRows) {
      const int rows = static_cast<int>(segment.end - begin < kStagedRows ? segment.end - begin : kStagedRows);
      __syncthreads();  // the rows before have been used
      for (int i = thread; i < rows; i += kThreads) row[i] = groups.order[begin + i] * x.stride;
      for (int i = thread; i < rows * kPass; i += kThreads) {
        const int r = i / kPass, j = i % kPass;
        a[r][j] = j < components ? posterior[(begin + r - segment.begin) * K + k0 + j] : T(0);
      }
      __syncthreads();  // the posteriors are there
      for (int first = 0; first < rows; first += kFlight) {
        T value[kFlight];
        UNROLL
        for (int i = 0; i < kFlight; ++i) value[i] = widen(features[row[first + i < rows ? first + i : rows - 1]]);
        UNROLL
        for (int i = 0; i < kFlight; ++i) {
          if (first + i >= rows) break;
          UNROLL
          for (int j = 0; j < kPass; ++j) {
            const T weight = a[first + i][j];
            if (weight == 0) continue;
            const T deviation = value[i] - mean[j], moment = weight * deviation;
            s1[j] += moment;
            s2[j] += moment * deviation;
          }
        }
      }
      for (int r = 0; r < rows && column == 0 && thread < components; ++r) s0 += a[r][thread];
    }
    const int64_t at = index * K + k0;
    if (column == 0 && thread < components) s.s0[at + thread] = s0;
    UNROLL
    for (int j = 0; j < kPass; ++j) {
      if (j >= components) break;
      if (d < D) s.s1[(at + j) * D + d] = s1[j];
      if (s.diagonal) {
        if (d < D) s.s2[(at + j) * D + d] = s2[j];
      } else {
        const T total = block_sum(d < D ? s2[j] : T(0));
        if (thread == 0) s.s2[(at + j) * s.wide + column] = total;
      }
    }
  }
}

// New parameters. One block: some dimensions of one component; the last of a class adds up what the blocks of its
// components found, and ends the iteration.
template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks)
    maximize_kernel(int64_t K, int64_t D, bool first, Segments groups, Shares by, Classes classes, MixtureState<T> s) {
  const int64_t ck = blockIdx.x / s.columns, c = ck / K, k = ck % K, block = blockIdx.x % s.columns;
  if (classes.active[c] == 0) return;
  const int64_t d = block * by.columns() + by.column();
  const double mass = segments_sum(groups, c, s.s0 + k, K) + groups.poison<double>();
  const double share = mass < s.tiny ? s.tiny : mass;  // NaN passes
  const double sum = shared_sum(groups, c, by, s.s1 + k * D + d, K * D, d < D);
  const double squares = s.diagonal ? shared_sum(groups, c, by, s.s2 + k * D + d, K * D, d < D) : 0;
  double moved = 0, logs = 0;
  if (by.share() == 0 && d < D) {
    const double shift = mass == 0 ? 0 : sum / share;
    T* mean = s.means + ck * D + d;
    *mean = static_cast<T>(static_cast<double>(*mean) + shift);
    if (s.diagonal) {
      const double spread = squares / share - shift * shift;
      const T variance = static_cast<T>((spread < 0 ? 0 : spread) + s.reg_covar);
      s.variances[ck * D + d] = variance;
      s.precisions[ck * D + d] = T(1) / variance;
      logs = log(static_cast<double>(variance));
    } else {
      moved = -shift * shift;
    }
  }
  if (s.diagonal) {
    logs = block_sum(logs);
  } else {
    moved = block_sum(moved);
    for (int64_t w = block; w < s.wide; w += s.columns) {
      moved += segments_sum(groups, c, s.s2 + k * s.wide + w, K * s.wide) / share;
    }
  }
  if (threadIdx.x == 0) {
    s.logs[blockIdx.x] = logs;
    s.moved[blockIdx.x] = moved;
    if (block == 0) s.counts[ck] = mass;
  }
  if (!is_last(classes.ticket + c, K * s.columns)) return;
  double rows = 0, likelihood = 0;
  for (int64_t i = c * K + threadIdx.x; i < (c + 1) * K; i += kThreads) rows += s.counts[i];
  rows = block_sum(rows);
  const int64_t parts = (groups.size + kExpectRows - 1) / kExpectRows;
  for (int64_t i = groups.first_segment[c] * parts + threadIdx.x; i < groups.first_segment[c + 1] * parts;
       i += kThreads) {
    likelihood += s.likelihood[i];
  }
  likelihood = block_sum(likelihood);
  const double divisor = rows < 1 ? 1 : rows;
  for (int64_t i = c * K + threadIdx.x; i < (c + 1) * K; i += kThreads) {
    double log_variance = 0, spread = 0;
    for (int64_t b = 0; b < s.columns; ++b) {
      log_variance += s.logs[i * s.columns + b];
      spread += s.moved[i * s.columns + b];
    }
    if (!s.diagonal) {
      spread /= static_cast<double>(D);
      s.variances[i] = static_cast<T>((spread < 0 ? 0 : spread) + s.reg_covar);
      log_variance = static_cast<double>(D) * log(static_cast<double>(s.variances[i]));
    }
    s.weights[i] = static_cast<T>(s.counts[i] / divisor);
    s.constant[i] = log(static_cast<double>(s.weights[i])) - 0.5 * (static_cast<double>(D) * kLogTwoPi + log_variance);
  }
  if (threadIdx.x > 0) return;
  const double before = first ? -INFINITY : s.bound[c];
  s.bound[c] = likelihood / divisor;
  finish_iteration(classes, c, s.bound[c] - before >= s.tol && rows > 0);
}

}  // namespace cem_fast::cuda
