// log p(x | class) of a mixture of Gaussians, its posterior, and the gradient to x.
#pragma once

#include "distance.cuh"

namespace cem_fast::cuda {

constexpr double kLog2Pi = 1.8378770664093454836;

// log w - 1/2 sum_d log(2 pi v); one block for a component.
template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks) normalizer_kernel(Mixture mixture, int64_t D, double* out) {
  const T* variances = static_cast<const T*>(mixture.variances);
  const int64_t i = blockIdx.x;
  double logs = 0;
  if (mixture.diagonal) {
    for (int64_t d = threadIdx.x; d < D; d += kThreads) logs += log(static_cast<double>(variances[i * D + d]));
    logs = block_sum(logs);
  } else {
    logs = static_cast<double>(D) * log(static_cast<double>(variances[i]));
  }
  if (threadIdx.x > 0) return;
  const double weight = static_cast<double>(static_cast<const T*>(mixture.weights)[i]);
  out[i] = log(weight) - 0.5 * (static_cast<double>(D) * kLog2Pi + logs);
}

// log(w_k N(x; mu_k, v_k)) from a distance that is weighted by 1 / v already where variances are diagonal.
template <class T>
__device__ double log_joint(const Mixture& mixture, const double* normalizers, int64_t ck, double distance) {
  const double v = mixture.diagonal ? 1.0 : static_cast<double>(static_cast<const T*>(mixture.variances)[ck]);
  return normalizers[ck] - 0.5 * distance / v;
}

// Adjacent rows of a block of posterior_kernel, and threads that share the components of one row.
constexpr int kPosteriorRows = 8;
constexpr int kPosteriorThreads = kThreads / kPosteriorRows;

// `log_prob` [rows] and `responsibilities` [rows or slots, components] of kPosteriorRows rows where they are not null.
template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks)
    posterior_kernel(Mixture mixture, Groups groups, Slab slab, const double* normalizers, T* log_prob,
                     T* responsibilities, bool by_slot) {
  __shared__ double of_thread[kPosteriorThreads][kPosteriorRows];
  const int64_t K = mixture.components;
  const int lane = threadIdx.x % kPosteriorRows, first = threadIdx.x / kPosteriorRows;
  const int64_t slot = blockIdx.x * static_cast<int64_t>(kPosteriorRows) + lane;
  const Occupant own = occupant(groups, slab, slot);
  const bool valid = own.row >= 0 && own.group < groups.classes;
  T* out = responsibilities == nullptr || own.row < 0 ? nullptr : responsibilities + (by_slot ? slot : own.row) * K;
  // what follows a share's distances: the joint, then its exponential, in place of the first share
  double maximum = -INFINITY, sum = 0;
  for (int64_t k = first; k < K && valid; k += kPosteriorThreads) {
    const double distance = total_distance(slab, K, slot, k);
    const double joint = log_joint<T>(mixture, normalizers, own.group * K + k, distance);
    slab.distance[k * slab.slots + slot] = joint;
    maximum = joint > maximum || joint != joint ? joint : maximum;
  }
  of_thread[first][lane] = maximum;
  __syncthreads();  // the maxima are there
  for (int i = 0; i < kPosteriorThreads; ++i) {
    const double other = of_thread[i][lane];
    maximum = other > maximum || other != other ? other : maximum;
  }
  for (int64_t k = first; k < K && valid; k += kPosteriorThreads) {
    double* joint = slab.distance + k * slab.slots + slot;
    *joint = static_cast<double>(exp(static_cast<T>(*joint - maximum)));
    sum += *joint;
  }
  __syncthreads();  // the maxima have been read
  of_thread[first][lane] = sum;
  __syncthreads();  // the sums are there
  sum = 0;
  for (int i = 0; i < kPosteriorThreads; ++i) sum += of_thread[i][lane];
  if (!valid) maximum = sum = static_cast<double>(nan(""));
  // an infinite maximum is the answer itself
  if (log_prob != nullptr && own.row >= 0 && first == 0) {
    log_prob[own.row] = static_cast<T>(isinf(maximum) ? maximum : maximum + log(sum));
  }
  for (int64_t k = first; k < K && out != nullptr; k += kPosteriorThreads) {
    out[k] = static_cast<T>((valid ? slab.distance[k * slab.slots + slot] : 0) / sum);
  }
}

constexpr int kGradientRows = 16;
constexpr int kGradientComponents = 32;

// dx = sum_k a_k (mu_k - x) (/ v_k) with a = grad r; one block for kGradientRows rows and kThreads dimensions.
template <bool kWeighted, class X>
__global__ void __launch_bounds__(kThreads, kBlocks)
    gradient_kernel(LogProbBackward p, Groups groups, Slab slab, const Parameter<X>* responsibilities, bool by_slot) {
  using T = Parameter<X>;
  __shared__ T a[kGradientComponents][kGradientRows];
  __shared__ int64_t row[kGradientRows];

  const int64_t D = p.x.dimension, K = p.mixture.components, columns = (D + kThreads - 1) / kThreads;
  const int64_t d = blockIdx.x % columns * kThreads + threadIdx.x, slot = blockIdx.x / columns * kGradientRows;
  const int thread = threadIdx.x;
  const Segment segment = segment_at(groups, slab.first + slot / groups.size);
  const int64_t begin = segment.begin + slot % groups.size;
  if (begin >= segment.end) return;
  const int64_t rows = segment.end - begin < kGradientRows ? segment.end - begin : kGradientRows;
  if (thread < kGradientRows) row[thread] = groups.order[begin + (thread < rows ? thread : rows - 1)];
  __syncthreads();

  X* dx = static_cast<X*>(p.dx);
  if (segment.group == groups.classes) {
    for (int64_t r = 0; r < rows && d < D; ++r) narrow(static_cast<T>(nan("")), dx + row[r] * D + d);
    return;
  }
  const T* grad = static_cast<const T*>(p.grad);
  const T* variances = static_cast<const T*>(p.mixture.variances);
  T value[kGradientRows], sum[kGradientRows] = {};
  for (int r = 0; r < kGradientRows; ++r) {
    value[r] = d < D ? widen(static_cast<const X*>(p.x.data)[row[r] * p.x.stride + d]) : T(0);
  }
  for (int64_t k0 = 0; k0 < K; k0 += kGradientComponents) {
    const int components = static_cast<int>(K - k0 < kGradientComponents ? K - k0 : kGradientComponents);
    __syncthreads();  // the components before have been used
    for (int i = thread; i < kGradientComponents * kGradientRows; i += kThreads) {
      const int r = i / kGradientComponents, j = i % kGradientComponents;
      if (j >= components || r >= rows) continue;
      const T posterior = responsibilities[(by_slot ? slot + r : row[r]) * K + k0 + j];
      a[j][r] = posterior * grad[row[r]] / (kWeighted ? T(1) : variances[segment.group * K + k0 + j]);
    }
    __syncthreads();
    for (int j = 0; j < components && d < D; ++j) {
      const int64_t at = (segment.group * K + k0 + j) * D + d;
      const T mean = static_cast<const T*>(p.mixture.means)[at];
      T inverse = 1;
      if constexpr (kWeighted) inverse = T(1) / variances[at];
      for (int r = 0; r < kGradientRows; ++r) sum[r] += a[j][r] * inverse * (mean - value[r]);
    }
  }
  for (int r = 0; r < kGradientRows; ++r) {
    if (r < rows && d < D) narrow(sum[r], dx + row[r] * D + d);
  }
}

// The normalizers of all components: [classes, components].
double* log_normalizers(Queue& queue, const Features& x, const Mixture& mixture);

// Calls f with the responsibilities of all rows or, if they were not kept, once per slab with those of its slots.
using UsePosterior = std::function<void(const Slab& slab, const void* responsibilities, bool by_slot)>;
void for_each_posterior(Queue& queue, const Features& x, const Mixture& mixture, const Groups& groups, const void* kept,
                        const UsePosterior& f);

}  // namespace cem_fast::cuda
