#include "groups.cuh"

#include <algorithm>

#include "sort_kernels.cuh"

namespace cem_fast::cuda {

namespace {

#ifdef CEM_FAST_SMALL_PARTS  // so that small problems have several
constexpr int64_t kRowsOfRange = kThreads;
constexpr int64_t kSegments = 2;
constexpr int64_t kSharedGroups = 8;
constexpr int64_t kRowsAtOnce = 72;
constexpr int64_t kRowsOfRangeAtOnce = kWarp;
#else
constexpr int64_t kRowsOfRange = 1024;
constexpr int64_t kSegments = 512;        // enough to fill a large device
constexpr int64_t kSharedGroups = 3072;   // 48 KiB
constexpr int64_t kRowsAtOnce = 1 << 14;  // that are sorted in one launch
constexpr int64_t kRowsOfRangeAtOnce = kThreads;
#endif
constexpr int64_t kCounts = 1 << 16;    // maximum, because every block reads all counts
constexpr int64_t kPartials = 1 << 23;  // maximum partial results of all segments
constexpr int64_t kSegmentRows = 1 << 16;

Grouping plan(const Features& x, const Mixture& mixture, int64_t size, bool every_class) {
  const int64_t N = x.rows, C = mixture.classes, groups = C + 1;
  const bool in_shared = groups <= kSharedGroups, at_once = in_shared && N <= kRowsAtOnce;
  Sort s{};
  s.labels = mixture.labels;
  s.rows = N;
  s.classes = C;
  s.run_size = size;
  s.every_class = every_class;
  if (at_once) {
    s.rows_of_range = kRowsOfRangeAtOnce;
    s.ranges = std::max<int64_t>(1, divide_up(N, s.rows_of_range));
  } else {
    s.ranges = std::clamp<int64_t>(kCounts / groups, 1, std::max<int64_t>(1, divide_up(N, kRowsOfRange)));
    s.rows_of_range = divide_up(divide_up(N, s.ranges), kThreads) * kThreads;
  }
  return {s, N / size + (every_class ? groups : std::min(groups, N)), at_once, in_shared};
}

}  // namespace

void sort(Queue& queue, const Grouping& plan) {
  const Sort& s = plan.sort;
  if (plan.at_once) {
    queue.launch_with(plan.shared(), sort_kernel, s.ranges, s);
  } else {
    queue.launch_with(plan.shared() / 4, count_kernel, s.ranges, s);
    queue.launch_with(plan.shared(), place_kernel, s.ranges, s);
  }
}

Groups group_rows(Queue& queue, const Features& x, const Mixture& mixture, int64_t partials) {
  int64_t size = kTileRows;
  while (size < kSegmentRows &&
         (x.rows / size > kSegments || x.rows / size > kPartials / std::max<int64_t>(partials, 1))) {
    size *= 2;
  }
  Grouping by_class = plan(x, mixture, size, false);
  const Groups groups = allocate(by_class, [&](auto&&... wanted) { queue.allocate_all(wanted...); });
  sort(queue, by_class);
  return groups;
}

Grouping plan_every_class(const Features& x, const Mixture& mixture, int64_t size) {
  return plan(x, mixture, size, true);
}

}  // namespace cem_fast::cuda
