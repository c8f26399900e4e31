// Squared distances of a block of rows to the components of their class, in direct form: sum_d (x_d - mu_d)^2 (/ v_d).

// Rows and components held in registers at once.
#if CEM_FAST_WIDTH == 64 || !defined(__x86_64__)
constexpr int kTileRows = 4;
#else
constexpr int kTileRows = 2;
#endif
constexpr int kTileComponents = 5;

// Rows of a block, and components of a block: all of them for up to 64, so that a row's posterior is finished at once.
constexpr int kBlockRows = 128;
constexpr int kBlockComponents = 65;

// Dimensions before partial sums are widened to double, at most, so that a tile's operands of one chunk stay in the
// first-level cache: rows and means alone, or with them some ten components' 1 / v. Chunks are of equal length but for
// the last.
constexpr int64_t kChunk = 640;
constexpr int64_t kWeightedChunk = 256;

CEM_FAST_INLINE int64_t chunk_length(int64_t dimension, int64_t longest) {
  return divide_up(divide_up(dimension, divide_up(dimension, longest)), 64) * 64;
}

// Tiles between a row's prefetch and its use.
constexpr int kTilesAhead = 4;

// One tile over one chunk: adds to distance[r * ld + q]. Components lie `stride` apart; where they are weighted, 1 / v
// follows half a stride after the mean. Meanwhile fetches the chunks of rows at `upcoming`, one after the other because
// memory likes that best, and the components at `next_means` (and `next_variances`).
template <int R, int Q, bool kWeighted, class X, class T>
CEM_FAST_INLINE void distance_tile(const X* const* x, const X* const* upcoming, const T* means, int64_t stride,
                                   const T* next_means, const T* next_variances, int64_t dimension, int64_t length,
                                   bool wide, double* distance, int64_t ld) {
  constexpr int kStep = kTileRows * kLanes<T>, kLine = larger<int>(1, 64 / static_cast<int>(sizeof(X)));
  const int64_t section = divide_up(length, kStep) * kLanes<T>;
  Vector<T> sum[Q][R] = {};
  int64_t d = 0;
  for (int s = 0; s < kTileRows; ++s) {
    const X* ahead = upcoming[s];
    const int64_t end = smaller((s + 1) * section, length);
    for (; d + kLanes<T> <= end; d += kLanes<T>, ahead += kStep) {
#pragma GCC unroll 8
      for (int i = 0; i < kStep; i += kLine) prefetch_far(ahead + i);
      Vector<T> row[R];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        row[r] = load(x[r] + d);
        pin(row[r]);
      }
#pragma GCC unroll 8
      for (int q = 0; q < Q; ++q) {
        const Vector<T> mean = load(means + q * stride + d);
        prefetch_far(next_means + q * dimension + d);
        [[maybe_unused]] Vector<T> inverse;
        if constexpr (kWeighted) {
          inverse = load(means + q * stride + stride / 2 + d);
          prefetch_far(next_variances + q * dimension + d);
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          const Vector<T> deviation = row[r] - mean;
          if constexpr (kWeighted) {
            sum[q][r] += deviation * inverse * deviation;
          } else {
            sum[q][r] += deviation * deviation;
          }
        }
      }
    }
  }
  if (d < length) {
    const int rest = static_cast<int>(length - d);
    Vector<T> row[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) row[r] = load_last(x[r] + d, rest, wide);
#pragma GCC unroll 8
    for (int q = 0; q < Q; ++q) {
      const Vector<T> mean = load_last(means + q * stride + d, rest, kWeighted ? d > 0 : wide);
      [[maybe_unused]] Vector<T> inverse;
      if constexpr (kWeighted) inverse = load_last(means + q * stride + stride / 2 + d, rest, d > 0);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const Vector<T> deviation = row[r] - mean;
        if constexpr (kWeighted) {
          sum[q][r] += deviation * inverse * deviation;
        } else {
          sum[q][r] += deviation * deviation;
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int q = 0; q < Q; ++q) {
    T total[R];
    sum_lanes_of<R>(sum[q], total);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) distance[r * ld + q] += static_cast<double>(total[r]);
  }
}

// Room for a chunk of so many means and 1 / v. They are copied together because rows of a power of two of numbers would
// compete for the same few lines of a cache.
CEM_FAST_INLINE int64_t packed_size(int64_t components, int64_t chunk) { return 2 * chunk * components; }

template <class T>
void pack_chunk(const T* means, const T* variances, int64_t dimension, int64_t components, int64_t length,
                int64_t chunk, T* out) {
  for (int64_t q = 0; q < components; ++q, means += dimension, variances += dimension, out += 2 * chunk) {
    int64_t d = 0;
    for (; d + kLanes<T> <= length; d += kLanes<T>) {
      store(out + d, load(means + d));
      store(out + chunk + d, T(1) / load(variances + d));
    }
    for (; d < length; ++d) {
      out[d] = means[d];
      out[chunk + d] = T(1) / variances[d];
    }
  }
}

template <class X>
CEM_FAST_INLINE const X* row_at(const Features& x, const RowsByClass& groups, int64_t position) {
  return static_cast<const X*>(x.data) + groups.row(position) * x.stride;
}

// The pointers of up to kBlockRows rows, the last one repeated until the last tile is whole, and those of the tiles
// that follow.
template <class X>
struct RowPointers {
  const X* row[kBlockRows + kTilesAhead * kTileRows];
  int64_t count;
  int64_t tiles;

  RowPointers(const Features& x, const RowsByClass& groups, int64_t begin, int64_t end)
      : count(end - begin), tiles(divide_up(count, kTileRows)) {
    const auto at = [&](int64_t position) { return row_at<X>(x, groups, position); };
    const int64_t padded = tiles * kTileRows;
    for (int64_t i = 0; i < padded; ++i) row[i] = at(begin + smaller(i, count - 1));
    for (int64_t i = 0; i < kTilesAhead * kTileRows; ++i) row[padded + i] = at(smaller(end + i, x.rows - 1));
  }

  // The rows at the given positions, at least one.
  RowPointers(const Features& x, const RowsByClass& groups, const int64_t* positions, int64_t size)
      : count(size), tiles(divide_up(count, kTileRows)) {
    for (int64_t i = 0; i < (tiles + kTilesAhead) * kTileRows; ++i) {
      row[i] = row_at<X>(x, groups, positions[smaller(i, size - 1)]);
    }
  }
};

template <int size>
struct Size {
  static constexpr int value = size;
};

// Means and, where distances are weighted, variances of some components; and those that will be wanted next.
template <class T>
struct Components {
  const T* means;
  const T* variances;
  const T* next_means;
  const T* next_variances;
};

// distance[i * components + k] for the rows of `rows`: room for kBlockRows x components. `packed` is room for
// packed_size(components, kWeightedChunk) where there are variances.
template <class X, class T>
void distances(const RowPointers<X>& rows, int64_t dimension, const Components<T>& c, int64_t components, T* packed,
               double* distance) {
  for (int64_t i = 0; i < rows.tiles * kTileRows * components; ++i) distance[i] = 0;
  const bool weighted = c.variances != nullptr;
  const int64_t chunk = chunk_length(dimension, weighted ? kWeightedChunk : kChunk);
  for (int64_t start = 0; start < dimension; start += chunk) {
    const int64_t length = smaller(chunk, dimension - start), stride = weighted ? 2 * chunk : dimension;
    const bool wide = start > 0 || length >= kLanes<T>, last_chunk = start + length == dimension;
    if (weighted) pack_chunk(c.means + start, c.variances + start, dimension, components, length, chunk, packed);
    const T* means = weighted ? packed : c.means + start;
    const T* variances = weighted ? c.variances : c.means;  // never read, only pointed at, where there are none
    for (int64_t tile = 0; tile < rows.tiles; ++tile) {
      const X* x[kTileRows];
      const X* upcoming[kTileRows];
      const int64_t next = tile + kTilesAhead, over = next - rows.tiles;
      for (int r = 0; r < kTileRows; ++r) {
        x[r] = rows.row[tile * kTileRows + r] + start;
        if (over < 0) {
          upcoming[r] = rows.row[next * kTileRows + r] + start;
        } else if (!last_chunk) {
          upcoming[r] = rows.row[smaller(over, rows.tiles - 1) * kTileRows + r] + start + length;
        } else {
          upcoming[r] = rows.row[next * kTileRows + r];
        }
      }
      // the last tile may have no more than half its rows
      const int64_t short_rows = (tile + 1) * kTileRows - rows.count;
      // once for all rows
      const T* next_means = tile > 0 ? c.means + start : last_chunk ? c.next_means : c.means + start + length;
      const T* next_variances = tile > 0 || !weighted ? variances + start
                                : last_chunk          ? c.next_variances
                                                      : variances + start + length;
      double* out = distance + tile * kTileRows * components;
      for (int64_t k = 0; k < components; k += kTileComponents) {
        const auto run = [&](auto height, auto width) {
          constexpr int R = decltype(height)::value, Q = decltype(width)::value;
          const auto run_weighted = [&](auto is_weighted) {
            distance_tile<R, Q, decltype(is_weighted)::value>(
                x, upcoming, means + k * stride, stride, next_means + k * dimension, next_variances + k * dimension,
                dimension, length, wide, out + k, components);
          };
          weighted ? run_weighted(Size<true>{}) : run_weighted(Size<false>{});
        };
        const auto run_height = [&](auto width) {
          if (2 * short_rows >= kTileRows) {
            run(Size<divide_up(kTileRows, 2)>{}, width);
          } else {
            run(Size<kTileRows>{}, width);
          }
        };
        switch (smaller<int64_t>(kTileComponents, components - k)) {
          case 1:
            run_height(Size<1>{});
            break;
          case 2:
            run_height(Size<2>{});
            break;
          case 3:
            run_height(Size<3>{});
            break;
          case 4:
            run_height(Size<4>{});
            break;
          default:
            run_height(Size<5>{});
        }
      }
    }
  }
}

// One row and one mean.
template <class X, class T>
double squared_distance(const X* x, const T* mean, int64_t dimension) {
  constexpr int U = 4;  // sums side by side: one alone would wait for its last addition
  double total = 0;
  for (int64_t start = 0; start < dimension; start += kChunk) {
    const int64_t end = smaller(start + kChunk, dimension);
    Vector<T> sum[U]{};
    int64_t d = start;
    for (; d + U * kLanes<T> <= end; d += U * kLanes<T>) {
#pragma GCC unroll 4
      for (int u = 0; u < U; ++u) {
        const Vector<T> deviation = load(x + d + u * kLanes<T>) - load(mean + d + u * kLanes<T>);
        sum[u] += deviation * deviation;
      }
    }
    for (; d + kLanes<T> <= end; d += kLanes<T>) {
      const Vector<T> deviation = load(x + d) - load(mean + d);
      sum[0] += deviation * deviation;
    }
    total += static_cast<double>(sum_lanes<T>((sum[0] + sum[1]) + (sum[2] + sum[3])));
    for (; d < end; ++d) {
      const T deviation = widen(x[d]) - mean[d];
      total += static_cast<double>(deviation * deviation);
    }
  }
  return total;
}
