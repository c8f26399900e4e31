// The operators of torch.ops.cem_fast on CPU tensors, through the stable ABI: tensors in, pointers to the kernels.

#include <algorithm>
#include <atomic>
#include <memory>
#include <tuple>

#include "../common/operators.h"
#include "dispatch.h"

namespace {

using namespace cem_fast;

// Distributes items over torch's threads. A thread takes a part of the remaining items whenever it is idle. Parts
// shrink, so that the other threads compensate for one that is delayed.
void parallel_for(int64_t items, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) {
  const int64_t pieces = (items + grain - 1) / grain;
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), pieces);
  if (threads <= 1) return body(0, items, context);
  std::atomic<int64_t> taken{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    while (true) {
      int64_t begin = taken.load(), end;
      do {
        if (begin >= items) return;
        end = std::min(items, begin + std::max(grain, (items - begin) / (2 * threads)));
      } while (!taken.compare_exchange_weak(begin, end));
      body(begin, end, context);
    }
  });
}

// The number in a tensor of one element.
double number(const Tensor& t) {
  STD_TORCH_CHECK(t.numel() == 1, "expected a tensor of one number");
  const void* data = t.const_data_ptr();
  switch (t.scalar_type()) {
    case ScalarType::Double:
      return *static_cast<const double*>(data);
    case ScalarType::Float:
      return static_cast<double>(*static_cast<const float*>(data));
    case ScalarType::Long:
      return static_cast<double>(*static_cast<const int64_t*>(data));
    default:
      STD_TORCH_CHECK(false, "expected a float32, float64 or int64 number");
  }
}

struct Cpu {
  struct Call : Tensors {
    explicit Call(const Tensor& t) : Tensors(aoti_torch_device_type_cpu(), t.get_device_index()) {}
  };

  static void log_prob_forward(const LogProbForward& p, const Call&) { kernels().log_prob_forward(p, parallel_for); }
  static void log_prob_backward(const LogProbBackward& p, const Call&) { kernels().log_prob_backward(p, parallel_for); }
  static void mixture_moments(const MixtureMoments& p, const Call&) { kernels().mixture_moments(p, parallel_for); }
  static void statistics_forward(const StatisticsForward& p, const Call&) {
    kernels().statistics_forward(p, parallel_for);
  }
  static void kmeans(const KMeans& p, const Call&) { kernels().kmeans(p, parallel_for); }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> mixture_statistics(const Tensor& x, const Tensor& means,
                                                              const Tensor& variances, const Tensor& weights,
                                                              const OptionalTensor& labels) {
  Arguments<Cpu::Call> a(x, means, labels);
  a.set_variances(variances, weights);
  const int64_t C = a.mixture.classes, K = a.mixture.components;
  Tensor s0 = a.parameter({C, K}), s1 = a.parameter({C, K, a.x.dimension}), s2 = a.like_variances();
  Tensor log_likelihood = a.call.empty({C}, ScalarType::Double);
  kernels().mixture_moments(
      {a.x, a.mixture, nullptr, nullptr, data(s0), data(s1), data(s2), static_cast<double*>(data(log_likelihood))},
      parallel_for);
  return {s0, s1, s2, log_likelihood};
}

Tensor component_statistics_bwd(const Tensor& grad_scatter, const OptionalTensor& scale, const Tensor& x,
                                const Tensor& means, const OptionalTensor& labels, const Tensor& assignment) {
  Arguments<Cpu::Call> a(x, means, labels);
  a.mixture.diagonal = grad_scatter.dim() == 3;
  const void* grad = a.parameters(grad_scatter, a.mixture.diagonal ? a.components() * a.x.dimension : a.components());
  Tensor dx = a.gradient();
  kernels().statistics_backward(
      {a.x, a.mixture, grad, scale.has_value() ? number(*scale) : 1, a.indices(assignment), data(dx)}, parallel_for);
  return dx;
}

// The bound of statistics that lie in `counts` and `scatter`.
std::tuple<Tensor, Tensor> bound(const Priors& p, const void* counts, const void* scatter, const Tensor& num_samples,
                                 const BoundOptions& o) {
  kernels().entropy_bound({p.dtype == ScalarType::Double,
                           p.diagonal,
                           p.classes,
                           p.components,
                           p.dimension,
                           counts,
                           scatter,
                           p.variances,
                           p.weights,
                           p.class_prior,
                           number(num_samples),
                           p.noise_variance,
                           p.noise_size,
                           o.official,
                           o.boost,
                           o.unbiased,
                           o.mean,
                           o.threshold,
                           o.gamma,
                           data(p.value),
                           data(p.slope)},
                          parallel_for);
  return {p.value, p.slope};
}

std::tuple<Tensor, Tensor> entropy_bound(const Tensor& counts, const Tensor& scatter, int64_t dimension,
                                         const Tensor& variances, const Tensor& weights, const Tensor& class_prior,
                                         const Tensor& num_samples, const Tensor& noise_variance, bool official,
                                         double boost, bool unbiased, bool mean, double threshold, double gamma) {
  const BoundOptions options{official, boost, unbiased, mean, threshold, gamma};
  STD_TORCH_CHECK(counts.scalar_type() == variances.scalar_type() && scatter.scalar_type() == variances.scalar_type(),
                  "counts and scatter must have the type of variances");
  Cpu::Call call(counts);
  const Priors priors(call, dimension, variances, weights, class_prior, num_samples, noise_variance, options);
  return bound(priors, call.dense(counts, weights.numel()), call.dense(scatter, variances.numel()), num_samples,
               options);
}

std::tuple<Tensor, Tensor, Tensor> cem_fwd(const Tensor& x, const Tensor& means, const OptionalTensor& labels,
                                           const Tensor& variances, const Tensor& weights, const Tensor& class_prior,
                                           const Tensor& num_samples, const Tensor& noise_variance, bool official,
                                           double boost, bool unbiased, bool mean, double threshold, double gamma) {
  const BoundOptions options{official, boost, unbiased, mean, threshold, gamma};
  Arguments<Cpu::Call> a(x, means, labels);
  const Priors priors(a.call, a.x.dimension, variances, weights, class_prior, num_samples, noise_variance, options);
  a.check(priors);
  const int64_t bytes = a.dtype() == ScalarType::Double ? 8 : 4, CK = a.components();
  const std::unique_ptr<char[]> counts(new char[CK * bytes]);
  const std::unique_ptr<char[]> scatter(new char[(priors.diagonal ? CK * a.x.dimension : CK) * bytes]);
  Tensor assignment = a.call.empty({a.x.rows}, ScalarType::Long);
  Cpu::statistics_forward(
      {a.x, a.mixture, priors.diagonal, counts.get(), scatter.get(), nullptr, static_cast<int64_t*>(data(assignment))},
      a.call);
  auto [value, slope] = bound(priors, counts.get(), scatter.get(), num_samples, options);
  return {value, slope, assignment};
}

std::tuple<Tensor, Tensor> candidate_distances(const Tensor& x, const Tensor& candidates, const OptionalTensor& labels,
                                               const Tensor& nearest, const Tensor& mass) {
  Arguments<Cpu::Call> a(x, candidates, labels);
  const int64_t C = a.mixture.classes, trials = a.mixture.components;
  STD_TORCH_CHECK(mass.numel() == a.x.rows, "mass must be [N]");
  Tensor distances = a.parameter({trials, a.x.rows}), potentials = a.call.empty({trials, C}, ScalarType::Double);
  kernels().candidate_distances({a.x, a.mixture, a.parameters(nearest, a.x.rows), a.call.doubles(mass), data(distances),
                                 static_cast<double*>(data(potentials))},
                                parallel_for);
  return {distances, potentials};
}

// Means [1, K, D] of one class.
Tensor kmeans_plus_plus(const Tensor& x, const Tensor& mass, const Tensor& uniform, int64_t num_components) {
  STD_TORCH_CHECK(x.dim() == 2 && x.size(0) > 0, "x must be [N, D] with at least one row");
  STD_TORCH_CHECK(num_components > 0, "num_components must be positive, got ", num_components);
  const ScalarType dtype = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor means = Cpu::Call(x).empty({1, num_components, x.size(1)}, dtype);
  Arguments<Cpu::Call> a(x, means, std::nullopt);
  const int64_t others = num_components - 1, candidates = others == 0 ? 1 : (uniform.numel() - 1) / others;
  STD_TORCH_CHECK(mass.numel() == a.x.rows, "mass must be [N]");
  STD_TORCH_CHECK(candidates > 0 && uniform.numel() == 1 + others * candidates, "uniform must be [1 + (K - 1) T]");
  kernels().seeding({a.x, a.call.doubles(mass), a.call.doubles(uniform), num_components, candidates, data(means)},
                    parallel_for);
  return means;
}

std::tuple<Tensor, Tensor> inverse_roots(const Tensor& matrices) {
  const int64_t D = matrices.size(matrices.dim() - 1);
  STD_TORCH_CHECK(matrices.dim() == 3 && matrices.size(1) == D && D > 0, "matrices must be [M, D, D]");
  STD_TORCH_CHECK(matrices.scalar_type() == ScalarType::Double, "matrices must be float64");
  Cpu::Call call(matrices);
  const int64_t count = matrices.size(0);
  Tensor roots = call.empty({count, D, D}, ScalarType::Double), half_logdets = call.empty({count}, ScalarType::Double);
  kernels().inverse_roots({count, D, static_cast<const double*>(call.dense(matrices, matrices.numel())),
                           static_cast<double*>(data(roots)), static_cast<double*>(data(half_logdets))},
                          parallel_for);
  return {roots, half_logdets};
}

Tensor matrix_log_joint(const Tensor& x, const Tensor& means, const Tensor& roots, const Tensor& constants,
                        const OptionalTensor& labels) {
  Arguments<Cpu::Call> a(x, means, labels);
  STD_TORCH_CHECK(a.dtype() == ScalarType::Double && roots.scalar_type() == a.dtype(), "x and roots must be float64");
  const int64_t D = a.x.dimension, C = a.mixture.classes, K = a.mixture.components;
  const bool tied = roots.dim() == 3;
  Tensor joint = a.parameter({a.x.rows, K});
  kernels().matrix_log_joint(
      {a.x, a.mixture, tied, static_cast<const double*>(a.parameters(roots, (tied ? C : C * K) * D * D)),
       static_cast<const double*>(a.parameters(constants, C * K)), static_cast<double*>(data(joint))},
      parallel_for);
  return joint;
}

std::tuple<Tensor, Tensor, Tensor> matrix_moments(const Tensor& x, const Tensor& means, const Tensor& responsibilities,
                                                  const OptionalTensor& labels, bool tied) {
  Arguments<Cpu::Call> a(x, means, labels);
  STD_TORCH_CHECK(a.dtype() == ScalarType::Double, "x must be float64");
  const int64_t D = a.x.dimension, C = a.mixture.classes, K = a.mixture.components;
  Tensor s0 = a.parameter({C, K}), s1 = a.parameter({C, K, D});
  Tensor s2 = tied ? a.parameter({C, D, D}) : a.parameter({C, K, D, D});
  kernels().matrix_moments(
      {a.x, a.mixture, tied, static_cast<const double*>(a.parameters(responsibilities, a.x.rows * K)),
       static_cast<double*>(data(s0)), static_cast<double*>(data(s1)), static_cast<double*>(data(s2))},
      parallel_for);
  return {s0, s1, s2};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cem_fast, CPU, m) {
  m.impl("mixture_log_prob_fwd", TORCH_BOX(&mixture_log_prob_fwd<Cpu>));
  m.impl("mixture_log_prob_bwd", TORCH_BOX(&mixture_log_prob_bwd<Cpu>));
  m.impl("mixture_moments", TORCH_BOX(&mixture_moments<Cpu>));
  m.impl("mixture_statistics", TORCH_BOX(&mixture_statistics));
  m.impl("component_statistics_fwd", TORCH_BOX(&component_statistics_fwd<Cpu>));
  m.impl("component_statistics_bwd", TORCH_BOX(&component_statistics_bwd));
  m.impl("kmeans", TORCH_BOX(&kmeans<Cpu>));
  m.impl("entropy_bound", TORCH_BOX(&entropy_bound));
  m.impl("cem_fwd", TORCH_BOX(&cem_fwd));
  m.impl("candidate_distances", TORCH_BOX(&candidate_distances));
  m.impl("kmeans_plus_plus", TORCH_BOX(&kmeans_plus_plus));
  m.impl("inverse_roots", TORCH_BOX(&inverse_roots));
  m.impl("matrix_log_joint", TORCH_BOX(&matrix_log_joint));
  m.impl("matrix_moments", TORCH_BOX(&matrix_moments));
}
