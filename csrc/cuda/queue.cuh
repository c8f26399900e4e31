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

constexpr int64_t kStaticShared = 6 << 10;  // bytes of a block, at most

// The current device.
struct Machine {
  int64_t multiprocessors;
  int64_t shared;  // bytes that a block can have

  static const Machine& current();
};

class Queue {
 public:
  explicit Queue(const Context& context) : context_(context) {}

  const Context& context() const { return context_; }
  cudaStream_t stream() const { return static_cast<cudaStream_t>(context_.stream); }

  template <class T>
  T* allocate(int64_t n) {
    return static_cast<T*>(context_.allocate(n * static_cast<int64_t>(sizeof(T))));
  }

  // Memory for several arrays at once, which takes the host less time: pairs of a pointer and its number of elements.
  template <class... Wanted>
  void allocate_all(Wanted&&... wanted) {
    place(allocate<char>(bytes_of(wanted...)), wanted...);
  }

  // Runs `blocks` blocks of kThreads threads; none is allowed.
  template <class... P, class... A>
  void launch(void (*kernel)(P...), int64_t blocks, const A&... arguments) {
    launch_with(0, kernel, blocks, arguments...);
  }

  // The same with so many bytes of dynamic shared memory.
  template <class... P, class... A>
  void launch_with(int64_t shared, void (*kernel)(P...), int64_t blocks, const A&... arguments) {
    if (blocks == 0) return;
    if (blocks > std::numeric_limits<int32_t>::max()) throw std::runtime_error("the problem needs too many blocks");
    cudaLaunchConfig_t config{};
    config.gridDim = config.blockDim = dim3{1, 1, 1};
    config.gridDim.x = static_cast<unsigned>(blocks);
    config.blockDim.x = kThreads;
    config.stream = static_cast<cudaStream_t>(context_.stream);
    config.dynamicSmemBytes = static_cast<size_t>(shared);
    if (shared > kDefaultShared - kStaticShared) {
      // as much as there is: another thread may launch the same kernel with less
      const int64_t most = Machine::current().shared - kStaticShared;
      check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(most)));
    }
    check(cudaLaunchKernelEx(&config, kernel, static_cast<P>(arguments)...));
    check(cudaGetLastError());
  }

  // Whether launches become nodes of a CUDA graph.
  bool is_captured() const {
    cudaStreamCaptureStatus status;
    check(cudaStreamIsCapturing(static_cast<cudaStream_t>(context_.stream), &status));
    return status != cudaStreamCaptureStatusNone;
  }

  template <class T>
  T* zeros(int64_t n) {
    T* out = allocate<T>(n);
    check(cudaMemsetAsync(out, 0, static_cast<size_t>(n) * sizeof(T), static_cast<cudaStream_t>(context_.stream)));
    return out;
  }

  static void check(cudaError_t status) {
    if (status != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(status));
  }

  // Copies n elements on the device.
  template <class T>
  void copy(T* to, const T* from, int64_t n) {
    const size_t bytes = static_cast<size_t>(n) * sizeof(T);
    check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, stream()));
  }

 private:
  template <class T, class... Rest>
  static int64_t bytes_of(T*&, int64_t n, Rest&&... rest) {
    const int64_t own = divide_up(n * static_cast<int64_t>(sizeof(T)), kAlignment) * kAlignment;
    if constexpr (sizeof...(rest) == 0) {
      return own;
    } else {
      return own + bytes_of(rest...);
    }
  }

  template <class T, class... Rest>
  static void place(char* at, T*& pointer, int64_t n, Rest&&... rest) {
    pointer = reinterpret_cast<T*>(at);
    if constexpr (sizeof...(rest) > 0) place(at + bytes_of(pointer, n), rest...);
  }

  static constexpr int64_t kAlignment = 16;            // of the arrays of one allocation
  static constexpr int64_t kDefaultShared = 48 << 10;  // static and dynamic; more must be asked for

  const Context& context_;
};

}  // namespace cem_fast::cuda
