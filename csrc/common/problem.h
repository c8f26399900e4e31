// Arguments of the operations as plain structs of pointers, from the torch layer or the sanitizer drivers to the
// kernels.
#pragma once

#include <cstdint>

namespace cem_fast {

// Calls body(begin, end, context), possibly in parallel, on ranges of at least `grain` items that cover [0, items).
// Results do not depend on the distribution of ranges over threads, because the problem alone determines the items.
using ParallelFor = void (*)(int64_t items, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context);

enum class Element { kFloat, kDouble, kBFloat16, kHalf };

// x [rows, dimension], unit stride along the dimension.
struct Features {
  const void* data;
  int64_t stride;  // elements from one row to the next
  Element element;
  int64_t rows;
  int64_t dimension;
};

// Parameters are double where the features are double and float otherwise. `variances` and `weights` may be null where
// an operation does not use them; `labels` null puts every row in class 0.
struct Mixture {
  int64_t classes;
  int64_t components;
  const int64_t* labels;  // [rows]
  const void* means;      // [classes, components, dimension]
  const void* variances;  // [classes, components] or, if diagonal, [classes, components, dimension]
  const void* weights;    // [classes, components]
  bool diagonal;
};

struct StatisticsForward {
  Features x;
  Mixture mixture;  // variances and weights given: assign by posterior, else to the nearest mean
  bool per_dimension;
  void* counts;         // [classes, components]
  void* scatter;        // [classes, components] or, per dimension, [classes, components, dimension]
  void* sums;           // [classes, components, dimension] or null
  int64_t* assignment;  // [rows]
};

// Lloyd's iterations from mixture.means. A class has converged if the squared movement of its means is at most `tol`
// times the mean variance of its features.
struct KMeans {
  Features x;
  Mixture mixture;
  int64_t max_iter;
  double tol;
  bool per_dimension;
  void* means;          // [classes, components, dimension]
  void* counts;         // [classes, components], about the last means
  void* scatter;        // [classes, components] or, per dimension, [classes, components, dimension], about them
  int64_t* iterations;  // [classes]
  int64_t* converged;   // [classes], 0 or 1
};

struct StatisticsBackward {
  Features x;
  Mixture mixture;           // means and labels
  const void* grad_scatter;  // [classes, components] or, if mixture.diagonal, [classes, components, dimension]
  double scale;
  const int64_t* assignment;  // [rows]
  void* dx;                   // [rows, dimension], the features' element
};

struct EntropyBound {
  bool is_double;
  bool diagonal;
  int64_t classes;
  int64_t components;
  int64_t dimension;
  const void* counts;
  const void* scatter;
  const void* variances;
  const void* weights;
  const void* class_prior;
  double num_samples;
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

struct LogProbForward {
  Features x;
  Mixture mixture;
  void* log_prob;          // [rows]
  void* responsibilities;  // [rows, components] or null
};

struct LogProbBackward {
  Features x;
  Mixture mixture;
  const void* grad;              // [rows]
  const void* log_prob;          // [rows]
  const void* responsibilities;  // [rows, components], or null: computed again
  void* dx;                      // [rows, dimension], the features' element
};

struct MixtureMoments {
  Features x;
  Mixture mixture;
  const void* row_weights;       // [rows], or null: all 1
  const void* responsibilities;  // [rows, components], or null: computed again
  void* s0;                      // [classes, components]
  void* s1;                      // [classes, components, dimension]
  void* s2;                      // the shape of variances
  double* log_likelihood;        // [classes], or null; needs responsibilities to be null
};

// Distances of rows to candidates for the next mean of every class, which are the means of `mixture`.
struct CandidateDistances {
  Features x;
  Mixture mixture;      // means and labels
  const void* nearest;  // [rows], squared distances to the means so far
  const double* mass;   // [rows]
  void* distances;      // [candidates, rows]: the smaller one of nearest and the squared distance to the candidate
  double* potentials;   // [candidates, classes]: their sums weighted by the masses
};

// Initial means of one class by greedy k-means++.
struct Seeding {
  Features x;             // one row at least
  const double* mass;     // [rows]
  const double* uniform;  // [1 + (components - 1) candidates], in the order of the draws
  int64_t components;
  int64_t candidates;  // of every mean but the first
  void* means;         // [components, dimension]
};

// Lower triangular W [dimension, dimension] with W A W^T = 1 of each matrix A.
struct InverseRoots {
  int64_t count;
  int64_t dimension;
  const double* matrices;  // [count, dimension, dimension], symmetric
  double* roots;           // the same
  double* half_logdets;    // [count], 1/2 log det A; NaN for a matrix that is not positive definite
};

// constants - 1/2 |W (x - mean)|^2; features and means are double.
struct MatrixLogJoint {
  Features x;
  Mixture mixture;          // means and labels
  bool tied;                // one matrix per class
  const double* roots;      // [classes, components, dimension, dimension] or, if tied, [classes, dimension, dimension]
  const double* constants;  // [classes, components]
  double* joint;            // [rows, components]
};

// Moments about the means, weighted by responsibilities; features and means are double.
struct MatrixMoments {
  Features x;
  Mixture mixture;                 // means and labels
  bool tied;                       // the second moment is summed over the components
  const double* responsibilities;  // [rows, components]
  double* s0;                      // [classes, components]
  double* s1;                      // [classes, components, dimension]
  double* s2;                      // [classes, components, dimension, dimension] or [classes, dimension, dimension]
};

// One set of kernels per instruction set. All accept zero rows.
struct Kernels {
  const char* capability;
  void (*statistics_forward)(const StatisticsForward&, ParallelFor);
  void (*statistics_backward)(const StatisticsBackward&, ParallelFor);
  void (*kmeans)(const KMeans&, ParallelFor);
  void (*entropy_bound)(const EntropyBound&, ParallelFor);
  void (*log_prob_forward)(const LogProbForward&, ParallelFor);
  void (*log_prob_backward)(const LogProbBackward&, ParallelFor);
  void (*mixture_moments)(const MixtureMoments&, ParallelFor);
  void (*candidate_distances)(const CandidateDistances&, ParallelFor);
  void (*seeding)(const Seeding&, ParallelFor);
  void (*inverse_roots)(const InverseRoots&, ParallelFor);
  void (*matrix_log_joint)(const MatrixLogJoint&, ParallelFor);
  void (*matrix_moments)(const MatrixMoments&, ParallelFor);
};

}  // namespace cem_fast
