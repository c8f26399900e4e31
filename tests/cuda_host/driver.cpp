// Runs the CUDA operations on the host, as they come on standard input: the name of an operation and its arguments in
// the order of their fields; the outputs go to standard output, after the numbers of launches and waits. Every buffer
// is exactly as large as it has to be, so that one byte more is an error.

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include <cuda_runtime.h>

#include "kernels.h"

namespace {

using namespace cem_fast;
using namespace cem_fast::cuda;

void read(void* data, int64_t bytes) {
  if (bytes > 0 && std::fread(data, static_cast<size_t>(bytes), 1, stdin) != 1) std::exit(2);
}

void write(const void* data, int64_t bytes) {
  if (bytes > 0) std::fwrite(data, static_cast<size_t>(bytes), 1, stdout);
}

struct Buffer {
  int64_t bytes;
  cuda_host::Memory data;
};

// The buffers of one call.
class Call {
 public:
  int64_t integer() { return value<int64_t>(); }
  double number() { return value<double>(); }
  bool flag() { return integer() != 0; }

  void* input() {
    void* data = allocate(integer());
    if (data != nullptr) read(data, buffers_.back().bytes);
    return data;
  }

  template <class T>
  T* input() {
    return static_cast<T*>(input());
  }

  void* output() {
    const int64_t bytes = integer();
    void* data = allocate(bytes);
    if (data != nullptr) outputs_.push_back({data, bytes});
    return data;
  }

  Context context() {
    return {nullptr, [this](int64_t bytes) { return allocate(bytes); }};
  }

  Features features() {
    Features x{};
    x.data = input();
    x.stride = integer();
    x.element = static_cast<Element>(integer());
    x.rows = integer();
    x.dimension = integer();
    return x;
  }

  Mixture mixture() {
    Mixture m{};
    m.classes = integer();
    m.components = integer();
    m.labels = input<int64_t>();
    m.means = input();
    m.variances = input();
    m.weights = input();
    m.diagonal = flag();
    return m;
  }

  Bound bound() {
    Bound p{};
    p.classes = integer();
    p.components = integer();
    p.dimension = integer();
    p.diagonal = flag();
    p.variances = input();
    p.weights = input();
    p.class_prior = input();
    p.num_samples = input<double>();
    p.noise_variance = input<double>();
    p.noise_size = integer();
    p.official = flag();
    p.boost = number();
    p.unbiased = flag();
    p.mean = flag();
    p.threshold = number();
    p.gamma = number();
    p.value = output();
    p.slope = output();
    return p;
  }

  void reply() {
    write(&cuda_host::Device::get().launches, sizeof(int64_t));
    write(&cuda_host::waits, sizeof(int64_t));
    for (const auto& [data, bytes] : outputs_) write(data, bytes);
    std::fflush(stdout);
  }

 private:
  template <class T>
  T value() {
    T v;
    read(&v, sizeof v);
    return v;
  }

  // Memory full of NaN; none for a negative size.
  void* allocate(int64_t bytes) {
    if (bytes < 0) return nullptr;
    buffers_.push_back({bytes, cuda_host::device_memory(static_cast<size_t>(bytes))});
    std::memset(buffers_.back().data.get(), 0xff, static_cast<size_t>(bytes));
    return buffers_.back().data.get();
  }

  std::vector<Buffer> buffers_;
  std::vector<std::pair<void*, int64_t>> outputs_;
};

void run(const std::string& name, Call& call) {
  if (name == "mixture_log_prob_fwd") {
    LogProbForward p{call.features(), call.mixture(), nullptr, nullptr};
    p.log_prob = call.output();
    p.responsibilities = call.output();
    log_prob_forward(p, call.context());
  } else if (name == "mixture_log_prob_bwd") {
    LogProbBackward p{call.features(), call.mixture(), nullptr, nullptr, nullptr, nullptr};
    p.grad = call.input();
    p.log_prob = call.input();
    p.responsibilities = call.input();
    p.dx = call.output();
    log_prob_backward(p, call.context());
  } else if (name == "mixture_moments") {
    MixtureMoments p{call.features(), call.mixture(), nullptr, nullptr, nullptr, nullptr, nullptr, nullptr};
    p.row_weights = call.input();
    p.responsibilities = call.input();
    p.s0 = call.output();
    p.s1 = call.output();
    p.s2 = call.output();
    mixture_moments(p, call.context());
  } else if (name == "component_statistics_fwd") {
    StatisticsForward p{call.features(), call.mixture(), false, nullptr, nullptr, nullptr, nullptr};
    p.per_dimension = call.flag();
    p.counts = call.output();
    p.scatter = call.output();
    p.sums = call.output();
    p.assignment = static_cast<int64_t*>(call.output());
    statistics_forward(p, call.context());
  } else if (name == "component_statistics_bwd") {
    ScatterGradient p{call.features(), call.mixture(), nullptr, nullptr, nullptr, nullptr};
    p.grad_scatter = call.input();
    p.scale = call.input();
    p.assignment = call.input<int64_t>();
    p.dx = call.output();
    scatter_gradient(p, call.context());
  } else if (name == "entropy_bound") {
    const void* counts = call.input();
    const void* scatter = call.input();
    const bool is_double = call.flag();
    entropy_bound(call.bound(), counts, scatter, is_double, call.context());
  } else if (name == "cem_fwd") {
    const Features x = call.features();
    const Mixture mixture = call.mixture();
    const Bound p = call.bound();
    cem_forward(p, x, mixture, static_cast<int64_t*>(call.output()), call.context());
  } else if (name == "kmeans") {
    KMeans p{};
    p.x = call.features();
    p.mixture = call.mixture();
    p.max_iter = call.integer();
    p.tol = call.number();
    p.per_dimension = call.flag();
    p.means = call.output();
    p.counts = call.output();
    p.scatter = call.output();
    p.iterations = static_cast<int64_t*>(call.output());
    p.converged = static_cast<int64_t*>(call.output());
    kmeans(p, call.context());
  } else if (name == "expectation_maximization") {
    ExpectationMaximization p{};
    p.x = call.features();
    p.mixture = call.mixture();
    p.max_iter = call.integer();
    p.tol = call.number();
    p.reg_covar = call.number();
    p.tiny = call.number();
    p.means = call.output();
    p.variances = call.output();
    p.weights = call.output();
    p.counts = static_cast<double*>(call.output());
    p.bound = static_cast<double*>(call.output());
    p.iterations = static_cast<int64_t*>(call.output());
    p.converged = static_cast<int64_t*>(call.output());
    expectation_maximization(p, call.context());
  } else {
    std::exit(2);
  }
}

}  // namespace

int main() {
  char name[64];
  while (std::fread(name, sizeof name, 1, stdin) == 1) {
    Call call;
    run(name, call);
    call.reply();
  }
}
