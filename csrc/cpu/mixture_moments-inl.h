// Responsibility-weighted moments of the rows about the means: the gradients to a mixture's parameters, and the M-step.

constexpr int kMomentRows = 2 * kTileRows;

// Rows of a block where blocks are to be many.
constexpr int64_t kMomentBlock = 1024;

// Dimensions of a chunk: with ten components its sums stay in the first-level cache.
constexpr int64_t kMomentChunk = 256;

// s1[d] += sum_r a_r (x_r - mean), s2[d] += sum_r a_r (x_r - mean)^2 over [0, length) for a tile of rows; s2 null:
// returns its sum over the dimensions.
template <bool kDiagonal, class X, class T>
double moment_tile(const X* const* x, const T* a, const T* mean, int64_t length, T* s1, T* s2) {
  constexpr int R = kMomentRows;
  Vector<T> share[R], spread{};
  for (int r = 0; r < R; ++r) share[r] = broadcast(a[r]);
  int64_t d = 0;
  for (; d + kLanes<T> <= length; d += kLanes<T>) {
    const Vector<T> m = load(mean + d);
    Vector<T> first = load(s1 + d);
    [[maybe_unused]] Vector<T> second;
    if constexpr (kDiagonal) second = load(s2 + d);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Vector<T> deviation = load(x[r] + d) - m, weighted = share[r] * deviation;
      first += weighted;
      if constexpr (kDiagonal) {
        second += weighted * deviation;
      } else {
        spread += weighted * deviation;
      }
    }
    store(s1 + d, first);
    if constexpr (kDiagonal) store(s2 + d, second);
  }
  double total = kDiagonal ? 0 : static_cast<double>(sum_lanes<T>(spread));
  for (; d < length; ++d) {
    for (int r = 0; r < R; ++r) {
      const T deviation = widen(x[r][d]) - mean[d], weighted = a[r] * deviation;
      s1[d] += weighted;
      if constexpr (kDiagonal) {
        s2[d] += weighted * deviation;
      } else {
        total += static_cast<double>(weighted * deviation);
      }
    }
  }
  return total;
}

template <class X>
void mixture_moments_of(const MixtureMoments& p, ParallelFor parallel_for) {
  using T = typename ParameterOf<X>::Type;
  const int64_t N = p.x.rows, D = p.x.dimension, C = p.mixture.classes, K = p.mixture.components;
  const bool diagonal = p.mixture.diagonal;
  const T* means = static_cast<const T*>(p.mixture.means);
  const T* row_weights = static_cast<const T*>(p.row_weights);
  const T* saved = static_cast<const T*>(p.responsibilities);
  T* s0 = static_cast<T*>(p.s0);
  T* s1 = static_cast<T*>(p.s1);
  T* s2 = static_cast<T*>(p.s2);
  const RowsByClass groups(p.mixture.labels, N, C);

  // Saved responsibilities: an item is a block of rows and, where rows are too few to share, a range of dimensions.
  // Else it is a block of rows and of components, over all dimensions, so that the responsibilities are computed once:
  // of all components, where they are few, on the way.
  const bool at_once = saved == nullptr && K <= kFewComponents;
  const int64_t size = saved != nullptr || at_once ? larger<int64_t>(K, 1) : kManyComponents,
                component_blocks = divide_up(K, size);
  const bool few_rows = N < 16 * kMomentBlock;
  const int64_t chunk = saved != nullptr && few_rows ? smaller(D, kMomentChunk) : D, chunks = divide_up(D, chunk);
  int64_t present = 0;
  for (int64_t c = 0; c < C; ++c) present += groups.end(c) > groups.begin(c);
  // Rows are split when there is too little else to share, and before sums grow too long; never below what pays for the
  // partial sums.
  const int64_t longest = present * component_blocks * chunks >= 16 ? 2048 : kMomentBlock;
  const RowBlocks blocks(groups, larger<int64_t>(longest, 4 * K));
  Scratch<T> s1_slots(blocks.slots() * K * D), s2_slots(diagonal ? blocks.slots() * K * D : 0);
  Scratch<double> s0_parts(blocks.count() * K), s2_parts(diagonal ? 0 : blocks.count() * chunks * K);
  Scratch<double> normalizers(saved != nullptr ? 0 : C * K);
  // the given log_prob has lost digits to its rounding, and the posterior would lose them, too
  Scratch<double> exact(saved != nullptr ? 0 : N);
  if (saved == nullptr) log_normalizers<T>(p.mixture, D, groups, parallel_for, normalizers);
  if (saved == nullptr && !at_once) log_sums<X, T>(p.x, p.mixture, groups, normalizers, parallel_for, exact);

  const int64_t items = blocks.count() * component_blocks * chunks;
  const int64_t rows_of_block = divide_up(larger<int64_t>(N, 1), larger<int64_t>(blocks.count(), 1));
  parallel(parallel_for, items, 2 * rows_of_block * size * chunk, [&](int64_t first, int64_t last) {
    Scratch<double> joint(saved != nullptr ? 0 : kBlockRows * size);
    LogJoint<X, T> log_joint(p.x, p.mixture, normalizers);
    // For each component, the rows that have a share in it and the shares: posteriors are often zero but for one.
    Scratch<T> a(kBlockRows * size);
    Scratch<int32_t> sharing(kBlockRows * size);
    Scratch<int64_t> number(size);
    for (int64_t item = first; item < last; ++item) {
      const int64_t b = item / (component_blocks * chunks), k0 = item / chunks % component_blocks * size;
      const int64_t start = item % chunks * chunk, end = smaller(start + chunk, D), count = smaller(size, K - k0);
      const RowBlock& block = blocks[b];
      const int64_t c = block.class_index;
      T* first_moment = block.slot < 0 ? s1 + c * K * D : s1_slots + block.slot * K * D;
      T* second_moment = !diagonal ? nullptr : block.slot < 0 ? s2 + c * K * D : s2_slots + block.slot * K * D;
      double* spread = diagonal ? nullptr : s2_parts + (b * chunks + item % chunks) * K;
      for (int64_t k = k0; k < k0 + count; ++k) {
        fill(first_moment + k * D + start, end - start, T(0));
        if (diagonal) fill(second_moment + k * D + start, end - start, T(0));
        if (!diagonal) spread[k] = 0;
        if (start == 0) s0_parts[b * K + k] = 0;
      }
      for (int64_t begin = block.begin; begin < block.end; begin += kBlockRows) {
        const RowPointers<X> rows(p.x, groups, begin, smaller(begin + kBlockRows, block.end));
        if (saved == nullptr) {
          log_joint(rows, c, k0, count, c, joint);
          if (at_once) {
            finish_rows(joint, rows.count, K, exact + begin);
          } else {
            posterior(joint, rows.count, count, exact + begin);
          }
        }
        fill<int64_t>(number, count, 0);
        for (int64_t i = 0; i < rows.count; ++i) {
          const int64_t n = groups.row(begin + i);
          for (int64_t q = 0; q < count; ++q) {
            const T posterior = saved != nullptr ? saved[n * K + q] : static_cast<T>(joint[i * count + q]);
            const T share = row_weights != nullptr ? row_weights[n] * posterior : posterior;
            if (start == 0) s0_parts[b * K + k0 + q] += static_cast<double>(share);
            const int64_t at = q * kBlockRows + number[q];
            a[at] = share;
            sharing[at] = static_cast<int32_t>(i);
            number[q] += share != 0;
          }
        }
        for (int64_t low = start; low < end; low += kMomentChunk) {
          const int64_t length = smaller(kMomentChunk, end - low);
          // while components take their shares, a part of what comes next is fetched: these rows' next dimensions, or
          // the first of the rows that follow
          const bool more = low + length < end;
          const int64_t next_start = more ? low + length : start, next_length = smaller(kMomentChunk, end - next_start);
          for (int64_t q = 0; q < count; ++q) {
            for (int64_t i = kBlockRows * q / count; i < kBlockRows * (q + 1) / count; ++i) {
              const int64_t position = smaller(more ? begin + i : begin + kBlockRows + i, groups.rows() - 1);
              const X* row = row_at<X>(p.x, groups, position) + next_start;
              for (int64_t d = 0; d < next_length; d += 64 / static_cast<int64_t>(sizeof(X))) prefetch(row + d);
            }
            const int64_t at = (k0 + q) * D + low;
            const T* mean = means + c * K * D + at;
            for (int64_t tile = 0; tile < number[q]; tile += kMomentRows) {
              // the last tile is filled up with rows that share nothing
              const X* x[kMomentRows];
              T share[kMomentRows] = {};
              for (int64_t r = 0; r < kMomentRows; ++r) {
                const int64_t i = q * kBlockRows + smaller(tile + r, number[q] - 1);
                x[r] = rows.row[sharing[i]] + low;
                if (tile + r < number[q]) share[r] = a[i];
              }
              if (diagonal) {
                moment_tile<true>(x, share, mean, length, first_moment + at, second_moment + at);
              } else {
                spread[k0 + q] +=
                    moment_tile<false>(x, share, mean, length, first_moment + at, static_cast<T*>(nullptr));
              }
            }
          }
        }
      }
    }
  });

  parallel(parallel_for, C, divide_up(blocks.count(), C) * 2 * K * D, [&](int64_t first, int64_t last) {
    for (int64_t c = first; c < last; ++c) {
      const int64_t at = c * K * D;
      if (blocks.first(c) == blocks.first(c + 1)) {
        fill(s1 + at, K * D, T(0));
        if (diagonal) fill(s2 + at, K * D, T(0));
      }
      for (int64_t b = blocks.first(c) + 1; b < blocks.first(c + 1); ++b) {
        add(s1_slots + blocks[b].slot * K * D, K * D, s1 + at);
        if (diagonal) add(s2_slots + blocks[b].slot * K * D, K * D, s2 + at);
      }
      for (int64_t k = 0; k < K; ++k) {
        double mass = 0, spread = 0;
        for (int64_t b = blocks.first(c); b < blocks.first(c + 1); ++b) {
          mass += s0_parts[b * K + k];
          for (int64_t part = 0; part < chunks && !diagonal; ++part) spread += s2_parts[(b * chunks + part) * K + k];
        }
        s0[c * K + k] = static_cast<T>(mass);
        if (!diagonal) s2[c * K + k] = static_cast<T>(spread);
      }
    }
  });
  if (p.log_likelihood != nullptr) {
    for (int64_t c = 0; c < C; ++c) {
      double total = 0;
      for (int64_t i = groups.begin(c); i < groups.end(c); ++i) total += exact[i];
      p.log_likelihood[c] = total;
    }
  }
  if (groups.valid_rows() < N) {
    const T nan = static_cast<T>(__builtin_nan(""));
    if (p.log_likelihood != nullptr) fill<double>(p.log_likelihood, C, __builtin_nan(""));
    fill(s0, C * K, nan);
    fill(s1, C * K * D, nan);
    fill(s2, diagonal ? C * K * D : C * K, nan);
  }
}
