// The operators that differ between devices only in the kernels that they call. `Device` has the kernels as static
// functions, and a type `Call` for the tensors of one call.
#pragma once

#include <tuple>

#include "arguments.h"

namespace cem_fast {

template <class Device>
std::tuple<Tensor, Tensor> mixture_log_prob_fwd(const Tensor& x, const Tensor& means, const Tensor& variances,
                                                const Tensor& weights, const OptionalTensor& labels,
                                                bool with_responsibilities) {
  Arguments<typename Device::Call> a(x, means, labels);
  a.set_variances(variances, weights);
  Tensor log_prob = a.parameter({a.x.rows});
  Tensor responsibilities = a.parameter({a.x.rows, with_responsibilities ? a.mixture.components : 0});
  Device::log_prob_forward({a.x, a.mixture, data(log_prob), with_responsibilities ? data(responsibilities) : nullptr},
                           a.call);
  return {log_prob, responsibilities};
}

template <class Device>
Tensor mixture_log_prob_bwd(const Tensor& grad, const Tensor& x, const Tensor& means, const Tensor& variances,
                            const Tensor& weights, const OptionalTensor& labels, const Tensor& log_prob,
                            const Tensor& responsibilities) {
  Arguments<typename Device::Call> a(x, means, labels);
  a.set_variances(variances, weights);
  Tensor dx = a.gradient();
  Device::log_prob_backward({a.x, a.mixture, a.parameters(grad, a.x.rows), a.parameters(log_prob, a.x.rows),
                             a.responsibilities(responsibilities), data(dx)},
                            a.call);
  return dx;
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor> mixture_moments(const Tensor& row_weights, const Tensor& x, const Tensor& means,
                                                   const Tensor& variances, const Tensor& weights,
                                                   const OptionalTensor& labels, const Tensor& /*log_prob*/,
                                                   const Tensor& responsibilities) {
  Arguments<typename Device::Call> a(x, means, labels);
  a.set_variances(variances, weights);
  const int64_t C = a.mixture.classes, K = a.mixture.components;
  Tensor s0 = a.parameter({C, K}), s1 = a.parameter({C, K, a.x.dimension}), s2 = a.like_variances();
  Device::mixture_moments({a.x, a.mixture, a.parameters(row_weights, a.x.rows), a.responsibilities(responsibilities),
                           data(s0), data(s1), data(s2), nullptr},
                          a.call);
  return {s0, s1, s2};
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor> component_statistics_fwd(const Tensor& x, const Tensor& means,
                                                                    const OptionalTensor& labels,
                                                                    const OptionalTensor& variances,
                                                                    const OptionalTensor& weights, bool per_dimension,
                                                                    bool sums) {
  Arguments<typename Device::Call> a(x, means, labels);
  if (variances.has_value() && weights.has_value()) a.set_variances(*variances, *weights);
  const int64_t C = a.mixture.classes, K = a.mixture.components, D = a.x.dimension;
  Tensor counts = a.parameter({C, K}), scatter = per_dimension ? a.parameter({C, K, D}) : a.parameter({C, K});
  Tensor totals = sums ? a.parameter({C, K, D}) : a.parameter({0});
  Tensor assignment = a.call.empty({a.x.rows}, ScalarType::Long);
  Device::statistics_forward({a.x, a.mixture, per_dimension, data(counts), data(scatter), sums ? data(totals) : nullptr,
                              static_cast<int64_t*>(data(assignment))},
                             a.call);
  return {counts, scatter, totals, assignment};
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> kmeans(const Tensor& x, const Tensor& means,
                                                          const OptionalTensor& labels, int64_t max_iter, double tol,
                                                          bool per_dimension) {
  Arguments<typename Device::Call> a(x, means, labels);
  const int64_t C = a.mixture.classes, K = a.mixture.components, D = a.x.dimension;
  Tensor moved = a.parameter({C, K, D}), counts = a.parameter({C, K});
  Tensor scatter = per_dimension ? a.parameter({C, K, D}) : a.parameter({C, K});
  Tensor iterations = a.call.empty({C}, ScalarType::Long), converged = a.call.empty({C}, ScalarType::Long);
  Device::kmeans({a.x, a.mixture, max_iter, tol, per_dimension, data(moved), data(counts), data(scatter),
                  static_cast<int64_t*>(data(iterations)), static_cast<int64_t*>(data(converged))},
                 a.call);
  return {moved, counts, scatter, iterations, converged};
}

}  // namespace cem_fast
