// One class with many components: log p(x) and its gradient to x, in tiles as a matrix product has them. Distances are
// in direct form, so they lose nothing wherever rows and means are. Parameters are float.
#pragma once

#include "mixture_log_prob.cuh"
#include "ticket.cuh"

namespace cem_fast::cuda {

// A tile of distances: rows, components, and dimensions at a time.
constexpr int kGlobalRows = 128;
constexpr int kGlobalComponents = 32;
constexpr int kDepth = 32;
constexpr int kGap = 4;            // numbers between the dimensions of a tile, which puts threads in different banks
constexpr int kThreadRows = 8;     // adjacent ones
constexpr int kThreadColumns = 4;  // adjacent components or, of the gradient, dimensions
constexpr int kLanes = kGlobalComponents / kThreadColumns;  // threads that share some rows

// Minimum blocks per multiprocessor. Rows that are read element by element take more registers.
template <bool kAligned>
constexpr int kGlobalBlocks = kAligned ? 3 : 2;

// Some rows, all of the only class.
struct GlobalMixture {
  Features x;
  Mixture mixture;
  int64_t shares;      // that the components are cut into
  int64_t share_size;  // a multiple of kGlobalComponents
  double* best;        // [shares, rows]: the largest log joint density of a share
  double* mass;        // [shares, rows]: their sum over that
  Tickets tickets;
  float* log_prob;   // [rows]
  float* posterior;  // [components, pitch], not divided by its sum; or null
  int64_t pitch;     // a multiple of kGlobalRows
  float* inverse;    // [components, dimension]: 1 / variances
  const float* grad;
  void* dx;

  // The end of the share that begins with a component.
  __device__ int last_of(int first) const {
    return static_cast<int>(first + share_size < mixture.components ? first + share_size : mixture.components);
  }
};

// Four consecutive elements.
template <bool kAligned, class X>
__device__ void read_four(const X* from, float (&out)[4]) {
  X elements[4];
  if constexpr (kAligned) {
    const auto bits = *reinterpret_cast<const std::conditional_t<sizeof(X) == 4, uint4, uint64_t>*>(from);
    memcpy(elements, &bits, sizeof elements);
  } else {
    UNROLL
    for (int e = 0; e < 4; ++e) elements[e] = from[e];
  }
  UNROLL
  for (int e = 0; e < 4; ++e) out[e] = widen(elements[e]);
}

// kCount times four elements of a row, kApart elements apart. Those from `left` on are not there, and are `past`.
template <bool kAligned, int kApart, int kCount, class X>
__device__ void read_fours(const X* from, int left, float past, float (&out)[kCount][4]) {
  if (left >= (kCount - 1) * kApart + 4) {
    UNROLL
    for (int i = 0; i < kCount; ++i) read_four<kAligned>(from + i * kApart, out[i]);
  } else {
    UNROLL
    for (int i = 0; i < kCount; ++i) {
      UNROLL
      for (int e = 0; e < 4; ++e) out[i][e] = i * kApart + e < left ? widen(from[i * kApart + e]) : past;
    }
  }
}

// Writes four consecutive elements of a row, up to its end.
template <bool kAligned, class X>
__device__ void write_four(const float (&from)[4], X* row, int64_t d, int64_t D) {
  if constexpr (kAligned && sizeof(X) == 4) {
    if (d < D) write_vector<true>(from, row + d);
  } else {
    UNROLL
    for (int e = 0; e < 4; ++e) {
      if (d + e < D) narrow(from[e], row + d + e);
    }
  }
}

// exp(a - b)
__device__ inline double ratio(double a, double b) { return static_cast<double>(expf(static_cast<float>(a - b))); }

// Adds the mass, over exp(best), of some components to that of others.
__device__ inline void add_mass(double best, double mass, double& total_best, double& total) {
  if (mass == 0) return;
  const double top = best > total_best ? best : total_best, anchor = isinf(top) ? 0 : top;
  total = total * ratio(total_best, anchor) + mass * ratio(best, anchor);
  total_best = top;
}

// An infinite maximum is the answer itself.
__device__ inline float log_of(double best, double mass) {
  return static_cast<float>(isinf(best) && mass == mass ? best : best + log(mass));
}

// Log joint densities of a tile: each thread has kThreadRows rows and kThreadColumns components.
template <bool kAligned, class X>
__device__ void joint_tile(const GlobalMixture& p, int64_t row0, int k0, double (&joint)[kThreadRows][kThreadColumns]) {
  alignas(16) __shared__ float row[kDepth][kGlobalRows + kGap];
  alignas(16) __shared__ float mean[kDepth][kGlobalComponents + kGap];
  alignas(16) __shared__ float inverse[kDepth][kGlobalComponents + kGap];
  __shared__ double normalizer[kGlobalComponents];
  // threads next to each other read the same row, or component, so that they read whole sectors of it
  constexpr int kOnRow = 2, kOnComponent = kThreads / kGlobalComponents, kRowsAtOnce = kThreads / kOnRow;
  constexpr int kPasses = kGlobalRows / kRowsAtOnce;
  constexpr int kOfRow = kDepth / 4 / kOnRow, kOfComponent = kDepth / 4 / kOnComponent;

  const int64_t N = p.x.rows;
  const int D = static_cast<int>(p.x.dimension), K = static_cast<int>(p.mixture.components);
  const int thread = threadIdx.x, lane = thread % kLanes, group = thread / kLanes;
  const int own_row = thread / kOnRow, own = thread / kOnComponent;
  const int row_piece = thread % kOnRow * 4, piece = thread % kOnComponent * 4;
  // rows and components that are not there repeat the last
  const int64_t k = k0 + own < K ? k0 + own : K - 1;
  const X* x[kPasses];
  UNROLL
  for (int pass = 0; pass < kPasses; ++pass) {
    const int64_t wanted = row0 + own_row + pass * kRowsAtOnce;
    x[pass] = static_cast<const X*>(p.x.data) + (wanted < N ? wanted : N - 1) * p.x.stride + row_piece;
  }
  const int64_t at = k * D + piece;
  const float* means = static_cast<const float*>(p.mixture.means);
  const float* variances = static_cast<const float*>(p.mixture.variances);
  double logs = 0;
  UNROLL
  for (int i = 0; i < kThreadRows; ++i) {
    UNROLL
    for (int j = 0; j < kThreadColumns; ++j) joint[i][j] = 0;
  }
  for (int start = 0; start < D; start += kDepth) {
    float value[kPasses][kOfRow][4], center[kOfComponent][4], spread[kOfComponent][4];
    UNROLL
    for (int pass = 0; pass < kPasses; ++pass) {
      read_fours<kAligned, 4 * kOnRow>(x[pass] + start, D - start - row_piece, 0, value[pass]);
    }
    read_fours<kAligned, 4 * kOnComponent>(means + at + start, D - start - piece, 0, center);
    if (p.mixture.diagonal) {
      read_fours<kAligned, 4 * kOnComponent>(variances + at + start, D - start - piece, 1, spread);
    } else {
      UNROLL
      for (int i = 0; i < kOfComponent; ++i) {
        UNROLL
        for (int e = 0; e < 4; ++e) spread[i][e] = variances[k];
      }
    }
    __syncthreads();  // the dimensions before have been used
    UNROLL
    for (int pass = 0; pass < kPasses; ++pass) {
      UNROLL
      for (int i = 0; i < kOfRow; ++i) {
        UNROLL
        for (int e = 0; e < 4; ++e) {
          row[4 * kOnRow * i + row_piece + e][own_row + pass * kRowsAtOnce] = value[pass][i][e];
        }
      }
    }
    float of_chunk = 0;
    UNROLL
    for (int i = 0; i < kOfComponent; ++i) {
      UNROLL
      for (int e = 0; e < 4; ++e) {
        const int d = 4 * kOnComponent * i + piece + e;
        mean[d][own] = center[i][e];
        inverse[d][own] = 1 / spread[i][e];
        of_chunk += __logf(spread[i][e]);
      }
    }
    logs += static_cast<double>(of_chunk);
    __syncthreads();  // the dimensions are there
    float sum[kThreadRows][kThreadColumns] = {};
    UNROLL_BY(2)
    for (int d = 0; d < kDepth; ++d) {
      float a[kThreadRows], m[kThreadColumns], w[kThreadColumns];
      read_vector<true>(&row[d][group * kThreadRows], a);
      read_vector<true>(&mean[d][lane * kThreadColumns], m);
      read_vector<true>(&inverse[d][lane * kThreadColumns], w);
      UNROLL
      for (int i = 0; i < kThreadRows; ++i) {
        UNROLL
        for (int j = 0; j < kThreadColumns; ++j) {
          const float deviation = a[i] - m[j];
          sum[i][j] += deviation * w[j] * deviation;
        }
      }
    }
    UNROLL
    for (int i = 0; i < kThreadRows; ++i) {
      UNROLL
      for (int j = 0; j < kThreadColumns; ++j) joint[i][j] += static_cast<double>(sum[i][j]);
    }
  }
  if (p.mixture.diagonal) {
    UNROLL
    for (int offset = 1; offset < kOnComponent; offset *= 2) logs += __shfl_xor_sync(kAllLanes, logs, offset);
  } else {
    logs = static_cast<double>(D) * log(static_cast<double>(variances[k]));
  }
  if (piece == 0) {
    const double weight = static_cast<double>(static_cast<const float*>(p.mixture.weights)[k]);
    normalizer[own] = log(weight) - 0.5 * (static_cast<double>(D) * kLog2Pi + logs);
  }
  __syncthreads();  // the normalizers are there
  UNROLL
  for (int j = 0; j < kThreadColumns; ++j) {
    const double constant = normalizer[lane * kThreadColumns + j];
    UNROLL
    for (int i = 0; i < kThreadRows; ++i) joint[i][j] = constant - 0.5 * joint[i][j];
  }
}

// One block: a tile of rows and a share of the components. The last block of some tiles adds up all shares.
template <bool kAligned, class X>
__global__ void __launch_bounds__(kThreads, kGlobalBlocks<kAligned>) global_log_prob_kernel(GlobalMixture p) {
  const int64_t N = p.x.rows, share = blockIdx.x % p.shares, tile = blockIdx.x / p.shares, row0 = tile * kGlobalRows;
  const int first_k = static_cast<int>(share * p.share_size), last_k = p.last_of(first_k);
  const int lane = threadIdx.x % kLanes, group = threadIdx.x / kLanes;
  const int64_t row = row0 + group * kThreadRows + lane;  // whose sum this thread has
  const bool has_row = row < N;
  static_assert(kLanes == kThreadRows);
  double best = -INFINITY, mass = 0;
  for (int k0 = first_k; k0 < last_k; k0 += kGlobalComponents) {
    double joint[kThreadRows][kThreadColumns];
    joint_tile<kAligned, X>(p, row0, k0, joint);
    double own_best = -INFINITY, own_mass = 0;
    UNROLL
    for (int i = 0; i < kThreadRows; ++i) {
      double top = -INFINITY;  // of those that are numbers
      UNROLL
      for (int j = 0; j < kThreadColumns; ++j) {
        if (k0 + lane * kThreadColumns + j >= last_k) joint[i][j] = -INFINITY;
        top = joint[i][j] > top ? joint[i][j] : top;
      }
      UNROLL
      for (int offset = kLanes / 2; offset > 0; offset /= 2) {
        const double other = __shfl_xor_sync(kAllLanes, top, offset);
        top = other > top ? other : top;
      }
      const double anchor = isinf(top) ? 0 : top;
      float sum = 0;
      UNROLL
      for (int j = 0; j < kThreadColumns; ++j) sum += expf(static_cast<float>(joint[i][j] - anchor));
      UNROLL
      for (int offset = kLanes / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(kAllLanes, sum, offset);
      if (lane == i) {
        own_best = top;
        own_mass = static_cast<double>(sum);
      }
    }
    add_mass(own_best, own_mass, best, mass);
  }
  if (p.shares == 1) {
    if (has_row) p.log_prob[row] = log_of(best, mass);
    return;
  }
  if (has_row) {
    p.best[share * N + row] = best;
    p.mass[share * N + row] = mass;
  }
  const int64_t tiles = gridDim.x / p.shares, part = tile * kTickets / tiles;
  const int64_t first = (part * tiles + kTickets - 1) / kTickets, last = ((part + 1) * tiles + kTickets - 1) / kTickets;
  if (!is_last(p.tickets.at(part), (last - first) * p.shares)) return;
  for (int64_t n = first * kGlobalRows + threadIdx.x; n < last * kGlobalRows && n < N; n += kThreads) {
    best = -INFINITY, mass = 0;
    UNROLL_BY(4)
    for (int64_t s = 0; s < p.shares; ++s) best = p.best[s * N + n] > best ? p.best[s * N + n] : best;
    const double anchor = isinf(best) ? 0 : best;
    UNROLL_BY(4)
    for (int64_t s = 0; s < p.shares; ++s) mass += p.mass[s * N + n] * ratio(p.best[s * N + n], anchor);
    p.log_prob[n] = log_of(best, mass);
  }
}

// One block: the posterior of a tile of rows and a share of the components, from the log-likelihood of the rows. The
// blocks of the first rows write the reciprocals.
template <bool kAligned, class X>
__global__ void __launch_bounds__(kThreads, kGlobalBlocks<kAligned>) global_posterior_kernel(GlobalMixture p) {
  const int64_t N = p.x.rows, D = p.x.dimension, row0 = blockIdx.x / p.shares * kGlobalRows;
  const int first = static_cast<int>(blockIdx.x % p.shares * p.share_size), last = p.last_of(first);
  const int lane = threadIdx.x % kLanes, group = threadIdx.x / kLanes;
  const int64_t row = row0 + group * kThreadRows;
  UNROLL_BY(1)
  for (int64_t at = first * D + threadIdx.x; row0 == 0 && at < last * D; at += kThreads) {
    p.inverse[at] = 1 / static_cast<const float*>(p.mixture.variances)[p.mixture.diagonal ? at : at / D];
  }
  UNROLL_BY(1)
  for (int k0 = first; k0 < last; k0 += kGlobalComponents) {
    double joint[kThreadRows][kThreadColumns];
    joint_tile<kAligned, X>(p, row0, k0, joint);
    UNROLL
    for (int i = 0; i < kThreadRows; i += 4) {
      float log_prob[4];
      UNROLL
      for (int e = 0; e < 4; ++e) log_prob[e] = p.log_prob[row + i + e < N ? row + i + e : N - 1];
      UNROLL
      for (int j = 0; j < kThreadColumns; ++j) {
        const int k = k0 + lane * kThreadColumns + j;
        float r[4];
        UNROLL
        for (int e = 0; e < 4; ++e) {
          double own = joint[i + e][j];
          // its rounding is more than what exp takes: round both, so that the best of a row remains near 1
          if (fabsf(log_prob[e]) > 0x1p27F) own = static_cast<double>(static_cast<float>(own));
          r[e] = expf(static_cast<float>(own - static_cast<double>(log_prob[e])));
        }
        if (k < last) write_vector<true>(r, &p.posterior[k * p.pitch + row + i]);
      }
    }
  }
}

// A tile of the gradient: rows, dimensions, and components at a time.
constexpr int kPullRows = 32;
constexpr int kPullDims = 64;
constexpr int kPullComponents = 32;
constexpr int kPullLanes = kPullDims / kThreadColumns;  // threads that share some rows
constexpr int kPullThreadRows = kPullRows * kPullLanes / kThreads;

// dx = grad sum_k r_k (mu_k - x) / v_k, over sum_k r_k, so that the rounding of the log-likelihood does not matter; one
// block for a tile.
template <bool kAligned, class X>
__global__ void __launch_bounds__(kThreads, kBlocks) global_gradient_kernel(GlobalMixture p) {
  alignas(16) __shared__ float posterior[kPullComponents][kPullRows];
  alignas(16) __shared__ float mean[kPullComponents][kPullDims];
  alignas(16) __shared__ float inverse[kPullComponents][kPullDims];
  // threads of a row of these, rows at once, and times
  constexpr int kOnRows = kPullRows / 4, kAtOnce = kThreads / kOnRows, kTimes = kPullComponents / kAtOnce;
  constexpr int kOnDims = kPullDims / 4, kWideAtOnce = kThreads / kOnDims, kWideTimes = kPullComponents / kWideAtOnce;

  const int64_t N = p.x.rows, D = p.x.dimension, K = p.mixture.components, columns = (D + kPullDims - 1) / kPullDims;
  const int64_t d0 = blockIdx.x % columns * kPullDims, row0 = blockIdx.x / columns * kPullRows;
  const int thread = threadIdx.x, lane = thread % kPullLanes, group = thread / kPullLanes;
  const int component = thread / kOnRows, quad = thread % kOnRows * 4;
  const int wide_component = thread / kOnDims, wide_quad = thread % kOnDims * 4;
  const int64_t d = d0 + lane * kThreadColumns, row = row0 + group * kPullThreadRows;
  float x[kPullThreadRows][1][4], pull[kPullThreadRows][kThreadColumns] = {}, mass[4] = {};
  UNROLL
  for (int i = 0; i < kPullThreadRows; ++i) {
    const int64_t n = row + i < N ? row + i : N - 1;
    read_fours<kAligned, 4>(static_cast<const X*>(p.x.data) + n * p.x.stride + d, static_cast<int>(D - d), 0, x[i]);
  }
  const int left = static_cast<int>(D - d0) - wide_quad;
  const float* means = static_cast<const float*>(p.mixture.means) + d0 + wide_quad;
  for (int64_t k0 = 0; k0 < K; k0 += kPullComponents) {
    float r[kTimes][4] = {}, center[kWideTimes][1][4], weight[kWideTimes][1][4];
    UNROLL
    for (int i = 0; i < kTimes; ++i) {
      const int64_t k = k0 + component + i * kAtOnce;
      if (k < K) read_four<true>(p.posterior + k * p.pitch + row0 + quad, r[i]);
    }
    UNROLL
    for (int i = 0; i < kWideTimes; ++i) {
      const int64_t wanted = k0 + wide_component + i * kWideAtOnce, at = (wanted < K ? wanted : K - 1) * D;
      read_fours<kAligned, 4>(means + at, left, 0, center[i]);
      read_fours<kAligned, 4>(p.inverse + at + d0 + wide_quad, left, 0, weight[i]);
    }
    __syncthreads();  // the components before have been used
    UNROLL
    for (int i = 0; i < kTimes; ++i) {
      write_vector<true>(r[i], &posterior[component + i * kAtOnce][quad]);
      UNROLL
      for (int e = 0; e < 4; ++e) mass[e] += r[i][e];
    }
    UNROLL
    for (int i = 0; i < kWideTimes; ++i) {
      write_vector<true>(center[i][0], &mean[wide_component + i * kWideAtOnce][wide_quad]);
      write_vector<true>(weight[i][0], &inverse[wide_component + i * kWideAtOnce][wide_quad]);
    }
    __syncthreads();  // the components are there
    float part[kPullThreadRows][kThreadColumns] = {};
    UNROLL_BY(4)
    for (int k = 0; k < kPullComponents; ++k) {
      float a[kPullThreadRows], m[kThreadColumns], w[kThreadColumns];
      read_vector<true>(&posterior[k][group * kPullThreadRows], a);
      read_vector<true>(&mean[k][lane * kThreadColumns], m);
      read_vector<true>(&inverse[k][lane * kThreadColumns], w);
      UNROLL
      for (int i = 0; i < kPullThreadRows; ++i) {
        UNROLL
        for (int j = 0; j < kThreadColumns; ++j) part[i][j] += a[i] * w[j] * (m[j] - x[i][0][j]);
      }
    }
    UNROLL
    for (int i = 0; i < kPullThreadRows; ++i) {
      UNROLL
      for (int j = 0; j < kThreadColumns; ++j) pull[i][j] += part[i][j];
    }
  }
  __syncthreads();  // the last components have been used
  write_vector<true>(mass, &posterior[component][quad]);
  __syncthreads();  // the sums of the posterior are there
  UNROLL
  for (int i = 0; i < kPullThreadRows; ++i) {
    if (row + i >= N) break;
    float sum = 0;
    for (int t = 0; t < kAtOnce; ++t) sum += posterior[t][group * kPullThreadRows + i];
    const float factor = p.grad[row + i] / sum;
    UNROLL
    for (int e = 0; e < kThreadColumns; ++e) pull[i][e] *= factor;
    write_four<kAligned>(pull[i], static_cast<X*>(p.dx) + (row + i) * D, d, D);
  }
}

// Whether a call is one of these: a class without labels, and enough components and dimensions to fill tiles.
bool is_global(const Features& x, const Mixture& mixture, const void* responsibilities);

void global_log_prob(Queue& queue, const LogProbForward& p);
void global_gradient(Queue& queue, const LogProbBackward& p);

}  // namespace cem_fast::cuda
