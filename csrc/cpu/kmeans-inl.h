// Lloyd's iterations of k-means. Each class iterates until its own means have converged.

// With many classes whose rows fit in a cache on average, one thread runs all iterations of a class and fetches its
// rows once. Otherwise all threads share the rows of a class or, with few dimensions, those of all classes.
constexpr int64_t kManyClasses = 8;
constexpr int64_t kResidentBytes = 4 << 20;

// Parts of a class that threads share: the more the longer the class is, in rows and in components, whose sums every
// part has for itself.
constexpr int64_t kFewestParts = 16, kMostParts = 64, kRowsOfPart = 1024, kRowsOfComponent = 32, kShortestPart = 256;

// Replaces a mean's entry; returns the square of how far it moved.
template <class T>
CEM_FAST_INLINE double set_mean(double value, T* mean) {
  const double old = static_cast<double>(*mean);
  *mean = static_cast<T>(value);
  const double step = static_cast<double>(*mean) - old;
  return step * step;
}

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

  // Moves the means onto their rows; squared_shift [K] is the square of how far each one went.
  template <class T>
  void move(T* means, double* squared_shift) const {
    for (int64_t k = 0; k < components; ++k) {
      squared_shift[k] = 0;
      if (counts[k] == 0) continue;
      const double inverse = 1 / counts[k];
      for (int64_t d = 0; d < dimension; ++d) {
        T* mean = means + k * dimension + d;
        squared_shift[k] += set_mean(static_cast<double>(*mean) + inverse * deviations[k * dimension + d], mean);
      }
    }
  }
};

CEM_FAST_INLINE double sum_of(const double* terms, int64_t n) {
  double total = 0;
  for (int64_t i = 0; i < n; ++i) total += terms[i];
  return total;
}

// Puts the first component without rows onto the row that is farthest from its own mean, and notes how far it went.
// `component_of(position)` is the assignment.
template <class X, class T, class F>
void reseed_empty(const Features& x, const RowsByClass& groups, int64_t c, const double* counts, int64_t K, T* means,
                  double* squared_shift, const F& component_of) {
  int64_t empty = 0;
  while (empty < K && counts[empty] != 0) ++empty;
  if (empty == K || groups.end(c) - groups.begin(c) < 2) return;
  const int64_t D = x.dimension;
  double farthest = 0;
  const X* chosen = nullptr;
  for (int64_t i = groups.begin(c); i < groups.end(c); ++i) {
    const X* row = row_at<X>(x, groups, i);
    const double distance = squared_distance(row, means + component_of(i) * D, D);
    if (distance > farthest) farthest = distance, chosen = row;
  }
  for (int64_t d = 0; d < D && chosen != nullptr; ++d) {
    squared_shift[empty] += set_mean(static_cast<double>(widen(chosen[d])), means + empty * D + d);
  }
}

// Upper bound of a row's distance to its own mean, and lower bound of its distance to any other mean.
struct DistanceBounds {
  double own;
  double others;
  double squared_own;  // as computed for the means at hand, or kUnknown
};
constexpr double kUnknown = -1;

// Rows [begin, end) of a class, and what is added up over them. Sums [K, width] of a component are zeroed when its
// first row comes, because most iterations move few rows.
struct PartOfClass {
  int64_t begin, end, width;
  double* counts;  // [K]
  double* left;    // largest distance to its mean of a row that has left, by component [K]
  double* totals;  // [K, width]
  double squared;  // distances to the means, added up
  bool* blank;     // [K], or null: totals hold numbers already

  double* total_of(int64_t k) const {
    double* total = totals + k * width;
    if (blank != nullptr && blank[k]) fill<double>(total, width, 0), blank[k] = false;
    return total;
  }
};

// All iterations of one class, and the statistics about the means they end with. Threads share the parts of the class,
// and sums of parts are added up in their order.
//
// A row is looked at again only where its bounds, widened by how far the means have gone, leave open which mean is the
// nearest (Hamerly, "Making k-means even faster", SDM 2010). Bounds allow for the rounding of computed distances, so
// that the assignment is that of a search.
template <class X, class T>
class BoundedClass {
 public:
  // For classes of up to `most_rows` rows; a null `parallel_for` leaves the class in one part.
  BoundedClass(const KMeans& p, const RowsByClass& groups, int64_t most_rows, ParallelFor parallel_for)
      : p_(p),
        groups_(groups),
        parallel_for_(parallel_for),
        K_(p.mixture.components),
        D_(p.x.dimension),
        counts_(K_),
        left_(K_),
        origin_(D_),
        totals_(K_ * D_),
        shift_(K_),
        gap_(K_),
        room_(K_, D_),
        slots_(parts_of(most_rows) == 1 ? 0 : parts_of(most_rows) * K_ * (D_ + 2)),
        squared_(parts_of(most_rows)),
        blank_(parts_of(most_rows) * K_) {}

  // `component` and `bounds` have room for the rows of the class.
  void run(int64_t c, int32_t* component, DistanceBounds* bounds) {
    begin_ = groups_.begin(c), rows_ = groups_.end(c) - begin_;
    means_ = static_cast<T*>(p_.means) + c * K_ * D_;
    component_ = component, bounds_ = bounds;
    search_all();
    const double limit = p_.tol * mean_variance();
    int64_t iteration = 0;
    bool rests = rows_ == 0;
    for (; iteration < p_.max_iter && !rests; ++iteration) {
      move();
      reseed_empty<X, T>(p_.x, groups_, c, counts_, K_, means_, shift_,
                         [&](int64_t position) { return component_[position - begin_]; });
      rests = !(sum_of(shift_, K_) > limit);
      const bool last = rests || iteration + 1 == p_.max_iter;
      if (last && lost_digits()) rests = settle(limit) && rests;
      search_where_open(last);
    }
    p_.iterations[c] = iteration;
    p_.converged[c] = rests;
    for (int64_t k = 0; k < K_; ++k) static_cast<T*>(p_.counts)[c * K_ + k] = static_cast<T>(counts_[k]);
    T* scatter = static_cast<T*>(p_.scatter) + c * K_ * (p_.per_dimension ? D_ : 1);
    p_.per_dimension ? squares(scatter) : squared_distances(scatter);
  }

 private:
  // Maximum error of a computed distance: relative, and absolute where squares underflow.
  static constexpr double kRounding = 128 * (sizeof(T) == 4 ? 0x1p-23 : 0x1p-52);
  static constexpr double kUnderflow = sizeof(T) == 4 ? 0x1p-68 : 0x1p-530;

  // What a distance is at most and at least, given its computed square.
  static double at_most(double squared) { return __builtin_sqrt(squared) * (1 + kRounding) + kUnderflow; }
  static double at_least(double squared) { return __builtin_sqrt(squared) * (1 - kRounding) - kUnderflow; }

  static constexpr int kDoubles = kLanes<T> / kLanes<double>;  // vectors of double that a vector widens to

  // What a thread needs for itself.
  struct Room {
    PackedComponents<T> unpacked;
    Scratch<double> distance;
    Scratch<T> partial;  // [D]

    Room(int64_t K, int64_t D)
        : unpacked(false, K, D), distance(kBlockRows * smaller<int64_t>(K, kBlockComponents)), partial(D) {}
  };

  // A function of the problem alone.
  int64_t parts_of(int64_t rows) const {
    if (parallel_for_ == nullptr) return 1;
    const int64_t parts = rows / larger(kRowsOfPart, kRowsOfComponent * K_);
    return larger<int64_t>(1, smaller(larger(kFewestParts, smaller(parts, kMostParts)), rows / kShortestPart));
  }

  const X* row(int64_t i) const { return row_at<X>(p_.x, groups_, begin_ + i); }

  // Calls f(part, room) for every part of the class, and adds up their sums, of `width` numbers a component.
  template <class F>
  void sweep(int64_t width, const F& f) {
    const int64_t parts = parts_of(rows_);
    if (parts == 1) {
      PartOfClass whole{0, rows_, width, counts_, left_, totals_, 0, nullptr};
      f(whole, room_);
      squared_[0] = whole.squared;
      return;
    }
    const int64_t size = divide_up(rows_, parts);
    parallel(parallel_for_, parts, size * (K_ + 1) * D_, [&](int64_t first, int64_t last) {
      Room room(K_, D_);
      for (int64_t i = first; i < last; ++i) {
        PartOfClass part = slot(i, width);
        part.begin = smaller(i * size, rows_), part.end = smaller(part.begin + size, rows_);
        fill<double>(part.counts, K_, 0);
        fill<double>(part.left, K_, 0);
        fill<bool>(part.blank, K_, true);
        f(part, room);
        squared_[i] = part.squared;
      }
    });
    for (int64_t i = 0; i < parts; ++i) {
      const PartOfClass part = slot(i, width);
      if (i > 0) squared_[0] += squared_[i];
      for (int64_t k = 0; k < K_; ++k) {
        counts_[k] += part.counts[k];
        left_[k] = larger(left_[k], part.left[k]);
        if (!part.blank[k]) add<double>(part.totals + k * width, width, totals_ + k * width);
      }
    }
  }

  PartOfClass slot(int64_t i, int64_t width) const {
    double* of_part = slots_ + i * K_ * (D_ + 2);
    return {0, 0, width, of_part, of_part + K_, of_part + 2 * K_, 0, blank_ + i * K_};
  }

  template <class F>
  void nearest(const RowPointers<X>& rows, Room& room, Nearest<true>* best, const F& found) {
    const Mixture mixture{1, K_, nullptr, means_, nullptr, nullptr, false};
    best_components<X, T>(rows, mixture, 0, 0, D_, nullptr, room.unpacked, room.distance, nullptr, best, found);
  }

  void bound(int64_t i, double squared_own, double squared_others) {
    bounds_[i] = {at_most(squared_own), at_least(squared_others), kUnknown};
  }

  // f(k, rows, count) for the rows of component k in every block of rows of a part.
  template <class F>
  void for_members(const PartOfClass& part, const F& f) {
    for (int64_t at = part.begin; at < part.end; at += kStatisticsRows) {
      const RowPointers<X> rows(p_.x, groups_, begin_ + at, begin_ + smaller(at + kStatisticsRows, part.end));
      for_each_component(rows, component_ + at, f);
    }
  }

  void clear() {
    fill<double>(counts_, K_, 0);
    fill<double>(totals_, K_ * D_, 0);
    fill<double>(left_, K_, 0);
  }

  // Assigns every row, and adds up counts and sums of the components.
  void search_all() {
    clear();
    // sums of single precision keep their digits in double as they are
    for (int64_t d = 0; d < D_; ++d) origin_[d] = sizeof(T) < sizeof(double) ? T(0) : means_[d];
    sweep(D_, [&](PartOfClass& part, Room& room) {
      for (int64_t at = part.begin; at < part.end; at += kStatisticsRows) {
        const RowPointers<X> rows(p_.x, groups_, begin_ + at, begin_ + smaller(at + kStatisticsRows, part.end));
        Nearest<true> best;
        nearest(rows, room, &best, [&](int64_t i) {
          component_[at + i] = best.component[i];
          bound(at + i, best.score[i], best.second[i]);
          part.squared += best.score[i];
        });
        for_each_component(rows, best.component,
                           [&](int64_t k, const X* const* members, int64_t n) { join(part, members, n, k); });
      }
    });
  }

  // Adds rows to the sums of component k, in double precision.
  void join(const PartOfClass& part, const X* const* rows, int64_t count, int64_t k) const {
    part.counts[k] += static_cast<double>(count);
    double* total = part.total_of(k);
    int64_t d = 0;
    for (; d + kLanes<T> <= D_; d += kLanes<T>) {
      Vector<double> sum[kDoubles]{};
      for (int64_t r = 0; r < count; ++r) {
        const Vector<T> x = load(rows[r] + d) - load(origin_ + d);
        for (int half = 0; half < kDoubles; ++half) sum[half] += doubles_of(x, half);
      }
      for (int half = 0; half < kDoubles; ++half) {
        double* to = total + d + half * kLanes<double>;
        store(to, load(to) + sum[half]);
      }
    }
    for (; d < D_; ++d) {
      for (int64_t r = 0; r < count; ++r) total[d] += static_cast<double>(widen(rows[r][d]) - origin_[d]);
    }
  }

  // Moves a row from the sums of one component to those of another.
  void change(const PartOfClass& part, const X* row, int64_t from, int64_t to) const {
    part.counts[from] -= 1, part.counts[to] += 1;
    double* less = part.total_of(from);
    double* more = part.total_of(to);
    int64_t d = 0;
    for (; d + kLanes<T> <= D_; d += kLanes<T>) {
      const Vector<T> x = load(row + d) - load(origin_ + d);
      for (int half = 0; half < kDoubles; ++half) {
        const Vector<double> wide = doubles_of(x, half);
        const int64_t at = d + half * kLanes<double>;
        store(less + at, load(less + at) - wide);
        store(more + at, load(more + at) + wide);
      }
    }
    for (; d < D_; ++d) {
      const double wide = static_cast<double>(widen(row[d]) - origin_[d]);
      less[d] -= wide, more[d] += wide;
    }
  }

  // Whether a row has left a component that is so much larger than the rest that it took digits of theirs with it.
  bool lost_digits() const {
    constexpr double kHarmless = sizeof(T) < sizeof(double) ? 0x1p20 : 0;
    for (int64_t k = 0; k < K_; ++k) {
      double largest = 0;
      for (int64_t d = 0; d < D_; ++d) largest = larger(largest, __builtin_fabs(totals_[k * D_ + d]));
      if (counts_[k] > 0 && left_[k] * counts_[k] > kHarmless * largest) return true;
    }
    return false;
  }

  // After a move, adds the rows up afresh and puts the means onto them. Returns whether the means stay where they are.
  bool settle(double limit) {
    clear();
    sweep(D_, [&](PartOfClass& part, Room&) {
      for_members(part, [&](int64_t k, const X* const* members, int64_t n) { join(part, members, n, k); });
    });
    Scratch<double> before(K_);
    for (int64_t k = 0; k < K_; ++k) before[k] = __builtin_sqrt(shift_[k]);
    move();
    const bool stays = !(sum_of(shift_, K_) > limit);
    for (int64_t k = 0; k < K_; ++k) {
      const double both = before[k] + __builtin_sqrt(shift_[k]);
      shift_[k] = both * both;
    }
    return stays;
  }

  // Puts the means onto their rows: a function of the assignment alone, so that they rest when it does.
  void move() {
    for (int64_t k = 0; k < K_; ++k) {
      shift_[k] = 0;
      if (counts_[k] == 0) continue;
      const double inverse = 1 / counts_[k];
      for (int64_t d = 0; d < D_; ++d) {
        shift_[k] += set_mean(static_cast<double>(origin_[d]) + inverse * totals_[k * D_ + d], means_ + k * D_ + d);
      }
    }
  }

  // Of the class's features, from the sums about the first means.
  double mean_variance() {
    ClusterSums about(K_, D_);
    about.clear();
    about.scatter[0] = squared_[0];
    for (int64_t k = 0; k < K_; ++k) {
      about.counts[k] = counts_[k];
      for (int64_t d = 0; d < D_; ++d) {
        const double away = static_cast<double>(origin_[d]) - static_cast<double>(means_[k * D_ + d]);
        about.deviations[k * D_ + d] = totals_[k * D_ + d] + counts_[k] * away;
      }
    }
    return about.mean_variance<T>(means_);
  }

  // After the means have moved by shift_: assigns the rows whose bounds leave it open, and moves them between the sums.
  // The last time, rows that are read anyway are measured for the scatter.
  void search_where_open(bool last) {
    double most = 0, next = 0;  // the largest shift, and the largest of the others
    int64_t fastest = 0;
    for (int64_t k = 0; k < K_; ++k) {
      shift_[k] = __builtin_sqrt(shift_[k]);
      if (shift_[k] > most) {
        next = most, most = shift_[k], fastest = k;
      } else if (shift_[k] > next) {
        next = shift_[k];
      }
    }
    measure_gaps();
    sweep(D_, [&](PartOfClass& part, Room& room) {
      // the distance to a row's own mean alone is worth its while where it often closes the question
      constexpr int64_t kTries = 16, kWorthwhile = 4;
      int64_t open[kStatisticsRows], count = 0, tried = 0, closed = 0;
      for (int64_t i = part.begin; i < part.end; ++i) {
        const int64_t k = component_[i];
        bounds_[i].own += shift_[k];
        bounds_[i].others -= k == fastest ? next : most;
        bounds_[i].squared_own = kUnknown;
        const double others = larger(bounds_[i].others, gap_[k]);
        if (bounds_[i].own < others) continue;
        if (tried < kTries || kWorthwhile * closed >= tried) {
          ++tried;
          bounds_[i].squared_own = squared_distance(row(i), means_ + k * D_, D_);
          bounds_[i].own = at_most(bounds_[i].squared_own);
          if (bounds_[i].own < others) {
            ++closed;
            continue;
          }
        }
        open[count++] = i;
        if (count == kStatisticsRows) search(part, room, open, count, last), count = 0;
      }
      if (count > 0) search(part, room, open, count, last);
    });
  }

  void search(const PartOfClass& part, Room& room, const int64_t* which, int64_t count, bool last) {
    int64_t positions[kStatisticsRows];
    for (int64_t i = 0; i < count; ++i) positions[i] = begin_ + which[i];
    const RowPointers<X> rows(p_.x, groups_, positions, count);
    Nearest<true> best;
    nearest(rows, room, &best, [&](int64_t i) {
      const int64_t from = component_[which[i]], to = best.component[i];
      const double went = bounds_[which[i]].own;
      bound(which[i], best.score[i], best.second[i]);
      if (last) bounds_[which[i]].squared_own = squared_distance(rows.row[i], means_ + to * D_, D_);
      if (from == to) return;
      component_[which[i]] = best.component[i];
      part.left[from] = larger(part.left[from], went);
      change(part, rows.row[i], from, to);
    });
  }

  // Half the distance from every mean to the nearest other one: a row within it needs no other bound. Not
  // worth its K^2 distances where there are few rows.
  void measure_gaps() {
    for (int64_t k = 0; k < K_; ++k) gap_[k] = K_ * K_ <= rows_ ? __builtin_inf() : 0;
    for (int64_t k = 0; k < K_ && K_ * K_ <= rows_; ++k) {
      for (int64_t j = 0; j < k; ++j) {
        const double half = 0.5 * at_least(squared_distance(means_ + j * D_, means_ + k * D_, D_));
        gap_[j] = smaller(gap_[j], half);
        gap_[k] = smaller(gap_[k], half);
      }
    }
  }

  void squares(T* out) {
    fill<double>(totals_, K_ * D_, 0);
    sweep(D_, [&](PartOfClass& part, Room& room) {
      for_members(part, [&](int64_t k, const X* const* members, int64_t count) {
        fill<T>(room.partial, D_, 0);
        accumulate_rows<X, T>(members, count, means_ + k * D_, D_, room.partial, nullptr);
        double* total = part.total_of(k);
        for (int64_t d = 0; d < D_; ++d) total[d] += static_cast<double>(room.partial[d]);
      });
    });
    for (int64_t i = 0; i < K_ * D_; ++i) out[i] = static_cast<T>(totals_[i]);
  }

  void squared_distances(T* out) {
    fill<double>(totals_, K_, 0);
    sweep(1, [&](PartOfClass& part, Room&) {
      for (int64_t i = part.begin; i < part.end; ++i) {
        const int64_t k = component_[i];
        const double known = bounds_[i].squared_own;
        *part.total_of(k) += known >= 0 ? known : squared_distance(row(i), means_ + k * D_, D_);
      }
    });
    for (int64_t k = 0; k < K_; ++k) out[k] = static_cast<T>(totals_[k]);
  }

  const KMeans& p_;
  const RowsByClass& groups_;
  ParallelFor parallel_for_;
  int64_t K_, D_;
  // of the class
  Scratch<double> counts_;  // [K]
  Scratch<double> left_;    // [K]
  Scratch<T> origin_;       // [D]
  Scratch<double> totals_;  // sums over the rows of each component, from the origin [K, D]
  Scratch<double> shift_, gap_;
  Room room_;
  // of its parts
  Scratch<double> slots_;    // counts, left and totals [parts, K + K + K * D]
  Scratch<double> squared_;  // [parts]; after a sweep, the first is their sum
  Scratch<bool> blank_;      // [parts, K]
  // the class at hand
  int64_t begin_ = 0, rows_ = 0;
  T* means_ = nullptr;
  int32_t* component_ = nullptr;
  DistanceBounds* bounds_ = nullptr;
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
  const bool resident = C >= kManyClasses && rows_of_class * D * static_cast<int64_t>(sizeof(X)) <= kResidentBytes;
  if (resident || (D > kNarrow && p.max_iter > 0)) {
    Scratch<int32_t> component(N);
    Scratch<DistanceBounds> bounds(N);
    const auto run = [&](int64_t first, int64_t last, int64_t most_rows, ParallelFor within) {
      BoundedClass<X, T> cluster(p, groups, most_rows, within);
      for (int64_t c = first; c < last; ++c) cluster.run(c, component + groups.begin(c), bounds + groups.begin(c));
    };
    if (resident) {
      parallel(parallel_for, C, (p.max_iter + 1) * rows_of_class * (K + 1) * D,
               [&](int64_t first, int64_t last) { run(first, last, 0, nullptr); });
    } else {
      int64_t most_rows = 0;
      for (int64_t c = 0; c < C; ++c) most_rows = larger(most_rows, groups.end(c) - groups.begin(c));
      run(0, C, most_rows, parallel_for);
    }
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
        Scratch<double> shift(K);
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
          moved.move(of_class, shift);
          reseed_empty<X, T>(p.x, groups, c, moved.counts, K, of_class, shift,
                             [&](int64_t position) { return component[groups.row(position)]; });
          p.iterations[c] = iteration + 1;
          p.converged[c] = !(sum_of(shift, K) > limit[c]);
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
