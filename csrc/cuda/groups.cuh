// Rows grouped by class on the device, and the runs of rows that are the items of work.
#pragma once

#include "queue.cuh"

namespace cem_fast::cuda {

// Rows of the smallest segment, and of one block's tile of distances. Segment sizes are multiples of it.
constexpr int kTileRows = 32;

// Some consecutive rows of a group, in sorted order.
struct Run {
  int32_t group;
  int32_t begin;
  int32_t end;
  int32_t part;   // of the group
  int32_t parts;  // that the group is cut into
};

// Group c holds the rows of class c in their natural order. The last group holds the rows with a label out of range.
// Every group is cut evenly into segments of at most `size` rows.
struct Groups {
  int64_t rows;
  int64_t classes;
  int64_t size;
  int64_t segments;              // upper bound, because the labels are on the device
  const int32_t* order;          // [rows]: the row at each position
  const int64_t* offsets;        // [classes + 2]: the first position of every group, and the end
  const int64_t* first_segment;  // [classes + 2]: the first segment of every group, and the end
  const Run* runs;               // [segments]
  unsigned* tickets;             // [classes + 1], all 0, or null

  // Whether a row has a label out of range.
  __device__ bool has_stranger() const { return offsets[classes] < rows; }

  // NaN if any row has no class, else zero. Added to all results that such a row invalidates.
  template <class T>
  __device__ T poison() const {
    return has_stranger() ? static_cast<T>(nan("")) : T(0);
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
  const Run& run = g.runs[index];
  return {run.group, run.begin, run.end};
}

// What the kernels that group rows work on, a range of rows at a time.
struct Sort {
  const int64_t* labels;  // [rows], or null: class 0
  int64_t rows;
  int64_t classes;
  int64_t ranges;
  int64_t rows_of_range;
  int64_t run_size;    // most rows of a run
  bool every_class;    // classes without rows have an empty run
  int32_t* counts;     // [ranges, classes + 1]: rows of each group in each range
  int32_t* room;       // [ranges, 4, classes + 1] for Places; or null: in shared memory
  int32_t* order;      // [rows]
  int64_t* offsets;    // [classes + 2]
  int64_t* first_run;  // [classes + 2]
  Run* runs;
  unsigned* tickets;  // [classes + 1], set to 0; or null
};

// How rows are to be grouped, before there is memory for it.
struct Grouping {
  Sort sort;
  int64_t most_runs;  // because the labels are on the device
  bool at_once;       // every range counts all rows, which saves a launch
  bool in_shared;     // counts of a block

  // Bytes of shared memory to place rows with.
  int64_t shared() const { return in_shared ? 4 * (sort.classes + 1) * static_cast<int64_t>(sizeof(int32_t)) : 0; }
};

// Groups rows for kernels that store `partials` numbers per segment. One launch, or two for many rows.
Groups group_rows(Queue& queue, const Features& x, const Mixture& mixture, int64_t partials);

// Plans segments of at most `size` rows; classes without rows have an empty one.
Grouping plan_every_class(const Features& x, const Mixture& mixture, int64_t size);

// The groups of a plan, in memory that `find`, which takes the arguments of Queue::allocate_all, finds for them and for
// more. They are to be sorted.
template <class Find>
Groups allocate(Grouping& plan, const Find& find) {
  Sort& s = plan.sort;
  const int64_t groups = s.classes + 1;
  find(s.offsets, groups + 1, s.first_run, groups + 1, s.counts, plan.at_once ? 0 : s.ranges * groups, s.room,
       plan.in_shared ? 0 : s.ranges * 4 * groups, s.order, s.rows, s.runs, plan.most_runs, s.tickets,
       s.every_class ? groups : 0);
  if (plan.in_shared) s.room = nullptr;
  if (!s.every_class) s.tickets = nullptr;
  return {s.rows, s.classes, s.run_size, plan.most_runs, s.order, s.offsets, s.first_run, s.runs, s.tickets};
}

// Sorts in one launch, or two for many rows.
void sort(Queue& queue, const Grouping& plan);

}  // namespace cem_fast::cuda
