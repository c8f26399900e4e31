// Few dimensions: a lane holds a row instead of a dimension, because sums across lanes would cost more than the
// distances.

constexpr int64_t kNarrow = 64;  // dimensions at most
constexpr int kNarrowRows = 32;  // of a tile

// A number as an integer of the same order, in torch's: NaN comes before every number.
CEM_FAST_INLINE int64_t order_of(double value) {
  const int64_t bits = __builtin_bit_cast(int64_t, value + 0.0);  // -0 is 0
  return value == value ? bits ^ ((bits >> 63) & INT64_MAX) : INT64_MIN;
}

// The lanes of two vectors in turn, from lane `begin` on.
template <int begin, class V, int... lane>
CEM_FAST_INLINE V interleave(V a, V b, std::integer_sequence<int, lane...>) {
  constexpr int lanes = static_cast<int>(sizeof...(lane));
  return __builtin_shufflevector(a, b, (begin + lane / 2 + lane % 2 * lanes)...);
}

// Lane j of vector i becomes lane i of vector j.
template <class T>
CEM_FAST_INLINE void transpose(Vector<T>* v) {
  constexpr int L = kLanes<T>;
  const auto lanes = std::make_integer_sequence<int, L>{};
  for (int left = L; left > 1; left /= 2) {
    Vector<T> in_turn[L];
#pragma GCC unroll 8
    for (int i = 0; i < L / 2; ++i) {
      in_turn[2 * i] = interleave<0>(v[i], v[i + L / 2], lanes);
      in_turn[2 * i + 1] = interleave<L / 2>(v[i], v[i + L / 2], lanes);
    }
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) v[i] = in_turn[i];
  }
}

// Rows of a tile, the last one repeated until it is full: tile[d * kNarrowRows + r].
template <class X, class T>
void transpose_rows(const X* const* row, int64_t count, int64_t D, T* tile) {
  constexpr int L = kLanes<T>;
  if (D < L) {
    for (int64_t r = 0; r < kNarrowRows; ++r) {
      const X* x = row[smaller(r, count - 1)];
      for (int64_t d = 0; d < D; ++d) tile[d * kNarrowRows + r] = widen(x[d]);
    }
    return;
  }
  for (int64_t start = 0; start < D; start += L) {
    const int64_t d = smaller(start, D - L);  // the last vector may overlap the one before
    for (int64_t first = 0; first < kNarrowRows; first += L) {
      Vector<T> v[L];
#pragma GCC unroll 16
      for (int64_t i = 0; i < L; ++i) v[i] = load(row[smaller(first + i, count - 1)] + d);
      transpose<T>(v);
#pragma GCC unroll 16
      for (int64_t i = 0; i < L; ++i) store(tile + (d + i) * kNarrowRows + first, v[i]);
    }
  }
}

// Squared distances of two vectors of rows to four means, of which those after `size` are repeated.
template <class T>
CEM_FAST_INLINE void narrow_distances(const T* tile, const T* means, int64_t stride, int64_t D, int64_t size,
                                      Vector<T> (*sum)[2]) {
  const T* mean[4];
  for (int q = 0; q < 4; ++q) mean[q] = means + smaller<int64_t>(q, size - 1) * stride;
  for (int q = 0; q < 4; ++q) sum[q][0] = sum[q][1] = Vector<T>{};
  for (int64_t d = 0; d < D; ++d) {
    const Vector<T> first = load(tile + d * kNarrowRows), second = load(tile + d * kNarrowRows + kLanes<T>);
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) {
      const Vector<T> m = broadcast<T>(mean[q][d]);
      const Vector<T> a = first - m, b = second - m;
      sum[q][0] = multiply_add(a, a, sum[q][0]);
      sum[q][1] = multiply_add(b, b, sum[q][1]);
    }
  }
}

// Means of every class about their center c. The nearest mean m of a row x has the least
//   |m - c|^2 / 2 - (x - c) (m - c),
// which takes half the arithmetic of squared distances but rounds more. A row is decided if its second best mean is
// further behind than rounding explains.
template <class T>
class CenteredMeans {
 public:
  CenteredMeans(const T* means, int64_t C, int64_t K, int64_t D)
      : components_(divide_up(K, 4) * 4),
        dimension_(D),
        center_(C * D),
        means_(C * components_ * D),
        half_squares_(C * components_),
        reach_(C) {
    Scratch<double> sum(D);
    for (int64_t c = 0; c < C; ++c) {
      const T* of_class = means + c * K * D;
      T* center = center_ + c * D;
      fill<double>(sum, D, 0);
      for (int64_t k = 0; k < K; ++k) {
        for (int64_t d = 0; d < D; ++d) sum[d] += static_cast<double>(of_class[k * D + d]);
      }
      for (int64_t d = 0; d < D; ++d) center[d] = static_cast<T>(sum[d] / static_cast<double>(K));
      T* centered = means_ + c * components_ * D;
      T* half = half_squares_ + c * components_;
      fill(centered + K * D, (components_ - K) * D, T(0));
      fill(half + K, components_ - K, static_cast<T>(__builtin_inf()));
      double reach = kLeastReach;
      for (int64_t k = 0; k < K; ++k) {
        for (int64_t d = 0; d < D; ++d) centered[k * D + d] = center[d] - of_class[k * D + d];
        const double square = squared_distance(of_class + k * D, static_cast<const T*>(center), D);
        half[k] = static_cast<T>(0.5 * square);
        // NaN and infinity stay, and leave all rows undecided
        if (reach == reach && !(square <= reach)) reach = square;
      }
      reach_[c] = static_cast<T>(reach);
    }
  }

  // Finds the nearest component of class c for two vectors of rows. Returns false if rounding leaves a row undecided.
  bool decide(const T* tile, int64_t c, int32_t* component) const {
    constexpr int V = 2, L = kLanes<T>;
    const int64_t D = dimension_;
    const T* center = center_ + c * D;
    alignas(64) T rows[kNarrow * V * L];
    Vector<T> square[V]{}, best[V], second[V];
    Bits<T> index[V]{};
    for (int64_t d = 0; d < D; ++d) {
      const Vector<T> middle = broadcast<T>(center[d]);
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) {
        const Vector<T> x = load(tile + d * kNarrowRows + v * L) - middle;
        store(rows + (d * V + v) * L, x);
        square[v] = multiply_add(x, x, square[v]);
      }
    }
    for (int v = 0; v < V; ++v) best[v] = second[v] = broadcast<T>(static_cast<T>(__builtin_inf()));
    for (int64_t k = 0; k < components_; k += 4) {
      const T* mean = means_ + (c * components_ + k) * D;
      Vector<T> score[4][V];
      for (int q = 0; q < 4; ++q) score[q][0] = score[q][1] = broadcast<T>(half_squares_[c * components_ + k + q]);
      for (int64_t d = 0; d < D; ++d) {
        const Vector<T> first = load(rows + d * V * L), other = load(rows + (d * V + 1) * L);
#pragma GCC unroll 4
        for (int q = 0; q < 4; ++q) {
          const Vector<T> m = broadcast<T>(mean[q * D + d]);
          score[q][0] = multiply_add(first, m, score[q][0]);
          score[q][1] = multiply_add(other, m, score[q][1]);
        }
      }
#pragma GCC unroll 4
      for (int q = 0; q < 4; ++q) {
        const Bits<T> number = Bits<T>{} + static_cast<decltype(index[0][0] + 0)>(k + q);
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) {
          const Vector<T> value = score[q][v];
          const auto better = value < best[v];
          const Vector<T> loser = better ? best[v] : value;
          second[v] = loser < second[v] ? loser : second[v];
          best[v] = better ? value : best[v];
          index[v] = better ? number : index[v];
        }
      }
    }
    // Sums of D products and of D squares round by at most this share of the squares of the row and of the means.
    const Vector<T> share = broadcast<T>(static_cast<T>(4 * (D + 4)) * (sizeof(T) == 4 ? T(0x1p-23) : T(0x1p-52)));
    Bits<T> decided = ~Bits<T>{};
    for (int v = 0; v < V; ++v) decided &= second[v] - best[v] > share * (square[v] + broadcast<T>(reach_[c]));
    bool all = true;
    for (int i = 0; i < L; ++i) all &= decided[i] != 0;
    for (int v = 0; v < V && all; ++v) {
      for (int i = 0; i < L; ++i) component[v * L + i] = static_cast<int32_t>(index[v][i]);
    }
    return all;
  }

 private:
  static constexpr double kLeastReach = 0x1p-100;  // far above products that lose digits by underflow

  int64_t components_, dimension_;  // components are filled up to whole blocks with some that are infinitely far
  Scratch<T> center_;               // [C, D]
  Scratch<T> means_;                // c - m [C, components, D]
  Scratch<T> half_squares_;         // [C, components]
  Scratch<T> reach_;                // the largest |m - c|^2, and at least kLeastReach [C]
};

// The nearest of K means of each row of a tile, the lowest index of several; false if a distance is NaN, or all of a
// row's are infinite. `decide` may settle two vectors of rows without a look at every distance.
template <class T, class F>
bool nearest_of_narrow(const T* tile, int64_t D, const T* means, int64_t K, int32_t* component, const F& decide) {
  const Vector<T> infinite = broadcast<T>(static_cast<T>(__builtin_inf()));
  Bits<T> unordered{};
  for (int start = 0; start < kNarrowRows; start += 2 * kLanes<T>) {
    if (decide(tile + start, component + start)) continue;
    Vector<T> best[2] = {infinite, infinite};
    Bits<T> index[2] = {};
    for (int64_t k = 0; k < K; k += 4) {
      const int64_t size = smaller<int64_t>(4, K - k);
      Vector<T> sum[4][2];
      narrow_distances(tile + start, means + k * D, D, D, size, sum);
#pragma GCC unroll 4
      for (int q = 0; q < 4; ++q) {
        const Bits<T> number = Bits<T>{} + static_cast<decltype(index[0][0] + 0)>(k + smaller<int64_t>(q, size - 1));
#pragma GCC unroll 2
        for (int v = 0; v < 2; ++v) {
          const auto better = sum[q][v] < best[v];
          best[v] = better ? sum[q][v] : best[v];
          index[v] = better ? number : index[v];
          unordered |= sum[q][v] != sum[q][v];
        }
      }
    }
    for (int v = 0; v < 2; ++v) {
      unordered |= best[v] == infinite;
      for (int i = 0; i < kLanes<T>; ++i) component[start + v * kLanes<T> + i] = static_cast<int32_t>(index[v][i]);
    }
  }
  for (int i = 0; i < kLanes<T>; ++i) {
    if (unordered[i] != 0) return false;
  }
  return true;
}

// The squared distances of the rows of a tile, each to its own mean: the sums that `distances` finds, in the same
// order. For fewer dimensions than lanes, which `distances` has in the last lanes of a vector.
template <class T>
void own_distances_of_narrow(const T* tile, int64_t D, const T* means, const int32_t* component, T* squared) {
  alignas(64) T mean[kLanes<T> * kNarrowRows];
  for (int64_t r = 0; r < kNarrowRows; ++r) {
    for (int64_t d = 0; d < D; ++d) mean[d * kNarrowRows + r] = means[component[r] * D + d];
  }
  for (int start = 0; start < kNarrowRows; start += kLanes<T>) {
    Vector<T> lane[kLanes<T>]{};
    for (int64_t d = 0; d < D; ++d) {
      const Vector<T> deviation = load(tile + d * kNarrowRows + start) - load(mean + d * kNarrowRows + start);
      lane[kLanes<T> - D + d] = multiply_add(deviation, deviation, Vector<T>{});
    }
    for (int half = kLanes<T> / 2; half > 0; half /= 2) {
      for (int l = 0; l < half; ++l) lane[l] += lane[l + half];
    }
    store(squared + start, lane[0]);
  }
}

// The squared distance that `distances` finds: the same sums in the same order. For a vector of dimensions at least,
// and a single chunk.
template <class X, class T>
CEM_FAST_INLINE double distance_of_tiles(const X* x, const T* mean, int64_t D) {
  Vector<T> sum{};
  int64_t d = 0;
  for (; d + kLanes<T> <= D; d += kLanes<T>) {
    const Vector<T> deviation = load(x + d) - load(mean + d);
    sum = multiply_add(deviation, deviation, sum);
  }
  if (d < D) {
    const int rest = static_cast<int>(D - d);
    const Vector<T> deviation = load_last(x + d, rest, true) - load_last(mean + d, rest, true);
    sum = multiply_add(deviation, deviation, sum);
  }
  return static_cast<double>(sum_lanes<T>(sum));
}

// Squared distances of up to kNarrowRows rows to S candidates: squared[t * kNarrowRows + r].
template <class X, class T>
void squared_of_candidates(const X* const* row, int64_t count, int64_t D, const T* candidates, int64_t S, T* tile,
                           T* squared) {
  if (D > kNarrow) {
    for (int64_t r = 0; r < count; ++r) {
      for (int64_t t = 0; t < S; ++t) {
        squared[t * kNarrowRows + r] = static_cast<T>(squared_distance(row[r], candidates + t * D, D));
      }
    }
    return;
  }
  transpose_rows(row, count, D, tile);
  for (int64_t t = 0; t < S; t += 4) {
    const int64_t size = smaller<int64_t>(4, S - t);
    for (int start = 0; start < kNarrowRows; start += 2 * kLanes<T>) {
      Vector<T> sum[4][2];
      narrow_distances<T>(tile + start, candidates + t * D, D, D, size, sum);
      for (int64_t q = 0; q < size; ++q) {
        store(squared + (t + q) * kNarrowRows + start, sum[q][0]);
        store(squared + (t + q) * kNarrowRows + start + kLanes<T>, sum[q][1]);
      }
    }
  }
}

// total[t] += sum_r mass[r] value[t * kNarrowRows + r], row by row. Some candidates at a time: the sum of one alone
// would wait for its last addition.
CEM_FAST_INLINE void add_weighted(const double* mass, const double* value, int64_t count, int64_t S, double* total) {
  constexpr int kAtOnce = 8;
  for (int64_t t = 0; t < S; t += kAtOnce) {
    const double* of[kAtOnce];
    double sum[kAtOnce];
    for (int q = 0; q < kAtOnce; ++q) {
      const int64_t candidate = smaller(t + q, S - 1);
      of[q] = value + candidate * kNarrowRows, sum[q] = total[candidate];
    }
    for (int64_t r = 0; r < count; ++r) {
#pragma GCC unroll 8
      for (int q = 0; q < kAtOnce; ++q) sum[q] += mass[r] * of[q][r];
    }
    for (int q = 0; q < kAtOnce && t + q < S; ++q) total[t + q] = sum[q];
  }
}

// How near rows come to the means so far and one more, for several candidates of every class:
// min(nearest_n, |x_n - candidate|^2), and the sums over the rows of each class, weighted by their masses.
template <class X>
void candidate_distances_of(const CandidateDistances& p, ParallelFor parallel_for) {
  using T = typename ParameterOf<X>::Type;
  const int64_t N = p.x.rows, D = p.x.dimension, C = p.mixture.classes, S = p.mixture.components;
  const T* candidates = static_cast<const T*>(p.mixture.means);
  const T* nearest = static_cast<const T*>(p.nearest);
  T* distances = static_cast<T*>(p.distances);
  const RowsByClass groups(p.mixture.labels, N, C);
  const RowBlocks blocks(groups, 32 * kNarrowRows);
  Scratch<double> partial(blocks.count() * S);
  parallel(parallel_for, blocks.count(), 32 * kNarrowRows * S * (D + 8), [&](int64_t first, int64_t last) {
    Scratch<T> tile(D <= kNarrow ? D * kNarrowRows : 0), squared(S * kNarrowRows);
    Scratch<double> value(S * kNarrowRows);
    for (int64_t b = first; b < last; ++b) {
      double* total = partial + b * S;
      fill<double>(total, S, 0);
      const T* of_class = candidates + blocks[b].class_index * S * D;
      for (int64_t begin = blocks[b].begin; begin < blocks[b].end; begin += kNarrowRows) {
        const int64_t count = smaller<int64_t>(kNarrowRows, blocks[b].end - begin);
        const X* row[kNarrowRows];
        int64_t number[kNarrowRows];
        alignas(64) T near[kNarrowRows];
        double mass[kNarrowRows];
        for (int64_t r = 0; r < count; ++r) {
          const int64_t n = number[r] = groups.row(begin + r);
          row[r] = row_at<X>(p.x, groups, begin + r), near[r] = nearest[n], mass[r] = p.mass[n];
        }
        squared_of_candidates<X, T>(row, count, D, of_class, S, tile, squared);
        for (int64_t t = 0; t < S; ++t) {
          T* of_candidate = squared + t * kNarrowRows;
          for (int64_t r = 0; r < count; ++r) {
            const T closer = of_candidate[r] < near[r] ? of_candidate[r] : near[r];
            of_candidate[r] = closer, value[t * kNarrowRows + r] = static_cast<double>(closer);
          }
          if (p.mixture.labels == nullptr) {
            for (int64_t r = 0; r < count; ++r) distances[t * N + begin + r] = of_candidate[r];
          } else {
            for (int64_t r = 0; r < count; ++r) distances[t * N + number[r]] = of_candidate[r];
          }
        }
        add_weighted(mass, value, count, S, total);
      }
    }
  });
  for (int64_t i = 0; i < S * C; ++i) p.potentials[i] = 0;
  for (int64_t b = 0; b < blocks.count(); ++b) {
    for (int64_t t = 0; t < S; ++t) p.potentials[t * C + blocks[b].class_index] += partial[b * S + t];
  }
}

// Greedy k-means++ of one class: every mean is the best of some candidates, rows drawn with probability proportional
// to their mass times the squared distance to the nearest mean so far.
template <class X>
void seeding_of(const Seeding& p, ParallelFor parallel_for) {
  using T = typename ParameterOf<X>::Type;
  const int64_t N = p.x.rows, D = p.x.dimension, K = p.components;
  T* means = static_cast<T*>(p.means);
  const double* uniform = p.uniform;
  Scratch<T> first(p.candidates * N), second(p.candidates * N), candidates(p.candidates * D);
  Scratch<double> cumulative(N), potentials(p.candidates);
  T* distances = first;
  T* nearest = second;
  fill(nearest, N, static_cast<T>(__builtin_inf()));
  const auto add_up = [&] {
    double total = 0;
    for (int64_t n = 0; n < N; ++n) cumulative[n] = total += cumulative[n];
    return total;
  };
  const auto add_up_masses = [&] {
    for (int64_t n = 0; n < N; ++n) cumulative[n] = p.mass[n];
    return add_up();
  };
  for (int64_t k = 0; k < K; ++k) {
    const int64_t S = k == 0 ? 1 : p.candidates;
    double total = 0;
    if (k > 0) {
      for (int64_t n = 0; n < N; ++n) cumulative[n] = static_cast<double>(nearest[n]) * p.mass[n];
      total = add_up();
    }
    if (!(total > 0)) total = add_up_masses();  // no mass left: the rows' own
    for (int64_t t = 0; t < S; ++t) {
      const double target = *uniform++ * total;
      int64_t low = 0, high = N;  // the first row beyond the target lies in [low, high]
      while (low < high) {
        const int64_t middle = low + (high - low) / 2;
        if (cumulative[middle] > target) {
          high = middle;
        } else {
          low = middle + 1;
        }
      }
      const X* row = static_cast<const X*>(p.x.data) + smaller(low, N - 1) * p.x.stride;
      for (int64_t d = 0; d < D; ++d) candidates[t * D + d] = widen(row[d]);
    }
    const Mixture mixture{1, S, nullptr, candidates, nullptr, nullptr, false};
    candidate_distances_of<X>({p.x, mixture, nearest, p.mass, distances, potentials}, parallel_for);
    int64_t best = 0;
    for (int64_t t = 1; t < S; ++t) best = order_of(potentials[t]) < order_of(potentials[best]) ? t : best;
    for (int64_t d = 0; d < D; ++d) means[k * D + d] = candidates[best * D + d];
    nearest = distances + best * N;
    distances = distances == first ? second : first;
  }
}
