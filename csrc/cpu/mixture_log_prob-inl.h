// log p(x | class) of a mixture of Gaussians, its posterior, and the gradients to x and (as moments) to the parameters.

// Up to this many components a row's posterior is finished at once.
constexpr int64_t kFewComponents = 64;

// Components of a block where there are more: a multiple of the tile.
constexpr int64_t kManyComponents = 60;

constexpr double kLog2Pi = 1.8378770664093454836;

// sum_d log v_d; one logarithm for the product of eight.
template <class T>
double sum_of_logs(const T* v, int64_t n) {
  constexpr int U = 4, L = kLanes<double>;  // products side by side: one alone would wait for its last factor
  Vector<double> total{};
  int64_t i = 0;
  while (n - i >= U * L) {
    const int64_t begin = i, end = i + smaller<int64_t>(8, (n - i) / (U * L)) * U * L;
    Vector<double> product[U], low = load_double(v + i), high = low;
    for (int u = 0; u < U; ++u) product[u] = broadcast(1.0);
    for (; i < end; i += U * L) {
#pragma GCC unroll 4
      for (int u = 0; u < U; ++u) {
        const Vector<double> x = load_double(v + i + u * L);
        product[u] *= x;
        low = x < low ? x : low;
        high = x > high ? x : high;
      }
    }
    if (__builtin_expect(all_lanes((low > 1e-37) & (high < 1e37)), 1)) {
      for (int u = 0; u < U; ++u) total += log_vector(product[u]);
    } else {
      for (i = begin; i < end; i += L) total += log_vector(load_double(v + i));
    }
  }
  for (; i + L <= n; i += L) total += log_vector(load_double(v + i));
  double sum = sum_lanes<double>(total);
  for (; i < n; ++i) sum += __builtin_log(static_cast<double>(v[i]));
  return sum;
}

// log w - 1/2 sum_d log(2 pi v) of the classes that have rows: [classes, components].
template <class T>
void log_normalizers(const Mixture& mixture, int64_t dimension, const RowsByClass& groups, ParallelFor parallel_for,
                     double* out) {
  const T* variances = static_cast<const T*>(mixture.variances);
  const T* weights = static_cast<const T*>(mixture.weights);
  const int64_t K = mixture.components, D = dimension;
  parallel(parallel_for, mixture.classes * K, mixture.diagonal ? 2 * D : 20, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t c = i / K;
      if (groups.begin(c) == groups.end(c)) continue;
      const double logs = mixture.diagonal ? sum_of_logs(variances + i * D, D)
                                           : static_cast<double>(D) * __builtin_log(static_cast<double>(variances[i]));
      out[i] = __builtin_log(static_cast<double>(weights[i])) - 0.5 * (static_cast<double>(D) * kLog2Pi + logs);
    }
  });
}

// log(w_k N(x; mu_k, v_k)) of blocks of rows and components.
template <class X, class T>
class LogJoint {
 public:
  LogJoint(const Features& x, const Mixture& mixture, const double* normalizers)
      : dimension_(x.dimension),
        mixture_(mixture),
        normalizers_(normalizers),
        packed_(mixture.diagonal, smaller<int64_t>(mixture.components, kBlockComponents), x.dimension) {}

  // out [rows, size] for components k, k + 1, ... of class c; those of `next_class` will be wanted next.
  void operator()(const RowPointers<X>& rows, int64_t c, int64_t k, int64_t size, int64_t next_class, double* out) {
    const int64_t at = c * mixture_.components + k;
    const int64_t next = k + size < mixture_.components ? at + size : next_class * mixture_.components;
    const T* means = static_cast<const T*>(mixture_.means);
    const T* variances = static_cast<const T*>(mixture_.variances);
    Components<T> components{means + at * dimension_, nullptr, means + next * dimension_, nullptr};
    if (mixture_.diagonal) {
      components.variances = variances + at * dimension_;
      components.next_variances = variances + next * dimension_;
    }
    distances<X, T>(rows, dimension_, components, size, packed_, out);
    if (!mixture_.diagonal) widen_distances(rows, dimension_, components.means, variances + at, size, out);
    double factor[kBlockComponents];
    for (int64_t q = 0; q < size; ++q) {
      factor[q] = mixture_.diagonal ? -0.5 : -0.5 / static_cast<double>(variances[at + q]);
    }
    for (int64_t i = 0; i < rows.count; ++i) {
      for (int64_t q = 0; q < size; ++q) out[i * size + q] = normalizers_[at + q] + factor[q] * out[i * size + q];
    }
  }

 private:
  int64_t dimension_;
  const Mixture& mixture_;
  const double* normalizers_;
  PackedComponents<T> packed_;
};

// NaN if there is one.
CEM_FAST_INLINE double largest(const double* values, int64_t n) {
  double m = values[0];
  for (int64_t i = 1; i < n; ++i) m = values[i] > m || values[i] != values[i] ? values[i] : m;
  return m;
}

// The logarithm of a sum of exponentials that grows block by block.
struct LogSum {
  double maximum = -__builtin_inf();
  double sum = 0;

  // Replaces n values by exp(value - maximum) and adds them.
  CEM_FAST_INLINE void add(double* values, int64_t n) {
    const double block = largest(values, n), m = block > maximum || block != block ? block : maximum;
    if (m == -__builtin_inf()) return;
    for (int64_t i = 0; i < n; ++i) values[i] -= m;
    map_doubles(values, n, Exp{});
    double added = 0;
    for (int64_t i = 0; i < n; ++i) added += values[i];
    if (sum != 0) sum *= __builtin_exp(maximum - m);
    maximum = m;
    sum += added;
  }

  CEM_FAST_INLINE void add(const LogSum& other) {
    const double m = larger(maximum, other.maximum);
    if (m == -__builtin_inf() && sum == 0 && other.sum == 0) return;
    sum = sum * __builtin_exp(maximum - m) + other.sum * __builtin_exp(other.maximum - m);
    maximum = m;
  }

  CEM_FAST_INLINE double value() const { return __builtin_isinf(maximum) ? maximum : maximum + __builtin_log(sum); }
};

// exp(joint - log_prob) in place.
CEM_FAST_INLINE void posterior(double* joint, int64_t rows, int64_t components, const double* log_prob) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t q = 0; q < components; ++q) joint[i * components + q] -= log_prob[i];
  }
  map_doubles(joint, rows * components, Exp{});
}

// log p and the posterior of a block's rows, all components at once.
void finish_rows(double* joint, int64_t rows, int64_t K, double* log_prob) {
  double sum[kBlockRows];
  for (int64_t i = 0; i < rows; ++i) {
    const double m = largest(joint + i * K, K);
    log_prob[i] = m;
    for (int64_t k = 0; k < K; ++k) joint[i * K + k] -= m;
  }
  map_doubles(joint, rows * K, Exp{});
  for (int64_t i = 0; i < rows; ++i) {
    double total = 0;
    for (int64_t k = 0; k < K; ++k) total += joint[i * K + k];
    sum[i] = total;
    const double inverse = 1 / total;
    for (int64_t k = 0; k < K; ++k) joint[i * K + k] *= inverse;
  }
  map_doubles(sum, rows, Log{});
  for (int64_t i = 0; i < rows; ++i) {
    // an infinite maximum is the answer itself
    if (!__builtin_isinf(log_prob[i])) log_prob[i] += sum[i];
  }
}

template <class T>
void fill_invalid_rows(const RowsByClass& groups, int64_t width, T* out) {
  for (int64_t i = groups.valid_rows(); i < groups.rows(); ++i) {
    fill(out + groups.row(i) * width, width, static_cast<T>(__builtin_nan("")));
  }
}

// Few rows make shorter blocks, so that there is something to share.
CEM_FAST_INLINE int64_t log_prob_rows(int64_t rows) {
  return smaller<int64_t>(kBlockRows, larger<int64_t>(16, divide_up(divide_up(rows, 32), kTileRows) * kTileRows));
}

// log p of every row by position, unrounded: an online sum over blocks of components, in a fixed number of parts that
// are merged in order, so that few rows and many components can be shared, too.
template <class X, class T>
void log_sums(const Features& x, const Mixture& mixture, const RowsByClass& groups, const double* normalizers,
              ParallelFor parallel_for, double* out) {
  const int64_t K = mixture.components, size = log_prob_rows(x.rows);
  const RowBlocks blocks(groups, size);
  const int64_t component_blocks = divide_up(K, kManyComponents);
  const int64_t parts = smaller(component_blocks, divide_up(32, larger<int64_t>(1, blocks.count())));
  Scratch<LogSum> sums(x.rows * parts);
  const int64_t cost = smaller(size, x.rows) * divide_up(K, parts) * x.dimension;
  parallel(parallel_for, blocks.count() * parts, cost, [&](int64_t first, int64_t last) {
    Scratch<double> joint(kBlockRows * kManyComponents);
    LogJoint<X, T> log_joint(x, mixture, normalizers);
    for (int64_t item = first; item < last; ++item) {
      const RowBlock& block = blocks[item / parts];
      const int64_t part = item % parts;
      const RowPointers<X> rows(x, groups, block.begin, block.end);
      LogSum sum[kBlockRows];
      for (int64_t kb = component_blocks * part / parts; kb < component_blocks * (part + 1) / parts; ++kb) {
        const int64_t k = kb * kManyComponents, count = smaller(kManyComponents, K - k);
        log_joint(rows, block.class_index, k, count, block.class_index, joint);
        for (int64_t i = 0; i < rows.count; ++i) sum[i].add(joint + i * count, count);
      }
      for (int64_t i = 0; i < rows.count; ++i) sums[(block.begin + i) * parts + part] = sum[i];
    }
  });
  for (int64_t i = 0; i < groups.valid_rows(); ++i) {
    LogSum total = sums[i * parts];
    for (int64_t part = 1; part < parts; ++part) total.add(sums[i * parts + part]);
    out[i] = total.value();
  }
}

template <class X>
void log_prob_forward_of(const LogProbForward& p, ParallelFor parallel_for) {
  using T = typename ParameterOf<X>::Type;
  const int64_t N = p.x.rows, D = p.x.dimension, K = p.mixture.components;
  T* log_prob = static_cast<T*>(p.log_prob);
  T* responsibilities = static_cast<T*>(p.responsibilities);
  const RowsByClass groups(p.mixture.labels, N, p.mixture.classes);
  fill_invalid_rows(groups, 1, log_prob);
  if (responsibilities != nullptr) fill_invalid_rows(groups, K, responsibilities);
  Scratch<double> normalizers(p.mixture.classes * K);
  log_normalizers<T>(p.mixture, D, groups, parallel_for, normalizers);

  const int64_t size = log_prob_rows(N);
  const RowBlocks blocks(groups, size);
  if (K <= kFewComponents) {
    parallel(parallel_for, blocks.count(), smaller(size, N) * K * D, [&](int64_t first, int64_t last) {
      Scratch<double> joint(kBlockRows * K);
      LogJoint<X, T> log_joint(p.x, p.mixture, normalizers);
      for (int64_t b = first; b < last; ++b) {
        const RowPointers<X> rows(p.x, groups, blocks[b].begin, blocks[b].end);
        const int64_t next_class = blocks[smaller(b + 1, blocks.count() - 1)].class_index;
        log_joint(rows, blocks[b].class_index, 0, K, next_class, joint);
        double value[kBlockRows];
        finish_rows(joint, rows.count, K, value);
        for (int64_t i = 0; i < rows.count; ++i) {
          const int64_t n = groups.row(blocks[b].begin + i);
          log_prob[n] = static_cast<T>(value[i]);
          for (int64_t k = 0; k < K && responsibilities != nullptr; ++k) {
            responsibilities[n * K + k] = static_cast<T>(joint[i * K + k]);
          }
        }
      }
    });
    return;
  }
  Scratch<double> exact(N);
  log_sums<X, T>(p.x, p.mixture, groups, normalizers, parallel_for, exact);
  for (int64_t i = 0; i < groups.valid_rows(); ++i) log_prob[groups.row(i)] = static_cast<T>(exact[i]);
  if (responsibilities == nullptr) return;
  const int64_t component_blocks = divide_up(K, kManyComponents), cost = smaller(size, N) * kManyComponents * D;
  parallel(parallel_for, blocks.count() * component_blocks, cost, [&](int64_t first, int64_t last) {
    Scratch<double> joint(kBlockRows * kManyComponents);
    LogJoint<X, T> log_joint(p.x, p.mixture, normalizers);
    for (int64_t item = first; item < last; ++item) {
      const RowBlock& block = blocks[item / component_blocks];
      const int64_t k = item % component_blocks * kManyComponents, count = smaller(kManyComponents, K - k);
      const RowPointers<X> rows(p.x, groups, block.begin, block.end);
      log_joint(rows, block.class_index, k, count, block.class_index, joint);
      posterior(joint, rows.count, count, exact + block.begin);
      for (int64_t i = 0; i < rows.count; ++i) {
        T* out = responsibilities + groups.row(block.begin + i) * K + k;
        for (int64_t q = 0; q < count; ++q) out[q] = static_cast<T>(joint[i * count + q]);
      }
    }
  });
}

// out[r] (+)= sum_k a_rk (mu_k - x_r) (/ v_k) over one chunk, for a tile of rows and the `active` components listed in
// `pulling`; components as in distance_tile. Meanwhile fetches the chunks of rows at `upcoming`. `streaming`: out is
// aligned to vectors and too large for the caches.
template <bool kWeighted, bool kAdd, class X, class T, class Out>
CEM_FAST_INLINE void pull_tile(const X* const* x, const X* const* upcoming, const T* a, int64_t ld,
                               const int32_t* pulling, int64_t active, const T* means, int64_t stride, int64_t length,
                               bool wide, bool streaming, Out* const* out) {
  constexpr int R = kTileRows, U = 2, L = kLanes<T>;
  constexpr int kLine = larger<int>(1, 64 / static_cast<int>(sizeof(X)));
  int64_t d = 0;
  for (; d + U * L <= length; d += U * L) {
    if (U * L >= kLine || d % kLine == 0) {
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
        for (int i = 0; i < U * L; i += kLine) prefetch(upcoming[r] + d + i);
      }
    }
    Vector<T> row[R][U], sum[R][U] = {};
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
      for (int u = 0; u < U; ++u) {
        row[r][u] = load(x[r] + d + u * L);
        pin(row[r][u]);
      }
    }
    for (int64_t j = 0; j < active; ++j) {
      const int64_t k = pulling[j];
#pragma GCC unroll 2
      for (int u = 0; u < U; ++u) {
        const Vector<T> mean = load(means + k * stride + d + u * L);
        [[maybe_unused]] Vector<T> inverse;
        if constexpr (kWeighted) inverse = load(means + k * stride + stride / 2 + d + u * L);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          const Vector<T> deviation = mean - row[r][u];
          if constexpr (kWeighted) {
            sum[r][u] += deviation * inverse * a[r * ld + k];
          } else {
            sum[r][u] += deviation * a[r * ld + k];
          }
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
      for (int u = 0; u < U; ++u) {
        if constexpr (kAdd) sum[r][u] += load(out[r] + d + u * L);
      }
    }
    for (int r = 0; r < R; ++r) {
      for (int u = 0; u < U; ++u) {
        if (streaming) {
          stream(out[r] + d + u * L, sum[r][u]);
        } else {
          store(out[r] + d + u * L, sum[r][u]);
        }
      }
    }
  }
  for (; d < length; d += L) {
    const int rest = static_cast<int>(smaller<int64_t>(L, length - d));
    Vector<T> row[R], sum[R] = {};
    for (int r = 0; r < R; ++r) row[r] = load_last(x[r] + d, rest, wide || d > 0);
    for (int64_t j = 0; j < active; ++j) {
      const int64_t k = pulling[j];
      const Vector<T> mean = load_last(means + k * stride + d, rest, d > 0 || (wide && !kWeighted));
      [[maybe_unused]] Vector<T> inverse;
      if constexpr (kWeighted) inverse = load_last(means + k * stride + stride / 2 + d, rest, d > 0);
      for (int r = 0; r < R; ++r) {
        if constexpr (kWeighted) {
          sum[r] += (mean - row[r]) * inverse * a[r * ld + k];
        } else {
          sum[r] += (mean - row[r]) * a[r * ld + k];
        }
      }
    }
    for (int r = 0; r < R; ++r) {
      if constexpr (kAdd) sum[r] += load_last(out[r] + d, rest, false);
    }
    for (int r = 0; r < R; ++r) store_last(out[r] + d, rest, sum[r]);
  }
}

// Rows of a block pulled toward `size` components by `a` [rows, size], over the dimensions [begin, end) of one panel.
// Components with a share in no row of a tile add exactly nothing and are left out: posteriors are often zero but for
// one.
template <bool kAdd, class X, class T, class Out>
void pull(const RowPointers<X>& rows, const T* means, const T* variances, int64_t dimension, int64_t size,
          int64_t begin, int64_t end, bool streaming, const T* a, PackedComponents<T>& packed, Out* const* out) {
  const int64_t chunk = packed.chunk();
  const int64_t stride = variances != nullptr ? 2 * chunk : dimension;
  const T* panel = variances != nullptr ? packed(means, variances, dimension, size, begin, end) : nullptr;
  Scratch<int32_t> pulling(kGroupTiles * size);
  for (int64_t group = 0; group < rows.tiles; group += kGroupTiles) {
    const int64_t height = smaller<int64_t>(kGroupTiles, rows.tiles - group);
    int64_t active[kGroupTiles] = {};
    for (int64_t tile = 0; tile < height; ++tile) {
      const T* share = a + (group + tile) * kTileRows * size;
      for (int64_t k = 0; k < size; ++k) {
        bool any = false;
        for (int r = 0; r < kTileRows; ++r) any |= share[r * size + k] != 0;
        pulling[tile * size + active[tile]] = static_cast<int32_t>(k);
        active[tile] += any;
      }
    }
    const ChunksAhead<X> chunks_ahead(rows, group, height, begin, end, dimension, chunk);
    for (int64_t start = begin; start < end; start += chunk) {
      const int64_t length = smaller(chunk, end - start);
      for (int64_t tile = 0; tile < height; ++tile) {
        const X* x[kTileRows];
        const X* upcoming[kTileRows];
        Out* to[kTileRows];
        chunks_ahead(group + tile, start, upcoming);
        for (int64_t r = 0; r < kTileRows; ++r) {
          const int64_t i = (group + tile) * kTileRows + r;
          x[r] = rows.row[i] + start;
          to[r] = out[smaller(i, rows.count - 1)] + start;
        }
        const T* share = a + (group + tile) * kTileRows * size;
        const int32_t* components = pulling + tile * size;
        if (variances != nullptr) {
          pull_tile<true, kAdd>(x, upcoming, share, size, components, active[tile], panel + (start - begin) * 2 * size,
                                stride, length, start > 0, streaming, to);
        } else {
          pull_tile<false, kAdd>(x, upcoming, share, size, components, active[tile], means + start, stride, length,
                                 start > 0, streaming, to);
        }
      }
    }
  }
}

// Rows of the last tile beyond `count` repeat row count - 1.
template <class T>
CEM_FAST_INLINE void repeat_last_row(T* a, int64_t count, int64_t padded, int64_t width) {
  for (int64_t i = count; i < padded; ++i) {
    for (int64_t k = 0; k < width; ++k) a[i * width + k] = a[(count - 1) * width + k];
  }
}

template <class X>
void log_prob_backward_of(const LogProbBackward& p, ParallelFor parallel_for) {
  using T = typename ParameterOf<X>::Type;
  const int64_t N = p.x.rows, D = p.x.dimension, K = p.mixture.components;
  const T* grad = static_cast<const T*>(p.grad);
  const T* log_prob = static_cast<const T*>(p.log_prob);
  const T* responsibilities = static_cast<const T*>(p.responsibilities);
  const T* means = static_cast<const T*>(p.mixture.means);
  const T* variances = static_cast<const T*>(p.mixture.variances);
  X* dx = static_cast<X*>(p.dx);
  const RowsByClass groups(p.mixture.labels, N, p.mixture.classes);
  for (int64_t i = groups.valid_rows(); i < N; ++i) {
    for (int64_t d = 0; d < D; ++d) narrow(static_cast<T>(__builtin_nan("")), dx + groups.row(i) * D + d);
  }
  const RowBlocks blocks(groups, kBlockRows);
  const bool diagonal = p.mixture.diagonal;
  const auto precision_of = [&](int64_t c, int64_t k) { return diagonal ? T(1) : 1 / variances[c * K + k]; };
  if (responsibilities != nullptr) {
    const bool streaming = stream_rows(p.dx, N, D, static_cast<int64_t>(sizeof(X)));
    // blocks in reverse, because the last rows that the forward has read may still be in a cache; few of them are split
    // by chunks of dimensions
    const PackedComponents<T> whole(diagonal, K, D);
    const int64_t panel = blocks.count() < kEnoughBlocks ? whole.chunk() : whole.panel(), panels = divide_up(D, panel);
    const int64_t cost = smaller<int64_t>(kBlockRows, N) * K * panel;
    parallel(parallel_for, blocks.count() * panels, cost, [&](int64_t first, int64_t last) {
      PackedComponents<T> packed(diagonal, K, D);
      Scratch<T> a(kBlockRows * K);
      for (int64_t item = first; item < last; ++item) {
        const int64_t b = blocks.count() - 1 - item / panels, begin = item % panels * panel;
        const RowBlock& block = blocks[b];
        const int64_t c = block.class_index;
        const RowPointers<X> rows(p.x, groups, block.begin, block.end, blocks[larger<int64_t>(b - 1, 0)].begin);
        X* out[kBlockRows];
        for (int64_t i = 0; i < rows.count; ++i) {
          const int64_t n = groups.row(block.begin + i);
          out[i] = dx + n * D;
          for (int64_t k = 0; k < K; ++k) a[i * K + k] = grad[n] * responsibilities[n * K + k] * precision_of(c, k);
        }
        repeat_last_row<T>(a, rows.count, rows.tiles * kTileRows, K);
        pull<false, X, T, X>(rows, means + c * K * D, diagonal ? variances + c * K * D : nullptr, D, K, begin,
                             smaller(begin + panel, D), streaming, a, packed, out);
      }
      if (streaming) finish_streaming();
    });
    return;
  }
  // Many components: the posterior of a block of them at a time, and what it pulls kept apart until all have pulled.
  // The posterior is normalized by its own sum: log_prob has lost digits to its rounding.
  Scratch<double> normalizers(p.mixture.classes * K);
  log_normalizers<T>(p.mixture, D, groups, parallel_for, normalizers);
  parallel(parallel_for, blocks.count(), 2 * smaller<int64_t>(kBlockRows, N) * K * D, [&](int64_t first, int64_t last) {
    PackedComponents<T> packed(diagonal, kManyComponents, D);
    Scratch<double> joint(kBlockRows * kManyComponents);
    Scratch<T> a(kBlockRows * kManyComponents);
    Scratch<T> pulled(kBlockRows * D);
    LogJoint<X, T> log_joint(p.x, p.mixture, normalizers);
    for (int64_t b = first; b < last; ++b) {
      const RowBlock& block = blocks[b];
      const int64_t c = block.class_index;
      const RowPointers<X> rows(p.x, groups, block.begin, block.end);
      T* out[kBlockRows];
      double total[kBlockRows] = {};
      double shift[kBlockRows];
      for (int64_t i = 0; i < rows.count; ++i) {
        out[i] = pulled + i * D;
        shift[i] = static_cast<double>(log_prob[groups.row(block.begin + i)]);
      }
      fill<T>(pulled, rows.count * D, 0);
      for (int64_t k = 0; k < K; k += kManyComponents) {
        const int64_t size = smaller(kManyComponents, K - k);
        log_joint(rows, c, k, size, c, joint);
        posterior(joint, rows.count, size, shift);
        bool any = false;
        for (int64_t i = 0; i < rows.count; ++i) {
          for (int64_t q = 0; q < size; ++q) {
            total[i] += joint[i * size + q];
            a[i * size + q] = static_cast<T>(joint[i * size + q]) * precision_of(c, k + q);
            any |= a[i * size + q] != 0;
          }
        }
        if (!any) continue;  // exact: every term is zero
        repeat_last_row<T>(a, rows.count, rows.tiles * kTileRows, size);
        const int64_t at = (c * K + k) * D;
        for (int64_t start = 0; start < D; start += packed.panel()) {
          pull<true, X, T, T>(rows, means + at, diagonal ? variances + at : nullptr, D, size, start,
                              smaller(start + packed.panel(), D), false, a, packed, out);
        }
      }
      for (int64_t i = 0; i < rows.count; ++i) {
        const int64_t n = groups.row(block.begin + i);
        const T factor = static_cast<T>(static_cast<double>(grad[n]) / total[i]);
        for (int64_t d = 0; d < D; ++d) narrow(factor * out[i][d], dx + n * D + d);
      }
    }
  });
}
