#include "component_statistics.cuh"

namespace cem_fast::cuda {

namespace {

template <class X>
void statistics_of(const StatisticsForward& p, Queue& queue) {
  using T = Parameter<X>;
  const int64_t K = p.mixture.components, D = p.x.dimension;
  const StatisticsPartials<T> s =
      partial_statistics<X>(queue, p.x, p.mixture, p.per_dimension, p.sums != nullptr, p.assignment);
  reduce(queue, s.groups, s.counts, K, 1, false, static_cast<T*>(p.counts));
  if (p.per_dimension) {
    reduce(queue, s.groups, s.scatter, K, D, false, static_cast<T*>(p.scatter));
  } else {
    reduce(queue, s.groups, s.distance, K, 1, false, static_cast<T*>(p.scatter));
  }
  if (p.sums == nullptr) return;
  T* sums = static_cast<T*>(p.sums);
  const int64_t size = p.mixture.classes * K * D;
  reduce(queue, s.groups, s.sums, K, D, false, sums);
  queue.launch(add_means_kernel<T>, divide_up(size, kThreads), size, D, static_cast<const T*>(p.counts),
               static_cast<const T*>(p.mixture.means), sums);
}

}  // namespace

template <class X>
StatisticsPartials<Parameter<X>> partial_statistics(Queue& queue, const Features& x, const Mixture& mixture,
                                                    bool per_dimension, bool sums, int64_t* assignment) {
  using T = Parameter<X>;
  const int64_t K = mixture.components, D = x.dimension;
  const bool posterior = mixture.variances != nullptr, weighted = posterior && mixture.diagonal;
  const Groups groups = group_rows(queue, x, mixture, (per_dimension + sums) * K * D);
  const double* normalizers = posterior ? log_normalizers(queue, x, mixture) : nullptr;
  double* distance = queue.allocate<double>(x.rows);
  Slabs(queue, x, mixture, groups).for_each(weighted, [&](const Slab& slab) {
    queue.launch(choose_kernel<T>, divide_up(slab.slots, kThreads), mixture, groups, slab, normalizers, assignment,
                 distance);
  });
  if (weighted && !per_dimension) {
    queue.launch(own_distance_kernel<X>, x.rows, x, mixture, groups, assignment, distance);
  }
  const int64_t segments = groups.segments * K;
  const StatisticsPartials<T> partials{groups,
                                       K,
                                       D,
                                       queue.allocate<T>(segments),
                                       queue.allocate<double>(segments),
                                       per_dimension ? queue.allocate<T>(segments * D) : nullptr,
                                       sums ? queue.allocate<T>(segments * D) : nullptr};
  const int64_t columns = per_dimension || sums ? divide_up(D, kThreads) : 0;
  queue.launch(partial_statistics_kernel<X>, groups.segments * (columns + 1), x, mixture, assignment, distance, columns,
               partials);
  return partials;
}

template StatisticsPartials<float> partial_statistics<float>(Queue&, const Features&, const Mixture&, bool, bool,
                                                             int64_t*);
template StatisticsPartials<double> partial_statistics<double>(Queue&, const Features&, const Mixture&, bool, bool,
                                                               int64_t*);
template StatisticsPartials<float> partial_statistics<__half>(Queue&, const Features&, const Mixture&, bool, bool,
                                                              int64_t*);
template StatisticsPartials<float> partial_statistics<__nv_bfloat16>(Queue&, const Features&, const Mixture&, bool,
                                                                     bool, int64_t*);

void statistics_forward(const StatisticsForward& p, const Context& context) {
  Queue queue(context);
  for_element(p.x.element, [&]<class X>(const X*) { statistics_of<X>(p, queue); });
}

void scatter_gradient(const ScatterGradient& p, const Context& context) {
  Queue queue(context);
  for_element(p.x.element, [&]<class X>(const X*) {
    constexpr auto kSize = static_cast<int64_t>(sizeof(X)), kParameter = static_cast<int64_t>(sizeof(Parameter<X>));
    const int64_t D = p.x.dimension;
    const bool aligned = is_aligned(p.x.data, p.x.stride * kSize, D * kSize) && is_aligned(p.dx, 0, 0) &&
                         is_aligned(p.mixture.means, 0, D * kParameter) &&
                         (!p.mixture.diagonal || is_aligned(p.grad_scatter, 0, 0));
    const int64_t pieces = divide_up(D, aligned ? Piece<X, true, 4>::kDims : Piece<X, false, 4>::kDims);
    queue.launch(aligned ? scatter_gradient_kernel<X, true> : scatter_gradient_kernel<X, false>,
                 divide_up(p.x.rows * pieces, kWarps), p, pieces);
  });
}

}  // namespace cem_fast::cuda
