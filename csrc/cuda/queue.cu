#include "queue.cuh"

#include <memory>
#include <mutex>
#include <vector>

namespace cem_fast::cuda {

const Machine& Machine::current() {
  static std::mutex mutex;
  static std::vector<std::unique_ptr<Machine>> known;
  int device = 0;
  Queue::check(cudaGetDevice(&device));
  const std::lock_guard lock(mutex);
  if (known.size() <= static_cast<size_t>(device)) known.resize(static_cast<size_t>(device) + 1);
  std::unique_ptr<Machine>& one = known[static_cast<size_t>(device)];
  if (one == nullptr) {
    int multiprocessors = 0, shared = 0;
    Queue::check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
    Queue::check(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    one.reset(new Machine{multiprocessors, shared});
  }
  return *one;
}

}  // namespace cem_fast::cuda
