// The operations on CUDA tensors: each takes a struct of device pointers and launches kernels on a stream. Only fits
// wait for the device.
#pragma once

#include <cstdint>
#include <functional>

#include "../common/problem.h"

namespace cem_fast::cuda {

// Stream of the kernels of one call, and its allocator. Memory remains valid until these kernels have run.
struct Context {
  void* stream;  // cudaStream_t
  std::function<void*(int64_t bytes)> allocate;
};

// As on the CPU, but with pointers to numbers that are on the device.
struct ScatterGradient {
  Features x;
  Mixture mixture;            // means and labels
  const void* grad_scatter;   // [classes, components] or, if mixture.diagonal, [classes, components, dimension]
  const void* scale;          // one parameter, or null for 1
  const int64_t* assignment;  // [rows]
  void* dx;                   // [rows, dimension], the features' element
};

struct Bound {
  int64_t classes;
  int64_t components;
  int64_t dimension;
  bool diagonal;
  const void* variances;         // [classes, components] or, if diagonal, [classes, components, dimension]
  const void* weights;           // [classes, components]
  const void* class_prior;       // [classes]
  const double* num_samples;     // [1]
  const double* noise_variance;  // [noise_size]
  int64_t noise_size;            // 1 or dimension
  bool official;
  double boost;
  bool unbiased;
  bool mean;
  double threshold;
  double gamma;
  void* value;  // [1]
  void* slope;  // the shape of variances: derivative of the value to the scatter
};

// EM from the parameters of the mixture. A class has converged if an iteration raises the mean log-likelihood of its
// rows by less than `tol`.
struct ExpectationMaximization {
  Features x;
  Mixture mixture;
  int64_t max_iter;
  double tol;
  double reg_covar;     // added to variances
  double tiny;          // the smallest normal number of the parameters' type
  void* means;          // [classes, components, dimension]
  void* variances;      // the shape of the mixture's
  void* weights;        // [classes, components]
  double* counts;       // [classes, components]
  double* bound;        // [classes]: the mean log-likelihood under the parameters before the last ones
  int64_t* iterations;  // [classes]
  int64_t* converged;   // [classes], 0 or 1
};

// Fits wait for the device now and then, in order to stop.
void kmeans(const KMeans& p, const Context& context);
void expectation_maximization(const ExpectationMaximization& p, const Context& context);

void log_prob_forward(const LogProbForward& p, const Context& context);
void log_prob_backward(const LogProbBackward& p, const Context& context);
void mixture_moments(const MixtureMoments& p, const Context& context);
void statistics_forward(const StatisticsForward& p, const Context& context);
void scatter_gradient(const ScatterGradient& p, const Context& context);

// The bound of given statistics, in the type of the parameters: [classes, components], and the shape of variances.
void entropy_bound(const Bound& p, const void* counts, const void* scatter, bool is_double, const Context& context);

// One step of the loss: assigns every row to the nearest mean and computes the bound of these statistics.
void cem_forward(const Bound& p, const Features& x, const Mixture& mixture, int64_t* assignment,
                 const Context& context);

}  // namespace cem_fast::cuda
