// The CEM loss of a batch's statistics and its derivative to the scatter: Eq. 5-7 of the paper, or the released code's
// hinge.

// Sum of log(1 + u). The products 1 + q = prod (1 + u) are kept as q, so that small u lose nothing, and one logarithm
// serves eight of them.
class SumOfLog1p {
 public:
  CEM_FAST_INLINE void add(Vector<double> u) {
    constexpr double kLargest = 1e37;  // eight such factors do not overflow
    if (__builtin_expect(!all_lanes((u > -0.5) & (u < kLargest)), 0)) {
      total_ += log1p_vector(u);
      return;
    }
    product_ = product_ * u + (product_ + u);
    if (++factors_ == 8) flush();
  }

  CEM_FAST_INLINE double sum() {
    flush();
    return sum_lanes<double>(total_);
  }

 private:
  CEM_FAST_INLINE void flush() {
    total_ += log1p_vector(product_);
    product_ = Vector<double>{};
    factors_ = 0;
  }

  Vector<double> total_{};
  Vector<double> product_{};
  int factors_ = 0;
};

// Calls f(d, n, s2) for every vector of dimensions: n lanes of it count, the others of s2 repeat the last.
template <class F>
CEM_FAST_INLINE void for_each_noise(const EntropyBound& p, const F& f) {
  constexpr int lanes = kLanes<double>;
  const Vector<double> uniform = broadcast(p.noise_variance[0]);
  const bool one = p.noise_size == 1;
  int64_t d = 0;
  for (; d + lanes <= p.dimension; d += lanes) f(d, lanes, one ? uniform : load(p.noise_variance + d));
  if (d < p.dimension) {
    const int rest = static_cast<int>(p.dimension - d);
    Vector<double> s2 = uniform;
    for (int i = 0; i < lanes && !one; ++i) s2[i] = p.noise_variance[d + smaller(i, rest - 1)];
    f(d, rest, s2);
  }
}

template <class T>
CEM_FAST_INLINE Vector<double> load_some(const T* p, int n) {
  if (n == kLanes<double>) return load_double(p);
  Vector<double> value{};
  for (int i = 0; i < n; ++i) value[i] = static_cast<double>(p[i]);
  return value;
}

// sum_d log(1 + v / s2) of one component with v = v + blend (scatter / n - v), and slope = scale / (v + s2).
template <class T>
double entropy_of_diagonal(const EntropyBound& p, const T* variances, const T* scatter, double n, double blend,
                           double scale, T* slope) {
  SumOfLog1p logs;
  for_each_noise(p, [&](int64_t d, int lanes, Vector<double> s2) {
    const Vector<double> fitted = load_some(variances + d, lanes);
    const Vector<double> v = fitted + blend * (load_some(scatter + d, lanes) / n - fitted);
    logs.add(v / s2);
    const Vector<double> derivative = scale / (v + s2);
    if (lanes == kLanes<double>) {
      store_double(slope + d, derivative);
    } else {
      for (int i = 0; i < lanes; ++i) slope[d + i] = static_cast<T>(derivative[i]);
    }
  });
  return logs.sum();
}

// The same of a spherical component where the noise differs by dimension; slope takes the mean over the dimensions.
template <class T>
double entropy_of_spherical(const EntropyBound& p, double v, double scale, T* slope) {
  SumOfLog1p logs;
  double precision = 0;
  for_each_noise(p, [&](int64_t, int lanes, Vector<double> s2) {
    Vector<double> u = v / s2;
    for (int i = 0; i < lanes; ++i) precision += 1 / (v + s2[i]);
    for (int i = lanes; i < kLanes<double>; ++i) u[i] = 0;
    logs.add(u);
  });
  *slope = static_cast<T>(scale * (precision / static_cast<double>(p.dimension)));
  return logs.sum();
}

template <class T>
void bound_of_paper(const EntropyBound& p, ParallelFor parallel_for) {
  const int64_t CK = p.classes * p.components, D = p.dimension;
  const T* counts = static_cast<const T*>(p.counts);
  const T* scatter = static_cast<const T*>(p.scatter);
  const T* variances = static_cast<const T*>(p.variances);
  const T* weights = static_cast<const T*>(p.weights);
  const T* class_prior = static_cast<const T*>(p.class_prior);
  T* slope = static_cast<T*>(p.slope);

  // The weights of the blend are rounded as the parameters are, so that every backend takes the same side of a
  // comparison.
  double rows = 0;
  for (int64_t i = 0; i < CK; ++i) rows += static_cast<double>(counts[i]);
  const double at_least_one = rows < 1 ? 1 : rows, share = p.num_samples / at_least_one;
  const double b = share > p.boost ? p.boost : share;  // NaN counts must stay NaN
  const double left = p.num_samples - b * rows;
  const T remainder = static_cast<T>(left < 0 ? 0 : left);  // rounding must not make a mass negative
  const double scale = p.mean ? 1 / static_cast<double>(D) : 1;
  const double gradient = 0.5 * scale * (p.unbiased ? 1 / at_least_one : b / p.num_samples);

  Scratch<double> pi(CK), blend(CK), entropy(CK), log_pi(CK);
  for (int64_t i = 0; i < CK; ++i) {
    const T mass = class_prior[i / p.components] * weights[i] * remainder + static_cast<T>(b) * counts[i];
    pi[i] = static_cast<double>(mass / static_cast<T>(p.num_samples));
    blend[i] = counts[i] > 0 ? static_cast<double>(static_cast<T>(b) * counts[i] / mass) : 0;
    log_pi[i] = pi[i] == 0 ? 1 : pi[i];
  }
  map_doubles(log_pi, CK, Log{});

  const auto rows_of = [&](int64_t i) {
    const double n = static_cast<double>(counts[i]);
    return n < 1 ? 1 : n;
  };
  if (p.diagonal) {
    parallel(parallel_for, CK, 8 * D, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        entropy[i] = 0.5 * entropy_of_diagonal(p, variances + i * D, scatter + i * D, rows_of(i), blend[i], gradient,
                                               slope + i * D);
      }
    });
  } else {
    for (int64_t i = 0; i < CK; ++i) {
      const double fitted = static_cast<double>(variances[i]);
      const double observed = static_cast<double>(scatter[i]) / (rows_of(i) * static_cast<double>(D));
      const double v = fitted + blend[i] * (observed - fitted);
      entropy[i] = p.noise_size == 1 ? v / p.noise_variance[0] : v;
      if (p.noise_size == 1) slope[i] = static_cast<T>(gradient / (v + p.noise_variance[0]));
    }
    if (p.noise_size == 1) {
      map_doubles(entropy, CK, Log1p{});
      for (int64_t i = 0; i < CK; ++i) entropy[i] *= 0.5 * static_cast<double>(D);
    } else {
      parallel(parallel_for, CK, 8 * D, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) {
          entropy[i] = 0.5 * entropy_of_spherical(p, entropy[i], gradient, slope + i);
        }
      });
    }
  }
  double value = 0;
  for (int64_t i = 0; i < CK; ++i) value += pi[i] * (entropy[i] - log_pi[i]);
  *static_cast<T*>(p.value) = static_cast<T>(scale * value);
}

template <class T>
void hinge_of_released_code(const EntropyBound& p) {
  const int64_t CK = p.classes * p.components;
  const T* counts = static_cast<const T*>(p.counts);
  const T* scatter = static_cast<const T*>(p.scatter);
  const T* variances = static_cast<const T*>(p.variances);
  const T* weights = static_cast<const T*>(p.weights);
  T* slope = static_cast<T*>(p.slope);

  int64_t present = 0;
  for (int64_t c = 0; c < p.classes; ++c) {
    T rows = 0;
    for (int64_t k = 0; k < p.components; ++k) rows += counts[c * p.components + k];
    present += rows > 0;
  }
  const T classes_present = static_cast<T>(larger<int64_t>(present, 1));
  const T class_rows = static_cast<T>(p.num_samples) / static_cast<T>(p.classes);
  const double level = __builtin_log(p.threshold * p.noise_variance[0] + p.gamma);

  Scratch<double> blend(CK), padded(CK), hinge(CK);
  for (int64_t i = 0; i < CK; ++i) {
    const T share = counts[i] > 0 ? static_cast<T>(p.boost) * counts[i] / (weights[i] * class_rows) : T(0);
    blend[i] = static_cast<double>(share < 1 ? share : T(0.99));
    const double n = static_cast<double>(counts[i]), fitted = static_cast<double>(variances[i]);
    const double observed = static_cast<double>(scatter[i]) / ((n < 1 ? 1 : n) * static_cast<double>(p.dimension));
    padded[i] = hinge[i] = fitted + blend[i] * (observed - fitted) + p.gamma;
  }
  map_doubles(hinge, CK, Log{});
  double value = 0;
  for (int64_t i = 0; i < CK; ++i) {
    const double n = static_cast<double>(counts[i]);
    const double share = counts[i] > 0 ? static_cast<double>(weights[i] / classes_present) : 0;
    const double excess = hinge[i] - level;
    value += share * (excess <= 0 ? 0 : excess);  // NaN stays NaN
    const double rows = (n < 1 ? 1 : n) * static_cast<double>(p.dimension);
    slope[i] = static_cast<T>((excess > 0 ? share : 0) * blend[i] / (padded[i] * rows));
  }
  *static_cast<T*>(p.value) = static_cast<T>(value);
}

void entropy_bound(const EntropyBound& p, ParallelFor parallel_for) {
  if (p.official) {
    p.is_double ? hinge_of_released_code<double>(p) : hinge_of_released_code<float>(p);
  } else {
    p.is_double ? bound_of_paper<double>(p, parallel_for) : bound_of_paper<float>(p, parallel_for);
  }
}
