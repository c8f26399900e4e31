// The operators of torch.ops.cem_fast on CPU tensors, through the stable ABI: tensors in, pointers to the kernels.
// The Python layer has checked shapes; what is checked here again is what would read or write out of bounds.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <initializer_list>
#include <limits>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "dispatch.h"
#include "problem.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Shares items out among torch's threads. A thread takes a piece of what is left when it is done with the last one, and
// pieces get smaller: where other work holds up one thread, the rest do its share.
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

int32_t code_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double:
      return aoti_torch_dtype_float64();
    case ScalarType::Long:
      return aoti_torch_dtype_int64();
    case ScalarType::BFloat16:
      return aoti_torch_dtype_bfloat16();
    case ScalarType::Half:
      return aoti_torch_dtype_float16();
    default:
      return aoti_torch_dtype_float32();
  }
}

// A contiguous tensor without a trip through the dispatcher.
Tensor empty(std::initializer_list<int64_t> sizes, ScalarType dtype) {
  int64_t size[3], stride[3], rank = 0, step = 1;
  for (const int64_t s : sizes) size[rank++] = s;
  for (int64_t i = rank - 1; i >= 0; --i) {
    stride[i] = step;
    step *= size[i] > 1 ? size[i] : 1;
  }
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(rank, size, stride, code_of(dtype), aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

cem_fast::Element element_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return cem_fast::Element::kFloat;
    case ScalarType::Double:
      return cem_fast::Element::kDouble;
    case ScalarType::BFloat16:
      return cem_fast::Element::kBFloat16;
    case ScalarType::Half:
      return cem_fast::Element::kHalf;
    default:
      STD_TORCH_CHECK(false, "x must be float32, float64, bfloat16 or float16");
  }
}

ScalarType parameter_dtype(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
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

// The tensors of one call, made contiguous and kept alive while the kernel runs.
class Arguments {
 public:
  cem_fast::Features x;
  cem_fast::Mixture mixture;

  Arguments(const Tensor& features, const Tensor& means, const OptionalTensor& labels)
      : dtype_(parameter_dtype(features)), features_dtype_(features.scalar_type()) {
    kept_.reserve(10);
    STD_TORCH_CHECK(features.dim() == 2 && means.dim() == 3 && features.size(1) == means.size(2),
                    "x must be [N, D] and means [C, K, D]");
    const int64_t N = features.size(0), D = features.size(1);
    STD_TORCH_CHECK(N <= std::numeric_limits<int32_t>::max(), "x must have fewer than 2^31 rows");
    const bool dense_rows = features.is_contiguous() || (features.stride(1) == 1 && features.stride(0) >= D);
    const Tensor& rows = keep(dense_rows ? features : torch::stable::contiguous(features));
    x = {rows.const_data_ptr(), N > 1 ? rows.stride(0) : D, element_of(features_dtype_), N, D};
    mixture = {means.size(0), means.size(1), nullptr, nullptr, nullptr, nullptr, false};
    mixture.means = parameters(means, components() * D);
    if (labels.has_value()) {
      mixture.labels = indices(*labels);
    } else {
      STD_TORCH_CHECK(mixture.classes == 1, "labels may be left out for one class only");
    }
  }

  void set_variances(const Tensor& variances, const Tensor& weights) {
    mixture.diagonal = variances.dim() == 3;
    mixture.variances = parameters(variances, mixture.diagonal ? components() * x.dimension : components());
    mixture.weights = parameters(weights, components());
  }

  // A tensor of the parameters' type and of a known number of elements.
  const void* parameters(const Tensor& t, int64_t numel) {
    STD_TORCH_CHECK(t.scalar_type() == dtype_, "parameters must be float64 with float64 features, else float32");
    STD_TORCH_CHECK(t.numel() == numel, "expected ", numel, " elements, got ", t.numel());
    return keep(dense(t)).const_data_ptr();
  }

  // One int64 for each row.
  const int64_t* indices(const Tensor& t) {
    STD_TORCH_CHECK(t.scalar_type() == ScalarType::Long && t.numel() == x.rows, "labels must be int64 [N]");
    return static_cast<const int64_t*>(keep(dense(t)).const_data_ptr());
  }

  // [N, K], or null for [N, 0]: not kept.
  const void* responsibilities(const Tensor& t) {
    return t.size(1) == 0 ? nullptr : parameters(t, x.rows * mixture.components);
  }

  Tensor gradient() const { return empty({x.rows, x.dimension}, features_dtype_); }
  Tensor parameter(std::initializer_list<int64_t> sizes) const { return empty(sizes, dtype_); }
  Tensor like_variances() const {
    return mixture.diagonal ? parameter({mixture.classes, mixture.components, x.dimension})
                            : parameter({mixture.classes, mixture.components});
  }
  int64_t components() const { return mixture.classes * mixture.components; }
  bool is_double() const { return dtype_ == ScalarType::Double; }

 private:
  const Tensor& keep(const Tensor& t) { return kept_.emplace_back(t); }

  ScalarType dtype_, features_dtype_;
  std::vector<Tensor> kept_;
};

void* data(const Tensor& t) { return t.mutable_data_ptr(); }

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> kmeans(const Tensor& x, const Tensor& means,
                                                          const OptionalTensor& labels, int64_t max_iter, double tol,
                                                          bool per_dimension) {
  Arguments a(x, means, labels);
  const int64_t C = a.mixture.classes, K = a.mixture.components, D = a.x.dimension;
  Tensor moved = a.parameter({C, K, D}), counts = a.parameter({C, K});
  Tensor scatter = per_dimension ? a.parameter({C, K, D}) : a.parameter({C, K});
  Tensor iterations = empty({C}, ScalarType::Long), converged = empty({C}, ScalarType::Long);
  cem_fast::kernels().kmeans({a.x, a.mixture, max_iter, tol, per_dimension, data(moved), data(counts), data(scatter),
                              static_cast<int64_t*>(data(iterations)), static_cast<int64_t*>(data(converged))},
                             parallel_for);
  return {moved, counts, scatter, iterations, converged};
}

std::tuple<Tensor, Tensor> mixture_log_prob_fwd(const Tensor& x, const Tensor& means, const Tensor& variances,
                                                const Tensor& weights, const OptionalTensor& labels,
                                                bool with_responsibilities) {
  Arguments a(x, means, labels);
  a.set_variances(variances, weights);
  Tensor log_prob = a.parameter({a.x.rows});
  Tensor responsibilities = a.parameter({a.x.rows, with_responsibilities ? a.mixture.components : 0});
  cem_fast::kernels().log_prob_forward(
      {a.x, a.mixture, data(log_prob), with_responsibilities ? data(responsibilities) : nullptr}, parallel_for);
  return {log_prob, responsibilities};
}

Tensor mixture_log_prob_bwd(const Tensor& grad, const Tensor& x, const Tensor& means, const Tensor& variances,
                            const Tensor& weights, const OptionalTensor& labels, const Tensor& log_prob,
                            const Tensor& responsibilities) {
  Arguments a(x, means, labels);
  a.set_variances(variances, weights);
  Tensor dx = a.gradient();
  cem_fast::kernels().log_prob_backward({a.x, a.mixture, a.parameters(grad, a.x.rows), a.parameters(log_prob, a.x.rows),
                                         a.responsibilities(responsibilities), data(dx)},
                                        parallel_for);
  return dx;
}

std::tuple<Tensor, Tensor, Tensor> mixture_moments(const Tensor& row_weights, const Tensor& x, const Tensor& means,
                                                   const Tensor& variances, const Tensor& weights,
                                                   const OptionalTensor& labels, const Tensor& /*log_prob*/,
                                                   const Tensor& responsibilities) {
  Arguments a(x, means, labels);
  a.set_variances(variances, weights);
  const int64_t C = a.mixture.classes, K = a.mixture.components;
  Tensor s0 = a.parameter({C, K}), s1 = a.parameter({C, K, a.x.dimension}), s2 = a.like_variances();
  cem_fast::kernels().mixture_moments({a.x, a.mixture, a.parameters(row_weights, a.x.rows),
                                       a.responsibilities(responsibilities), data(s0), data(s1), data(s2), nullptr},
                                      parallel_for);
  return {s0, s1, s2};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> mixture_statistics(const Tensor& x, const Tensor& means,
                                                              const Tensor& variances, const Tensor& weights,
                                                              const OptionalTensor& labels) {
  Arguments a(x, means, labels);
  a.set_variances(variances, weights);
  const int64_t C = a.mixture.classes, K = a.mixture.components;
  Tensor s0 = a.parameter({C, K}), s1 = a.parameter({C, K, a.x.dimension}), s2 = a.like_variances();
  Tensor log_likelihood = empty({C}, ScalarType::Double);
  cem_fast::kernels().mixture_moments(
      {a.x, a.mixture, nullptr, nullptr, data(s0), data(s1), data(s2), static_cast<double*>(data(log_likelihood))},
      parallel_for);
  return {s0, s1, s2, log_likelihood};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> component_statistics_fwd(const Tensor& x, const Tensor& means,
                                                                    const OptionalTensor& labels,
                                                                    const OptionalTensor& variances,
                                                                    const OptionalTensor& weights, bool per_dimension,
                                                                    bool sums) {
  Arguments a(x, means, labels);
  if (variances.has_value() && weights.has_value()) a.set_variances(*variances, *weights);
  const int64_t C = a.mixture.classes, K = a.mixture.components, D = a.x.dimension;
  Tensor counts = a.parameter({C, K}), scatter = per_dimension ? a.parameter({C, K, D}) : a.parameter({C, K});
  Tensor totals = sums ? a.parameter({C, K, D}) : a.parameter({0}), assignment = empty({a.x.rows}, ScalarType::Long);
  cem_fast::kernels().statistics_forward({a.x, a.mixture, per_dimension, data(counts), data(scatter),
                                          sums ? data(totals) : nullptr, static_cast<int64_t*>(data(assignment))},
                                         parallel_for);
  return {counts, scatter, totals, assignment};
}

Tensor component_statistics_bwd(const Tensor& grad_scatter, const OptionalTensor& scale, const Tensor& x,
                                const Tensor& means, const OptionalTensor& labels, const Tensor& assignment) {
  Arguments a(x, means, labels);
  a.mixture.diagonal = grad_scatter.dim() == 3;
  const void* grad = a.parameters(grad_scatter, a.mixture.diagonal ? a.components() * a.x.dimension : a.components());
  Tensor dx = a.gradient();
  cem_fast::kernels().statistics_backward(
      {a.x, a.mixture, grad, scale.has_value() ? number(*scale) : 1, a.indices(assignment), data(dx)}, parallel_for);
  return dx;
}

// The scalars of the loss, in the order of the schema.
struct BoundOptions {
  bool official;
  double boost;
  bool unbiased;
  bool mean;
  double threshold;
  double gamma;
};

// The bound of statistics that lie in `counts` and `scatter`.
std::tuple<Tensor, Tensor> bound(const void* counts, const void* scatter, int64_t dimension, const Tensor& variances,
                                 const Tensor& weights, const Tensor& class_prior, const Tensor& num_samples,
                                 const Tensor& noise_variance, const BoundOptions& o) {
  const ScalarType dtype = variances.scalar_type();
  const int64_t C = weights.size(0), K = weights.size(1), CK = C * K;
  const bool diagonal = variances.dim() == 3;
  const int64_t noise_size = noise_variance.numel();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, "variances must be float32 or float64");
  STD_TORCH_CHECK(weights.scalar_type() == dtype && class_prior.scalar_type() == dtype && class_prior.numel() == C &&
                      variances.numel() == (diagonal ? CK * dimension : CK),
                  "variances, weights [C, K] and class_prior [C] must agree in type and shape");
  STD_TORCH_CHECK(noise_size == 1 || (noise_size == dimension && !o.official), "noise_variance must be [1] or [D]");
  const Tensor v = dense(variances), w = dense(weights), prior = dense(class_prior);
  const Tensor noise =
      dense(noise_variance.scalar_type() == ScalarType::Double ? noise_variance
                                                               : torch::stable::to(noise_variance, ScalarType::Double));
  Tensor value = empty({}, dtype);
  Tensor slope = diagonal ? empty({C, K, dimension}, dtype) : empty({C, K}, dtype);
  cem_fast::kernels().entropy_bound({dtype == ScalarType::Double,
                                     diagonal,
                                     C,
                                     K,
                                     dimension,
                                     counts,
                                     scatter,
                                     v.const_data_ptr(),
                                     w.const_data_ptr(),
                                     prior.const_data_ptr(),
                                     number(num_samples),
                                     static_cast<const double*>(noise.const_data_ptr()),
                                     noise_size,
                                     o.official,
                                     o.boost,
                                     o.unbiased,
                                     o.mean,
                                     o.threshold,
                                     o.gamma,
                                     data(value),
                                     data(slope)},
                                    parallel_for);
  return {value, slope};
}

std::tuple<Tensor, Tensor> entropy_bound(const Tensor& counts, const Tensor& scatter, int64_t dimension,
                                         const Tensor& variances, const Tensor& weights, const Tensor& class_prior,
                                         const Tensor& num_samples, const Tensor& noise_variance, bool official,
                                         double boost, bool unbiased, bool mean, double threshold, double gamma) {
  STD_TORCH_CHECK(counts.scalar_type() == variances.scalar_type() && scatter.scalar_type() == variances.scalar_type() &&
                      counts.numel() == weights.numel() && scatter.numel() == variances.numel(),
                  "counts and scatter must match weights and variances");
  const Tensor n = dense(counts), s = dense(scatter);
  return bound(n.const_data_ptr(), s.const_data_ptr(), dimension, variances, weights, class_prior, num_samples,
               noise_variance, {official, boost, unbiased, mean, threshold, gamma});
}

std::tuple<Tensor, Tensor, Tensor> cem_fwd(const Tensor& x, const Tensor& means, const OptionalTensor& labels,
                                           const Tensor& variances, const Tensor& weights, const Tensor& class_prior,
                                           const Tensor& num_samples, const Tensor& noise_variance, bool official,
                                           double boost, bool unbiased, bool mean, double threshold, double gamma) {
  Arguments a(x, means, labels);
  const bool diagonal = variances.dim() == 3;
  const int64_t bytes = a.is_double() ? 8 : 4, CK = a.components();
  STD_TORCH_CHECK((variances.scalar_type() == ScalarType::Double) == a.is_double() && weights.dim() == 2 &&
                      weights.size(0) == a.mixture.classes && weights.size(1) == a.mixture.components,
                  "variances and weights [C, K] must match means");
  const std::unique_ptr<char[]> counts(new char[CK * bytes]);
  const std::unique_ptr<char[]> scatter(new char[(diagonal ? CK * a.x.dimension : CK) * bytes]);
  Tensor assignment = empty({a.x.rows}, ScalarType::Long);
  cem_fast::kernels().statistics_forward(
      {a.x, a.mixture, diagonal, counts.get(), scatter.get(), nullptr, static_cast<int64_t*>(data(assignment))},
      parallel_for);
  auto [value, slope] = bound(counts.get(), scatter.get(), a.x.dimension, variances, weights, class_prior, num_samples,
                              noise_variance, {official, boost, unbiased, mean, threshold, gamma});
  return {value, slope, assignment};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cem_fast, CPU, m) {
  m.impl("mixture_log_prob_fwd", TORCH_BOX(&mixture_log_prob_fwd));
  m.impl("mixture_log_prob_bwd", TORCH_BOX(&mixture_log_prob_bwd));
  m.impl("mixture_moments", TORCH_BOX(&mixture_moments));
  m.impl("mixture_statistics", TORCH_BOX(&mixture_statistics));
  m.impl("component_statistics_fwd", TORCH_BOX(&component_statistics_fwd));
  m.impl("component_statistics_bwd", TORCH_BOX(&component_statistics_bwd));
  m.impl("kmeans", TORCH_BOX(&kmeans));
  m.impl("entropy_bound", TORCH_BOX(&entropy_bound));
  m.impl("cem_fwd", TORCH_BOX(&cem_fwd));
}
