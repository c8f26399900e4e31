#include "groups.cuh"

#include <algorithm>

#include "sort.cuh"

namespace cem_fast::cuda {

namespace {

#ifdef CEM_FAST_SMALL_PARTS  // so that small problems have several
constexpr int64_t kRowsOfBlock = kThreads;
constexpr int64_t kSegments = 2;
constexpr int64_t kSharedGroups = 8;
constexpr int64_t kRowsAtOnce = 72;
constexpr int64_t kRowsOfBlockAtOnce = kWarp;
#else
constexpr int64_t kRowsOfBlock = 1024;
constexpr int64_t kSegments = 512;        // enough to fill a large device
constexpr int64_t kSharedGroups = 3072;   // 48 KiB
constexpr int64_t kRowsAtOnce = 1 << 14;  // that are sorted in one launch
constexpr int64_t kRowsOfBlockAtOnce = kThreads;
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
    s.rows_of_block = kRowsOfBlockAtOnce;
    s.blocks = std::max<int64_t>(1, divide_up(N, s.rows_of_block));
  } else {
    s.blocks = std::clamp<int64_t>(kCounts / groups, 1, std::max<int64_t>(1, divide_up(N, kRowsOfBlock)));
    s.rows_of_block = divide_up(divide_up(N, s.blocks), kThreads) * kThreads;
  }
  return {s, N / size + (every_class ? groups : std::min(groups, N)), at_once, in_shared};
}

}  // namespace

Groups launch(Queue& queue, const Grouping& plan) {
  const Sort& s = plan.sort;
  const int64_t shared = plan.in_shared ? (s.classes + 1) * static_cast<int64_t>(sizeof(int32_t)) : 0;
  if (plan.at_once) {
    queue.launch_with(4 * shared, sort_kernel, s.blocks, s);
  } else {
    queue.launch_with(shared, count_kernel, s.blocks, s);
    queue.launch_with(4 * shared, place_kernel, s.blocks, s);
  }
  return {s.rows, s.classes, s.run_size, plan.most_runs, s.order, s.offsets, s.first_run, s.runs, s.tickets};
}

Groups group_rows(Queue& queue, const Features& x, const Mixture& mixture, int64_t partials) {
  int64_t size = kTileRows;
  while (size < kSegmentRows &&
         (x.rows / size > kSegments || x.rows / size > kPartials / std::max<int64_t>(partials, 1))) {
    size *= 2;
  }
  Grouping by_class = plan(x, mixture, size, false);
  return launch(queue, by_class, [&](auto&&... wanted) { queue.allocate_all(wanted...); });
}

Grouping plan_every_class(const Features& x, const Mixture& mixture, int64_t size) {
  return plan(x, mixture, size, true);
}

}  // namespace cem_fast::cuda
