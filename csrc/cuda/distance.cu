#include "distance.cuh"

#include <algorithm>

namespace cem_fast::cuda {

namespace {

#ifdef CEM_FAST_SMALL_PARTS  // so that small problems have several
constexpr int64_t kNumbersOfSlab = 1 << 10;
#else
constexpr int64_t kNumbersOfSlab = 1 << 23;
#endif
constexpr int64_t kEnoughBlocks = 256;  // a constant, so that every device gives the same bits
constexpr int64_t kSmallestShare = 4 * kTileDims;

}  // namespace

Slabs::Slabs(Queue& queue, const Features& x, const Mixture& mixture, const Groups& groups)
    : queue_(queue), x_(x), mixture_(mixture), groups_(groups) {
  const int64_t K = mixture.components;
  const int64_t tiles = (x.rows / kTileRows + std::min(groups.classes, x.rows)) * divide_up(K, kTileComponents);
  const int64_t wanted = kEnoughBlocks / std::max<int64_t>(tiles, 1);
  const int64_t splits = std::clamp<int64_t>(wanted, 1, std::max<int64_t>(1, x.dimension / kSmallestShare));
  split_dims_ = divide_up(divide_up(x.dimension, splits), kTileDims) * kTileDims;
  splits_ = divide_up(x.dimension, split_dims_);
  segments_ = std::max<int64_t>(1, kNumbersOfSlab / (groups.size * K * splits_));
  segments_ = std::min(segments_, std::max<int64_t>(groups.segments, 1));
  distance_ = queue.allocate<double>(splits_ * K * most_slots());
}

void Slabs::measure(const Slab& slab, bool weighted) {
  const int64_t blocks = slab.slots / kTileRows * divide_up(mixture_.components, kTileComponents) * slab.splits;
  for_element(x_.element, [&]<class X>(const X*) {
    queue_.launch(weighted ? distance_kernel<true, X> : distance_kernel<false, X>, blocks, x_, mixture_, groups_, slab);
  });
}

}  // namespace cem_fast::cuda
