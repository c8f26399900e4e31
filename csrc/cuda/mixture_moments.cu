#include "mixture_moments.cuh"

namespace cem_fast::cuda {

namespace {

template <class X>
void moments_of(const MixtureMoments& p, Queue& queue) {
  using T = Parameter<X>;
  const int64_t K = p.mixture.components, D = p.x.dimension, columns = divide_up(D, kThreads);
  const Groups groups = group_rows(queue, p.x, p.mixture, 2 * K * D);
  const int64_t sums = groups.segments * K, width = p.mixture.diagonal ? D : columns;
  const MomentPartials<T> partials{queue.allocate<T>(sums), queue.allocate<T>(sums * D),
                                   queue.allocate<T>(sums * width), columns};
  for_each_posterior(queue, p.x, p.mixture, groups, p.responsibilities,
                     [&](const Slab& slab, const void* responsibilities, bool by_slot) {
                       queue.launch(moments_kernel<X>, slab.segments * columns, p, groups, slab,
                                    static_cast<const T*>(responsibilities), by_slot, partials);
                     });
  reduce(queue, groups, partials.s0, K, 1, false, static_cast<T*>(p.s0));
  reduce(queue, groups, partials.s1, K, D, false, static_cast<T*>(p.s1));
  reduce(queue, groups, partials.s2, K, width, !p.mixture.diagonal, static_cast<T*>(p.s2));
}

}  // namespace

void mixture_moments(const MixtureMoments& p, const Context& context) {
  Queue queue(context);
  for_element(p.x.element, [&]<class X>(const X*) { moments_of<X>(p, queue); });
}

}  // namespace cem_fast::cuda
