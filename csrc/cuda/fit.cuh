// What the iterations of k-means and of EM share: runs of rows, classes that still move, and the end of an iteration.
#pragma once

#include <algorithm>

#include "groups.cuh"

namespace cem_fast::cuda {

// Rows grouped by class, and cut into segments of `size` rows; the last of a class may be shorter. Rows without a class
// have none.
struct Segments {
  int64_t rows;
  int64_t classes;
  int64_t size;
  int64_t segments;              // upper bound, because the labels are on the device
  const int32_t* order;          // [rows]: the row at each position
  const int64_t* offsets;        // [classes + 1]: the first position of every class, and the end
  const int64_t* first_segment;  // [classes + 1]: the first segment of every class, and the end

  // NaN if any row has no class, else zero.
  template <class T>
  __device__ T poison() const {
    return offsets[classes] < rows ? static_cast<T>(nan("")) : T(0);
  }
};

// Segments past the last are empty, and of no class.
__device__ inline Segment segment_at(const Segments& g, int64_t index) {
  if (index >= g.first_segment[g.classes]) return {g.classes, 0, 0};
  int64_t low = 0, high = g.classes - 1;  // the last class that starts at or before the segment
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    if (g.first_segment[middle] <= index) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  const int64_t begin = g.offsets[low] + (index - g.first_segment[low]) * g.size, end = g.offsets[low + 1];
  return {low, begin, begin + g.size < end ? begin + g.size : end};
}

// State of the classes on the device.
struct Classes {
  int32_t* active;      // [classes]: 1 while the class moves
  int32_t* remaining;   // [1]: number of active classes
  unsigned* ticket;     // [classes]: blocks of a kernel that have finished; 0 between kernels
  int64_t* iterations;  // [classes]
  int64_t* converged;   // [classes]
};

// Ends an iteration of a class, in one thread.
__device__ inline void finish_iteration(const Classes& s, int64_t c, bool moves) {
  ++s.iterations[c];
  if (moves) return;
  s.active[c] = 0;
  s.converged[c] = 1;
  atomicAdd(s.remaining, -1);
}

// Sums of a class's segments that outputs of adjacent columns need: one thread per column and share of the segments.
struct Shares {
  int64_t shares;  // that the segments of a class are cut into; a power of two
  __host__ __device__ int64_t columns() const { return kThreads / shares; }
  __device__ int64_t column() const { return threadIdx.x % columns(); }
  __device__ int64_t share() const { return threadIdx.x / columns(); }
};

// partial[segment * stride] added up over a class's segments, in double, for the threads of share 0. All threads of a
// block call this; `inside` says whether the thread's column exists.
template <class T>
__device__ double shared_sum(const Segments& groups, int64_t c, const Shares& by, const T* partial, int64_t stride,
                             bool inside) {
  __shared__ double part[kThreads];
  const int64_t first = groups.first_segment[c] + by.share(), last = groups.first_segment[c + 1];
  constexpr int kFlight = 16;
  double total = 0;
  int64_t s = first;
  for (; inside && s + (kFlight - 1) * by.shares < last; s += kFlight * by.shares) {
    T value[kFlight];
    for (int i = 0; i < kFlight; ++i) value[i] = partial[(s + i * by.shares) * stride];
    for (int i = 0; i < kFlight; ++i) total += static_cast<double>(value[i]);
  }
  for (; inside && s < last; s += by.shares) total += static_cast<double>(partial[s * stride]);
  __syncthreads();  // the parts of the call before have been read
  part[threadIdx.x] = total;
  __syncthreads();  // the parts are complete
  for (int64_t i = 1; i < by.shares && by.share() == 0; ++i) total += part[i * by.columns() + threadIdx.x];
  return total;
}

// Sum over a class's segments of partial[segment * stride], in double, for all threads of the block.
template <class T>
__device__ double segments_sum(const Segments& groups, int64_t c, const T* partial, int64_t stride) {
  double total = 0;
  for (int64_t s = groups.first_segment[c] + threadIdx.x; s < groups.first_segment[c + 1]; s += kThreads) {
    total += static_cast<double>(partial[s * stride]);
  }
  return block_sum(total);
}

// Results that a row without a class invalidates.
template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks) poison_kernel(Segments groups, T* values, int64_t size) {
  const int64_t i = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  if (i < size && groups.poison<T>() != 0) values[i] = static_cast<T>(nan(""));
}

// A fit's rows in about `wanted` segments, fewer if `partials` numbers of each would need much memory.
class Fit {
 public:
  Fit(Queue& queue, const Features& x, const Mixture& mixture, int64_t wanted, int64_t partials, int64_t* iterations,
      int64_t* converged);

  // Calls iterate(i) until no class moves, at most max_iter times. The host reads how many do while the device already
  // runs the next iterations, of which those after the last change nothing.
  template <class F>
  void run(int64_t max_iter, const F& iterate);

  template <class T>
  void poison(T* values, int64_t size) {
    queue_.launch(poison_kernel<T>, divide_up(size, kThreads), groups, values, size);
  }

  Segments groups{};
  Classes classes{};
  Shares shares{};

 private:
  Queue& queue_;
};

// The number of active classes, read by the host without holding up the device: the copy of one round is awaited after
// the work of the next one is queued.
class Progress {
 public:
  Progress(Queue& queue, const int32_t* remaining) : queue_(queue), remaining_(remaining), copy_(pinned()) {
    for (cudaEvent_t& event : copied_) Queue::check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
  }

  ~Progress() {
    for (cudaEvent_t event : copied_) cudaEventSynchronize(event), cudaEventDestroy(event);
  }

  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

  // Ends a round. Returns whether no class moved at the end of the round before.
  bool end_round() {
    const int64_t now = round_++ % 2;
    Queue::check(cudaMemcpyAsync(const_cast<int32_t*>(copy_ + now), remaining_, sizeof(int32_t), cudaMemcpyDeviceToHost,
                                 queue_.stream()));
    Queue::check(cudaEventRecord(copied_[now], queue_.stream()));
    if (round_ == 1) return false;
    Queue::check(cudaEventSynchronize(copied_[1 - now]));
    return copy_[1 - now] == 0;
  }

 private:
  // Memory of the host that a device writes without holding up the host; kept, because freeing it would wait for the
  // device.
  static volatile int32_t* pinned() {
    static thread_local void* memory = nullptr;
    if (memory == nullptr) Queue::check(cudaMallocHost(&memory, 2 * sizeof(int32_t)));
    return static_cast<volatile int32_t*>(memory);
  }

  Queue& queue_;
  const int32_t* remaining_;
  volatile int32_t* copy_;
  int64_t round_ = 0;
  cudaEvent_t copied_[2] = {};
};

constexpr int64_t kRoundIterations = 4;

template <class F>
void Fit::run(int64_t max_iter, const F& iterate) {
  if (groups.rows == 0) return;
  Progress progress(queue_, classes.remaining);
  for (int64_t i = 0; i < max_iter; ++i) {
    iterate(i);
    if (i % kRoundIterations == kRoundIterations - 1 && progress.end_round()) return;
  }
}

}  // namespace cem_fast::cuda
