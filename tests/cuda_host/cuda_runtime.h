// As much of CUDA as the kernels use, on the host: so that they run, and the sanitizers see them, without a GPU. Shared
// memory is static, and blocks run one after the other. The threads of a block are threads of the host, or, with
// CUDA_HOST_FIBERS, contexts that take turns.
//
// In the environment, CUDA_HOST_SKIP=FILE:LINE leaves out the barrier on that line, and CUDA_HOST_REVERSE=1 runs the
// last block first.
#pragma once

#include <math.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <vector>

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

inline thread_local dim3 threadIdx;
inline thread_local dim3 blockIdx;
inline thread_local dim3 gridDim;

#ifdef CUDA_HOST_FIBERS
#include "fibers.h"
#else
#include "threads.h"
#endif

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __shared__ static
#define __syncthreads() cuda_host::Device::get().synchronize(__FILE__, __LINE__)

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidResourceHandle = 400, cudaErrorLaunchFailure = 719 };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorInvalidResourceHandle ? "invalid resource handle" : "unspecified launch failure";
}

struct cudaLaunchConfig_t {
  dim3 gridDim;
  dim3 blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream;
};

namespace cuda_host {

constexpr int kWarp = 32;

// The only stream that takes work, and how much of it before a launch fails.
inline cudaStream_t current_stream = nullptr;
inline int64_t launches_left = INT64_MAX;

// With CUDA_HOST_IDLE, launches are listed here instead of run.
struct Launch {
  const void* kernel;
  int64_t blocks;
  int64_t threads;
  int64_t shared;
};
inline std::vector<Launch> listed;

// Runs blocks of a fixed number of threads.
class Device {
 public:
  static Device& get() {
    static Device device(128);
    return device;
  }

  void run(unsigned blocks, unsigned threads, const std::function<void()>& body) {
    if (static_cast<int>(threads) != threads_) fail("a launch with another number of threads");
    ++launches;
    crew_.run([&](int thread) {
      threadIdx.x = static_cast<unsigned>(thread);
      gridDim.x = blocks;
      for (unsigned b = 0; b < blocks; ++b) {
        blockIdx.x = reverse_ ? blocks - 1 - b : b;
        body();
        all_.wait();
        // a barrier that only some threads reach is undefined on a GPU
        if (own_[thread].barriers != own_[0].barriers) fail("a barrier that some threads did not reach");
        all_.wait();
      }
    });
  }

  void synchronize(const char* file, int line) {
    ++own_[threadIdx.x].barriers;
    if (line == skipped_line_ && skipped_file_ == std::strrchr(file, '/') + 1) return;
    all_.wait();
  }

  // What the thread in lane `source` of the own warp calls this with. Two rooms take turns, so that nobody writes where
  // another still reads.
  template <class T>
  T exchange(T value, int source) {
    static_assert(sizeof(T) <= sizeof(uint64_t));
    const unsigned thread = threadIdx.x, warp = thread / kWarp;
    std::vector<uint64_t>& room = lanes_[own_[thread].exchanges++ % 2];
    std::memcpy(&room[thread], &value, sizeof(T));
    warps_[warp]->wait();
    std::memcpy(&value, &room[warp * kWarp + static_cast<unsigned>(source)], sizeof(T));
    return value;
  }

  int64_t launches = 0;

 private:
  struct alignas(64) Counts {
    int64_t barriers = 0;
    int64_t exchanges = 0;
  };

  explicit Device(int threads)
      : threads_(threads),
        all_(threads),
        crew_(threads),
        own_(threads),
        lanes_{std::vector<uint64_t>(threads), std::vector<uint64_t>(threads)} {
    for (int w = 0; w < threads / kWarp; ++w) warps_.push_back(std::make_unique<Barrier>(kWarp));
    if (const char* skip = std::getenv("CUDA_HOST_SKIP")) {
      const std::string at = skip;
      skipped_file_ = at.substr(0, at.find(':'));
      skipped_line_ = std::stoi(at.substr(at.find(':') + 1));
    }
    reverse_ = std::getenv("CUDA_HOST_REVERSE") != nullptr;
  }

  [[noreturn]] static void fail(const char* what) {
    std::fprintf(stderr, "cuda_host: %s\n", what);
    std::abort();
  }

  int threads_;
  std::string skipped_file_;
  int skipped_line_ = -1;
  bool reverse_ = false;
  Barrier all_;
  Crew crew_;
  std::vector<std::unique_ptr<Barrier>> warps_;
  std::vector<Counts> own_;
  std::vector<uint64_t> lanes_[2];
};

}  // namespace cuda_host

template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return cuda_host::Device::get().exchange(value, static_cast<int>(threadIdx.x) % cuda_host::kWarp ^ mask);
}

template <class T>
T __shfl_up_sync(unsigned, T value, int delta) {
  const int lane = static_cast<int>(threadIdx.x) % cuda_host::kWarp;
  return cuda_host::Device::get().exchange(value, lane < delta ? lane : lane - delta);
}

template <class... P, class... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...), A... arguments) {
  if (config->stream != cuda_host::current_stream) return cudaErrorInvalidResourceHandle;
  if (cuda_host::launches_left-- == 0) return cudaErrorLaunchFailure;
#ifdef CUDA_HOST_IDLE
  cuda_host::listed.push_back({reinterpret_cast<const void*>(kernel), config->gridDim.x, config->blockDim.x,
                               static_cast<int64_t>(config->dynamicSmemBytes)});
  ((void)arguments, ...);
  return cudaSuccess;
#endif
  cuda_host::Device::get().run(config->gridDim.x, config->blockDim.x, [&] { kernel(arguments...); });
  return cudaSuccess;
}
