#include "entropy_bound.cuh"

#include <algorithm>

namespace cem_fast::cuda {

namespace {

#ifdef CEM_FAST_SMALL_PARTS  // so that blocks process several of few classes, too
constexpr int64_t kMostBlocks = 2;
#else
constexpr int64_t kMostBlocks = 1024;  // every block counts the whole batch
#endif

template <class T>
void bound_of(const Bound& p, const void* counts, const void* scatter, Queue& queue) {
  const int64_t blocks = p.official ? 1 : std::min(p.classes, kMostBlocks);
  double* room = queue.allocate<double>(blocks * 2 * kWarps * p.components);
  double* terms = queue.allocate<double>(p.classes * p.components);
  queue.launch(bound_kernel<T>, blocks, p, static_cast<const T*>(counts), static_cast<const T*>(scatter),
               take_tickets(queue), room, terms);
}

}  // namespace

void entropy_bound(const Bound& p, const void* counts, const void* scatter, bool is_double, const Context& context) {
  Queue queue(context);
  is_double ? bound_of<double>(p, counts, scatter, queue) : bound_of<float>(p, counts, scatter, queue);
}

}  // namespace cem_fast::cuda
