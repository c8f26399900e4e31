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
      : groups_(divide_up(K, kGroup)),
        dimension_(D),
        center_(C * D),
        means_(C * groups_ * D * kGroup),
        half_squares_(C * groups_ * kGroup),
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
      T* centered = means_ + c * groups_ * D * kGroup;
      T* half = half_squares_ + c * groups_ * kGroup;
      fill(centered, groups_ * D * kGroup, T(0));
      fill(half + K, groups_ * kGroup - K, static_cast<T>(__builtin_inf()));
      double reach = kLeastReach;
      for (int64_t k = 0; k < K; ++k) {
        T* own = centered + k / kGroup * D * kGroup + k % kGroup;
        for (int64_t d = 0; d < D; ++d) own[d * kGroup] = center[d] - of_class[k * D + d];
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
    return groups_ * kGroup >= kManyMeans * dimension_ ? decide_by<kGroup>(tile, c, component)
                                                       : decide_by<1>(tile, c, component);
  }

 private:
  static constexpr double kLeastReach = 0x1p-100;  // far above products that lose digits by underflow

  // means at a time: for two vectors of rows, their scores fill half of the registers
  static constexpr int kGroup = CEM_FAST_WIDTH == 64 ? 8 : smaller<int>(4, kLanes<T>);
  // for each dimension, from which on it takes less to follow groups, and to look into the best one again
  static constexpr int64_t kManyMeans = 16;

  // Follows the best two of all sets of kSet means; then a row looks for its mean in the best set.
  template <int kSet>
  bool decide_by(const T* tile, int64_t c, int32_t* component) const {
    constexpr int V = 2, L = kLanes<T>, G = kGroup;
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
    const T* means = means_ + c * groups_ * D * G;
    const T* half_squares = half_squares_ + c * groups_ * G;
    for (int v = 0; v < V; ++v) best[v] = second[v] = broadcast<T>(static_cast<T>(__builtin_inf()));
    for (int64_t g = 0; g < groups_; ++g) {
      const T* mean = means + g * D * G;
      Vector<T> score[G][V];
#pragma GCC unroll 8
      for (int q = 0; q < G; ++q) score[q][0] = score[q][1] = broadcast<T>(half_squares[g * G + q]);
      for (int64_t d = 0; d < D; ++d) {
        const Vector<T> first = load(rows + d * V * L), other = load(rows + (d * V + 1) * L);
#pragma GCC unroll 8
        for (int q = 0; q < G; ++q) {
          const Vector<T> m = broadcast<T>(mean[d * G + q]);
          score[q][0] = multiply_add(first, m, score[q][0]);
          score[q][1] = multiply_add(other, m, score[q][1]);
        }
      }
#pragma GCC unroll 8
      for (int set = 0; set < G / kSet; ++set) {
        const Bits<T> number = Bits<T>{} + static_cast<Place>(g * (G / kSet) + set);
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) {
          const Vector<T> least = least_of<kSet>(score + set * kSet, v);
          const auto better = least < best[v];
          const Vector<T> loser = better ? best[v] : least;
          second[v] = loser < second[v] ? loser : second[v];
          best[v] = better ? least : best[v];
          index[v] = better ? number : index[v];
        }
      }
    }
    // Sums of D products and of D squares round by at most this share of the squares of the row and of the means.
    const T share = static_cast<T>(4 * (D + 4)) * (sizeof(T) == 4 ? T(0x1p-23) : T(0x1p-52));
    bool all = true;
    for (int i = 0; i < V * L; ++i) {
      const int v = i / L, lane = i % L;
      const auto set = static_cast<int64_t>(index[v][lane]);
      int64_t place = 0;
      T first = best[v][lane], next = second[v][lane];
      if constexpr (kSet > 1) {
        const T* row = rows + v * L + lane;
        Group score = group_at(half_squares + set * G);
        for (int64_t d = 0; d < D; ++d) score += row[d * V * L] * group_at(means + (set * D + d) * G);
        const Group least = least_of_all(score);
        const Places found = least_of_all(score == least ? places() : Places{} + kGroup);
        const Group others = places() == found ? Group{} + static_cast<T>(__builtin_inf()) : score;
        place = found[0], first = least[0], next = smaller(next, least_of_all(others)[0]);
      }
      all &= next - first > share * (square[v][lane] + reach_[c]);
      component[i] = static_cast<int32_t>(set * kSet + place);
    }
    return all;
  }

  // One number for every mean of a group.
  typedef T Group __attribute__((vector_size(kGroup * sizeof(T))));
  typedef decltype(Bits<T>{}[0] + 0) Place;
  typedef Place Places __attribute__((vector_size(kGroup * sizeof(T))));

  static CEM_FAST_INLINE Group group_at(const T* numbers) {
    Group g;
    __builtin_memcpy(&g, numbers, sizeof(g));
    return g;
  }

  static CEM_FAST_INLINE Places places() {
    Places p;
    for (int q = 0; q < kGroup; ++q) p[q] = q;
    return p;
  }

  // The least number, in every place.
  template <int step = kGroup / 2, class V>
  static CEM_FAST_INLINE V least_of_all(V v) {
    if constexpr (step == 0) {
      return v;
    } else {
      const V other = swapped<step>(v, std::make_integer_sequence<int, kGroup>{});
      return least_of_all<step / 2>(other < v ? other : v);
    }
  }

  template <int step, class V, int... place>
  static CEM_FAST_INLINE V swapped(V v, std::integer_sequence<int, place...>) {
    return __builtin_shufflevector(v, v, (place ^ step)...);
  }

  // The least of the scores of n means, for one of the vectors of rows.
  template <int n>
  static CEM_FAST_INLINE Vector<T> least_of(const Vector<T> (*score)[2], int v) {
    if constexpr (n == 1) {
      return score[0][v];
    } else {
      const Vector<T> a = least_of<n / 2>(score, v), b = least_of<n / 2>(score + n / 2, v);
      return b < a ? b : a;
    }
  }

  int64_t groups_, dimension_;  // groups are filled up with means that are infinitely far
  Scratch<T> center_;           // [C, D]
  Scratch<T> means_;            // c - m [C, groups, D, kGroup]
  Scratch<T> half_squares_;     // [C, groups, kGroup]
  Scratch<T> reach_;            // the largest |m - c|^2, and at least kLeastReach [C]
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

// Squared distances of the rows of a tile to S candidates: squared[t * kNarrowRows + r].
template <class T>
void squared_of_tile(const T* tile, int64_t D, const T* candidates, int64_t S, T* squared) {
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

// The same for up to kNarrowRows rows of many dimensions; `room` holds [kNarrowRows, S].
template <class X, class T>
void squared_of_rows(const RowPointers<X>& rows, int64_t D, const T* candidates, int64_t S, PackedComponents<T>& packed,
                     double* room, T* squared) {
  distances<X, T>(rows, D, {candidates, nullptr, candidates, nullptr}, S, packed, room);
  for (int64_t t = 0; t < S; ++t) {
    for (int64_t r = 0; r < rows.count; ++r) squared[t * kNarrowRows + r] = static_cast<T>(room[r * S + t]);
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
// min(nearest_n, |x_n - candidate|^2), and the sums over the rows of each class, weighted by their masses. `tiles` are
// all rows of a single class and few dimensions, or null.
template <class X, class T>
void candidate_distances_of(const CandidateDistances& p, const T* tiles, ParallelFor parallel_for) {
  const int64_t N = p.x.rows, D = p.x.dimension, C = p.mixture.classes, S = p.mixture.components;
  const T* candidates = static_cast<const T*>(p.mixture.means);
  const T* nearest = static_cast<const T*>(p.nearest);
  T* distances = static_cast<T*>(p.distances);
  const RowsByClass groups(p.mixture.labels, N, C);
  const RowBlocks blocks(groups, 32 * kNarrowRows);
  Scratch<double> partial(blocks.count() * S);
  parallel(parallel_for, blocks.count(), 32 * kNarrowRows * S * (D + 8), [&](int64_t first, int64_t last) {
    const bool narrow = D <= kNarrow;
    Scratch<T> own(narrow ? D * kNarrowRows : 0), squared(S * kNarrowRows);
    Scratch<double> room(narrow ? 0 : kNarrowRows * S);
    PackedComponents<T> packed(false, S, D);
    Scratch<double> value(S * kNarrowRows);
    for (int64_t b = first; b < last; ++b) {
      double* total = partial + b * S;
      fill<double>(total, S, 0);
      const T* of_class = candidates + blocks[b].class_index * S * D;
      for (int64_t begin = blocks[b].begin; begin < blocks[b].end; begin += kNarrowRows) {
        const int64_t count = smaller<int64_t>(kNarrowRows, blocks[b].end - begin);
        int64_t number[kNarrowRows];
        alignas(64) T near[kNarrowRows];
        double mass[kNarrowRows];
        for (int64_t r = 0; r < count; ++r) {
          const int64_t n = number[r] = groups.row(begin + r);
          near[r] = nearest[n], mass[r] = p.mass[n];
        }
        if (!narrow) {
          squared_of_rows<X, T>({p.x, groups, begin, begin + count}, D, of_class, S, packed, room, squared);
        } else if (tiles != nullptr) {
          squared_of_tile<T>(tiles + begin * D, D, of_class, S, squared);
        } else {
          const X* row[kNarrowRows];
          for (int64_t r = 0; r < count; ++r) row[r] = row_at<X>(p.x, groups, begin + r);
          transpose_rows<X, T>(row, count, D, own);
          squared_of_tile<T>(own, D, of_class, S, squared);
        }
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

// All rows as tiles, which costs more than the distances of a tile to a few means: null for many dimensions, and where
// they take much memory.
template <class X, class T>
class Tiles {
 public:
  Tiles(const Features& x, ParallelFor parallel_for) : tiles_(size_of(x)), any_(size_of(x) > 0) {
    const int64_t D = x.dimension;
    const RowsByClass rows(nullptr, x.rows, 1);
    parallel(
        parallel_for, any_ ? divide_up(x.rows, kNarrowRows) : 0, kNarrowRows * D, [&](int64_t first, int64_t last) {
          for (int64_t begin = first * kNarrowRows; begin < smaller(last * kNarrowRows, x.rows); begin += kNarrowRows) {
            const int64_t count = smaller<int64_t>(kNarrowRows, x.rows - begin);
            const X* row[kNarrowRows];
            for (int64_t r = 0; r < count; ++r) row[r] = row_at<X>(x, rows, begin + r);
            transpose_rows<X, T>(row, count, D, tiles_ + begin * D);
          }
        });
  }

  const T* get() const { return any_ ? static_cast<const T*>(tiles_) : nullptr; }

 private:
  static constexpr int64_t kMostBytes = 64 << 20;

  static int64_t size_of(const Features& x) {
    const int64_t size = divide_up(x.rows, kNarrowRows) * kNarrowRows * x.dimension;
    return x.dimension <= kNarrow && size * static_cast<int64_t>(sizeof(T)) <= kMostBytes ? size : 0;
  }

  Scratch<T> tiles_;  // [tiles, D, kNarrowRows]
  bool any_;
};

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
  const Tiles<X, T> tiles(p.x, parallel_for);
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
    candidate_distances_of<X, T>({p.x, mixture, nearest, p.mass, distances, potentials}, tiles.get(), parallel_for);
    int64_t best = 0;
    for (int64_t t = 1; t < S; ++t) best = order_of(potentials[t]) < order_of(potentials[best]) ? t : best;
    for (int64_t d = 0; d < D; ++d) means[k * D + d] = candidates[best * D + d];
    nearest = distances + best * N;
    distances = distances == first ? second : first;
  }
}
