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

template <class T>
CEM_FAST_INLINE void store_some(T* p, int n, Vector<double> value) {
  if (n == kLanes<double>) return store_double(p, value);
  for (int i = 0; i < n; ++i) p[i] = static_cast<T>(value[i]);
}

// A number as T holds it. What decides a comparison is rounded as the parameters are, so that every backend takes the
// same side; sums, products and quotients of floats that are taken in double and rounded are those taken in float.
CEM_FAST_INLINE Vector<double> as(float, Vector<double> value) {
  typedef float Narrow __attribute__((vector_size(CEM_FAST_WIDTH / 2)));
  return __builtin_convertvector(__builtin_convertvector(value, Narrow), Vector<double>);
}

CEM_FAST_INLINE Vector<double> as(double, Vector<double> value) { return value; }

// Calls f(i, n) for every vector of components: n lanes of it count. load_some fills the others with zeros: components
// without rows and without weight, which add nothing.
template <class F>
CEM_FAST_INLINE void for_each_components(int64_t size, const F& f) {
  int64_t i = 0;
  for (; i + kLanes<double> <= size; i += kLanes<double>) f(i, kLanes<double>);
  if (i < size) f(i, static_cast<int>(size - i));
}

CEM_FAST_INLINE Vector<double> at_least_a_row(Vector<double> n) { return n < 1.0 ? broadcast(1.0) : n; }

// sum_d log(1 + v / s2) of one component with v = v + blend (scatter / n - v), and slope = scale / (v + s2).
template <class T>
double entropy_of_diagonal(const EntropyBound& p, const T* variances, const T* scatter, double n, double blend,
                           double scale, T* slope) {
  SumOfLog1p logs;
  for_each_noise(p, [&](int64_t d, int lanes, Vector<double> s2) {
    const Vector<double> fitted = load_some(variances + d, lanes);
    const Vector<double> v = fitted + blend * (load_some(scatter + d, lanes) / n - fitted);
    logs.add(v / s2);
    store_some(slope + d, lanes, scale / (v + s2));
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

  Vector<double> row_sums{};
  for_each_components(CK, [&](int64_t i, int lanes) { row_sums += load_some(counts + i, lanes); });
  const double rows = sum_lanes<double>(row_sums);
  const double at_least_one = rows < 1 ? 1 : rows, share = p.num_samples / at_least_one;
  const double b = share > p.boost ? p.boost : share;  // NaN counts must stay NaN
  const double left = p.num_samples - b * rows;
  // of T, like the products below; rounding must not make a mass negative
  const double remainder = static_cast<double>(static_cast<T>(left < 0 ? 0 : left));
  const double boost = static_cast<double>(static_cast<T>(b));
  const double num_samples = static_cast<double>(static_cast<T>(p.num_samples));
  const double scale = p.mean ? 1 / static_cast<double>(D) : 1;
  const double gradient = 0.5 * scale * (p.unbiased ? 1 / at_least_one : b / p.num_samples);
  // where all dimensions of a component are alike, one logarithm is its entropy
  const bool uniform = !p.diagonal && p.noise_size == 1;
  const double s2 = p.noise_variance[0], half_dimension = 0.5 * static_cast<double>(D);

  Scratch<double> pi(uniform ? 0 : CK), entropy(uniform ? 0 : CK), blend(p.diagonal ? CK : 0);
  Vector<double> sum{};
  int64_t c = 0, k = 0;
  for_each_components(CK, [&](int64_t i, int lanes) {
    T prior_of_lane[kLanes<double>]{};
    for (int j = 0; j < lanes; ++j) {
      prior_of_lane[j] = class_prior[c];
      if (++k == p.components) k = 0, ++c;
    }
    const Vector<double> prior = as(T{}, load_double(prior_of_lane) * load_some(weights + i, lanes));
    const Vector<double> n = load_some(counts + i, lanes), seen = as(T{}, boost * n);
    const Vector<double> mass = as(T{}, as(T{}, prior * remainder) + seen);
    const Vector<double> share_of_mixture = as(T{}, mass / num_samples);
    const Vector<double> share_of_batch = n > 0.0 ? as(T{}, seen / mass) : Vector<double>{};
    sum -= share_of_mixture * log_vector(share_of_mixture == 0.0 ? broadcast(1.0) : share_of_mixture);
    if (!uniform) store_some<double>(pi + i, lanes, share_of_mixture);
    if (p.diagonal) return store_some<double>(blend + i, lanes, share_of_batch);
    const Vector<double> fitted = load_some(variances + i, lanes);
    const Vector<double> observed = load_some(scatter + i, lanes) / (at_least_a_row(n) * static_cast<double>(D));
    const Vector<double> v = fitted + share_of_batch * (observed - fitted);
    if (uniform) {
      sum += share_of_mixture * (half_dimension * log1p_vector(v / s2));
      store_some(slope + i, lanes, gradient / (v + s2));
    } else {
      store_some<double>(entropy + i, lanes, v);
    }
  });
  double value = sum_lanes<double>(sum);
  if (!uniform) {
    parallel(parallel_for, CK, 8 * D, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const double n = static_cast<double>(counts[i]);
        entropy[i] = 0.5 * (p.diagonal ? entropy_of_diagonal(p, variances + i * D, scatter + i * D, n < 1 ? 1 : n,
                                                             blend[i], gradient, slope + i * D)
                                       : entropy_of_spherical(p, entropy[i], gradient, slope + i));
      }
    });
    for (int64_t i = 0; i < CK; ++i) value += pi[i] * entropy[i];
  }
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
  const double classes_present = static_cast<double>(larger<int64_t>(present, 1));
  const double class_rows = static_cast<double>(static_cast<T>(p.num_samples) / static_cast<T>(p.classes));
  const double boost = static_cast<double>(static_cast<T>(p.boost)), most = static_cast<double>(T(0.99));
  const double level = __builtin_log(p.threshold * p.noise_variance[0] + p.gamma);
  const double dimension = static_cast<double>(p.dimension);

  Vector<double> sum{};
  for_each_components(CK, [&](int64_t i, int lanes) {
    const Vector<double> n = load_some(counts + i, lanes), weight = load_some(weights + i, lanes);
    const Vector<double> of_batch =
        n > 0.0 ? as(T{}, as(T{}, boost * n) / as(T{}, weight * class_rows)) : Vector<double>{};
    const Vector<double> blend = of_batch < 1.0 ? of_batch : broadcast(most);
    const Vector<double> fitted = load_some(variances + i, lanes), rows = at_least_a_row(n) * dimension;
    const Vector<double> observed = load_some(scatter + i, lanes) / rows;
    const Vector<double> padded = fitted + blend * (observed - fitted) + p.gamma;
    const Vector<double> share = n > 0.0 ? as(T{}, weight / classes_present) : Vector<double>{};
    const Vector<double> excess = log_vector(padded) - level;
    sum += share * (excess <= 0.0 ? Vector<double>{} : excess);  // NaN stays NaN
    store_some(slope + i, lanes, (excess > 0.0 ? share : Vector<double>{}) * blend / (padded * rows));
  });
  *static_cast<T*>(p.value) = static_cast<T>(sum_lanes<double>(sum));
}

void entropy_bound(const EntropyBound& p, ParallelFor parallel_for) {
  if (p.official) {
    p.is_double ? hinge_of_released_code<double>(p) : hinge_of_released_code<float>(p);
  } else {
    p.is_double ? bound_of_paper<double>(p, parallel_for) : bound_of_paper<float>(p, parallel_for);
  }
}
