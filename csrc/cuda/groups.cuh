// Rows grouped by class on the device, and the segments of rows that are the items of work.
#pragma once

#include "queue.cuh"

namespace cem_fast::cuda {

// Rows of the smallest segment, and of one block's tile of distances. Segment sizes are multiples of it.
constexpr int kTileRows = 32;

// Group c holds the rows of class c in their natural order. The last group holds the rows with a label out of range.
// Every group is cut into segments of `size` rows; its last one may be shorter.
struct Groups {
  int64_t rows;
  int64_t classes;
  int64_t size;
  int64_t segments;              // upper bound, because the labels are on the device
  const int32_t* order;          // [rows]: the row at each position
  const int64_t* offsets;        // [classes + 2]: the first position of every group, and the end
  const int64_t* first_segment;  // [classes + 2]: the first segment of every group, and the end

  // NaN if any row has no class, else zero. Added to all results that such a row invalidates.
  template <class T>
  __device__ T poison() const {
    return offsets[classes] < rows ? static_cast<T>(nan("")) : T(0);
  }
};

struct Segment {
  int64_t group;
  int64_t begin;  // positions
  int64_t end;
};

// Segments past the last are empty.
__device__ inline Segment segment_at(const Groups& g, int64_t index) {
  if (index >= g.first_segment[g.classes + 1]) return {g.classes, 0, 0};
  int64_t low = 0, high = g.classes;  // the last group that starts at or before the segment
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    if (g.first_segment[middle] <= index) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  const int64_t begin = g.offsets[low] + (index - g.first_segment[low]) * g.size, end = g.offsets[low + 1];
  return {low, begin, begin + g.size < end ? begin + g.size : end};
}

// Groups rows for kernels that store `partials` numbers per segment. Two launches.
Groups group_rows(Queue& queue, const Features& x, const Mixture& mixture, int64_t partials);

}  // namespace cem_fast::cuda
