// The operators on CUDA tensors, through the stable ABI, under a name of their own: tensors in, device pointers to the
// kernels, on the tensors' device and the current stream. The Python layer has checked shapes; what is checked here
// again is what would read or write out of bounds.

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <deque>
#include <initializer_list>
#include <limits>
#include <optional>
#include <tuple>

#include "kernels.h"

// torch declares it where it is told that it has CUDA, together with much that needs CUDA's headers
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace {

using cem_fast::Element;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

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
    case ScalarType::Byte:
      return aoti_torch_dtype_uint8();
    default:
      return aoti_torch_dtype_float32();
  }
}

Element element_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return Element::kFloat;
    case ScalarType::Double:
      return Element::kDouble;
    case ScalarType::BFloat16:
      return Element::kBFloat16;
    case ScalarType::Half:
      return Element::kHalf;
    default:
      STD_TORCH_CHECK(false, "x must be float32, float64, bfloat16 or float16");
  }
}

void* data(const Tensor& t) { return t.mutable_data_ptr(); }

// One call: its device and stream, and every tensor that must live until its kernels are launched. After that the
// allocator hands out their memory to later work of the same stream only.
class Call {
 public:
  explicit Call(const Tensor& t) : device_(t.get_device_index()), guard_(device_) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream_));
  }

  Tensor empty(std::initializer_list<int64_t> sizes, ScalarType dtype) const {
    int64_t size[3], stride[3], rank = 0, step = 1;
    for (const int64_t s : sizes) size[rank++] = s;
    for (int64_t i = rank - 1; i >= 0; --i) {
      stride[i] = step;
      step *= size[i] > 1 ? size[i] : 1;
    }
    AtenTensorHandle handle;
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_empty_strided(rank, size, stride, code_of(dtype), aoti_torch_device_type_cuda(), device_, &handle));
    return Tensor(handle);
  }

  cem_fast::cuda::Context context() {
    return {stream_, [this](int64_t bytes) { return data(kept_.emplace_back(empty({bytes}, ScalarType::Byte))); }};
  }

  // The elements of a tensor, one after the other.
  const void* dense(const Tensor& t, ScalarType dtype, int64_t numel) {
    STD_TORCH_CHECK(t.is_cuda() && t.get_device_index() == device_, "all tensors must be on the same CUDA device");
    STD_TORCH_CHECK(t.scalar_type() == dtype && t.numel() == numel, "a tensor has the wrong type or, instead of ",
                    numel, ", ", t.numel(), " elements");
    return keep(t.is_contiguous() ? t : torch::stable::contiguous(t)).const_data_ptr();
  }

  // The same, converted to double first where it is something else.
  const double* doubles(const Tensor& t) {
    const Tensor& exact = t.scalar_type() == ScalarType::Double ? t : keep(torch::stable::to(t, ScalarType::Double));
    return static_cast<const double*>(dense(exact, ScalarType::Double, t.numel()));
  }

  const Tensor& keep(const Tensor& t) { return kept_.emplace_back(t); }

 private:
  int32_t device_;
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
  std::deque<Tensor> kept_;  // references into it stay
};

// The features and the mixture of one call.
class Arguments {
 public:
  Call call;
  cem_fast::Features x;
  cem_fast::Mixture mixture;

  Arguments(const Tensor& features, const Tensor& means, const OptionalTensor& labels)
      : call(features),
        features_dtype_(features.scalar_type()),
        dtype_(features_dtype_ == ScalarType::Double ? ScalarType::Double : ScalarType::Float) {
    STD_TORCH_CHECK(features.is_cuda() && features.dim() == 2 && means.dim() == 3 && features.size(1) == means.size(2),
                    "x must be [N, D] and means [C, K, D], on a CUDA device");
    const int64_t N = features.size(0), D = features.size(1);
    STD_TORCH_CHECK(N <= std::numeric_limits<int32_t>::max(), "x must have fewer than 2^31 rows");
    const bool dense_rows = features.is_contiguous() || (features.stride(1) == 1 && features.stride(0) >= D);
    const Tensor& rows = call.keep(dense_rows ? features : torch::stable::contiguous(features));
    x = {rows.const_data_ptr(), N > 1 ? rows.stride(0) : D, element_of(features_dtype_), N, D};
    mixture = {means.size(0), means.size(1), nullptr, nullptr, nullptr, nullptr, false};
    mixture.means = parameters(means, components() * D);
    STD_TORCH_CHECK(labels.has_value() || mixture.classes == 1, "labels may be left out for one class only");
    if (labels.has_value()) mixture.labels = indices(*labels);
  }

  void set_variances(const Tensor& variances, const Tensor& weights) {
    mixture.diagonal = variances.dim() == 3;
    mixture.variances = parameters(variances, mixture.diagonal ? components() * x.dimension : components());
    mixture.weights = parameters(weights, components());
  }

  const void* parameters(const Tensor& t, int64_t numel) { return call.dense(t, dtype_, numel); }

  // One int64 for each row.
  const int64_t* indices(const Tensor& t) {
    return static_cast<const int64_t*>(call.dense(t, ScalarType::Long, x.rows));
  }

  // [N, K], or null for [N, 0]: not kept.
  const void* responsibilities(const Tensor& t) {
    return t.size(1) == 0 ? nullptr : parameters(t, x.rows * mixture.components);
  }

  Tensor gradient() const { return call.empty({x.rows, x.dimension}, features_dtype_); }
  Tensor parameter(std::initializer_list<int64_t> sizes) const { return call.empty(sizes, dtype_); }
  Tensor like_variances() const {
    return mixture.diagonal ? parameter({mixture.classes, mixture.components, x.dimension})
                            : parameter({mixture.classes, mixture.components});
  }
  int64_t components() const { return mixture.classes * mixture.components; }
  ScalarType dtype() const { return dtype_; }

 private:
  ScalarType features_dtype_, dtype_;
};

std::tuple<Tensor, Tensor> mixture_log_prob_fwd(const Tensor& x, const Tensor& means, const Tensor& variances,
                                                const Tensor& weights, const OptionalTensor& labels,
                                                bool with_responsibilities) {
  Arguments a(x, means, labels);
  a.set_variances(variances, weights);
  Tensor log_prob = a.parameter({a.x.rows});
  Tensor responsibilities = a.parameter({a.x.rows, with_responsibilities ? a.mixture.components : 0});
  cem_fast::cuda::log_prob_forward(
      {a.x, a.mixture, data(log_prob), with_responsibilities ? data(responsibilities) : nullptr}, a.call.context());
  return {log_prob, responsibilities};
}

Tensor mixture_log_prob_bwd(const Tensor& grad, const Tensor& x, const Tensor& means, const Tensor& variances,
                            const Tensor& weights, const OptionalTensor& labels, const Tensor& log_prob,
                            const Tensor& responsibilities) {
  Arguments a(x, means, labels);
  a.set_variances(variances, weights);
  Tensor dx = a.gradient();
  cem_fast::cuda::log_prob_backward({a.x, a.mixture, a.parameters(grad, a.x.rows), a.parameters(log_prob, a.x.rows),
                                     a.responsibilities(responsibilities), data(dx)},
                                    a.call.context());
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
  cem_fast::cuda::mixture_moments({a.x, a.mixture, a.parameters(row_weights, a.x.rows),
                                   a.responsibilities(responsibilities), data(s0), data(s1), data(s2), nullptr},
                                  a.call.context());
  return {s0, s1, s2};
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
  Tensor totals = sums ? a.parameter({C, K, D}) : a.parameter({0});
  Tensor assignment = a.call.empty({a.x.rows}, ScalarType::Long);
  cem_fast::cuda::statistics_forward({a.x, a.mixture, per_dimension, data(counts), data(scatter),
                                      sums ? data(totals) : nullptr, static_cast<int64_t*>(data(assignment))},
                                     a.call.context());
  return {counts, scatter, totals, assignment};
}

Tensor component_statistics_bwd(const Tensor& grad_scatter, const OptionalTensor& scale, const Tensor& x,
                                const Tensor& means, const OptionalTensor& labels, const Tensor& assignment) {
  Arguments a(x, means, labels);
  a.mixture.diagonal = grad_scatter.dim() == 3;
  const void* grad = a.parameters(grad_scatter, a.mixture.diagonal ? a.components() * a.x.dimension : a.components());
  Tensor dx = a.gradient();
  cem_fast::cuda::scatter_gradient(
      {a.x, a.mixture, grad, scale.has_value() ? a.parameters(*scale, 1) : nullptr, a.indices(assignment), data(dx)},
      a.call.context());
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

// The bound's arguments, and its outputs: value and slope.
std::tuple<cem_fast::cuda::Bound, Tensor, Tensor> bound(Call& call, int64_t dimension, const Tensor& variances,
                                                        const Tensor& weights, const Tensor& class_prior,
                                                        const Tensor& num_samples, const Tensor& noise_variance,
                                                        const BoundOptions& o) {
  const ScalarType dtype = variances.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, "variances must be float32 or float64");
  STD_TORCH_CHECK(weights.dim() == 2 && num_samples.numel() == 1, "weights must be [C, K] and num_samples one number");
  const int64_t C = weights.size(0), K = weights.size(1), noise_size = noise_variance.numel();
  STD_TORCH_CHECK(noise_size == 1 || (noise_size == dimension && !o.official), "noise_variance must be [1] or [D]");
  const bool diagonal = variances.dim() == 3;
  Tensor value = call.empty({}, dtype);
  Tensor slope = diagonal ? call.empty({C, K, dimension}, dtype) : call.empty({C, K}, dtype);
  const cem_fast::cuda::Bound p{C,
                                K,
                                dimension,
                                diagonal,
                                call.dense(variances, dtype, diagonal ? C * K * dimension : C * K),
                                call.dense(weights, dtype, C * K),
                                call.dense(class_prior, dtype, C),
                                call.doubles(num_samples),
                                call.doubles(noise_variance),
                                noise_size,
                                o.official,
                                o.boost,
                                o.unbiased,
                                o.mean,
                                o.threshold,
                                o.gamma,
                                data(value),
                                data(slope)};
  return {p, value, slope};
}

std::tuple<Tensor, Tensor> entropy_bound(const Tensor& counts, const Tensor& scatter, int64_t dimension,
                                         const Tensor& variances, const Tensor& weights, const Tensor& class_prior,
                                         const Tensor& num_samples, const Tensor& noise_variance, bool official,
                                         double boost, bool unbiased, bool mean, double threshold, double gamma) {
  Call call(counts);
  const auto [p, value, slope] = bound(call, dimension, variances, weights, class_prior, num_samples, noise_variance,
                                       {official, boost, unbiased, mean, threshold, gamma});
  const ScalarType dtype = variances.scalar_type();
  cem_fast::cuda::entropy_bound(p, call.dense(counts, dtype, weights.numel()),
                                call.dense(scatter, dtype, variances.numel()), dtype == ScalarType::Double,
                                call.context());
  return {value, slope};
}

std::tuple<Tensor, Tensor, Tensor> cem_fwd(const Tensor& x, const Tensor& means, const OptionalTensor& labels,
                                           const Tensor& variances, const Tensor& weights, const Tensor& class_prior,
                                           const Tensor& num_samples, const Tensor& noise_variance, bool official,
                                           double boost, bool unbiased, bool mean, double threshold, double gamma) {
  Arguments a(x, means, labels);
  const auto [p, value, slope] = bound(a.call, a.x.dimension, variances, weights, class_prior, num_samples,
                                       noise_variance, {official, boost, unbiased, mean, threshold, gamma});
  STD_TORCH_CHECK(
      variances.scalar_type() == a.dtype() && p.classes == a.mixture.classes && p.components == a.mixture.components,
      "variances and weights [C, K] must match means");
  Tensor assignment = a.call.empty({a.x.rows}, ScalarType::Long);
  cem_fast::cuda::cem_forward(p, a.x, a.mixture, static_cast<int64_t*>(data(assignment)), a.call.context());
  return {value, slope, assignment};
}

}  // namespace

// The schemas are defined in Python, where those of cem_fast are.
STABLE_TORCH_LIBRARY_IMPL(cem_fast_cuda, CUDA, m) {
  m.impl("mixture_log_prob_fwd", TORCH_BOX(&mixture_log_prob_fwd));
  m.impl("mixture_log_prob_bwd", TORCH_BOX(&mixture_log_prob_bwd));
  m.impl("mixture_moments", TORCH_BOX(&mixture_moments));
  m.impl("component_statistics_fwd", TORCH_BOX(&component_statistics_fwd));
  m.impl("component_statistics_bwd", TORCH_BOX(&component_statistics_bwd));
  m.impl("entropy_bound", TORCH_BOX(&entropy_bound));
  m.impl("cem_fwd", TORCH_BOX(&cem_fwd));
}
