// Runs every kernel on exactly sized heap buffers, on one thread and on several, and requires the same bits from both.
//
// usage: driver CAPABILITY; prints "CAPABILITY: N problems, M calls", or says what differs and exits with 1.
// CEM_FAST_MUTATION=1 makes the features one element too short, 2 hands the same items to two threads at once: the
// sanitizers must notice, or they see nothing.

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "dispatch.h"

namespace {

using namespace cem_fast;

constexpr int kThreads = 4;

void serial(int64_t items, int64_t, void (*body)(int64_t, int64_t, void*), void* context) { body(0, items, context); }

// Ignores the grain: small problems must be shared, too.
void threaded(int64_t items, int64_t, void (*body)(int64_t, int64_t, void*), void* context) {
  std::vector<std::thread> threads;
  for (int64_t t = 0; t < kThreads; ++t) {
    const int64_t begin = items * t / kThreads;
    int64_t end = items * (t + 1) / kThreads;
    if (CEM_FAST_MUTATION == 2) end = std::min(items, end + 1);
    if (begin < end) threads.emplace_back(body, begin, end, context);
  }
  for (std::thread& thread : threads) thread.join();
}

std::mt19937 generator(0);

// Exactly `bytes` on the heap, so that one byte more is an error.
struct Buffer {
  int64_t bytes;
  std::unique_ptr<char[]> data;
  explicit Buffer(int64_t n) : bytes(n), data(new char[n]) { std::fill_n(data.get(), n, static_cast<char>(0xff)); }
  void* get() const { return data.get(); }
};

template <class T>
Buffer uniform(int64_t n, double low, double high) {
  Buffer buffer(n * static_cast<int64_t>(sizeof(T)));
  std::uniform_real_distribution<double> values(low, high);
  for (int64_t i = 0; i < n; ++i) static_cast<T*>(buffer.get())[i] = static_cast<T>(values(generator));
  return buffer;
}

// Features in [1, 2): for the half types any bits between those of one and of two.
Buffer features(Element element, int64_t n) {
  if (CEM_FAST_MUTATION == 1) n = std::max<int64_t>(0, n - 1);
  if (element == Element::kFloat) return uniform<float>(n, 1, 2);
  if (element == Element::kDouble) return uniform<double>(n, 1, 2);
  const uint16_t one = element == Element::kHalf ? 0x3c00 : 0x3f80;
  Buffer buffer(2 * n);
  for (int64_t i = 0; i < n; ++i) static_cast<uint16_t*>(buffer.get())[i] = one + generator() % 128;
  return buffer;
}

struct Shape {
  int64_t rows, dimension, classes, components;
};

int calls = 0;
bool same = true;

// Calls run(parallel_for) twice and compares what it wrote.
void twice(const char* name, const std::vector<Buffer*>& outputs, const std::function<void(ParallelFor)>& run) {
  std::vector<std::vector<char>> first;
  run(serial);
  for (const Buffer* b : outputs) first.emplace_back(b->data.get(), b->data.get() + b->bytes);
  for (const Buffer* b : outputs) std::fill_n(b->data.get(), b->bytes, static_cast<char>(0xee));
  run(threaded);
  for (size_t i = 0; i < outputs.size(); ++i) {
    if (!std::equal(first[i].begin(), first[i].end(), outputs[i]->data.get())) {
      std::printf("%s: output %zu differs between one thread and %d\n", name, i, kThreads);
      same = false;
    }
  }
  calls += 2;
}

template <class T>
void problem(const Kernels& kernels, Element element, const Shape& s, bool diagonal, bool labeled, bool out_of_range) {
  const int64_t N = s.rows, D = s.dimension, C = s.classes, K = s.components, CK = C * K;
  const int64_t size = sizeof(T), element_size = element == Element::kDouble ? 8 : element == Element::kFloat ? 4 : 2;
  const Buffer x = features(element, N * D);
  const Buffer means = uniform<T>(CK * D, 1, 2), variances = uniform<T>(diagonal ? CK * D : CK, 0.02, 0.2);
  const Buffer weights = uniform<T>(CK, 0.1, 1), grad = uniform<T>(N, -1, 1), prior = uniform<T>(C, 0.1, 1);
  std::vector<int64_t> labels(N);
  for (int64_t& label : labels) label = static_cast<int64_t>(generator() % C);
  if (out_of_range && N > 2) labels[N / 2] = -1, labels[N - 1] = C;
  const Features f{x.get(), D, element, N, D};
  const Mixture mixture{C, K, labeled ? labels.data() : nullptr, means.get(), variances.get(), weights.get(), diagonal};
  Mixture nearest = mixture;
  nearest.variances = nearest.weights = nullptr;

  Buffer counts(CK * size), assignment(8 * N), dx(N * D * element_size);
  auto* assigned = static_cast<int64_t*>(assignment.get());
  for (const bool per_dimension : {false, true}) {
    Buffer scatter((per_dimension ? CK * D : CK) * size), sums(CK * D * size);
    for (const Mixture& m : {nearest, mixture}) {
      for (void* totals : {static_cast<void*>(nullptr), sums.get()}) {
        std::vector<Buffer*> outputs{&counts, &scatter, &assignment};
        if (totals != nullptr) outputs.push_back(&sums);
        twice("statistics_forward", outputs, [&](ParallelFor run) {
          kernels.statistics_forward({f, m, per_dimension, counts.get(), scatter.get(), totals, assigned}, run);
        });
      }
    }
    Mixture m = nearest;
    m.diagonal = per_dimension;
    twice("statistics_backward", {&dx},
          [&](ParallelFor run) { kernels.statistics_backward({f, m, scatter.get(), 0.5, assigned, dx.get()}, run); });
    Buffer moved(CK * D * size), iterations(8 * C), converged(8 * C);
    twice("kmeans", {&moved, &counts, &scatter, &iterations, &converged}, [&](ParallelFor run) {
      kernels.kmeans({f, nearest, 3, 1e-4, per_dimension, moved.get(), counts.get(), scatter.get(),
                      static_cast<int64_t*>(iterations.get()), static_cast<int64_t*>(converged.get())},
                     run);
    });
    if (per_dimension != diagonal) continue;
    Buffer value(size), slope((diagonal ? CK * D : CK) * size);
    const std::vector<double> noise(D, 0.01);
    for (const int64_t noise_size : {int64_t{1}, D}) {
      for (const bool official : {false, true}) {
        if (official && (diagonal || noise_size > 1)) continue;
        const double total = static_cast<double>(10 * N + 1);
        twice("entropy_bound", {&value, &slope}, [&](ParallelFor run) {
          kernels.entropy_bound({size == 8,
                                 diagonal,
                                 C,
                                 K,
                                 D,
                                 counts.get(),
                                 scatter.get(),
                                 variances.get(),
                                 weights.get(),
                                 prior.get(),
                                 total,
                                 noise.data(),
                                 noise_size,
                                 official,
                                 1,
                                 true,
                                 true,
                                 0.125,
                                 0.01,
                                 value.get(),
                                 slope.get()},
                                run);
        });
      }
    }
  }
  Buffer log_prob(N * size), posterior(N * K * size);
  Buffer s0(CK * size), s1(CK * D * size), s2((diagonal ? CK * D : CK) * size);
  for (void* saved : {posterior.get(), static_cast<void*>(nullptr)}) {
    std::vector<Buffer*> outputs{&log_prob};
    if (saved != nullptr) outputs.push_back(&posterior);
    twice("log_prob_forward", outputs,
          [&](ParallelFor run) { kernels.log_prob_forward({f, mixture, log_prob.get(), saved}, run); });
    twice("log_prob_backward", {&dx}, [&](ParallelFor run) {
      kernels.log_prob_backward({f, mixture, grad.get(), log_prob.get(), saved, dx.get()}, run);
    });
    twice("mixture_moments", {&s0, &s1, &s2}, [&](ParallelFor run) {
      kernels.mixture_moments({f, mixture, grad.get(), saved, s0.get(), s1.get(), s2.get(), nullptr}, run);
    });
  }
  Buffer log_likelihood(C * 8);
  twice("mixture_statistics", {&s0, &s1, &s2, &log_likelihood}, [&](ParallelFor run) {
    kernels.mixture_moments(
        {f, mixture, nullptr, nullptr, s0.get(), s1.get(), s2.get(), static_cast<double*>(log_likelihood.get())}, run);
  });
  if (out_of_range) return;  // rows of no class are not written
  const Buffer near = uniform<T>(N, 0, 2), mass = uniform<double>(N, 0, 1);
  Buffer distances(K * N * size), potentials(K * C * 8);
  twice("candidate_distances", {&distances, &potentials}, [&](ParallelFor run) {
    kernels.candidate_distances({f, nearest, near.get(), static_cast<const double*>(mass.get()), distances.get(),
                                 static_cast<double*>(potentials.get())},
                                run);
  });
  if (N == 0) return;
  Buffer seeds(K * D * size);
  const Buffer draws = uniform<double>(1 + (K - 1) * 3, 0, 1);
  twice("seeding", {&seeds}, [&](ParallelFor run) {
    kernels.seeding(
        {f, static_cast<const double*>(mass.get()), static_cast<const double*>(draws.get()), K, 3, seeds.get()}, run);
  });
}

// Covariance matrices, whose features are double.
void matrices(const Kernels& kernels, const Shape& s, bool tied, bool labeled, bool out_of_range) {
  const int64_t N = s.rows, D = s.dimension, C = s.classes, K = s.components, CK = C * K, count = tied ? C : CK;
  const Buffer x = features(Element::kDouble, N * D), means = uniform<double>(CK * D, 1, 2);
  const Buffer constants = uniform<double>(CK, -1, 1), shares = uniform<double>(N * K, 0, 1);
  const Buffer covariances = uniform<double>(count * D * D, 0, 0.1);
  auto* entries = static_cast<double*>(covariances.get());
  for (int64_t m = 0; m < count; ++m) {
    for (int64_t d = 0; d < D; ++d) entries[(m * D + d) * D + d] = static_cast<double>(D);
  }
  std::vector<int64_t> labels(N);
  for (int64_t& label : labels) label = static_cast<int64_t>(generator() % C);
  if (out_of_range && N > 2) labels[N / 2] = -1, labels[N - 1] = C;
  const Features f{x.get(), D, Element::kDouble, N, D};
  const Mixture mixture{C, K, labeled ? labels.data() : nullptr, means.get(), nullptr, nullptr, false};
  Buffer roots(count * D * D * 8), half_logdets(count * 8), joint(N * K * 8);
  const auto at = [](const Buffer& buffer) { return static_cast<double*>(buffer.get()); };
  twice("inverse_roots", {&roots, &half_logdets},
        [&](ParallelFor run) { kernels.inverse_roots({count, D, entries, at(roots), at(half_logdets)}, run); });
  twice("matrix_log_joint", {&joint}, [&](ParallelFor run) {
    kernels.matrix_log_joint({f, mixture, tied, at(roots), at(constants), at(joint)}, run);
  });
  Buffer s0(CK * 8), s1(CK * D * 8), s2(count * D * D * 8);
  twice("matrix_moments", {&s0, &s1, &s2},
        [&](ParallelFor run) { kernels.matrix_moments({f, mixture, tied, at(shares), at(s0), at(s1), at(s2)}, run); });
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2 || cem_fast_cpu_select(argv[1]) != 0) return 2;
  const Shape shapes[] = {{0, 3, 2, 2},    {1, 1, 1, 1},    {7, 3, 2, 5},     {33, 17, 3, 2},
                          {70, 65, 2, 7},  {40, 641, 1, 3}, {12, 31, 1, 70},  {700, 5, 1, 2},
                          {800, 66, 1, 3}, {90, 6, 9, 3},   {20, 1030, 3, 40}};
  int problems = 0;
  for (const Shape& shape : shapes) {
    for (const bool diagonal : {false, true}) {
      for (const Element element : {Element::kFloat, Element::kDouble, Element::kBFloat16, Element::kHalf}) {
        const bool labeled = shape.classes > 1 || diagonal, out_of_range = labeled && element == Element::kFloat;
        if (element == Element::kDouble) {
          problem<double>(kernels(), element, shape, diagonal, labeled, out_of_range);
        } else {
          problem<float>(kernels(), element, shape, diagonal, labeled, out_of_range);
        }
        ++problems;
      }
      if (shape.dimension < 100) {
        const bool labeled = shape.classes > 1;
        for (const bool out_of_range : {false, labeled}) matrices(kernels(), shape, diagonal, labeled, out_of_range);
        ++problems;
      }
    }
  }
  std::printf("%s: %d problems, %d calls\n", argv[1], problems, calls);
  return same ? 0 : 1;
}
