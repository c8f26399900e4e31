// As much of CUDA as the kernels use, on the host: so that they run, and the sanitizers see them, without a GPU. Shared
// memory is static, or as large as the launch asks for and full of NaN; blocks run one after the other. The threads of
// a block are threads of the host, or, with CUDA_HOST_FIBERS, contexts that take turns.
//
// In the environment, CUDA_HOST_SKIP=FILE:LINE leaves out the barrier on that line, and CUDA_HOST_REVERSE=1 runs the
// last block first. With CUDA_HOST_FIBERS, CUDA_HOST_PROCESSES=N shares out the blocks of a launch among N processes,
// so that blocks run at the same time and may wait for each other; their memory is that of device_memory.
#pragma once

#include <math.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <new>
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
#define __align__(bytes) alignas(bytes)
#define __syncthreads() cuda_host::Device::get().synchronize(__FILE__, __LINE__)
#define DYNAMIC_SHARED(name) unsigned char* const name = cuda_host::Device::get().shared()

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

using cudaStream_t = void*;
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidResourceHandle = 400,
  cudaErrorLaunchFailure = 719
};
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorInvalidValue            ? "invalid argument"
         : error == cudaErrorInvalidResourceHandle ? "invalid resource handle"
                                                   : "unspecified launch failure";
}

// Copies are made, and events happen, as soon as they are queued.
using cudaEvent_t = void*;
enum cudaMemcpyKind { cudaMemcpyDeviceToHost = 2, cudaMemcpyDeviceToDevice = 3 };
enum { cudaEventDisableTiming = 2 };
inline cudaError_t cudaMallocHost(void** memory, size_t bytes) {
  static thread_local std::unique_ptr<char[]> pinned;
  pinned.reset(new char[bytes]);
  *memory = pinned.get();
  return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  if (bytes > 0) std::memcpy(to, from, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = nullptr;
  return cudaSuccess;
}
inline cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaEventDestroy(cudaEvent_t) { return cudaSuccess; }
inline cudaError_t cudaEventSynchronize(cudaEvent_t);

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
inline int64_t waits = 0;  // of the host for the device

// With CUDA_HOST_IDLE, launches are listed here instead of run.
struct Launch {
  const void* kernel;
  int64_t blocks;
  int64_t threads;
  int64_t shared;
};
inline std::vector<Launch> listed;

// Processes of a launch, and the seconds after which they are taken to wait for ever.
inline unsigned processes() {
  static const char* said = std::getenv("CUDA_HOST_PROCESSES");
  return said == nullptr ? 1 : static_cast<unsigned>(std::stoi(said));
}
constexpr unsigned kPatience = 30;

// Memory that all processes of a launch write to.
using Memory = std::unique_ptr<char, std::function<void(char*)>>;
inline Memory device_memory(size_t bytes) {
  if (processes() == 1) return {new char[bytes], [](char* p) { delete[] p; }};
  void* shared = mmap(nullptr, bytes + 1, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (shared == MAP_FAILED) std::abort();
  return {static_cast<char*>(shared), [bytes](char* p) { munmap(p, bytes + 1); }};
}

// Runs blocks of a fixed number of threads.
class Device {
 public:
  static Device& get() {
    static Device device(128);
    return device;
  }

  void run(unsigned blocks, unsigned threads, size_t shared, const std::function<void()>& body) {
    if (static_cast<int>(threads) != threads_) fail("a launch with another number of threads");
    if (shared > kShared) fail("a launch with more shared memory than there is");
    ++launches;
    shared_.reset(new (std::align_val_t(16)) unsigned char[shared]);
    if (processes() == 1) return run_some(0, 1, blocks, shared, body);
    for (unsigned first = 0; first < processes(); ++first) {
      if (fork() > 0) continue;
      alarm(kPatience);
      run_some(first, processes(), blocks, shared, body);
      _exit(0);
    }
    for (unsigned i = 0; i < processes(); ++i) {
      int status;
      if (wait(&status) < 0 || status != 0) fail("a block that waits for ever, or crashes");
    }
  }

  // Runs every `step`-th block.
  void run_some(unsigned first, unsigned step, unsigned blocks, size_t shared, const std::function<void()>& body) {
    crew_.run([&](int thread) {
      threadIdx.x = static_cast<unsigned>(thread);
      gridDim.x = blocks;
      for (unsigned b = first; b < blocks; b += step) {
        blockIdx.x = reverse_ ? blocks - 1 - b : b;
        if (shared > 0) {
          if (thread == 0) std::memset(shared_.get(), 0xff, shared);
          all_.wait();
        }
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

  // The same for every lane of the own warp.
  template <class T>
  void gather(T value, T (&of_lane)[kWarp]) {
    const unsigned thread = threadIdx.x, warp = thread / kWarp;
    std::vector<uint64_t>& room = lanes_[own_[thread].exchanges++ % 2];
    std::memcpy(&room[thread], &value, sizeof(T));
    warps_[warp]->wait();
    for (unsigned i = 0; i < kWarp; ++i) std::memcpy(&of_lane[i], &room[warp * kWarp + i], sizeof(T));
  }

  void synchronize_warp() { warps_[threadIdx.x / kWarp]->wait(); }

  unsigned char* shared() { return shared_.get(); }

#ifdef CUDA_HOST_IDLE
  static constexpr size_t kShared = 227 * 1024;
#else
  static constexpr size_t kShared = 99 * 1024;
#endif
  int64_t launches = 0;

 private:
  struct Delete {
    void operator()(unsigned char* p) const { ::operator delete[](p, std::align_val_t(16)); }
  };

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
  std::unique_ptr<unsigned char[], Delete> shared_;
};

// What the device says of itself: an H200 where launches are listed, else a small one.
#ifdef CUDA_HOST_IDLE
inline int multiprocessors = 132;
#else
inline int multiprocessors = 3;
#endif
inline bool capturing = processes() > 1;  // for counters in memory that processes share

// Bytes of dynamic shared memory that a kernel may have: 48 KiB less what is static, of which no kernel that asks for
// more has over 5 KiB, or what was asked for.
inline std::map<const void*, int64_t> dynamic_limits;
inline bool exceeds_limit(const void* kernel, size_t bytes) {
  if (bytes <= 43 << 10) return false;
  const auto found = dynamic_limits.find(kernel);
  return found == dynamic_limits.end() || static_cast<int64_t>(bytes) > found->second;
}

inline int64_t fills = 0;

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

template <class T>
T __shfl_sync(unsigned, T value, int source) {
  return cuda_host::Device::get().exchange(value, source);
}

inline unsigned __ballot_sync(unsigned, int predicate) {
  int of_lane[cuda_host::kWarp];
  cuda_host::Device::get().gather(predicate, of_lane);
  unsigned mask = 0;
  for (int i = 0; i < cuda_host::kWarp; ++i) mask |= (of_lane[i] != 0 ? 1u : 0u) << i;
  return mask;
}

template <class T>
unsigned __match_any_sync(unsigned, T value) {
  T of_lane[cuda_host::kWarp];
  cuda_host::Device::get().gather(value, of_lane);
  unsigned mask = 0;
  for (int i = 0; i < cuda_host::kWarp; ++i) mask |= (of_lane[i] == value ? 1u : 0u) << i;
  return mask;
}

inline void __syncwarp() { cuda_host::Device::get().synchronize_warp(); }
#define __logf logf
inline int __popc(unsigned mask) { return __builtin_popcount(mask); }
inline int __ffs(unsigned mask) { return __builtin_ffs(static_cast<int>(mask)); }

template <class T>
T atomicAdd(T* at, T value) {
  return std::atomic_ref<T>(*at).fetch_add(value);
}

inline void __threadfence() {
#ifdef CUDA_HOST_FIBERS  // else blocks run one after the other
  std::atomic_thread_fence(std::memory_order_seq_cst);
#endif
}
inline void __threadfence_block() {}

template <class T>
T __ldcg(const T* at) {
  return *at;
}

enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16, cudaDevAttrMaxSharedMemoryPerBlockOptin = 97 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone = 0, cudaStreamCaptureStatusActive = 1 };

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? cuda_host::multiprocessors
                                                       : static_cast<int>(cuda_host::Device::kShared);
  return cudaSuccess;
}

inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int value) {
  cuda_host::dynamic_limits[kernel] = value;
  return cudaSuccess;
}

inline cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = cuda_host::capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

inline cudaError_t cudaMemsetAsync(void* at, int value, size_t bytes, cudaStream_t stream) {
  if (stream != cuda_host::current_stream) return cudaErrorInvalidResourceHandle;
  ++cuda_host::fills;
  std::memset(at, value, bytes);
  return cudaSuccess;
}

inline cudaError_t cudaEventSynchronize(cudaEvent_t) {
  ++cuda_host::waits;
  return cudaSuccess;
}

template <class... P, class... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...), A... arguments) {
  if (config->stream != cuda_host::current_stream) return cudaErrorInvalidResourceHandle;
  if (cuda_host::launches_left-- == 0) return cudaErrorLaunchFailure;
  if (cuda_host::exceeds_limit(reinterpret_cast<const void*>(kernel), config->dynamicSmemBytes))
    return cudaErrorInvalidValue;
#ifdef CUDA_HOST_IDLE
  cuda_host::listed.push_back({reinterpret_cast<const void*>(kernel), config->gridDim.x, config->blockDim.x,
                               static_cast<int64_t>(config->dynamicSmemBytes)});
  ((void)arguments, ...);
  return cudaSuccess;
#endif
  cuda_host::Device::get().run(config->gridDim.x, config->blockDim.x, config->dynamicSmemBytes,
                               [&] { kernel(arguments...); });
  return cudaSuccess;
}
