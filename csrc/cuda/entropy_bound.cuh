// The CEM loss of a batch's statistics and its derivative to the scatter: Eq. 5-7 of the paper, or the released code's
// hinge. Statistics are complete when a class is finished; they come as count(k), total(k) and at(k, d): rows, summed
// and per-dimension scatter of a component.
#pragma once

#include "ticket.cuh"

namespace cem_fast::cuda {

// Eq. 5-7 for one component: what does not depend on its scatter. The weights of the blend are rounded to the
// parameters' type, so that comparisons have the same result on every backend.
template <class T>
struct Blend {
  T n;        // rows, at least one
  T share;    // of the batch in the variance
  T rest;     // of the fit; two shares, because fitted + share (observed - fitted) cancels where observed is small
  double pi;  // weight of the component
  T gradient;
  double scale;

  __device__ Blend(const Bound& p, double rows, int64_t ck, double of_component) {
    const double samples = *p.num_samples, at_least_one = rows < 1 ? 1 : rows, most = samples / at_least_one;
    const double b = most > p.boost ? p.boost : most;  // NaN counts must stay NaN
    const double left = samples - b * rows;
    const T remainder = static_cast<T>(left < 0 ? 0 : left);  // rounding must not make a mass negative
    scale = p.mean ? 1 / static_cast<double>(p.dimension) : 1;
    gradient = static_cast<T>(0.5 * scale * (p.unbiased ? 1 / at_least_one : b / samples));
    const T count = static_cast<T>(of_component);
    n = count < 1 ? T(1) : count;
    const T weight = static_cast<const T*>(p.class_prior)[ck / p.components] * static_cast<const T*>(p.weights)[ck];
    const T of_fit = weight * remainder, of_batch = static_cast<T>(b) * count, mass = of_fit + of_batch;
    pi = static_cast<double>(mass / static_cast<T>(samples));
    share = count > 0 ? of_batch / mass : T(0);
    rest = count > 0 ? of_fit / mass : T(1);
  }

  __device__ double term(double entropy) const { return scale * pi * (0.5 * entropy - (pi == 0 ? 0 : log(pi))); }
};

// Terms and slopes of the components of one class. `room` [kWarps, 2, components] is scratch that the block shares.
template <bool kWide, class T, class Sums>
__device__ void finish_class(const Bound& p, double rows, int64_t c, const Sums& sums, double* room, double* terms) {
  const int64_t K = p.components, D = p.dimension;
  const T* variances = static_cast<const T*>(p.variances);
  T* slope = static_cast<T*>(p.slope);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const bool per_dimension = p.diagonal || p.noise_size > 1;
  for (int64_t k = 0; k < K && per_dimension; ++k) {
    const int64_t ck = c * K + k;
    const Blend<T> blend(p, rows, ck, sums.count(k));
    double entropy = 0, precision = 0;
    if (kWide && p.diagonal) {
      UNROLL_BY(4)
      for (int64_t d = threadIdx.x; d < D; d += kThreads) {
        const T s2 = static_cast<T>(p.noise_variance[p.noise_size == 1 ? 0 : d]);
        const T observed = static_cast<T>(sums.at(k, d)) / blend.n;
        const T v = blend.rest * variances[ck * D + d] + blend.share * observed;
        entropy += static_cast<double>(log1p(v / s2));
        slope[ck * D + d] = blend.gradient / (v + s2);
      }
    } else {
      const T observed = static_cast<T>(sums.total(k)) / (blend.n * static_cast<T>(D));
      const T v = blend.rest * variances[ck] + blend.share * observed;
      for (int64_t d = threadIdx.x; d < D; d += kThreads) {
        const T s2 = static_cast<T>(p.noise_variance[d]);
        entropy += static_cast<double>(log1p(v / s2));
        precision += static_cast<double>(T(1) / (v + s2));
      }
    }
    entropy = warp_sum(entropy);
    if (!p.diagonal) precision = warp_sum(precision);
    if (lane > 0) continue;
    room[(warp * 2 + 0) * K + k] = entropy;
    room[(warp * 2 + 1) * K + k] = precision;
  }
  __syncthreads();  // `room` is complete
  for (int64_t k = threadIdx.x; k < K; k += kThreads) {
    const int64_t ck = c * K + k;
    const Blend<T> blend(p, rows, ck, sums.count(k));
    double entropy = 0, precision = 0;
    if (per_dimension) {
      for (int w = 0; w < kWarps; ++w) {
        entropy += room[(w * 2 + 0) * K + k];
        precision += room[(w * 2 + 1) * K + k];
      }
      precision /= static_cast<double>(D);
    } else {
      const T observed = static_cast<T>(sums.total(k)) / (blend.n * static_cast<T>(D));
      const T v = blend.rest * variances[ck] + blend.share * observed, s2 = static_cast<T>(p.noise_variance[0]);
      entropy = static_cast<double>(D) * static_cast<double>(log1p(v / s2));
      precision = static_cast<double>(T(1) / (v + s2));
    }
    if (!p.diagonal) slope[ck] = static_cast<T>(static_cast<double>(blend.gradient) * precision);
    terms[ck] = blend.term(entropy);
  }
}

// The hinge of all components, and its slopes, by one block; counts and totals [classes, components] are complete.
template <class T, class S>
__device__ double hinge(const Bound& p, const S* counts, const S* totals, double poison) {
  const int64_t K = p.components, CK = p.classes * K;
  double present = 0, value = 0;
  for (int64_t c = threadIdx.x; c < p.classes; c += kThreads) {
    double rows = 0;
    for (int64_t k = 0; k < K; ++k) rows += static_cast<double>(__ldcg(counts + c * K + k));
    present += rows > 0 ? 1 : 0;
  }
  present = block_sum(present);
  const T classes_present = static_cast<T>(present < 1 ? 1 : present);
  const T class_rows = static_cast<T>(*p.num_samples) / static_cast<T>(p.classes);
  const double level = log(p.threshold * p.noise_variance[0] + p.gamma);
  for (int64_t ck = threadIdx.x; ck < CK; ck += kThreads) {
    const T count = static_cast<T>(__ldcg(counts + ck)), weight = static_cast<const T*>(p.weights)[ck];
    const T share = count > 0 ? static_cast<T>(p.boost) * count / (weight * class_rows) : T(0);
    const double blend = static_cast<double>(share < 1 ? share : T(0.99));
    const double rows = static_cast<double>(count < 1 ? T(1) : count) * static_cast<double>(p.dimension);
    const double fitted = static_cast<double>(static_cast<const T*>(p.variances)[ck]);
    const double observed = (static_cast<double>(__ldcg(totals + ck)) + poison) / rows;
    const double padded = (1 - blend) * fitted + blend * observed + p.gamma;
    const double part = count > 0 ? static_cast<double>(weight / classes_present) : 0, excess = log(padded) - level;
    value += part * (excess <= 0 ? 0 : excess);  // NaN stays NaN
    static_cast<T*>(p.slope)[ck] = static_cast<T>((excess > 0 ? part : 0) * blend / (padded * rows) + poison);
  }
  return block_sum(value) + poison;
}

// The last block: the value.
template <class T>
__device__ void finish_value(const Bound& p, const double* terms) {
  double total = 0;
  UNROLL_BY(8)
  for (int64_t i = threadIdx.x; i < p.classes * p.components; i += kThreads) total += __ldcg(terms + i);
  total = block_sum(total);
  if (threadIdx.x == 0) *static_cast<T*>(p.value) = static_cast<T>(total);
}

// Statistics of a class that came complete.
template <class T>
struct Given {
  const T* counts;   // [components]
  const T* scatter;  // [components] or [components, dimension]
  int64_t dimension;

  __device__ double count(int64_t k) const { return static_cast<double>(counts[k]); }
  __device__ double total(int64_t k) const { return static_cast<double>(scatter[k]); }
  __device__ double at(int64_t k, int64_t d) const { return static_cast<double>(scatter[k * dimension + d]); }
};

// The bound of complete statistics. Blocks process classes in turn.
template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks)
    bound_kernel(Bound p, const T* counts, const T* scatter, Tickets tickets, double* room, double* terms) {
  const int64_t K = p.components;
  if (p.official) {
    const double value = hinge<T>(p, counts, scatter, 0);
    if (threadIdx.x == 0) *static_cast<T*>(p.value) = static_cast<T>(value);
    return;
  }
  double rows = 0;
  for (int64_t i = threadIdx.x; i < p.classes * K; i += kThreads) rows += static_cast<double>(counts[i]);
  rows = block_sum(rows);
  for (int64_t c = blockIdx.x; c < p.classes; c += gridDim.x) {
    const int64_t width = p.diagonal ? p.dimension : 1;
    __syncthreads();  // the class before has used `room`
    finish_class<true, T>(p, rows, c, Given<T>{counts + c * K, scatter + c * K * width, p.dimension},
                          room + blockIdx.x * 2 * kWarps * K, terms);
  }
  if (is_last(tickets.at(0), gridDim.x)) finish_value<T>(p, terms);
}

}  // namespace cem_fast::cuda
