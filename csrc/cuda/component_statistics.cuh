// Counts, scatter and sums of every component, and the bound of these.
#pragma once

#include "mixture_log_prob.cuh"
#include "parts.cuh"
#include "row.cuh"

namespace cem_fast::cuda {

constexpr int kStatisticsBlocks = 3;  // of a multiprocessor: rows that are read ahead need registers
constexpr int kRows = 2;              // of a warp at a time: they share what is read of the means

// Components whose distances are summed together: those of kRows rows fill half of a warp, or a quarter.
template <class T>
constexpr int kTogether = sizeof(T) == 8 ? 4 : 8;

// What a warp holds of a row at a time, and reads ahead.
template <class X, bool kAligned>
constexpr int kReads = kAligned        ? static_cast<int>(sizeof(X))
                       : sizeof(X) < 8 ? 8
                                       : 4;
template <class X, bool kAligned>
using RowPiece = Piece<X, kAligned, kReads<X, kAligned>>;

// The order of the dimensions in shared memory: lanes read 16 bytes each, next to each other.
template <class Row, class T>
struct Layout {
  static constexpr int kQuad = Row::kVector > 1 ? 16 / static_cast<int>(sizeof(T)) : 1;  // numbers of one read
  static constexpr int kQuads = Row::kVector / kQuad;

  __device__ static int32_t place(int32_t d) {
    if constexpr (kQuads == 1) return d;
    const int32_t span = d / Row::kSpan * Row::kSpan, lane = d % Row::kSpan / Row::kVector, e = d % Row::kVector;
    return span + e / kQuad * kWarp * kQuad + lane * kQuad + e % kQuad;
  }

  // The dimension of the first number of a read.
  __device__ static int32_t dimension(int32_t place) {
    if constexpr (kQuads == 1) return place;
    const int32_t span = place / Row::kSpan * Row::kSpan, quad = place % Row::kSpan / (kWarp * kQuad);
    return span + place % (kWarp * kQuad) / kQuad * Row::kVector + quad * kQuad;
  }

  // The place of the numbers that the own lane reads for a load of a row.
  __device__ static int32_t own(int32_t start, int i, int quad) {
    return start + i * Row::kSpan + (quad * kWarp + static_cast<int>(threadIdx.x % kWarp)) * kQuad;
  }
};

// What a block sums up, and where.
template <class T>
struct Own {
  double* room;     // [kWarps, 2, components]
  double* totals;   // [copies, components]
  int32_t* counts;  // [copies, components]
  T* means;         // [components, pitch], or null
  T* planes;        // [copies, planes, components, pitch]
  int copies;

  __host__ __device__ static int64_t head_bytes(int64_t K, int64_t copies) {
    const int64_t numbers = (2 * kWarps + copies) * K * static_cast<int64_t>(sizeof(double));
    return (numbers + copies * K * static_cast<int64_t>(sizeof(int32_t)) + 15) / 16 * 16;
  }
  static int64_t bytes(int64_t K, int64_t copies, int64_t planes, int64_t pitch) {
    return head_bytes(K, copies) + (1 + copies * planes) * K * pitch * static_cast<int64_t>(sizeof(T));
  }

  __device__ static Own in_shared(const Statistics<T>& p, unsigned char* shared) {
    const int64_t K = p.mixture.components;
    Own own;
    own.copies = p.together ? 1 : kWarps;
    own.room = reinterpret_cast<double*>(shared);
    own.totals = own.room + 2 * kWarps * K;
    own.counts = reinterpret_cast<int32_t*>(own.totals + own.copies * K);
    own.means = reinterpret_cast<T*>(shared + head_bytes(K, own.copies));
    own.planes = own.means + K * p.pitch;
    return own;
  }

  __device__ static Own of_run(const Statistics<T>& p, const Part& part) {
    const int64_t K = p.mixture.components, run = part.index * K;
    return {p.room + part.group * 2 * kWarps * K,
            p.run_totals + run,
            p.run_counts + run,
            nullptr,
            p.run_planes + run * p.planes() * p.pitch,
            1};
  }

  __device__ void clear(const Statistics<T>& p) const {
    const int64_t K = p.mixture.components;
    for (int64_t i = threadIdx.x; i < copies * K; i += kThreads) {
      totals[i] = 0;
      counts[i] = 0;
    }
    for (int64_t i = threadIdx.x; i < copies * p.planes() * K * p.pitch; i += kThreads) planes[i] = 0;
  }

  // Copies the means of a class; dimensions past the last are 0.
  template <class Row>
  __device__ void stage(const Statistics<T>& p, int64_t group) const {
    using Order = Layout<Row, T>;
    constexpr int kQuad = Order::kQuad;
    const int K = static_cast<int>(p.mixture.components), quads = static_cast<int>(p.pitch) / kQuad;
    const T* from = static_cast<const T*>(p.mixture.means) + group * K * p.x.dimension;
    UNROLL_BY(5)
    for (int i = threadIdx.x; i < K * quads; i += kThreads) {
      const int k = i / quads;
      const int64_t d = Order::dimension(i % quads * kQuad);
      T mean[kQuad] = {};
      if (d < p.x.dimension) read_vector<(kQuad > 1)>(from + k * p.x.dimension + d, mean);
      write_vector<(kQuad > 1)>(mean, means + static_cast<int64_t>(i) * kQuad);
    }
  }

  // Writes the sums of the run.
  template <class Row>
  __device__ void publish(const Statistics<T>& p, const Part& part) const {
    const int64_t K = p.mixture.components, D = p.x.dimension, first = part.index * K;
    for (int64_t k = threadIdx.x; k < K; k += kThreads) {
      double total = 0;
      int32_t count = 0;
      for (int copy = 0; copy < copies; ++copy) {
        total += totals[copy * K + k];
        count += counts[copy * K + k];
      }
      p.run_totals[first + k] = total;
      p.run_counts[first + k] = count;
    }
    for (int64_t row = 0; row < p.planes() * K; ++row) {
      for (int64_t d = threadIdx.x; d < D; d += kThreads) {
        T total = 0;
        for (int copy = 0; copy < copies; ++copy) {
          total += planes[(copy * p.planes() * K + row) * p.pitch + Layout<Row, T>::place(d)];
        }
        p.run_planes[(first * p.planes() + row) * D + d] = total;
      }
    }
  }
};

// Sum over the lanes of value[lane * kSize / kWarp].
template <int kSize, int kOffset = kWarp / 2, class T>
__device__ T sum_transposed(T (&value)[kSize]) {
  if constexpr (kOffset == 0) {
    return value[0];
  } else if constexpr (kSize == 1) {
    T total[1] = {value[0] + __shfl_xor_sync(kAllLanes, value[0], kOffset)};
    return sum_transposed<1, kOffset / 2>(total);
  } else {
    const bool upper = (threadIdx.x & kOffset) != 0;
    T half[kSize / 2];
    UNROLL
    for (int i = 0; i < kSize / 2; ++i) {
      const T keep = upper ? value[i + kSize / 2] : value[i], give = upper ? value[i] : value[i + kSize / 2];
      half[i] = keep + __shfl_xor_sync(kAllLanes, give, kOffset);
    }
    return sum_transposed<kSize / 2, kOffset / 2>(half);
  }
}

// Adds the squares of a piece of some rows, about means in shared memory, to sum[row * kTogether + component].
template <class Row, class T>
__device__ void add_squares(const Row (&x)[kRows], const T* means, int32_t pitch, int32_t start, int32_t end,
                            int components, T (&sum)[kRows * kTogether<T>]) {
  using Order = Layout<Row, T>;
  constexpr int kQuad = Order::kQuad;
  UNROLL
  for (int i = 0; i < Row::kLoads; ++i) {
    if (start + i * Row::kSpan >= end) break;
    typename Row::Element raw[kRows][Row::kVector];
    UNROLL
    for (int r = 0; r < kRows; ++r) x[r].elements(i, raw[r]);
    UNROLL
    for (int quad = 0; quad < Order::kQuads; ++quad) {
      const T* own = means + Order::own(start, i, quad);
      UNROLL
      for (int j = 0; j < kTogether<T>; ++j) {
        if (j >= components) break;
        T mean[kQuad];
        read_vector<(kQuad > 1)>(own + j * pitch, mean);
        UNROLL
        for (int r = 0; r < kRows; ++r) {
          UNROLL
          for (int e = 0; e < kQuad; ++e) {
            const T deviation = widen(raw[r][quad * kQuad + e]) - mean[e];
            sum[r * kTogether<T> + j] += deviation * deviation;
          }
        }
      }
    }
  }
}

// The same about means in global memory, with or without weights.
template <class Row, class T>
__device__ void add_squares(const Row (&x)[kRows], const T* means, const T* variances, int32_t D, int32_t start,
                            int32_t end, int components, T (&sum)[kRows * kTogether<T>]) {
  for (int i = 0; i < Row::kLoads; ++i) {
    const int32_t d = Row::dimension(start, i);
    if (d >= end) break;
    UNROLL
    for (int j = 0; j < kTogether<T>; ++j) {
      if (j >= components) break;
      const T mean = means[j * D + d], weight = variances == nullptr ? T(1) : T(1) / variances[j * D + d];
      UNROLL
      for (int r = 0; r < kRows; ++r) {
        const T deviation = widen(x[r].load[i]) - mean;
        sum[r * kTogether<T> + j] += deviation * weight * deviation;
      }
    }
  }
}

// Adds the deviations of a piece of a row from its own mean, and their squares, to the sums of its component; returns
// the lane's sum of squares.
template <class Row, class T>
__device__ T add_own(const Row& x, const T* mean, T* scatter, T* sums, int32_t start, int32_t end) {
  using Order = Layout<Row, T>;
  constexpr int kQuad = Order::kQuad;
  T total = 0;
  UNROLL
  for (int i = 0; i < Row::kLoads; ++i) {
    if (Row::dimension(start, i) >= end) break;
    typename Row::Element raw[Row::kVector];
    x.elements(i, raw);
    UNROLL
    for (int quad = 0; quad < Order::kQuads; ++quad) {
      const int32_t at = Order::own(start, i, quad);
      T deviation[kQuad], sum[kQuad];
      read_vector<(kQuad > 1)>(mean + at, deviation);
      UNROLL
      for (int e = 0; e < kQuad; ++e) {
        deviation[e] = widen(raw[quad * kQuad + e]) - deviation[e];
        total += deviation[e] * deviation[e];
      }
      if (scatter != nullptr) {
        read_vector<(kQuad > 1)>(scatter + at, sum);
        UNROLL
        for (int e = 0; e < kQuad; ++e) sum[e] += deviation[e] * deviation[e];
        write_vector<(kQuad > 1)>(sum, scatter + at);
      }
      if (sums != nullptr) {
        read_vector<(kQuad > 1)>(sums + at, sum);
        UNROLL
        for (int e = 0; e < kQuad; ++e) sum[e] += deviation[e];
        write_vector<(kQuad > 1)>(sum, sums + at);
      }
    }
  }
  return total;
}

// Sums of the warps of a block; calls take turns with two rooms, so that one barrier is enough.
template <class T>
class Exchange {
 public:
  __device__ explicit Exchange(T (*rooms)[kWarps][kWarp]) : rooms_(rooms) {}

  __device__ T sum(T value) {
    T(&room)[kWarps][kWarp] = rooms_[turn_];
    turn_ ^= 1;
    room[threadIdx.x / kWarp][threadIdx.x % kWarp] = value;
    __syncthreads();
    T total = room[0][threadIdx.x % kWarp];
    for (int w = 1; w < kWarps; ++w) total += room[w][threadIdx.x % kWarp];
    return total;
  }

 private:
  T (*rooms_)[kWarps][kWarp];
  int turn_ = 0;
};

// The rows that a warp takes kRows at a time: reads ahead.
template <class X, class Row>
class Reader {
 public:
  __device__ Reader(const Features& x, const Part& part, int32_t begin, int32_t end)
      : x_(x), part_(part), end_(end), base_(begin) {
    look_up();
  }

  // Row r of those from i on; rows past the last repeat it. `i` never goes back.
  __device__ int32_t row(int32_t i, int r) {
    const int32_t at = i + r < end_ ? i + r : end_ - 1;
    if (part_.rows == nullptr) return static_cast<int32_t>(part_.first) + at;
    if (at - base_ >= kWarp) {
      base_ += kWarp;
      look_up();
    }
    return __shfl_sync(kAllLanes, row_, at - base_);
  }

  __device__ void read(const int32_t (&row)[kRows], int32_t start, int32_t end, Row (&out)[kRows]) const {
    UNROLL
    for (int r = 0; r < kRows; ++r) out[r].read(static_cast<const X*>(x_.data) + row[r] * x_.stride, start, end);
  }

 private:
  __device__ void look_up() {
    const int32_t i = base_ + static_cast<int32_t>(threadIdx.x % kWarp);
    row_ = part_.rows != nullptr && i < end_ ? part_.rows[i] : 0;
  }

  const Features& x_;
  const Part& part_;
  int32_t end_;
  int32_t base_;
  int32_t row_ = 0;  // of the lane
};

// Whether a score comes before another in torch's order: NaN before every number, then the lowest index.
__device__ inline bool comes_before(double score, int k, double other, int of_other) {
  if (score < other) return true;
  const bool tie = score == other || (score != score && other != other);
  return tie ? k < of_other : score != score;
}

// The best of the components whose distances are in the lanes of a half warp, and its distance.
template <class T>
struct Choice {
  double score;
  int component;
  T distance;

  // Of kTogether components from k0 on; each half of the warp has a row. wide(k) is a distance that float cannot hold.
  template <class F>
  __device__ static Choice of(const Mixture& mixture, const double* normalizers, int group, int k0, T distance,
                              const F& wide) {
    constexpr int kLanes = kWarp / (kRows * kTogether<T>);
    const int K = static_cast<int>(mixture.components), lane = threadIdx.x % kWarp;
    int k = k0 + lane / kLanes % kTogether<T>;
    double score = k < K ? static_cast<double>(distance) : INFINITY;
    if constexpr (std::is_same_v<T, float>) {
      if (k < K && distance == INFINITY) score = wide(k);
    }
    if (normalizers != nullptr && k < K)
      score = -log_joint<T>(mixture, normalizers, static_cast<int64_t>(group) * K + k, score);
    UNROLL
    for (int offset = kLanes; offset < kLanes * kTogether<T>; offset *= 2) {
      const double other = __shfl_xor_sync(kAllLanes, score, offset);
      const int of_other = __shfl_xor_sync(kAllLanes, k, offset);
      if (!comes_before(other, of_other, score, k)) continue;
      score = other;
      k = of_other;
    }
    const int source = (lane & kWarp / kRows) + (k - k0) * kLanes;
    return {score, k, __shfl_sync(kAllLanes, distance, source)};
  }
};

// Assigns the rows of a part, and sums them up.
template <class X, bool kAligned, bool kWide, bool kStaged, class T>
__device__ void sum_rows(const Statistics<T>& p, const Part& part, const Own<T>& own) {
  using Row = RowPiece<X, kAligned>;
  __shared__ T rooms[2][kWarps][kWarp];
  Exchange<T> warps(rooms);
  const int D = static_cast<int>(p.x.dimension), K = static_cast<int>(p.mixture.components), pitch = p.pitch;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const bool together = p.together;
  const int begin = together ? 0 : static_cast<int>(static_cast<int64_t>(part.size) * warp / kWarps);
  const int last = together ? part.size : static_cast<int>(static_cast<int64_t>(part.size) * (warp + 1) / kWarps);
  if (begin >= last) return;
  const int slice = together ? ((D + kWarps - 1) / kWarps + Row::kSpan - 1) / Row::kSpan * Row::kSpan : D;
  const int from = together ? slice * warp : 0, to = from + slice < D ? from + slice : D;
  const int pieces = from + Row::kDims < to ? (to - from + Row::kDims - 1) / Row::kDims : 1;
  const T* means = own.means;
  if constexpr (!kStaged) means = static_cast<const T*>(p.mixture.means) + static_cast<int64_t>(part.group) * K * D;
  const T* variances = nullptr;
  if (!kStaged && p.mixture.diagonal && p.mixture.variances != nullptr) {
    variances = static_cast<const T*>(p.mixture.variances) + static_cast<int64_t>(part.group) * K * D;
  }

  Reader<X, Row> reader(p.x, part, begin, last);
  Row x[kRows], next[kRows];
  int32_t row[kRows], next_row[kRows];
  UNROLL
  for (int r = 0; r < kRows; ++r) next_row[r] = reader.row(begin, r);
  reader.read(next_row, from, to, next);
  for (int i = begin; i < last; i += kRows) {
    UNROLL
    for (int r = 0; r < kRows; ++r) row[r] = next_row[r];
    Choice<T> best{};
    for (int k0 = 0; k0 < K; k0 += kTogether<T>) {
      const int components = K - k0 < kTogether<T> ? K - k0 : kTogether<T>;
      T sum[kRows * kTogether<T>] = {};
      for (int piece = 0; piece < pieces; ++piece) {
        const int start = from + piece * Row::kDims;
        if (pieces > 1 || k0 == 0) {
          UNROLL
          for (int r = 0; r < kRows; ++r) x[r] = next[r];
          // the same rows again, or the next ones
          const bool more = piece + 1 < pieces, again = pieces > 1 && k0 + kTogether<T> < K;
          if (!more && !again && i + kRows < last) {
            UNROLL
            for (int r = 0; r < kRows; ++r) next_row[r] = reader.row(i + kRows, r);
          }
          reader.read(next_row, more ? start + Row::kDims : from, to, next);
        }
        if constexpr (kStaged) {
          add_squares(x, means + k0 * pitch, pitch, start, to, components, sum);
        } else {
          const int64_t at = static_cast<int64_t>(k0) * D;
          add_squares(x, means + at, variances == nullptr ? nullptr : variances + at, D, start, to, components, sum);
        }
      }
      T distance = sum_transposed(sum);
      if (together) distance = warps.sum(distance);
      static_assert(kRows == 2);
      const auto wide = [&](int k) -> double {
        if (variances != nullptr) return INFINITY;
        const X* own = static_cast<const X*>(p.x.data) + (lane < kWarp / kRows ? row[0] : row[kRows - 1]) * p.x.stride;
        const int64_t ck = static_cast<int64_t>(part.group) * K + k;
        return wide_distance(own, static_cast<const T*>(p.mixture.means) + ck * D, D);
      };
      const Choice<T> found = Choice<T>::of(p.mixture, p.normalizers, part.group, k0, distance, wide);
      if (k0 == 0 || comes_before(found.score, found.component, best.score, best.component)) best = found;
    }
    UNROLL
    for (int r = 0; r < kRows; ++r) {
      const int k = __shfl_sync(kAllLanes, best.component, r * kWarp / kRows);
      T distance = __shfl_sync(kAllLanes, best.distance, r * kWarp / kRows);
      if (i + r >= last) break;
      if constexpr (kWide) {
        const int64_t at = static_cast<int64_t>(k) * pitch, plane = static_cast<int64_t>(K) * pitch;
        T* planes = own.planes + (together ? 0 : warp) * p.planes() * plane + at;
        T* scatter = p.scatter ? planes : nullptr;
        T* sums = p.sums ? planes + p.scatter * plane : nullptr;
        T squares = 0;
        if (pieces == 1) {
          squares = add_own(x[r], means + at, scatter, sums, from, to);
        } else {
          Row again;
          for (int start = from; start < to; start += Row::kDims) {
            again.read(static_cast<const X*>(p.x.data) + row[r] * p.x.stride, start, to);
            squares += add_own(again, means + at, scatter, sums, start, to);
          }
        }
        if (!kStaged && variances != nullptr) distance = warps.sum(warp_sum(squares));
      }
      if (together && warp > 0) continue;
      if (lane == k % kWarp) {
        const int64_t at = (together ? 0 : warp * K) + k;
        own.totals[at] += static_cast<double>(distance);
        own.counts[at] += 1;
      }
      if (lane == 0) p.assignment[row[r]] = k;
    }
  }
}

// Complete sums of a class: of this block alone, or of all its runs.
template <class Row, class T>
struct ClassSums {
  const Statistics<T>& p;
  const Part& part;
  const Own<T>& own;
  bool alone;  // in `own`

  __device__ double count(int64_t k) const { return sum(own.counts, p.run_counts, 1, 1, k, k); }
  __device__ double total(int64_t k) const { return sum(own.totals, p.run_totals, 1, 1, k, k); }
  // of plane 0: the scatter, or else the sums
  __device__ double at(int64_t k, int64_t d, int64_t plane = 0) const {
    const int64_t row = plane * p.mixture.components + k, D = p.x.dimension;
    return sum(own.planes, p.run_planes, p.planes() * p.pitch, p.planes() * D, row * p.pitch + Layout<Row, T>::place(d),
               row * D + d);
  }

 private:
  // Adds the copies [components * width] of the block, or those of the runs.
  template <class S>
  __device__ double sum(const S* in_own, const S* of_runs, int64_t width, int64_t width_of_run, int64_t at,
                        int64_t at_in_run) const {
    const int64_t K = p.mixture.components;
    double total = 0;
    if (alone) {
      UNROLL_BY(1)
      for (int copy = 0; copy < own.copies; ++copy) total += static_cast<double>(in_own[copy * K * width + at]);
      return total;
    }
    const S* first = of_runs + (part.index - part.part) * K * width_of_run + at_in_run;
    UNROLL_BY(2)
    for (int64_t run = 0; run < part.parts; ++run) total += static_cast<double>(__ldcg(first + run * K * width_of_run));
    return total;
  }
};

// Writes the statistics of a class, or its share of the bound.
template <bool kWide, class Row, class T>
__device__ void finish(const Statistics<T>& p, const ClassSums<Row, T>& sums) {
  const Part& part = sums.part;
  const int64_t K = p.mixture.components, D = p.x.dimension, first = part.group * K;
  const double poison = part.poison();
  if (!p.bounded) {
    for (int64_t k = threadIdx.x; k < K; k += kThreads) {
      p.counts[first + k] = static_cast<T>(sums.count(k) + poison);
      if (!p.scatter) p.totals[first + k] = static_cast<T>(sums.total(k) + poison);
    }
    for (int64_t k = 0; kWide && k < K && p.planes() > 0; ++k) {
      const double count = sums.count(k) + poison;
      for (int64_t d = threadIdx.x; d < D; d += kThreads) {
        const int64_t at = (first + k) * D + d;
        if (p.scatter) p.totals[at] = static_cast<T>(sums.at(k, d) + poison);
        if (!p.sums) continue;
        // sums of deviations: sums of raw values with a common offset would lose the digits of a small spread
        const double mean = static_cast<double>(static_cast<const T*>(p.mixture.means)[at]);
        p.sum[at] = static_cast<T>(sums.at(k, d, p.scatter) + count * mean);
      }
    }
    return;
  }
  if (p.bound.official) {
    for (int64_t k = threadIdx.x; k < K; k += kThreads) {
      p.class_counts[first + k] = sums.count(k);
      p.class_totals[first + k] = sums.total(k);
    }
  } else {
    finish_class<kWide, T>(p.bound, static_cast<double>(p.x.rows) + poison, part.group, sums, sums.own.room, p.terms);
  }
  if (!is_last(p.tickets.at(0), p.mixture.classes)) return;
  if (p.bound.official) {
    const double value = hinge<T>(p.bound, p.class_counts, p.class_totals, poison);
    if (threadIdx.x == 0) *static_cast<T*>(p.bound.value) = static_cast<T>(value);
  } else {
    finish_value<T>(p.bound, p.terms);
  }
}

template <class X, bool kAligned, bool kWide, bool kStaged>
__global__ void __launch_bounds__(kThreads, kStatisticsBlocks) statistics_kernel(Statistics<Parameter<X>> p) {
  using T = Parameter<X>;
  using Row = RowPiece<X, kAligned>;
  __shared__ int32_t list[kSearched];
  DYNAMIC_SHARED(shared);
  __shared__ Part part;  // not in registers, which the rows need
  if (p.sort.ranges > 0) sort_in_turns(p.sort, p.turns, shared);
  const Part found = part_of_block(p, list);
  if (threadIdx.x == 0) part = found;
  __syncthreads();
  if (part.group == p.mixture.classes) {  // rows without a class
    for (int64_t i = threadIdx.x; i < part.size; i += kThreads) p.assignment[part.row(i)] = -1;
    return;
  }
  const Own<T> own = kStaged ? Own<T>::in_shared(p, shared) : Own<T>::of_run(p, part);
  own.clear(p);
  if constexpr (kStaged) own.template stage<Row>(p, part.group);
  __syncthreads();
  sum_rows<X, kAligned, kWide, kStaged>(p, part, own);
  __syncthreads();
  const bool alone = part.parts == 1;
  if (kStaged && !alone) own.template publish<Row>(p, part);
  if (!alone && !is_last(p.tickets.at(1 + part.group), part.parts)) return;
  if (!kStaged) __threadfence_block();
  finish<kWide>(p, ClassSums<Row, T>{p, part, own, kStaged && alone});
}

}  // namespace cem_fast::cuda
