// Gaussians with covariance matrices, in double precision: inverse roots of the matrices, log-densities, and moments.
// Every item of parallel work is a sum of its own in a fixed order, so that results do not depend on the threads.

// Entries of a row of the Cholesky factor, for lack of a library that gives the same bits for any number of threads.
CEM_FAST_INLINE double dot(const double* a, const double* b, int64_t n) {
  Vector<double> sum[2]{};
  int64_t i = 0;
  for (; i + 2 * kLanes<double> <= n; i += 2 * kLanes<double>) {
    sum[0] = multiply_add(load(a + i), load(b + i), sum[0]);
    sum[1] = multiply_add(load(a + i + kLanes<double>), load(b + i + kLanes<double>), sum[1]);
  }
  double total = sum_lanes<double>(sum[0] + sum[1]);
  for (; i < n; ++i) total += a[i] * b[i];
  return total;
}

// W = L^-1 of each matrix L L^T, lower triangles, zeros above; half log det = sum log L_ii, NaN if it is not positive
// definite.
void inverse_roots(const InverseRoots& p, ParallelFor parallel_for) {
  const int64_t D = p.dimension;
  parallel(parallel_for, p.count, D * D * D / 2 + D, [&](int64_t first, int64_t last) {
    Scratch<double> root(D * D), logs(D);
    for (int64_t m = first; m < last; ++m) {
      const double* matrix = p.matrices + m * D * D;
      double* inverse = p.roots + m * D * D;
      fill<double>(inverse, D * D, 0);
      double half_logdet = 0;
      for (int64_t i = 0; i < D; ++i) {
        double* row = root + i * D;
        for (int64_t j = 0; j < i; ++j) row[j] = (matrix[i * D + j] - dot(row, root + j * D, j)) / root[j * D + j];
        const double square = matrix[i * D + i] - dot(row, row, i);
        const bool positive = square > 0 && square < __builtin_inf();
        row[i] = positive ? __builtin_sqrt(square) : __builtin_nan("");
        half_logdet += __builtin_log(row[i]);
        double* out = inverse + i * D;
        for (int64_t k = 0; k < i; ++k) {
          const double factor = row[k];
          const double* above = inverse + k * D;
          for (int64_t j = 0; j <= k; ++j) out[j] -= factor * above[j];
        }
        for (int64_t j = 0; j < i; ++j) out[j] /= row[i];
        out[i] = 1 / row[i];
      }
      p.half_logdets[m] = half_logdet;
    }
  });
}

constexpr int kMatrixVectors = 4;  // vectors of rows that share the loads of a matrix
constexpr int kMatrixRows = kMatrixVectors * kLanes<double>;

// |W d|^2 for the deviations d [dimension][kMatrixRows] of a tile of rows; with `white`, W d instead.
CEM_FAST_INLINE void whiten(const double* root, const double* deviation, int64_t D, double* squares, double* white) {
  constexpr int V = kMatrixVectors, L = kLanes<double>;
  Vector<double> total[V]{};
  for (int64_t j = 0; j < D; j += 2) {
    const double* first = root + j * D;
    const double* second = first + (j + 1 < D ? D : 0);
    Vector<double> a[V]{}, b[V]{};
    for (int64_t i = 0; i <= j; ++i) {
      const Vector<double> w = broadcast<double>(first[i]), u = broadcast<double>(second[i]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        const Vector<double> d = load(deviation + i * kMatrixRows + v * L);
        a[v] = multiply_add(w, d, a[v]);
        b[v] = multiply_add(u, d, b[v]);
      }
    }
    const bool pair = j + 1 < D;
    const Vector<double> u = broadcast<double>(pair ? second[j + 1] : 0);
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      if (pair) b[v] = multiply_add(u, load(deviation + (j + 1) * kMatrixRows + v * L), b[v]);
      if (white != nullptr) {
        store(white + j * kMatrixRows + v * L, a[v]);
        if (pair) store(white + (j + 1) * kMatrixRows + v * L, b[v]);
        continue;
      }
      total[v] = multiply_add(a[v], a[v], total[v]);
      if (pair) total[v] = multiply_add(b[v], b[v], total[v]);
    }
  }
  for (int v = 0; v < V && squares != nullptr; ++v) store(squares + v * L, total[v]);
}

// x - mean of a tile of rows, dimension by dimension.
CEM_FAST_INLINE void deviations_of(const double* tile, const double* mean, int64_t D, double* out) {
  for (int64_t d = 0; d < D; ++d) {
    const Vector<double> m = broadcast<double>(mean[d]);
#pragma GCC unroll 4
    for (int v = 0; v < kMatrixVectors; ++v) {
      const int64_t at = d * kMatrixRows + v * kLanes<double>;
      store(out + at, load(tile + at) - m);
    }
  }
}

void matrix_log_joint(const MatrixLogJoint& p, ParallelFor parallel_for) {
  const int64_t N = p.x.rows, D = p.x.dimension, C = p.mixture.classes, K = p.mixture.components;
  const double* means = static_cast<const double*>(p.mixture.means);
  const RowsByClass groups(p.mixture.labels, N, C);
  const RowBlocks blocks(groups, 4 * kMatrixRows);
  // tied: W (mu_k - mu_0) of every component, so that a row is whitened once
  Scratch<double> shifts(p.tied ? C * K * D : 0);
  if (p.tied) {
    parallel(parallel_for, C * K, D * D / 2, [&](int64_t first, int64_t last) {
      Scratch<double> away(D);
      for (int64_t m = first; m < last; ++m) {
        const int64_t c = m / K;
        for (int64_t d = 0; d < D; ++d) away[d] = means[m * D + d] - means[c * K * D + d];
        for (int64_t d = 0; d < D; ++d) shifts[m * D + d] = dot(p.roots + (c * D + d) * D, away, d + 1);
      }
    });
  }
  parallel(parallel_for, blocks.count(), 4 * kMatrixRows * K * D * (p.tied ? 2 : D / 2 + 1),
           [&](int64_t first, int64_t last) {
             Scratch<double> tile(D * kMatrixRows), deviation(D * kMatrixRows), white(p.tied ? D * kMatrixRows : 0);
             Scratch<double> squares(kMatrixRows);
             for (int64_t b = first; b < last; ++b) {
               const int64_t c = blocks[b].class_index;
               for (int64_t begin = blocks[b].begin; begin < blocks[b].end; begin += kMatrixRows) {
                 const int64_t count = smaller<int64_t>(kMatrixRows, blocks[b].end - begin);
                 for (int64_t r = 0; r < kMatrixRows; ++r) {
                   const double* row = row_at<double>(p.x, groups, begin + smaller(r, count - 1));
                   for (int64_t d = 0; d < D; ++d) tile[d * kMatrixRows + r] = row[d];
                 }
                 if (p.tied) {
                   deviations_of(tile, means + c * K * D, D, deviation);
                   whiten(p.roots + c * D * D, deviation, D, nullptr, white);
                 }
                 for (int64_t k = 0; k < K; ++k) {
                   const int64_t m = c * K + k;
                   if (p.tied) {
                     Vector<double> total[kMatrixVectors]{};
                     for (int64_t d = 0; d < D; ++d) {
                       const Vector<double> shift = broadcast<double>(shifts[m * D + d]);
#pragma GCC unroll 4
                       for (int v = 0; v < kMatrixVectors; ++v) {
                         const Vector<double> away = load(white + d * kMatrixRows + v * kLanes<double>) - shift;
                         total[v] = multiply_add(away, away, total[v]);
                       }
                     }
                     for (int v = 0; v < kMatrixVectors; ++v) store(squares + v * kLanes<double>, total[v]);
                   } else {
                     deviations_of(tile, means + m * D, D, deviation);
                     whiten(p.roots + m * D * D, deviation, D, squares, nullptr);
                   }
                   for (int64_t r = 0; r < count; ++r) {
                     p.joint[groups.row(begin + r) * K + k] = p.constants[m] - 0.5 * squares[r];
                   }
                 }
               }
             }
           });
  for (int64_t i = groups.valid_rows(); i < N; ++i) fill(p.joint + groups.row(i) * K, K, __builtin_nan(""));
}

// Rows of a block whose outer products are added up before the next is read, and rows of the result of one item.
constexpr int64_t kOuterRows = 64, kStrip = 16;

// out[i][j] += sum_r a[r][i] b[r][j] for i in [0, 4) and j in [0, 2 vectors).
CEM_FAST_INLINE void outer_tile(const double* a, int64_t lda, const double* b, int64_t ldb, int64_t rows,
                                int64_t height, int64_t width, double* out, int64_t ldo) {
  constexpr int L = kLanes<double>;
  Vector<double> sum[4][2]{};
  for (int64_t r = 0; r < rows; ++r) {
    const Vector<double> left = load(b + r * ldb), right = load(b + r * ldb + L);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const Vector<double> factor = broadcast<double>(a[r * lda + i]);
      sum[i][0] = multiply_add(factor, left, sum[i][0]);
      sum[i][1] = multiply_add(factor, right, sum[i][1]);
    }
  }
  double lanes[4][2 * L];
  for (int i = 0; i < 4; ++i) store(lanes[i], sum[i][0]), store(lanes[i] + L, sum[i][1]);
  for (int64_t i = 0; i < height; ++i) {
    for (int64_t j = 0; j < width; ++j) out[i * ldo + j] += lanes[i][j];
  }
}

// Adds up the moments about a center of the rows of one class: mass, first moment [D] where it is not null, and rows
// [low, high) of the second moment's lower triangle where `second` [D, D] is not null.
class OuterProducts {
 public:
  explicit OuterProducts(int64_t D)
      : D_(D),
        width_(divide_up(D, 2 * kLanes<double>) * 2 * kLanes<double>),
        deviation_(kOuterRows * width_),
        scaled_(kOuterRows * kStrip) {}

  template <class Share>
  void run(const Features& x, const RowsByClass& groups, int64_t c, const double* center, const Share& share_of,
           int64_t low, int64_t high, double* mass, double* first, double* second) {
    double total = 0;
    if (first != nullptr) fill<double>(first, D_, 0);
    for (int64_t i = low; i < high && second != nullptr; ++i) fill<double>(second + i * D_, high, 0);
    int64_t held = 0;
    for (int64_t position = groups.begin(c); position < groups.end(c); ++position) {
      const int64_t n = groups.row(position);
      const double share = share_of(n);
      if (share == 0) continue;
      total += share;
      const double* row = static_cast<const double*>(x.data) + n * x.stride;
      double* deviation = deviation_ + held * width_;
      for (int64_t d = 0; d < D_; ++d) deviation[d] = row[d] - center[d];
      for (int64_t d = D_; d < width_; ++d) deviation[d] = 0;
      for (int64_t d = 0; d < D_ && first != nullptr; ++d) first[d] += share * deviation[d];
      for (int64_t i = 0; i < kStrip; ++i) scaled_[held * kStrip + i] = low + i < high ? share * deviation[low + i] : 0;
      if (++held == kOuterRows) add(held, low, high, second), held = 0;
    }
    add(held, low, high, second);
    if (mass != nullptr) *mass = total;
  }

 private:
  void add(int64_t rows, int64_t low, int64_t high, double* second) const {
    if (second == nullptr || rows == 0) return;
    for (int64_t i = low; i < high; i += 4) {
      const int64_t height = smaller<int64_t>(4, high - i), wide = i + height;
      for (int64_t j = 0; j < wide; j += 2 * kLanes<double>) {
        outer_tile(scaled_ + (i - low), kStrip, deviation_ + j, width_, rows, height,
                   smaller<int64_t>(2 * kLanes<double>, wide - j), second + i * D_ + j, D_);
      }
    }
  }

  int64_t D_, width_;
  Scratch<double> deviation_, scaled_;
};

void matrix_moments(const MatrixMoments& p, ParallelFor parallel_for) {
  const int64_t N = p.x.rows, D = p.x.dimension, C = p.mixture.classes, K = p.mixture.components;
  const double* means = static_cast<const double*>(p.mixture.means);
  const RowsByClass groups(p.mixture.labels, N, C);
  const int64_t strips = divide_up(D, kStrip), rows_of_class = divide_up(larger<int64_t>(N, 1), C);
  if (p.tied) {
    // about the first mean of the class: all components share one pass, and are moved to their own means below
    Scratch<double> mass(N);
    parallel(parallel_for, N, K, [&](int64_t first, int64_t last) {
      for (int64_t n = first; n < last; ++n) {
        double total = 0;
        for (int64_t k = 0; k < K; ++k) total += p.responsibilities[n * K + k];
        mass[n] = total;
      }
    });
    parallel(parallel_for, C * (K + strips), rows_of_class * (D * kStrip / 2 + D), [&](int64_t first, int64_t last) {
      OuterProducts outer(D);
      for (int64_t item = first; item < last; ++item) {
        const int64_t c = item / (K + strips), part = item % (K + strips), k = part - strips, m = c * K + k;
        const double* center = means + c * K * D;
        if (part < strips) {
          outer.run(
              p.x, groups, c, center, [&](int64_t n) { return mass[n]; }, part * kStrip,
              smaller(D, (part + 1) * kStrip), nullptr, nullptr, p.s2 + c * D * D);
        } else {
          outer.run(
              p.x, groups, c, center, [&](int64_t n) { return p.responsibilities[n * K + k]; }, 0, 0, p.s0 + m,
              p.s1 + m * D, nullptr);
        }
      }
    });
    parallel(parallel_for, C, K * D * D, [&](int64_t first, int64_t last) {
      Scratch<double> away(D);
      for (int64_t c = first; c < last; ++c) {
        for (int64_t k = 0; k < K; ++k) {
          const int64_t m = c * K + k;
          double* s1 = p.s1 + m * D;
          for (int64_t d = 0; d < D; ++d) away[d] = means[m * D + d] - means[c * K * D + d];
          for (int64_t i = 0; i < D; ++i) {
            for (int64_t j = 0; j <= i; ++j) {
              p.s2[(c * D + i) * D + j] += p.s0[m] * away[i] * away[j] - s1[i] * away[j] - away[i] * s1[j];
            }
          }
          for (int64_t d = 0; d < D; ++d) s1[d] -= p.s0[m] * away[d];
        }
      }
    });
  } else {
    parallel(parallel_for, C * K * strips, rows_of_class * (D * kStrip / 2 + D), [&](int64_t first, int64_t last) {
      OuterProducts outer(D);
      for (int64_t item = first; item < last; ++item) {
        const int64_t m = item / strips, strip = item % strips, c = m / K, k = m % K;
        outer.run(
            p.x, groups, c, means + m * D, [&](int64_t n) { return p.responsibilities[n * K + k]; }, strip * kStrip,
            smaller(D, (strip + 1) * kStrip), strip == 0 ? p.s0 + m : nullptr, strip == 0 ? p.s1 + m * D : nullptr,
            p.s2 + m * D * D);
      }
    });
  }
  const int64_t matrices = p.tied ? C : C * K;
  parallel(parallel_for, matrices, D * D, [&](int64_t first, int64_t last) {
    for (int64_t m = first; m < last; ++m) {
      double* matrix = p.s2 + m * D * D;
      for (int64_t i = 0; i < D; ++i) {
        for (int64_t j = 0; j < i; ++j) matrix[j * D + i] = matrix[i * D + j];
      }
    }
  });
  if (groups.valid_rows() < N) {
    fill(p.s0, C * K, __builtin_nan(""));
    fill(p.s1, C * K * D, __builtin_nan(""));
    fill(p.s2, matrices * D * D, __builtin_nan(""));
  }
}
