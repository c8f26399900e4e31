// The operators on CUDA tensors, through the stable ABI, under a name of their own: tensors in, device pointers to the
// kernels, on the tensors' device and the current stream.

#include <torch/csrc/stable/accelerator.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <iterator>
#include <string>
#include <tuple>
#include <utility>

#include "../common/operators.h"
#include "kernels.h"

// torch declares it only with its own CUDA headers, which need those of CUDA
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace {

using namespace cem_fast;

struct Cuda {
  class Call : public Tensors {
   public:
    explicit Call(const Tensor& t)
        : Tensors(aoti_torch_device_type_cuda(), t.get_device_index()), guard_(t.get_device_index()) {
      STD_TORCH_CHECK(t.is_cuda(), "x must be on a CUDA device");
      STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream_));
    }

    cuda::Context context() {
      return {stream_, [this](int64_t bytes) { return scratch(bytes); }};
    }

   private:
    torch::stable::accelerator::DeviceGuard guard_;
    void* stream_ = nullptr;
  };

  static void log_prob_forward(const LogProbForward& p, Call& call) { cuda::log_prob_forward(p, call.context()); }
  static void log_prob_backward(const LogProbBackward& p, Call& call) { cuda::log_prob_backward(p, call.context()); }
  static void mixture_moments(const MixtureMoments& p, Call& call) { cuda::mixture_moments(p, call.context()); }
  static void statistics_forward(const StatisticsForward& p, Call& call) {
    cuda::statistics_forward(p, call.context());
  }
  static void kmeans(const KMeans& p, Call& call) { cuda::kmeans(p, call.context()); }
};

Tensor component_statistics_bwd(const Tensor& grad_scatter, const OptionalTensor& scale, const Tensor& x,
                                const Tensor& means, const OptionalTensor& labels, const Tensor& assignment) {
  Arguments<Cuda::Call> a(x, means, labels);
  a.mixture.diagonal = grad_scatter.dim() == 3;
  const void* grad = a.parameters(grad_scatter, a.mixture.diagonal ? a.components() * a.x.dimension : a.components());
  Tensor dx = a.gradient();
  cuda::scatter_gradient(
      {a.x, a.mixture, grad, scale.has_value() ? a.parameters(*scale, 1) : nullptr, a.indices(assignment), data(dx)},
      a.call.context());
  return dx;
}

cuda::Bound bound_of(Cuda::Call& call, const Priors& p, const Tensor& num_samples, const BoundOptions& o) {
  return {p.classes,        p.components, p.dimension,   p.diagonal,
          p.variances,      p.weights,    p.class_prior, call.doubles(num_samples),
          p.noise_variance, p.noise_size, o.official,    o.boost,
          o.unbiased,       o.mean,       o.threshold,   o.gamma,
          data(p.value),    data(p.slope)};
}

std::tuple<Tensor, Tensor> entropy_bound(const Tensor& counts, const Tensor& scatter, int64_t dimension,
                                         const Tensor& variances, const Tensor& weights, const Tensor& class_prior,
                                         const Tensor& num_samples, const Tensor& noise_variance, bool official,
                                         double boost, bool unbiased, bool mean, double threshold, double gamma) {
  const BoundOptions options{official, boost, unbiased, mean, threshold, gamma};
  STD_TORCH_CHECK(counts.scalar_type() == variances.scalar_type() && scatter.scalar_type() == variances.scalar_type(),
                  "counts and scatter must have the type of variances");
  Cuda::Call call(counts);
  const Priors priors(call, dimension, variances, weights, class_prior, num_samples, noise_variance, options);
  cuda::entropy_bound(bound_of(call, priors, num_samples, options), call.dense(counts, weights.numel()),
                      call.dense(scatter, variances.numel()), priors.dtype == ScalarType::Double, call.context());
  return {priors.value, priors.slope};
}

std::tuple<Tensor, Tensor, Tensor> cem_fwd(const Tensor& x, const Tensor& means, const OptionalTensor& labels,
                                           const Tensor& variances, const Tensor& weights, const Tensor& class_prior,
                                           const Tensor& num_samples, const Tensor& noise_variance, bool official,
                                           double boost, bool unbiased, bool mean, double threshold, double gamma) {
  const BoundOptions options{official, boost, unbiased, mean, threshold, gamma};
  Arguments<Cuda::Call> a(x, means, labels);
  const Priors priors(a.call, a.x.dimension, variances, weights, class_prior, num_samples, noise_variance, options);
  a.check(priors);
  Tensor assignment = a.call.empty({a.x.rows}, ScalarType::Long);
  cuda::cem_forward(bound_of(a.call, priors, num_samples, options), a.x, a.mixture,
                    static_cast<int64_t*>(data(assignment)), a.call.context());
  return {priors.value, priors.slope, assignment};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> expectation_maximization(
    const Tensor& x, const Tensor& means, const Tensor& variances, const Tensor& weights, const OptionalTensor& labels,
    int64_t max_iter, double tol, double reg_covar) {
  Arguments<Cuda::Call> a(x, means, labels);
  a.set_variances(variances, weights);
  const int64_t C = a.mixture.classes, K = a.mixture.components;
  const bool is_double = a.dtype() == ScalarType::Double;
  Tensor moved = a.parameter({C, K, a.x.dimension}), spread = a.like_variances(), shares = a.parameter({C, K});
  Tensor counts = a.call.empty({C, K}, ScalarType::Double), bound = a.call.empty({C}, ScalarType::Double);
  Tensor iterations = a.call.empty({C}, ScalarType::Long), converged = a.call.empty({C}, ScalarType::Long);
  cuda::expectation_maximization(
      {a.x, a.mixture, max_iter, tol, reg_covar,
       is_double ? std::numeric_limits<double>::min() : static_cast<double>(std::numeric_limits<float>::min()),
       data(moved), data(spread), data(shares), static_cast<double*>(data(counts)), static_cast<double*>(data(bound)),
       static_cast<int64_t*>(data(iterations)), static_cast<int64_t*>(data(converged))},
      a.call.context());
  return {moved, spread, shares, counts, bound, iterations, converged};
}

using Boxed = void (*)(StableIValue* stack, uint64_t inputs, uint64_t outputs);

struct Operator {
  const char* name;
  Boxed kernel;
  int features;  // place of the features among the arguments, or of what has their type and device
};

constexpr Operator kOperators[] = {
    {"mixture_log_prob_fwd", TORCH_BOX(&mixture_log_prob_fwd<Cuda>), 0},
    {"mixture_log_prob_bwd", TORCH_BOX(&mixture_log_prob_bwd<Cuda>), 1},
    {"mixture_moments", TORCH_BOX(&mixture_moments<Cuda>), 1},
    {"component_statistics_fwd", TORCH_BOX(&component_statistics_fwd<Cuda>), 0},
    {"component_statistics_bwd", TORCH_BOX(&component_statistics_bwd), 2},
    {"entropy_bound", TORCH_BOX(&entropy_bound), 0},
    {"cem_fwd", TORCH_BOX(&cem_fwd), 0},
    {"kmeans", TORCH_BOX(&kmeans<Cuda>), 0},
    {"expectation_maximization", TORCH_BOX(&expectation_maximization), 0},
};
constexpr size_t kCount = std::size(kOperators);

constexpr int32_t kDevices = 64;
// Where a kernel has agreed with the reference: a bit for each device, by operator and element.
std::atomic<uint64_t> agreed[kCount][4];

bool has_agreed(size_t which, AtenTensorHandle features) {
  int32_t dtype, device;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(features, &dtype));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(features, &device));
  for (const ScalarType one : {ScalarType::Float, ScalarType::Double, ScalarType::BFloat16, ScalarType::Half}) {
    if (dtype != code_of(one)) continue;
    const uint64_t devices = agreed[which][static_cast<int>(element_of(one))].load(std::memory_order_relaxed);
    return device < kDevices && (devices >> std::max(device, 0) & 1) != 0;
  }
  return false;
}

// An operator of the package: the kernel where it has agreed; elsewhere Python chooses, in the operator of the same
// name of cem_fast_choice.
template <size_t which>
void serve(StableIValue* stack, uint64_t inputs, uint64_t outputs) {
  constexpr Operator kOne = kOperators[which];
  if (has_agreed(which, torch::stable::detail::to<AtenTensorHandle>(stack[kOne.features])))
    return kOne.kernel(stack, inputs, outputs);
  const std::string choice = std::string("cem_fast_choice::") + kOne.name;
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(choice.c_str(), "", stack, TORCH_ABI_VERSION));
}

template <size_t... which>
constexpr auto servers(std::index_sequence<which...>) {
  return std::array<Boxed, kCount>{serve<which>...};
}

size_t place_of(const char* name) {
  size_t which = 0;
  while (which < kCount && std::strcmp(kOperators[which].name, name) != 0) ++which;
  return which;
}

}  // namespace

// The schemas are defined in Python, where those of cem_fast are.
STABLE_TORCH_LIBRARY_IMPL(cem_fast_cuda, CUDA, m) {
  for (const Operator& one : kOperators) m.impl(one.name, one.kernel);
}

extern "C" {

// Registers an operator of the package for a kind of tensors; false if there is no such operator.
__attribute__((visibility("default"))) bool cem_fast_cuda_serve(const char* name, const char* dispatch_key) {
  using torch::stable::detail::StableLibrary;
  constexpr auto kServers = servers(std::make_index_sequence<kCount>());
  const size_t which = place_of(name);
  if (which == kCount) return false;
  // never deleted: it would remove the kernel
  (new StableLibrary(StableLibrary::Kind::IMPL, "cem_fast", dispatch_key, __FILE__, __LINE__))
      ->impl(name, kServers[which]);
  return true;
}

// Notes whether the kernel of an operator agrees with the reference on a device, by the place of an element in Element.
__attribute__((visibility("default"))) void cem_fast_cuda_agree(const char* name, int32_t element, int32_t device,
                                                                bool agrees) {
  const size_t which = place_of(name);
  if (which == kCount || device < 0 || device >= kDevices) return;
  const uint64_t bit = uint64_t{1} << device;
  if (agrees) {
    agreed[which][element] |= bit;
  } else {
    agreed[which][element] &= ~bit;
  }
}
}
