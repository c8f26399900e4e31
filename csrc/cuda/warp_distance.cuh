// Squared distances of a few rows to the components of their class by one warp: sum_d (x_d - mu_d)^2, or with weights.
#pragma once

#include "row.cuh"

namespace cem_fast::cuda {

constexpr int kWarpComponents = 8;   // distances of one pass over the dimensions
constexpr int kLaneDims = 4;         // loads of a row that are in flight together
constexpr int64_t kWarpDims = 1024;  // whose sums are widened to double
constexpr int64_t kStepDims = kLaneDims * kWarp;

// Rows of a pass. The sums of a pass fill the lanes of a warp, or half of them.
template <class T>
constexpr int kWarpRows = sizeof(T) == 8 ? 2 : 4;

// One step of transposed_sum. Recursive, because every index must be known to the compiler.
template <int kStep, int kSize, class T>
__device__ void fold_lanes(T (&value)[kSize]) {
  const bool upper = (threadIdx.x & kStep) != 0;
  UNROLL
  for (int i = 0; i < kStep; ++i) {
    const T own = upper ? value[i + kStep] : value[i], other = upper ? value[i] : value[i + kStep];
    value[i] = own + __shfl_xor_sync(kAllLanes, other, kStep);
  }
  if constexpr (kStep > 1) fold_lanes<kStep / 2>(value);
}

// Sum over the lanes of value[lane % kSize].
template <int kSize, class T>
__device__ T transposed_sum(T (&value)[kSize]) {
  fold_lanes<kSize / 2>(value);
  T total = value[0];
  for (int step = kSize; step < kWarp; step *= 2) total += __shfl_xor_sync(kAllLanes, total, step);
  return total;
}

// Adds kStepDims dimensions to the sums of rows and components; components past the last are left out.
template <bool kWhole, bool kWeighted, class X, class T>
__device__ void add_squares(const X* const (&row)[kWarpRows<T>], const T* mean, const T* weight, int components,
                            int64_t D, int64_t start, T (&sum)[kWarpRows<T> * kWarpComponents]) {
  T value[kWarpRows<T>][kLaneDims];
  const int64_t first = start + threadIdx.x % kWarp;
  UNROLL
  for (int i = 0; i < kLaneDims; ++i) {
    const int64_t d = first + i * kWarp;
    UNROLL
    for (int r = 0; r < kWarpRows<T>; ++r) value[r][i] = kWhole || d < D ? widen(row[r][d]) : T(0);
  }
  UNROLL
  for (int j = 0; j < kWarpComponents; ++j) {
    if (j >= components) break;
    UNROLL
    for (int i = 0; i < kLaneDims; ++i) {
      const int64_t d = first + i * kWarp;
      if (!kWhole && d >= D) continue;
      const T m = mean[j * D + d];
      T w = 1;
      if constexpr (kWeighted) w = weight[j * D + d];
      UNROLL
      for (int r = 0; r < kWarpRows<T>; ++r) {
        const T deviation = value[r][i] - m;
        sum[r * kWarpComponents + j] += kWeighted ? deviation * w * deviation : deviation * deviation;
      }
    }
  }
}

// Calls use(r, k, distance) for every row r of the warp and component k < `components`, each pair in one lane or, for
// doubles, in two. All lanes of the warp call this with the same rows.
template <bool kWeighted, class X, class T, class F>
__device__ void for_each_distance(const X* const (&row)[kWarpRows<T>], const T* means, const T* weights,
                                  int64_t components, int64_t D, const F& use) {
  constexpr int kSums = kWarpRows<T> * kWarpComponents;
  const int lane = threadIdx.x % kWarp, r = lane % kSums / kWarpComponents, j = lane % kWarpComponents;
  for (int64_t k = 0; k < components; k += kWarpComponents) {
    const int count = static_cast<int>(components - k < kWarpComponents ? components - k : kWarpComponents);
    const T* mean = means + k * D;
    const T* weight = kWeighted ? weights + k * D : nullptr;
    double total = 0;
    for (int64_t begin = 0; begin < D; begin += kWarpDims) {
      const int64_t end = begin + kWarpDims < D ? begin + kWarpDims : D;
      T sum[kSums] = {};
      int64_t d = begin;
      for (; d + kStepDims <= end; d += kStepDims) {
        add_squares<true, kWeighted>(row, mean, weight, count, D, d, sum);
      }
      if (d < end) add_squares<false, kWeighted>(row, mean, weight, count, D, d, sum);
      total += static_cast<double>(transposed_sum(sum));
    }
    if (j >= count) continue;
    if constexpr (!kWeighted && std::is_same_v<T, float>) {
      if (total == INFINITY) {
        UNROLL
        for (int other = 0; other < kWarpRows<T>; ++other) {
          if (r == other) total = wide_distance(row[other], mean + j * D, D);
        }
      }
    }
    use(r, k + j, total);
  }
}

}  // namespace cem_fast::cuda
