#include "kmeans.cuh"

namespace cem_fast::cuda {

namespace {

#ifdef CEM_FAST_SMALL_PARTS  // so that segments of small problems are longer than a block's rows
constexpr int64_t kAssignSegments = 20;
#else
// four blocks on each of an H100's multiprocessors; a constant, for equal bits
constexpr int64_t kAssignSegments = 528;
#endif

template <class X>
void kmeans_of(const KMeans& p, Queue& queue) {
  using T = Parameter<X>;
  const int64_t C = p.mixture.classes, K = p.mixture.components, D = p.x.dimension, size = C * K * D;
  Fit fit(queue, p.x, p.mixture, kAssignSegments, K * D, p.iterations, p.converged);
  const int64_t segments = fit.groups.segments, columns = divide_up(D, fit.shares.columns());
  const T* first = static_cast<const T*>(p.mixture.means);
  const KMeansState<T> s{static_cast<T*>(p.means),
                         queue.allocate<int32_t>(p.x.rows),
                         queue.allocate<T>(segments * K),
                         queue.allocate<T>(segments * K * D),
                         queue.allocate<double>(segments),
                         queue.allocate<double>(size),
                         queue.allocate<double>(C * K),
                         queue.allocate<double>(C * K * columns),
                         queue.allocate<double>(C),
                         queue.allocate<double>(segments),
                         queue.allocate<int64_t>(segments),
                         columns,
                         p.tol};
  queue.copy(s.means, first, size);
  fit.run(p.max_iter, [&](int64_t iteration) {
    queue.launch(assign_kernel<X>, segments, p.x, K, fit.groups, fit.classes, s);
    queue.launch(move_means_kernel<T>, C * K * columns, K, D, fit.groups, fit.shares, fit.classes,
                 iteration == 0 ? first : nullptr, s);
    queue.launch(reseed_kernel<X>, segments, p.x, K, fit.groups, fit.classes, s);
  });
  Mixture fitted = p.mixture;
  fitted.means = p.means;
  statistics_forward({p.x, fitted, p.per_dimension, p.counts, p.scatter, nullptr, queue.allocate<int64_t>(p.x.rows)},
                     queue.context());
  fit.poison(s.means, size);
}

}  // namespace

void kmeans(const KMeans& p, const Context& context) {
  Queue queue(context);
  for_element(p.x.element, [&]<class X>(const X*) { kmeans_of<X>(p, queue); });
}

}  // namespace cem_fast::cuda
