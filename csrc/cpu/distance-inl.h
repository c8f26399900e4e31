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

// With fewer blocks of rows than this, work is split by dimension, too.
constexpr int64_t kEnoughBlocks = 16;

// Dimensions before partial sums are widened to double, at most, so that the operands of one chunk stay in the
// first-level cache: a group of rows and means alone, or with them some ten components' 1 / v. Chunks are of equal
// length but for the last.
constexpr int64_t kChunk = 640;
constexpr int64_t kWeightedChunk = 256;

CEM_FAST_INLINE int64_t chunk_length(int64_t dimension, int64_t longest) {
  return divide_up(divide_up(dimension, divide_up(dimension, longest)), 64) * 64;
}

// Tiles of a group: all its chunks come before the next group, so that memory is read a few whole rows at a time.
constexpr int kGroupTiles = 4;

// How far ahead rows are fetched: about what memory takes to answer. The rows of one tile are fetched side by side, as
// they will be read: a processor follows several rows at once, and waits for none of their pages alone.
constexpr int kTilesAhead = 8 / kTileRows;

// What a tile fetches meanwhile: the chunks of a later tile's rows, and chunks of means (and variances), `dimension`
// apart.
template <class X, class T>
struct Upcoming {
  const X* rows[kTileRows];
  const T* means;
  const T* variances;
  int64_t components;
};

// sum[r] += (row[r] - mean)^2, times `inverse` where weighted.
template <int R, bool kWeighted, class T>
CEM_FAST_INLINE void add_squares(const Vector<T>* row, Vector<T> mean, Vector<T> inverse, Vector<T>* sum) {
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    const Vector<T> deviation = row[r] - mean;
    if constexpr (kWeighted) {
      sum[r] = multiply_add(deviation * inverse, deviation, sum[r]);
    } else {
      sum[r] = multiply_add(deviation, deviation, sum[r]);
    }
  }
}

// One tile over one chunk: adds to distance[r * ld + q]. Components lie `stride` apart; where they are weighted, 1 / v
// follows half a stride after the mean.
template <int R, int Q, bool kWeighted, class X, class T>
CEM_FAST_INLINE void distance_tile(const X* const* x, const Upcoming<X, T>& upcoming, const T* means, int64_t stride,
                                   int64_t dimension, int64_t length, bool wide, double* distance, int64_t ld) {
  constexpr int kLine = larger<int>(1, 64 / static_cast<int>(sizeof(X)));
  Vector<T> sum[Q][R] = {};
  int64_t d = 0;
  for (; d + kLanes<T> <= length; d += kLanes<T>) {
    if (kLanes<T> >= kLine || d % kLine == 0) {
#pragma GCC unroll 8
      for (int r = 0; r < kTileRows; ++r) prefetch(upcoming.rows[r] + d);
    }
    for (int64_t i = 0; i < upcoming.components; ++i) {
      prefetch(upcoming.means + i * dimension + d);
      if constexpr (kWeighted) prefetch(upcoming.variances + i * dimension + d);
    }
    Vector<T> row[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      row[r] = load(x[r] + d);
      pin(row[r]);
    }
#pragma GCC unroll 8
    for (int q = 0; q < Q; ++q) {
      const Vector<T> mean = load(means + q * stride + d);
      Vector<T> inverse{};
      if constexpr (kWeighted) inverse = load(means + q * stride + stride / 2 + d);
      add_squares<R, kWeighted, T>(row, mean, inverse, sum[q]);
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
      Vector<T> inverse{};
      if constexpr (kWeighted) inverse = load_last(means + q * stride + stride / 2 + d, rest, d > 0);
      add_squares<R, kWeighted, T>(row, mean, inverse, sum[q]);
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

// Chunks of means and 1 / v of a class's components, as many as stay in the second-level cache: a panel. Copied,
// because rows of a power of two of numbers would compete for the same few lines of a cache, and kept until another
// panel is asked for, because blocks of rows of one class follow each other.
template <class T>
class PackedComponents {
 public:
  // For up to `components` of them. Where they are not `weighted` there is nothing to pack, and one panel is all.
  PackedComponents(bool weighted, int64_t components, int64_t dimension)
      : chunk_(chunk_length(dimension, weighted ? kWeightedChunk : kChunk)),
        panel_(weighted ? chunk_ * smaller(divide_up(dimension, chunk_), larger<int64_t>(1, kBytes / bytes(components)))
                        : dimension),
        data_(weighted ? 2 * panel_ * components : 0) {}

  int64_t chunk() const { return chunk_; }
  int64_t panel() const { return panel_; }

  // Dimensions [start, end) of components whose means and variances begin at the given places: chunk by chunk, in each
  // one component after the other.
  const T* operator()(const T* means, const T* variances, int64_t dimension, int64_t components, int64_t start,
                      int64_t end) {
    if (means == packed_ && components == components_ && start == start_) return data_;
    packed_ = means, components_ = components, start_ = start;
    for (int64_t q = 0; q < components; ++q, means += dimension, variances += dimension) {
      T* out = data_ + 2 * chunk_ * q;
      for (int64_t d = start; d < end; d += chunk_, out += 2 * chunk_ * components) {
        pack(means + d, variances + d, dimension, smaller(chunk_, end - d), out);
      }
    }
    return data_;
  }

 private:
  static constexpr int64_t kBytes = 384 << 10;
  int64_t bytes(int64_t components) const { return 2 * chunk_ * components * static_cast<int64_t>(sizeof(T)); }

  // One chunk of one component, while fetching that of the next.
  void pack(const T* mean, const T* variance, int64_t dimension, int64_t length, T* out) const {
    int64_t d = 0;
    for (; d + kLanes<T> <= length; d += kLanes<T>) {
      prefetch(mean + dimension + d);
      prefetch(variance + dimension + d);
      store(out + d, load(mean + d));
      store(out + chunk_ + d, T(1) / load(variance + d));
    }
    for (; d < length; ++d) {
      out[d] = mean[d];
      out[chunk_ + d] = T(1) / variance[d];
    }
  }

  int64_t chunk_;
  int64_t panel_;
  Scratch<T> data_;
  const T* packed_ = nullptr;
  int64_t components_ = 0;
  int64_t start_ = 0;
};

template <class X>
CEM_FAST_INLINE const X* row_at(const Features& x, const RowsByClass& groups, int64_t position) {
  return static_cast<const X*>(x.data) + groups.row(position) * x.stride;
}

// The pointers of up to kBlockRows rows, the last one repeated until the last tile is whole, and those of the tiles
// that come next: at position `next` or, if not given, right after them.
template <class X>
struct RowPointers {
  const X* row[kBlockRows + kTilesAhead * kTileRows];
  int64_t count;
  int64_t tiles;

  RowPointers(const Features& x, const RowsByClass& groups, int64_t begin, int64_t end, int64_t next)
      : count(end - begin), tiles(divide_up(count, kTileRows)) {
    const auto at = [&](int64_t position) { return row_at<X>(x, groups, position); };
    const int64_t padded = tiles * kTileRows;
    for (int64_t i = 0; i < padded; ++i) row[i] = at(begin + smaller(i, count - 1));
    for (int64_t i = 0; i < kTilesAhead * kTileRows; ++i) row[padded + i] = at(smaller(next + i, x.rows - 1));
  }

  RowPointers(const Features& x, const RowsByClass& groups, int64_t begin, int64_t end)
      : RowPointers(x, groups, begin, end, end) {}

  // The rows at the given positions, at least one. Where many are wanted, those after the last come next.
  RowPointers(const Features& x, const RowsByClass& groups, const int64_t* positions, int64_t size)
      : count(size), tiles(divide_up(count, kTileRows)) {
    const int64_t padded = tiles * kTileRows, next = positions[size - 1] + 1;
    for (int64_t i = 0; i < padded; ++i) row[i] = row_at<X>(x, groups, positions[smaller(i, size - 1)]);
    for (int64_t i = 0; i < kTilesAhead * kTileRows; ++i) {
      row[padded + i] = row_at<X>(x, groups, smaller(next + i, x.rows - 1));
    }
  }
};

// Finds the chunks of rows that are read kTilesAhead tiles after a tile of one group, within one panel.
template <class X>
class ChunksAhead {
 public:
  ChunksAhead(const RowPointers<X>& rows, int64_t group, int64_t height, int64_t begin, int64_t end, int64_t dimension,
              int64_t chunk)
      : rows_(rows), group_(group), height_(height), begin_(begin), end_(end), dimension_(dimension), chunk_(chunk) {}

  CEM_FAST_INLINE void operator()(int64_t tile, int64_t start, const X** chunks) const {
    int64_t later = tile + kTilesAhead - group_;
    for (; later >= height_ && start + chunk_ < end_; later -= height_) start += chunk_;
    if (later < height_) return point(group_ + later, start, chunks);
    const int64_t next = group_ + later, past_block = next - rows_.tiles;
    if (past_block < 0) return point(next, begin_, chunks);
    // the first rows once more, in the next panel, or those of the next block in the first panel
    if (end_ < dimension_) return point(smaller(past_block, rows_.tiles - 1), end_, chunks);
    point(next, 0, chunks);
  }

 private:
  CEM_FAST_INLINE void point(int64_t tile, int64_t start, const X** chunks) const {
    for (int r = 0; r < kTileRows; ++r) chunks[r] = rows_.row[tile * kTileRows + r] + start;
  }

  const RowPointers<X>& rows_;
  int64_t group_, height_, begin_, end_, dimension_, chunk_;
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

// One row and one mean in double, for a distance that float cannot hold.
template <class X, class T>
double wide_distance(const X* x, const T* mean, int64_t dimension) {
  double total = 0;
  for (int64_t d = 0; d < dimension; ++d) {
    const double deviation = static_cast<double>(widen(x[d])) - static_cast<double>(mean[d]);
    total += deviation * deviation;
  }
  return total;
}

// Whether one of n numbers is infinite.
CEM_FAST_INLINE bool any_infinite(const double* values, int64_t n) {
  const Vector<double> infinite = broadcast(__builtin_inf());
  Bits<double> found{};
  int64_t i = 0;
  for (; i + kLanes<double> <= n; i += kLanes<double>) found |= load(values + i) == infinite;
  bool any = !all_lanes(~found);
  for (; i < n; ++i) any |= values[i] == __builtin_inf();
  return any;
}

// distance[i * components + k] for the rows of `rows`: room for kBlockRows x components.
template <class X, class T>
void distances(const RowPointers<X>& rows, int64_t dimension, const Components<T>& c, int64_t components,
               PackedComponents<T>& packed, double* distance) {
  for (int64_t i = 0; i < rows.tiles * kTileRows * components; ++i) distance[i] = 0;
  const bool weighted = c.variances != nullptr;
  const int64_t chunk = packed.chunk(), stride = weighted ? 2 * chunk : dimension;
  // what is fetched is shared out: rows among the widths of a tile, components among all tiles and widths
  const int64_t widths = divide_up(components, kTileComponents);
  const double share =
      c.next_means == c.means ? 0 : static_cast<double>(components) / static_cast<double>(rows.tiles * widths);
  for (int64_t begin = 0; begin < dimension; begin += packed.panel()) {
    const int64_t end = smaller(begin + packed.panel(), dimension);
    const T* panel = weighted ? packed(c.means, c.variances, dimension, components, begin, end) : c.means + begin;
    for (int64_t group = 0; group < rows.tiles; group += kGroupTiles) {
      const int64_t height = smaller<int64_t>(kGroupTiles, rows.tiles - group);
      const ChunksAhead<X> chunks_ahead(rows, group, height, begin, end, dimension, chunk);
      for (int64_t start = begin; start < end; start += chunk) {
        const int64_t length = smaller(chunk, end - start);
        const bool wide = start > 0 || length >= kLanes<T>;
        const T* means = weighted ? panel + (start - begin) * 2 * components : c.means + start;
        for (int64_t tile = group; tile < group + height; ++tile) {
          const X* x[kTileRows];
          const X* ahead[kTileRows];
          chunks_ahead(tile, start, ahead);
          for (int r = 0; r < kTileRows; ++r) x[r] = rows.row[tile * kTileRows + r] + start;
          // the last tile may have no more than half its rows
          const int64_t short_rows = (tile + 1) * kTileRows - rows.count;
          double* out = distance + tile * kTileRows * components;
          for (int64_t k = 0, width_index = 0; k < components; k += kTileComponents, ++width_index) {
            Upcoming<X, T> upcoming;
            for (int r = 0; r < kTileRows; ++r) upcoming.rows[r] = ahead[r];
            for (int r = 0; r < kTileRows && widths > 1; ++r) {
              if (r * widths / kTileRows != width_index) upcoming.rows[r] = x[r];
            }
            const double turn = static_cast<double>(tile * widths + width_index);
            const int64_t first = static_cast<int64_t>(turn * share);
            upcoming.components = static_cast<int64_t>((turn + 1) * share) - first;
            upcoming.means = c.next_means + first * dimension + start;
            upcoming.variances = weighted ? c.next_variances + first * dimension + start : nullptr;
            const auto run = [&](auto rows_of_tile, auto width) {
              constexpr int R = decltype(rows_of_tile)::value, Q = decltype(width)::value;
              const auto run_weighted = [&](auto is_weighted) {
                distance_tile<R, Q, decltype(is_weighted)::value>(x, upcoming, means + k * stride, stride, dimension,
                                                                  length, wide, out + k, components);
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
  }
}

// Replaces distances that float cannot hold; with variances [components], only those whose log-density float can hold.
template <class X, class T>
CEM_FAST_INLINE void widen_distances(const RowPointers<X>& rows, int64_t dimension, const T* means, const T* variances,
                                     int64_t components, double* distance) {
  if (sizeof(T) == sizeof(double) || !any_infinite(distance, rows.count * components)) return;
  for (int64_t i = 0; i < rows.count; ++i) {
    for (int64_t k = 0; k < components; ++k) {
      double& own = distance[i * components + k];
      if (own != __builtin_inf()) continue;
      const double wide = wide_distance(rows.row[i], means + k * dimension, dimension);
      if (variances == nullptr || 0.5 * wide / static_cast<double>(variances[k]) < 0x1.fffffep127) own = wide;
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
  if (sizeof(T) < sizeof(double) && total == __builtin_inf()) return wide_distance(x, mean, dimension);
  return total;
}
