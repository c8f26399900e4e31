#include "global_mixture.cuh"

namespace cem_fast::cuda {

namespace {

// Writes log p and the posterior where they are not null.
void posterior(Queue& queue, const Features& x, const Mixture& mixture, const Groups& groups, const Slab& slab,
               const double* normalizers, void* log_prob, void* responsibilities, bool by_slot) {
  const int64_t blocks = divide_up(slab.slots, kPosteriorRows);
  if (x.element == Element::kDouble) {
    queue.launch(posterior_kernel<double>, blocks, mixture, groups, slab, normalizers, static_cast<double*>(log_prob),
                 static_cast<double*>(responsibilities), by_slot);
  } else {
    queue.launch(posterior_kernel<float>, blocks, mixture, groups, slab, normalizers, static_cast<float*>(log_prob),
                 static_cast<float*>(responsibilities), by_slot);
  }
}

}  // namespace

double* log_normalizers(Queue& queue, const Features& x, const Mixture& mixture) {
  const int64_t components = mixture.classes * mixture.components;
  double* out = queue.allocate<double>(components);
  const bool is_double = x.element == Element::kDouble;
  queue.launch(is_double ? normalizer_kernel<double> : normalizer_kernel<float>, components, mixture, x.dimension, out);
  return out;
}

void for_each_posterior(Queue& queue, const Features& x, const Mixture& mixture, const Groups& groups, const void* kept,
                        const UsePosterior& f) {
  if (kept != nullptr) return f({0, groups.segments, groups.segments * groups.size, 0, 0, nullptr}, kept, false);
  Slabs slabs(queue, x, mixture, groups);
  const double* normalizers = log_normalizers(queue, x, mixture);
  const int64_t numbers = slabs.most_slots() * mixture.components;
  void* responsibilities = x.element == Element::kDouble ? static_cast<void*>(queue.allocate<double>(numbers))
                                                         : static_cast<void*>(queue.allocate<float>(numbers));
  slabs.for_each(mixture.diagonal, [&](const Slab& slab) {
    posterior(queue, x, mixture, groups, slab, normalizers, nullptr, responsibilities, true);
    f(slab, responsibilities, true);
  });
}

void log_prob_forward(const LogProbForward& p, const Context& context) {
  Queue queue(context);
  if (is_global(p.x, p.mixture, p.responsibilities)) return global_log_prob(queue, p);
  const Groups groups = group_rows(queue, p.x, p.mixture, 0);
  const double* normalizers = log_normalizers(queue, p.x, p.mixture);
  Slabs(queue, p.x, p.mixture, groups).for_each(p.mixture.diagonal, [&](const Slab& slab) {
    posterior(queue, p.x, p.mixture, groups, slab, normalizers, p.log_prob, p.responsibilities, false);
  });
}

void log_prob_backward(const LogProbBackward& p, const Context& context) {
  Queue queue(context);
  if (is_global(p.x, p.mixture, p.responsibilities)) return global_gradient(queue, p);
  const Groups groups = group_rows(queue, p.x, p.mixture, 0);
  for_each_posterior(queue, p.x, p.mixture, groups, p.responsibilities,
                     [&](const Slab& slab, const void* r, bool by_slot) {
                       const int64_t blocks = slab.slots / kGradientRows * divide_up(p.x.dimension, kThreads);
                       for_element(p.x.element, [&]<class X>(const X*) {
                         queue.launch(p.mixture.diagonal ? gradient_kernel<true, X> : gradient_kernel<false, X>, blocks,
                                      p, groups, slab, static_cast<const Parameter<X>*>(r), by_slot);
                       });
                     });
}

}  // namespace cem_fast::cuda
