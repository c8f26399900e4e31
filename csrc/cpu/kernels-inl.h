// All kernels for one instruction set. The includer defines CEM_FAST_CAPABILITY (the namespace),
// CEM_FAST_CAPABILITY_NAME and CEM_FAST_WIDTH (bytes of a vector), and enables the instruction set.

namespace cem_fast {
namespace CEM_FAST_CAPABILITY {

#include "simd-inl.h"
#include "math-inl.h"
#include "distance-inl.h"
#include "mixture_log_prob-inl.h"
#include "mixture_moments-inl.h"
#include "narrow-inl.h"
#include "component_statistics-inl.h"
#include "kmeans-inl.h"
#include "entropy_bound-inl.h"
#include "matrices-inl.h"

// Calls f with a null pointer to the features' element type.
template <class F>
void for_element(Element element, const F& f) {
  switch (element) {
    case Element::kFloat:
      return f(static_cast<const float*>(nullptr));
    case Element::kDouble:
      return f(static_cast<const double*>(nullptr));
    case Element::kBFloat16:
      return f(static_cast<const BFloat16*>(nullptr));
    case Element::kHalf:
      return f(static_cast<const Half*>(nullptr));
  }
}

void statistics_forward(const StatisticsForward& p, ParallelFor f) {
  for_element(p.x.element, [&]<class X>(const X*) { statistics_forward_of<X>(p, f); });
}

void statistics_backward(const StatisticsBackward& p, ParallelFor f) {
  for_element(p.x.element, [&]<class X>(const X*) { statistics_backward_of<X>(p, f); });
}

void kmeans(const KMeans& p, ParallelFor f) {
  for_element(p.x.element, [&]<class X>(const X*) { kmeans_of<X>(p, f); });
}

void log_prob_forward(const LogProbForward& p, ParallelFor f) {
  for_element(p.x.element, [&]<class X>(const X*) { log_prob_forward_of<X>(p, f); });
}

void log_prob_backward(const LogProbBackward& p, ParallelFor f) {
  for_element(p.x.element, [&]<class X>(const X*) { log_prob_backward_of<X>(p, f); });
}

void mixture_moments(const MixtureMoments& p, ParallelFor f) {
  for_element(p.x.element, [&]<class X>(const X*) { mixture_moments_of<X>(p, f); });
}

void candidate_distances(const CandidateDistances& p, ParallelFor f) {
  for_element(p.x.element,
              [&]<class X>(const X*) { candidate_distances_of<X, typename ParameterOf<X>::Type>(p, nullptr, f); });
}

void seeding(const Seeding& p, ParallelFor f) {
  for_element(p.x.element, [&]<class X>(const X*) { seeding_of<X>(p, f); });
}

extern const Kernels kernels = {CEM_FAST_CAPABILITY_NAME,
                                statistics_forward,
                                statistics_backward,
                                kmeans,
                                entropy_bound,
                                log_prob_forward,
                                log_prob_backward,
                                mixture_moments,
                                candidate_distances,
                                seeding,
                                inverse_roots,
                                matrix_log_joint,
                                matrix_moments};

}  // namespace CEM_FAST_CAPABILITY
}  // namespace cem_fast
