// Lloyd's iterations of k-means, every class until its own means rest.

// Where there are many classes, and their rows fit in a cache on average, one thread does all iterations of a class, so
// that its rows are fetched once. Otherwise all threads do one iteration of all classes at a time.
constexpr int64_t kManyClasses = 8;
constexpr int64_t kResidentBytes = 4 << 20;

// Rows whose deviations are added up before the sum is widened to double.
constexpr int64_t kPartialRows = 256;

// What one iteration moves a class by: counts [K], scatter [K] and deviations from the means [K, D], added up.
struct ClusterSums {
  int64_t components, dimension;
  Scratch<double> counts, scatter, deviations;

  ClusterSums(int64_t K, int64_t D) : components(K), dimension(D), counts(K), scatter(K), deviations(K * D) {}

  void clear() {
    fill<double>(counts, components, 0);
    fill<double>(scatter, components, 0);
    fill<double>(deviations, components * dimension, 0);
  }

  // The mean variance of the class's features.
  template <class T>
  double mean_variance(const T* means) const {
    double rows = 0, total = 0;
    for (int64_t k = 0; k < components; ++k) rows += counts[k], total += scatter[k];
    if (rows == 0) return 0;
    for (int64_t d = 0; d < dimension; ++d) {
      double center = 0;
      for (int64_t k = 0; k < components; ++k) {
        center += counts[k] * static_cast<double>(means[k * dimension + d]) + deviations[k * dimension + d];
      }
      center /= rows;
      for (int64_t k = 0; k < components; ++k) {
        const double away = static_cast<double>(means[k * dimension + d]) - center;
        total += away * (2 * deviations[k * dimension + d] + counts[k] * away);
      }
    }
    return total / (rows * static_cast<double>(dimension));
  }

  // Moves the means onto their rows; returns the square of how far.
  template <class T>
  double move(T* means) const {
    double shift = 0;
    for (int64_t k = 0; k < components; ++k) {
      if (counts[k] == 0) continue;
      const double inverse = 1 / counts[k];
      for (int64_t d = 0; d < dimension; ++d) {
        const T old = means[k * dimension + d];
        const T mean = static_cast<T>(static_cast<double>(old) + inverse * deviations[k * dimension + d]);
        const double step = static_cast<double>(mean) - static_cast<double>(old);
        shift += step * step;
        means[k * dimension + d] = mean;
      }
    }
    return shift;
  }
};

// Puts the first component without rows onto the row that is farthest from its own mean; returns the square of how far
// it moved. `component_of(position)` is the assignment.
template <class X, class T, class F>
double reseed_empty(const Features& x, const RowsByClass& groups, int64_t c, const double* counts, int64_t K, T* means,
                    const F& component_of) {
  int64_t empty = 0;
  while (empty < K && counts[empty] != 0) ++empty;
  if (empty == K || groups.end(c) - groups.begin(c) < 2) return 0;
  const int64_t D = x.dimension;
  double farthest = 0;
  const X* chosen = nullptr;
  for (int64_t i = groups.begin(c); i < groups.end(c); ++i) {
    const X* row = row_at<X>(x, groups, i);
    const double distance = squared_distance(row, means + component_of(i) * D, D);
    if (distance > farthest) farthest = distance, chosen = row;
  }
  double shift = 0;
  for (int64_t d = 0; d < D && chosen != nullptr; ++d) {
    const T value = widen(chosen[d]);
    const double step = static_cast<double>(value) - static_cast<double>(means[empty * D + d]);
    shift += step * step;
    means[empty * D + d] = value;
  }
  return shift;
}

// All iterations of one class, and the statistics about the means they end with.
template <class X, class T>
class ResidentClass {
 public:
  ResidentClass(const KMeans& p, const RowsByClass& groups)
      : p_(p),
        groups_(groups),
        K_(p.mixture.components),
        D_(p.x.dimension),
        sums_(K_, D_),
        partial_(K_ * D_),
        distance_(kBlockRows * smaller<int64_t>(K_, kBlockComponents)) {}

  void run(int64_t c, int32_t* component) {
    const int64_t begin = groups_.begin(c);
    T* means = static_cast<T*>(p_.means) + c * K_ * D_;
    double limit = 0, shift = 1;
    int64_t iteration = 0;
    bool rests = groups_.end(c) == begin;
    for (; iteration < p_.max_iter && !rests; ++iteration) {
      add_up(c, means, component, true, static_cast<T*>(nullptr));
      if (iteration == 0) limit = p_.tol * sums_.mean_variance<T>(means);
      shift = sums_.move(means);
      shift += reseed_empty<X, T>(p_.x, groups_, c, sums_.counts, K_, means,
                                  [&](int64_t position) { return component[position - begin]; });
      rests = !(shift > limit);
    }
    p_.iterations[c] = iteration;
    p_.converged[c] = rests;
    T* scatter = static_cast<T*>(p_.scatter) + c * K_ * (p_.per_dimension ? D_ : 1);
    add_up(c, means, component, false, p_.per_dimension ? scatter : nullptr);
    for (int64_t k = 0; k < K_; ++k) {
      static_cast<T*>(p_.counts)[c * K_ + k] = static_cast<T>(sums_.counts[k]);
      if (!p_.per_dimension) scatter[k] = static_cast<T>(sums_.scatter[k]);
    }
  }

 private:
  // One pass over the rows: counts and scatter, and either deviations or squares per dimension.
  void add_up(int64_t c, const T* means, int32_t* component, bool deviations, T* squares) {
    const Mixture mixture{1, K_, nullptr, means, nullptr, nullptr, false};
    sums_.clear();
    const int64_t begin = groups_.begin(c), end = groups_.end(c);
    for (int64_t part = begin; part < end; part += kPartialRows) {
      fill<T>(partial_, K_ * D_, 0);
      const int64_t part_end = smaller(part + kPartialRows, end);
      for (int64_t at = part; at < part_end; at += kStatisticsRows) {
        const RowPointers<X> rows(p_.x, groups_, at, smaller(at + kStatisticsRows, part_end));
        Nearest best;
        best_components<X, T>(rows, mixture, 0, 0, D_, nullptr, nullptr, distance_, &best);
        for (int64_t i = 0; i < rows.count; ++i) {
          const int64_t k = best.component[i];
          component[at - begin + i] = best.component[i];
          sums_.counts[k] += 1;
          sums_.scatter[k] += best.score[i];
        }
        if (!deviations && squares == nullptr) continue;
        for_each_component(rows, best.component, [&](int64_t k, const X* const* members, int64_t count) {
          accumulate_rows(members, count, means + k * D_, D_, deviations ? nullptr : partial_ + k * D_,
                          deviations ? partial_ + k * D_ : nullptr);
        });
      }
      for (int64_t i = 0; i < K_ * D_; ++i) sums_.deviations[i] += static_cast<double>(partial_[i]);
    }
    for (int64_t i = 0; i < K_ * D_ && squares != nullptr; ++i) squares[i] = static_cast<T>(sums_.deviations[i]);
  }

  const KMeans& p_;
  const RowsByClass& groups_;
  int64_t K_, D_;
  ClusterSums sums_;
  Scratch<T> partial_;
  Scratch<double> distance_;
};

template <class X>
void kmeans_of(const KMeans& p, ParallelFor parallel_for) {
  using T = typename ParameterOf<X>::Type;
  const int64_t N = p.x.rows, D = p.x.dimension, C = p.mixture.classes, K = p.mixture.components;
  T* means = static_cast<T*>(p.means);
  const T* start = static_cast<const T*>(p.mixture.means);
  for (int64_t i = 0; i < C * K * D; ++i) means[i] = start[i];
  const RowsByClass groups(p.mixture.labels, N, C);
  const int64_t rows_of_class = divide_up(larger<int64_t>(N, 1), C);
  if (C >= kManyClasses && rows_of_class * D * static_cast<int64_t>(sizeof(X)) <= kResidentBytes) {
    Scratch<int32_t> component(N);
    parallel(parallel_for, C, (p.max_iter + 1) * rows_of_class * (K + 1) * D, [&](int64_t first, int64_t last) {
      ResidentClass<X, T> cluster(p, groups);
      for (int64_t c = first; c < last; ++c) cluster.run(c, component + groups.begin(c));
    });
  } else {
    Mixture mixture = p.mixture;
    mixture.means = means;
    Scratch<T> sums(C * K * D), scatter(C * K);
    Scratch<int64_t> component(N);
    Scratch<double> limit(C);
    T* counts = static_cast<T*>(p.counts);
    for (int64_t c = 0; c < C; ++c) p.iterations[c] = 0, p.converged[c] = groups.begin(c) == groups.end(c);
    bool any = true;
    for (int64_t iteration = 0; iteration < p.max_iter && any; ++iteration) {
      statistics_forward_of<X>({p.x, mixture, false, counts, scatter, sums, component}, parallel_for);
      parallel(parallel_for, C, 8 * K * D, [&](int64_t first, int64_t last) {
        ClusterSums moved(K, D);
        for (int64_t c = first; c < last; ++c) {
          if (p.converged[c]) continue;
          T* of_class = means + c * K * D;
          for (int64_t k = 0; k < K; ++k) {
            const double rows = static_cast<double>(counts[c * K + k]);
            moved.counts[k] = rows;
            moved.scatter[k] = static_cast<double>(scatter[c * K + k]);
            for (int64_t d = 0; d < D; ++d) {
              moved.deviations[k * D + d] =
                  static_cast<double>(sums[(c * K + k) * D + d]) - rows * static_cast<double>(of_class[k * D + d]);
            }
          }
          if (iteration == 0) limit[c] = p.tol * moved.mean_variance<T>(of_class);
          double shift = moved.move(of_class);
          shift += reseed_empty<X, T>(p.x, groups, c, moved.counts, K, of_class,
                                      [&](int64_t position) { return component[groups.row(position)]; });
          p.iterations[c] = iteration + 1;
          p.converged[c] = !(shift > limit[c]);
        }
      });
      any = false;
      for (int64_t c = 0; c < C; ++c) any |= !p.converged[c];
    }
    statistics_forward_of<X>({p.x, mixture, p.per_dimension, p.counts, p.scatter, nullptr, component}, parallel_for);
  }
  if (groups.valid_rows() < N) {
    const T nan = static_cast<T>(__builtin_nan(""));
    fill(means, C * K * D, nan);
    fill(static_cast<T*>(p.counts), C * K, nan);
    fill(static_cast<T*>(p.scatter), p.per_dimension ? C * K * D : C * K, nan);
  }
}
