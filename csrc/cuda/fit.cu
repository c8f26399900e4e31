#include "begin_fit.cuh"

namespace cem_fast::cuda {

namespace {

constexpr int64_t kMostPartials = 1 << 25;  // of all segments
constexpr int64_t kSegmentRowsUnit = 16;
constexpr int64_t kShareSegments = 16;  // of a class, at least, for each share

}  // namespace

Fit::Fit(Queue& queue, const Features& x, const Mixture& mixture, int64_t wanted, int64_t partials, int64_t* iterations,
         int64_t* converged)
    : queue_(queue) {
  const int64_t N = x.rows, C = mixture.classes;
  const int64_t most = std::clamp<int64_t>(kMostPartials / std::max<int64_t>(partials, 1), 1, wanted);
  const int64_t size = std::max<int64_t>(1, divide_up(divide_up(N, most), kSegmentRowsUnit)) * kSegmentRowsUnit;
  const Groups by_class = group_rows(queue, x, mixture, 0);
  int64_t* first = queue.allocate<int64_t>(C + 1);
  groups = {N, C, size, N / size + std::min(C, N), by_class.order, by_class.offsets, first};
  classes = {queue.allocate<int32_t>(C), queue.allocate<int32_t>(1), queue.allocate<unsigned>(C), iterations,
             converged};
  queue.launch(begin_fit_kernel, 1, groups, first, classes);
  shares.shares = groups.segments / std::max<int64_t>(C, 1) >= kShareSegments ? 4 : 1;
}

}  // namespace cem_fast::cuda
