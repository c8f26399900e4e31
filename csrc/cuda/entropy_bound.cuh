// The CEM loss of a batch's statistics and its derivative to the scatter: Eq. 5-7 of the paper, or the released code's
// hinge.
#pragma once

#include "component_statistics.cuh"

namespace cem_fast::cuda {

// Complete statistics.
template <class T>
struct Given {
  int64_t components;
  const T* counts;   // [classes, components]
  const T* scatter;  // [classes, components] or, if diagonal, [classes, components, width]
  int64_t width;

  __device__ T count(int64_t ck) const { return counts[ck]; }
  __device__ T scatter_at(int64_t ck, int64_t d) const { return scatter[ck * width + d]; }
  __device__ double rows_of_class(int64_t c) const {
    double total = 0;
    for (int64_t k = 0; k < components; ++k) total += static_cast<double>(counts[c * components + k]);
    return total;
  }
};

// Statistics as partial sums of segments.
template <class T>
struct Summed {
  StatisticsPartials<T> of;

  __device__ T count(int64_t ck) const {
    return static_cast<T>(sum_of_segments(of.groups, of.counts, of.components, 1, ck, 0));
  }
  __device__ T scatter_at(int64_t ck, int64_t d) const {
    return static_cast<T>(of.scatter == nullptr
                              ? sum_of_segments(of.groups, of.distance, of.components, 1, ck, 0)
                              : sum_of_segments(of.groups, of.scatter, of.components, of.dimension, ck, d));
  }
  __device__ double rows_of_class(int64_t c) const {
    return static_cast<double>(of.groups.offsets[c + 1] - of.groups.offsets[c]) + of.groups.template poison<double>();
  }
};

// Number of rows of the batch, and number of classes with rows.
struct Batch {
  double rows;
  double classes;
};

template <class Statistics>
__device__ Batch batch_of(const Statistics& statistics, int64_t classes) {
  double rows = 0, present = 0;
  for (int64_t c = threadIdx.x; c < classes; c += kThreads) {
    const double of_class = statistics.rows_of_class(c);
    rows += of_class;
    present += of_class > 0 ? 1 : 0;
  }
  rows = block_sum(rows);
  return {rows, block_sum(present)};
}

// pi (entropy - log pi) of every component, and the slopes. Blocks process components in turn. The weights of the blend
// are rounded to the parameters' type, so that comparisons have the same result on every backend.
template <class T, class Statistics>
__global__ void __launch_bounds__(kThreads, kBlocks) paper_kernel(Bound p, Statistics statistics, double* terms) {
  const int64_t CK = p.classes * p.components, D = p.dimension;
  const T* variances = static_cast<const T*>(p.variances);
  T* slope = static_cast<T*>(p.slope);
  const double samples = *p.num_samples;

  const double rows = batch_of(statistics, p.classes).rows;
  const double at_least_one = rows < 1 ? 1 : rows, most = samples / at_least_one;
  const double b = most > p.boost ? p.boost : most;  // NaN counts must stay NaN
  const double left = samples - b * rows;
  const T remainder = static_cast<T>(left < 0 ? 0 : left);  // rounding must not make a mass negative
  const double scale = p.mean ? 1 / static_cast<double>(D) : 1;
  const T gradient = static_cast<T>(0.5 * scale * (p.unbiased ? 1 / at_least_one : b / samples));

  for (int64_t ck = blockIdx.x; ck < CK; ck += gridDim.x) {
    const T count = statistics.count(ck), n = count < 1 ? T(1) : count;
    const T weight = static_cast<const T*>(p.class_prior)[ck / p.components] * static_cast<const T*>(p.weights)[ck];
    const T of_fit = weight * remainder, of_batch = static_cast<T>(b) * count, mass = of_fit + of_batch;
    const T pi = mass / static_cast<T>(samples);
    // two shares, because fitted + share (observed - fitted) cancels where observed is small
    const T share = count > 0 ? of_batch / mass : T(0), rest = count > 0 ? of_fit / mass : T(1);
    double entropy = 0, precision = 0;
    if (p.diagonal) {
      for (int64_t d = threadIdx.x; d < D; d += kThreads) {
        const T fitted = variances[ck * D + d], s2 = static_cast<T>(p.noise_variance[p.noise_size == 1 ? 0 : d]);
        const T v = rest * fitted + share * (statistics.scatter_at(ck, d) / n);
        entropy += static_cast<double>(log1p(v / s2));
        slope[ck * D + d] = gradient / (v + s2);
      }
    } else {
      const T fitted = variances[ck];
      const T v = rest * fitted + share * (statistics.scatter_at(ck, 0) / (n * static_cast<T>(D)));
      for (int64_t d = threadIdx.x; d < p.noise_size; d += kThreads) {
        const T s2 = static_cast<T>(p.noise_variance[d]);
        entropy += static_cast<double>(log1p(v / s2));
        precision += static_cast<double>(T(1) / (v + s2));
      }
    }
    entropy = block_sum(entropy);
    if (!p.diagonal) {
      precision = block_sum(precision) / static_cast<double>(p.noise_size);
      entropy *= static_cast<double>(D) / static_cast<double>(p.noise_size);
      if (threadIdx.x == 0) slope[ck] = static_cast<T>(static_cast<double>(gradient) * precision);
    }
    const double mixed = static_cast<double>(pi);
    if (threadIdx.x == 0) terms[ck] = scale * mixed * (0.5 * entropy - (mixed == 0 ? 0 : log(mixed)));
  }
}

// Every component's share of the hinge, and the slopes; one thread for a component.
template <class T, class Statistics>
__global__ void __launch_bounds__(kThreads, kBlocks) official_kernel(Bound p, Statistics statistics, double* terms) {
  const int64_t CK = p.classes * p.components;
  const double present = batch_of(statistics, p.classes).classes;
  const T classes_present = static_cast<T>(present < 1 ? 1 : present);
  const T class_rows = static_cast<T>(*p.num_samples) / static_cast<T>(p.classes);
  const double level = log(p.threshold * p.noise_variance[0] + p.gamma);
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t ck = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x; ck < CK; ck += step) {
    const T count = statistics.count(ck), weight = static_cast<const T*>(p.weights)[ck];
    const T share = count > 0 ? static_cast<T>(p.boost) * count / (weight * class_rows) : T(0);
    const double blend = static_cast<double>(share < 1 ? share : T(0.99));
    const double rows = static_cast<double>(count < 1 ? T(1) : count) * static_cast<double>(p.dimension);
    const double fitted = static_cast<double>(static_cast<const T*>(p.variances)[ck]);
    const double observed = static_cast<double>(statistics.scatter_at(ck, 0)) / rows;
    const double padded = (1 - blend) * fitted + blend * observed + p.gamma;
    const double part = count > 0 ? static_cast<double>(weight / classes_present) : 0, excess = log(padded) - level;
    terms[ck] = part * (excess <= 0 ? 0 : excess);  // NaN stays NaN
    static_cast<T*>(p.slope)[ck] = static_cast<T>((excess > 0 ? part : 0) * blend / (padded * rows));
  }
}

// One block: the sum of all terms.
template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks) value_kernel(const double* terms, int64_t size, T* value) {
  double total = 0;
  for (int64_t i = threadIdx.x; i < size; i += kThreads) total += terms[i];
  total = block_sum(total);
  if (threadIdx.x == 0) *value = static_cast<T>(total);
}

}  // namespace cem_fast::cuda
