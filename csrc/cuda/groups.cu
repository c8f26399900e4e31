#include "groups.cuh"

#include <algorithm>

#include "sort.cuh"

namespace cem_fast::cuda {

namespace {

#ifdef CEM_FAST_SMALL_PARTS  // so that small problems have several
constexpr int64_t kRowsOfBlock = kThreads;
constexpr int64_t kSegments = 2;
#else
constexpr int64_t kRowsOfBlock = 1024;
constexpr int64_t kSegments = 512;  // enough to fill a large device
#endif
constexpr int64_t kCounts = 1 << 16;    // maximum, because every block reads all counts
constexpr int64_t kPartials = 1 << 23;  // maximum partial results of all segments
constexpr int64_t kSegmentRows = 1 << 16;

}  // namespace

Groups group_rows(Queue& queue, const Features& x, const Mixture& mixture, int64_t partials) {
  const int64_t N = x.rows, C = mixture.classes;
  int64_t size = kTileRows;
  while (size < kSegmentRows && (N / size > kSegments || N / size > kPartials / std::max<int64_t>(partials, 1))) {
    size *= 2;
  }
  const int64_t blocks = std::clamp<int64_t>(kCounts / (C + 1), 1, std::max<int64_t>(1, divide_up(N, kRowsOfBlock)));
  Sort s{};
  s.labels = mixture.labels;
  s.rows = N;
  s.classes = C;
  s.blocks = blocks;
  s.rows_of_block = divide_up(divide_up(N, blocks), kThreads) * kThreads;
  s.segment_size = size;
  s.counts = queue.allocate<int64_t>(blocks * (C + 1));
  s.next = queue.allocate<int64_t>(blocks * (C + 1));
  s.order = queue.allocate<int32_t>(N);
  s.offsets = queue.allocate<int64_t>(C + 2);
  s.first_segment = queue.allocate<int64_t>(C + 2);
  queue.launch(count_kernel, blocks, s);
  queue.launch(place_kernel, blocks, s);
  return {N, C, size, N / size + std::min(C + 1, N), s.order, s.offsets, s.first_segment};
}

}  // namespace cem_fast::cuda
