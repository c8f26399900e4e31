#include "expectation_maximization.cuh"

namespace cem_fast::cuda {

namespace {

#ifdef CEM_FAST_SMALL_PARTS  // so that small problems have several, and segments that are longer than a block's rows
constexpr int64_t kMostPosteriors = 1 << 10;
constexpr int64_t kMomentSegments = 20;
#else
constexpr int64_t kMostPosteriors = 1 << 25;
constexpr int64_t kMomentSegments = 264;  // two for each of an H100's multiprocessors; a constant, for equal bits
#endif

template <class X>
void maximization_of(const ExpectationMaximization& p, Queue& queue) {
  using T = Parameter<X>;
  const Mixture& m = p.mixture;
  const int64_t C = m.classes, K = m.components, D = p.x.dimension, wide = divide_up(D, kThreads);
  const int64_t spread = m.diagonal ? C * K * D : C * K, squares = m.diagonal ? D : wide;
  Fit fit(queue, p.x, m, kMomentSegments, K * (D + squares), p.iterations, p.converged);
  const int64_t segments = fit.groups.segments, parts = divide_up(fit.groups.size, kExpectRows);
  const int64_t columns = divide_up(D, fit.shares.columns());
  const int64_t window =
      std::clamp<int64_t>(kMostPosteriors / (fit.groups.size * K), 1, std::max<int64_t>(segments, 1));
  const int64_t posteriors = window * fit.groups.size * K;
  const MixtureState<T> s{static_cast<T*>(p.means),
                          static_cast<T*>(p.variances),
                          static_cast<T*>(p.weights),
                          p.counts,
                          p.bound,
                          queue.allocate<T>(spread),
                          queue.allocate<double>(C * K),
                          K <= kJointsOfBlock ? nullptr : queue.allocate<double>(posteriors),
                          queue.allocate<T>(posteriors),
                          queue.allocate<double>(segments * parts),
                          queue.allocate<T>(segments * K),
                          queue.allocate<T>(segments * K * D),
                          queue.allocate<T>(segments * K * squares),
                          queue.allocate<double>(C * K * columns),
                          queue.allocate<double>(C * K * columns),
                          m.diagonal,
                          wide,
                          columns,
                          p.tol,
                          p.reg_covar,
                          p.tiny};
  queue.copy(s.means, static_cast<const T*>(m.means), C * K * D);
  queue.copy(s.variances, static_cast<const T*>(m.variances), spread);
  queue.copy(s.weights, static_cast<const T*>(m.weights), C * K);
  queue.launch(prepare_kernel<T>, C * K, K, D, s);
  fit.run(p.max_iter, [&](int64_t iteration) {
    for (int64_t begin = 0; begin < segments; begin += window) {
      const Window at{begin, std::min(window, segments - begin)};
      queue.launch(m.diagonal ? expect_kernel<true, X> : expect_kernel<false, X>, at.segments * parts, p.x, K,
                   fit.groups, fit.classes, at, s);
      queue.launch(fit_moments_kernel<X>, at.segments * wide, p.x, K, fit.groups, fit.classes, at, s);
    }
    queue.launch(maximize_kernel<T>, C * K * columns, K, D, iteration == 0, fit.groups, fit.shares, fit.classes, s);
  });
}

}  // namespace

void expectation_maximization(const ExpectationMaximization& p, const Context& context) {
  Queue queue(context);
  for_element(p.x.element, [&]<class X>(const X*) { maximization_of<X>(p, queue); });
}

}  // namespace cem_fast::cuda
