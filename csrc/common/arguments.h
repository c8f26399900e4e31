// Torch's tensors as arguments of the kernels, through the stable ABI. The Python layer has checked shapes; the checks
// here prevent reads and writes out of bounds.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>
#include <limits>
#include <optional>
#include <utility>
#include <vector>

#include "problem.h"

#ifndef STABLE_TORCH_ERROR_CODE_CHECK  // torch 2.11 has only the other name
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif

namespace cem_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline int32_t code_of(ScalarType dtype) {
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

inline Element element_of(ScalarType dtype) {
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

inline void* data(const Tensor& t) { return t.mutable_data_ptr(); }

// The tensors of one call on one device. Those that it makes are kept alive while its kernels run or, on a GPU, until
// they are launched; its arguments live longer. After that the allocator hands out their memory to later work of the
// same stream only.
class Tensors {
 public:
  Tensors(int32_t device_type, int32_t device) : device_type_(device_type), device_(device) {}

  // A contiguous tensor without a trip through the dispatcher.
  Tensor empty(std::initializer_list<int64_t> sizes, ScalarType dtype) const {
    int64_t size[4], stride[4], rank = 0, step = 1;
    for (const int64_t s : sizes) size[rank++] = s;
    for (int64_t i = rank - 1; i >= 0; --i) {
      stride[i] = step;
      step *= size[i] > 1 ? size[i] : 1;
    }
    AtenTensorHandle handle;
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_empty_strided(rank, size, stride, code_of(dtype), device_type_, device_, &handle));
    return Tensor(handle);
  }

  // Temporary memory.
  void* scratch(int64_t bytes) { return data(kept_.emplace_back(empty({bytes}, ScalarType::Byte))); }

  const void* keep(Tensor made) { return kept_.emplace_back(std::move(made)).const_data_ptr(); }

  // The elements of an argument, one after the other.
  const void* dense(const Tensor& t, int64_t numel) {
    STD_TORCH_CHECK(t.get_device_index() == device_, "all tensors must be on the same device");
    STD_TORCH_CHECK(t.numel() == numel, "expected ", numel, " elements, got ", t.numel());
    return t.is_contiguous() ? t.const_data_ptr() : keep(torch::stable::contiguous(t));
  }

  // The same, converted to double first if it has another type.
  const double* doubles(const Tensor& t) {
    if (t.scalar_type() == ScalarType::Double) return static_cast<const double*>(dense(t, t.numel()));
    const Tensor converted = torch::stable::to(t, ScalarType::Double);
    keep(converted);
    return static_cast<const double*>(dense(converted, t.numel()));
  }

 private:
  int32_t device_type_, device_;
  std::vector<Tensor> kept_;
};

// The scalars of the loss, in the order of the schema.
struct BoundOptions {
  bool official;
  double boost;
  bool unbiased;
  bool mean;
  double threshold;
  double gamma;
};

// The parameters of the loss, and its outputs.
struct Priors {
  ScalarType dtype;
  int64_t classes, components, dimension;
  bool diagonal;
  const void *variances, *weights, *class_prior;
  const double* noise_variance;
  int64_t noise_size;
  Tensor value, slope;

  Priors(Tensors& tensors, int64_t dimension, const Tensor& of_variances, const Tensor& of_weights,
         const Tensor& of_classes, const Tensor& num_samples, const Tensor& noise, const BoundOptions& o)
      : dtype(of_variances.scalar_type()),
        classes(of_weights.size(0)),
        components(of_weights.size(1)),
        dimension(dimension),
        diagonal(of_variances.dim() == 3),
        noise_size(noise.numel()),
        value(tensors.empty({}, dtype)),
        slope(diagonal ? tensors.empty({classes, components, dimension}, dtype)
                       : tensors.empty({classes, components}, dtype)) {
    STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, "variances must be float32 or float64");
    STD_TORCH_CHECK(of_weights.scalar_type() == dtype && of_classes.scalar_type() == dtype,
                    "variances, weights and class_prior must have the same type");
    STD_TORCH_CHECK(num_samples.numel() == 1, "num_samples must be one number");
    STD_TORCH_CHECK(noise_size == 1 || (noise_size == dimension && !o.official), "noise_variance must be [1] or [D]");
    const int64_t size = classes * components;
    variances = tensors.dense(of_variances, diagonal ? size * dimension : size);
    weights = tensors.dense(of_weights, size);
    class_prior = tensors.dense(of_classes, classes);
    noise_variance = tensors.doubles(noise);
  }
};

// The features and the mixture of one call. `Call` is constructed from the features and derives from Tensors.
template <class Call>
class Arguments {
 public:
  Call call;
  Features x;
  Mixture mixture;

  Arguments(const Tensor& features, const Tensor& means, const OptionalTensor& labels)
      : call(features),
        features_dtype_(features.scalar_type()),
        dtype_(features_dtype_ == ScalarType::Double ? ScalarType::Double : ScalarType::Float) {
    STD_TORCH_CHECK(features.dim() == 2 && means.dim() == 3 && features.size(1) == means.size(2),
                    "x must be [N, D] and means [C, K, D]");
    STD_TORCH_CHECK(means.numel() > 0, "means must have at least one class, component and dimension");
    const int64_t N = features.size(0), D = features.size(1);
    STD_TORCH_CHECK(N <= std::numeric_limits<int32_t>::max(), "x must have fewer than 2^31 rows");
    const bool dense_rows = features.is_contiguous() || (features.stride(1) == 1 && features.stride(0) >= D);
    const void* rows = dense_rows ? features.const_data_ptr() : call.keep(torch::stable::contiguous(features));
    x = {rows, dense_rows && N > 1 ? features.stride(0) : D, element_of(features_dtype_), N, D};
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

  // A tensor of the parameters' type with a known number of elements.
  const void* parameters(const Tensor& t, int64_t numel) {
    STD_TORCH_CHECK(t.scalar_type() == dtype_, "parameters must be float64 with float64 features, else float32");
    return call.dense(t, numel);
  }

  // One int64 per row.
  const int64_t* indices(const Tensor& t) {
    STD_TORCH_CHECK(t.scalar_type() == ScalarType::Long && t.numel() == x.rows, "labels must be int64 [N]");
    return static_cast<const int64_t*>(call.dense(t, x.rows));
  }

  // [N, K], or null for [N, 0]: not kept.
  const void* responsibilities(const Tensor& t) {
    return t.size(1) == 0 ? nullptr : parameters(t, x.rows * mixture.components);
  }

  void check(const Priors& p) const {
    STD_TORCH_CHECK(p.dtype == dtype_ && p.classes == mixture.classes && p.components == mixture.components,
                    "variances and weights [C, K] must match means");
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

}  // namespace cem_fast
