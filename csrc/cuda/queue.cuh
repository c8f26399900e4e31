// Host code shared by the launchers: kernels on the stream of a call, and its temporary memory.
#pragma once

#include <cuda_runtime.h>

#include <limits>
#include <stdexcept>
#include <string>

#include "block.cuh"
#include "kernels.h"

namespace cem_fast::cuda {

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

class Queue {
 public:
  explicit Queue(const Context& context) : context_(context) {}

  template <class T>
  T* allocate(int64_t n) {
    return static_cast<T*>(context_.allocate(n * static_cast<int64_t>(sizeof(T))));
  }

  // Runs `blocks` blocks of kThreads threads; none is allowed.
  template <class... P, class... A>
  void launch(void (*kernel)(P...), int64_t blocks, const A&... arguments) {
    if (blocks == 0) return;
    if (blocks > std::numeric_limits<int32_t>::max()) throw std::runtime_error("the problem needs too many blocks");
    cudaLaunchConfig_t config{};
    config.gridDim = config.blockDim = dim3{1, 1, 1};
    config.gridDim.x = static_cast<unsigned>(blocks);
    config.blockDim.x = kThreads;
    config.stream = static_cast<cudaStream_t>(context_.stream);
    cudaError_t status = cudaLaunchKernelEx(&config, kernel, static_cast<P>(arguments)...);
    if (status == cudaSuccess) status = cudaGetLastError();
    if (status != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(status));
  }

 private:
  const Context& context_;
};

}  // namespace cem_fast::cuda
