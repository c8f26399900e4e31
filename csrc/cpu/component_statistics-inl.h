// Counts, scatter and sums of every component from one read of x, and the gradient of the scatter.

// Rows of a block when nothing but distances is wanted of them, and the rows whose second reading still hits the cache.
constexpr int64_t kStatisticsRows = 32;

// The number of `order_of`.
CEM_FAST_INLINE double from_order(int64_t order) {
  return __builtin_bit_cast(double, order ^ ((order >> 63) & INT64_MAX));
}

// The best component of each row of a block so far, its distance and, with the second, the least of the others'.
template <bool kWithSecond>
struct Nearest {
  double score[kBlockRows];  // the smallest wins, then the lowest index
  double second[kWithSecond ? kBlockRows : 1];
  int32_t component[kBlockRows];

  // Takes score(0), ..., score(size - 1) of the components from k on. A branch on which is smaller would often
  // be mispredicted, so they are compared as integers, which compilers select without one.
  template <class F>
  CEM_FAST_INLINE void offer(int64_t row, int64_t k, int64_t size, const F& score_of) {
    int64_t first = k == 0 ? order_of(__builtin_inf()) : order_of(score[row]);
    int64_t next = order_of(__builtin_inf());
    if (kWithSecond && k > 0) next = order_of(second[row]);
    int64_t best = k == 0 ? 0 : component[row];
    for (int64_t q = 0; q < size; ++q) {
      const int64_t candidate = order_of(score_of(q));
      const bool better = candidate < first;
      if constexpr (kWithSecond) {
        const int64_t loser = better ? first : candidate;
        next = loser < next ? loser : next;
      }
      first = better ? candidate : first;
      best = better ? k + q : best;
    }
    score[row] = from_order(first);
    if constexpr (kWithSecond) second[row] = from_order(next);
    component[row] = static_cast<int32_t>(best);
  }
};

// scatter[d] += sum_r (x_r - mean)^2, sums[d] += sum_r (x_r - mean) over [0, length).
template <class X, class T>
void accumulate_rows(const X* const* x, int64_t rows, const T* mean, int64_t length, T* scatter, T* sums) {
  int64_t d = 0;
  for (; d + kLanes<T> <= length; d += kLanes<T>) {
    const Vector<T> m = load(mean + d);
    Vector<T> first{}, second{};
    for (int64_t r = 0; r < rows; ++r) {
      const Vector<T> deviation = load(x[r] + d) - m;
      first += deviation;
      second += deviation * deviation;
    }
    if (scatter != nullptr) store(scatter + d, load(scatter + d) + second);
    if (sums != nullptr) store(sums + d, load(sums + d) + first);
  }
  for (; d < length; ++d) {
    for (int64_t r = 0; r < rows; ++r) {
      const T deviation = widen(x[r][d]) - mean[d];
      if (scatter != nullptr) scatter[d] += deviation * deviation;
      if (sums != nullptr) sums[d] += deviation;
    }
  }
}

// Calls f(component, rows, count) for every component of up to kStatisticsRows rows.
template <class X, class F>
CEM_FAST_INLINE void for_each_component(const RowPointers<X>& rows, const int32_t* component, const F& f) {
  uint64_t left = rows.count < 64 ? (uint64_t{1} << rows.count) - 1 : ~uint64_t{0};
  static_assert(kStatisticsRows <= 64);
  while (left != 0) {
    const int32_t k = component[__builtin_ctzll(left)];
    const X* members[kStatisticsRows];
    int64_t count = 0;
    for (uint64_t seen = left; seen != 0; seen &= seen - 1) {
      const int i = __builtin_ctzll(seen);
      if (component[i] != k) continue;
      members[count++] = rows.row[i];
      left &= ~(uint64_t{1} << i);
    }
    f(k, members, count);
  }
}

// sums[d] += rows * mean[d]: what was added up as deviations, because raw values of a common offset drown a small
// spread.
template <class T>
void add_mean(T rows, const T* mean, int64_t length, T* sums) {
  if (rows == 0) return;
  for (int64_t d = 0; d < length; ++d) sums[d] += rows * mean[d];
}

// The best component of each of up to kBlockRows rows of class c: the nearest mean or, with normalizers, the highest
// posterior; found(i) is called as soon as it is known for row i. `distance` is room for kBlockRows times a block of
// components. `centered` may be null.
template <class X, class T, bool kWithSecond, class F>
void best_components(const RowPointers<X>& rows, const Mixture& mixture, int64_t c, int64_t next_class,
                     int64_t dimension, const double* normalizers, PackedComponents<T>& packed, double* distance,
                     const CenteredMeans<T>* centered, Nearest<kWithSecond>* best, const F& found) {
  const int64_t K = mixture.components, D = dimension;
  const T* means = static_cast<const T*>(mixture.means);
  const T* variances = static_cast<const T*>(mixture.variances);
  const bool posterior = normalizers != nullptr, weighted = posterior && mixture.diagonal;
  if constexpr (!kWithSecond) {
    if (!posterior && D <= kNarrow && rows.count <= kNarrowRows && K >= 4) {
      alignas(64) T tile[kNarrow * kNarrowRows];
      transpose_rows(rows.row, rows.count, D, tile);
      int32_t component[kNarrowRows];
      const auto decide = [&](const T* rows_of_tile, int32_t* of_rows) {
        return centered != nullptr && centered->decide(rows_of_tile, c, of_rows);
      };
      if (nearest_of_narrow<T>(tile, D, means + c * K * D, K, component, decide)) {
        alignas(64) T squared[kNarrowRows];
        if (D < kLanes<T>) own_distances_of_narrow<T>(tile, D, means + c * K * D, component, squared);
        for (int64_t i = 0; i < rows.count; ++i) {
          const T* mean = means + (c * K + component[i]) * D;
          best->component[i] = component[i];
          best->score[i] = D < kLanes<T> ? static_cast<double>(squared[i]) : distance_of_tiles(rows.row[i], mean, D);
          found(i);
        }
        return;
      }
    }
  }
  for (int64_t k = 0; k < K; k += kBlockComponents) {
    const int64_t size = smaller<int64_t>(kBlockComponents, K - k);
    const int64_t at = c * K + k, next = next_class * K + k;
    const Components<T> components{means + at * D, weighted ? variances + at * D : nullptr, means + next * D,
                                   weighted ? variances + next * D : nullptr};
    distances<X, T>(rows, D, components, size, packed, distance);
    if (!weighted) widen_distances(rows, D, components.means, posterior ? variances + at : nullptr, size, distance);
    for (int64_t i = 0; i < rows.count; ++i) {
      const double* of_row = distance + i * size;
      if (posterior) {
        best->offer(i, k, size, [&](int64_t q) {
          const double precision = mixture.diagonal ? 1.0 : 1 / static_cast<double>(variances[at + q]);
          return 0.5 * of_row[q] * precision - normalizers[at + q];
        });
      } else {
        best->offer(i, k, size, [&](int64_t q) { return of_row[q]; });
      }
      if (k + size == K) found(i);
    }
  }
}

template <class X>
void statistics_forward_of(const StatisticsForward& p, ParallelFor parallel_for) {
  using T = typename ParameterOf<X>::Type;
  const int64_t N = p.x.rows, D = p.x.dimension, C = p.mixture.classes, K = p.mixture.components;
  const T* means = static_cast<const T*>(p.mixture.means);
  T* counts = static_cast<T*>(p.counts);
  T* scatter = static_cast<T*>(p.scatter);
  T* per_dimension = p.per_dimension ? scatter : nullptr;
  T* sums = static_cast<T*>(p.sums);
  const bool second_pass = per_dimension != nullptr || sums != nullptr;

  const RowsByClass groups(p.mixture.labels, N, C, p.assignment);

  // A block that accumulates into its own partial sums pays only if it is longer than they are.
  const RowBlocks long_blocks(groups, larger<int64_t>(8 * kStatisticsRows, D));
  const bool fused = second_pass && long_blocks.count() >= kEnoughBlocks;
  const RowBlocks short_blocks(groups, fused ? N + 1 : kStatisticsRows);
  const RowBlocks& blocks = fused ? long_blocks : short_blocks;

  // The first block of a class accumulates in place, the others in a slot of their own.
  const int64_t slot_size = fused ? K * D : 0;
  Scratch<T> scatter_slots(per_dimension != nullptr ? blocks.slots() * slot_size : 0);
  Scratch<T> sums_slots(sums != nullptr ? blocks.slots() * slot_size : 0);

  const bool posterior = p.mixture.variances != nullptr;
  const bool weighted = posterior && p.mixture.diagonal;
  Scratch<double> normalizers(posterior ? C * K : 0);
  if (posterior) log_normalizers<T>(p.mixture, D, groups, parallel_for, normalizers);

  // worth their making where enough rows look at enough means
  std::optional<CenteredMeans<T>> centered;
  if (!posterior && D >= 8 && D <= kNarrow && K >= 16 && N >= 64 * C) centered.emplace(means, C, K, D);

  // The chosen component and the distance to it (not needed where the scatter is per dimension), by position: rows that
  // share a cache line of the assignment are mostly another thread's.
  Scratch<int32_t> component(N);
  Scratch<T> nearest_distance(per_dimension == nullptr ? N : 0);

  // Counts and spherical scatter of a class, in row order.
  const auto total_up = [&](int64_t c, double* total) {
    fill<double>(total, 2 * K, 0);
    for (int64_t i = groups.begin(c); i < groups.end(c); ++i) {
      const int64_t k = component[i];
      total[k] += 1;
      if (per_dimension == nullptr) total[K + k] += static_cast<double>(nearest_distance[i]);
    }
    for (int64_t k = 0; k < K; ++k) {
      counts[c * K + k] = static_cast<T>(total[k]);
      if (per_dimension == nullptr) scatter[c * K + k] = static_cast<T>(total[K + k]);
    }
  };
  const auto is_one_block = [&](int64_t c) { return blocks.first(c + 1) - blocks.first(c) == 1; };

  const int64_t rows_of_block = divide_up(larger<int64_t>(groups.valid_rows(), 1), larger<int64_t>(blocks.count(), 1));
  parallel(parallel_for, blocks.count(), rows_of_block * (K + 1) * D, [&](int64_t first, int64_t last) {
    const int64_t wide = smaller<int64_t>(K, kBlockComponents);
    Scratch<double> distance(kBlockRows * wide), total(2 * K);
    PackedComponents<T> packed(weighted, wide, D);
    for (int64_t b = first; b < last; ++b) {
      const RowBlock& block = blocks[b];
      const int64_t c = block.class_index, next_class = blocks[smaller(b + 1, blocks.count() - 1)].class_index;
      T* block_scatter = nullptr;
      T* block_sums = nullptr;
      if (fused && per_dimension != nullptr) {
        block_scatter = block.slot < 0 ? scatter + c * K * D : scatter_slots + block.slot * slot_size;
        fill(block_scatter, K * D, T(0));
      }
      if (fused && sums != nullptr) {
        block_sums = block.slot < 0 ? sums + c * K * D : sums_slots + block.slot * slot_size;
        fill(block_sums, K * D, T(0));
      }
      for (int64_t begin = block.begin; begin < block.end; begin += kStatisticsRows) {
        const RowPointers<X> rows(p.x, groups, begin, smaller(begin + kStatisticsRows, block.end));
        Nearest<false> best;
        best_components<X, T>(rows, p.mixture, c, next_class, D,
                              posterior ? static_cast<const double*>(normalizers) : nullptr, packed, distance,
                              centered ? &*centered : nullptr, &best, [&](int64_t i) {
                                const int64_t k = component[begin + i] = best.component[i];
                                if (per_dimension != nullptr) return;
                                double squared = best.score[i];
                                if (posterior) squared = squared_distance(rows.row[i], means + (c * K + k) * D, D);
                                nearest_distance[begin + i] = static_cast<T>(squared);
                              });
        if (!fused) continue;
        const auto accumulate = [&](int64_t k, const X* const* members, int64_t count) {
          accumulate_rows(members, count, means + (c * K + k) * D, D,
                          block_scatter != nullptr ? block_scatter + k * D : nullptr,
                          block_sums != nullptr ? block_sums + k * D : nullptr);
        };
        if (D < kLanes<T>) {  // without a vector to fill, looking for the members costs more than it saves
          for (int64_t i = 0; i < rows.count; ++i) accumulate(best.component[i], rows.row + i, 1);
        } else {
          for_each_component(rows, best.component, accumulate);
        }
      }
      if (is_one_block(c)) total_up(c, total);
    }
  });

  // the cost of a row here is the latency of loading its component
  parallel(parallel_for, N, 64, [&](int64_t first, int64_t last) {
    for (int64_t n = first; n < last; ++n) {
      const int64_t position = p.assignment[n];
      p.assignment[n] = position < groups.valid_rows() ? component[position] : -1;
    }
  });
  const int64_t rows_left = blocks.slots() > 0 ? divide_up(N, C) : 0;
  parallel(parallel_for, C, 2 * K + rows_left * 64, [&](int64_t first, int64_t last) {
    Scratch<double> total(2 * K);
    for (int64_t c = first; c < last; ++c) {
      if (!is_one_block(c)) total_up(c, total);
    }
  });
  if (second_pass && !fused) {
    const int64_t chunks = divide_up(D, kChunk);
    parallel(parallel_for, C * chunks, divide_up(N, C) * 2 * smaller(D, kChunk), [&](int64_t first, int64_t last) {
      for (int64_t item = first; item < last; ++item) {
        const int64_t c = item / chunks, start = item % chunks * kChunk, length = smaller(kChunk, D - start);
        for (int64_t k = 0; k < K; ++k) {
          const int64_t at = (c * K + k) * D + start;
          if (per_dimension != nullptr) fill(scatter + at, length, T(0));
          if (sums != nullptr) fill(sums + at, length, T(0));
        }
        for (int64_t i = groups.begin(c); i < groups.end(c); ++i) {
          const int64_t at = (c * K + component[i]) * D + start;
          const X* row = row_at<X>(p.x, groups, i) + start;
          accumulate_rows(&row, 1, means + at, length, per_dimension != nullptr ? scatter + at : nullptr,
                          sums != nullptr ? sums + at : nullptr);
        }
        for (int64_t k = 0; k < K && sums != nullptr; ++k) {
          const int64_t at = (c * K + k) * D + start;
          add_mean(counts[c * K + k], means + at, length, sums + at);
        }
      }
    });
  }
  if (fused) {
    parallel(parallel_for, C, divide_up(blocks.count(), C) * K * D, [&](int64_t first, int64_t last) {
      for (int64_t c = first; c < last; ++c) {
        const int64_t at = c * K * D;
        if (blocks.first(c) == blocks.first(c + 1)) {
          if (per_dimension != nullptr) fill(scatter + at, K * D, T(0));
          if (sums != nullptr) fill(sums + at, K * D, T(0));
        }
        for (int64_t b = blocks.first(c) + 1; b < blocks.first(c + 1); ++b) {
          const int64_t slot = blocks[b].slot * slot_size;
          if (per_dimension != nullptr) add(scatter_slots + slot, K * D, scatter + at);
          if (sums != nullptr) add(sums_slots + slot, K * D, sums + at);
        }
        for (int64_t k = 0; k < K && sums != nullptr; ++k) {
          add_mean(counts[c * K + k], means + at + k * D, D, sums + at + k * D);
        }
      }
    });
  }
  if (groups.valid_rows() < N) {
    const T nan = static_cast<T>(__builtin_nan(""));
    fill(counts, C * K, nan);
    fill(scatter, per_dimension != nullptr ? C * K * D : C * K, nan);
    if (sums != nullptr) fill(sums, C * K * D, nan);
  }
}

// dx = factor (x - mean) of one row; factor is one number or, per dimension, 2 scale grad[d].
template <bool kPerDimension, bool kStream, class X, class T>
void scale_deviation(const X* x, const T* mean, const T* next_mean, const T* grad, T scale, int64_t D, X* dx) {
  const Vector<T> uniform = broadcast<T>(kPerDimension ? scale : scale * grad[0]);
  const bool wide = D >= kLanes<T>;
  int64_t d = 0;
  for (; d + kLanes<T> <= D; d += kLanes<T>) {
    Vector<T> factor = uniform;
    if constexpr (kPerDimension) factor = uniform * load(grad + d);
    prefetch(next_mean + d);
    const Vector<T> value = factor * (load(x + d) - load(mean + d));
    if constexpr (kStream) {
      stream(dx + d, value);
    } else {
      store(dx + d, value);
    }
  }
  if (d < D) {
    const int rest = static_cast<int>(D - d);
    Vector<T> factor = uniform;
    if constexpr (kPerDimension) factor = uniform * load_last(grad + d, rest, wide);
    store_last(dx + d, rest, factor * (load_last(x + d, rest, wide) - load_last(mean + d, rest, wide)));
  }
}

template <class X>
void statistics_backward_of(const StatisticsBackward& p, ParallelFor parallel_for) {
  using T = typename ParameterOf<X>::Type;
  const int64_t N = p.x.rows, D = p.x.dimension, C = p.mixture.classes, K = p.mixture.components;
  const T* means = static_cast<const T*>(p.mixture.means);
  const T* grad = static_cast<const T*>(p.grad_scatter);
  const bool per_dimension = p.mixture.diagonal;
  const int64_t* labels = p.mixture.labels;
  const T scale = static_cast<T>(2 * p.scale);
  const bool streaming = stream_rows(p.dx, N, D, static_cast<int64_t>(sizeof(X)));
  // -1: a label or an assignment out of range
  const auto component_of = [&](int64_t n) -> int64_t {
    const int64_t c = labels == nullptr ? 0 : labels[n], k = p.assignment[n];
    const bool valid =
        static_cast<uint64_t>(c) < static_cast<uint64_t>(C) && static_cast<uint64_t>(k) < static_cast<uint64_t>(K);
    return valid ? c * K + k : -1;
  };
  // moving a number to and from memory takes about as long as eight multiply-adds
  parallel(parallel_for, N, 16 * D, [&](int64_t first, int64_t last) {
    int64_t next = component_of(first);
    for (int64_t n = first; n < last; ++n) {
      const int64_t ck = next;
      if (n + 1 < last) next = component_of(n + 1);
      X* dx = static_cast<X*>(p.dx) + n * D;
      if (ck < 0) {
        for (int64_t d = 0; d < D; ++d) narrow(static_cast<T>(__builtin_nan("")), dx + d);
        continue;
      }
      const X* x = static_cast<const X*>(p.x.data) + n * p.x.stride;
      const T* mean = means + ck * D;
      const T* next_mean = means + larger<int64_t>(next, 0) * D;
      if (per_dimension) {
        if (streaming) {
          scale_deviation<true, true>(x, mean, next_mean, grad + ck * D, scale, D, dx);
        } else {
          scale_deviation<true, false>(x, mean, next_mean, grad + ck * D, scale, D, dx);
        }
      } else if (streaming) {
        scale_deviation<false, true>(x, mean, next_mean, grad + ck, scale, D, dx);
      } else {
        scale_deviation<false, false>(x, mean, next_mean, grad + ck, scale, D, dx);
      }
    }
    if (streaming) finish_streaming();
  });
}
