#include "entropy_bound.cuh"

#include <algorithm>

namespace cem_fast::cuda {

namespace {

constexpr int64_t kMostBlocks = 1024;  // every block counts the whole batch

template <class T, class Statistics>
void bound_of(const Bound& p, const Statistics& statistics, Queue& queue) {
  const int64_t CK = p.classes * p.components;
  double* terms = queue.allocate<double>(CK);
  if (p.official) {
    const int64_t blocks = std::min(divide_up(CK, kThreads), kMostBlocks);
    queue.launch(official_kernel<T, Statistics>, blocks, p, statistics, terms);
  } else {
    queue.launch(paper_kernel<T, Statistics>, std::min(CK, kMostBlocks), p, statistics, terms);
  }
  queue.launch(value_kernel<T>, 1, terms, CK, static_cast<T*>(p.value));
}

template <class T>
void bound_of_given(const Bound& p, const void* counts, const void* scatter, Queue& queue) {
  bound_of<T>(p,
              Given<T>{p.components, static_cast<const T*>(counts), static_cast<const T*>(scatter),
                       p.diagonal ? p.dimension : 1},
              queue);
}

}  // namespace

void entropy_bound(const Bound& p, const void* counts, const void* scatter, bool is_double, const Context& context) {
  Queue queue(context);
  is_double ? bound_of_given<double>(p, counts, scatter, queue) : bound_of_given<float>(p, counts, scatter, queue);
}

void cem_forward(const Bound& p, const Features& x, const Mixture& mixture, int64_t* assignment,
                 const Context& context) {
  Queue queue(context);
  for_element(x.element, [&]<class X>(const X*) {
    using T = Parameter<X>;
    bound_of<T>(p, Summed<T>{partial_statistics<X>(queue, x, mixture, p.diagonal, false, assignment)}, queue);
  });
}

}  // namespace cem_fast::cuda
