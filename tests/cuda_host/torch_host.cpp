// The device that register.cpp finds on the host. Its current stream is another than the default one, and work can be
// launched there only while a guard for the device is held.

#include "torch_host.h"

#include <cuda_runtime.h>

#include <utility>

namespace {

int stream;

}  // namespace

extern "C" {

AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  cuda_host::current_stream = &stream;
  *guard = reinterpret_cast<DeviceGuardHandle>(&stream);
  return 0;
}

AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) {
  cuda_host::current_stream = nullptr;
  return 0;
}

AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** current);
AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** current) {
  *current = &stream;
  return 0;
}

// The launch after so many others fails.
__attribute__((visibility("default"))) void cuda_host_fail_after(int64_t launches) {
  cuda_host::launches_left = launches;
}

// Whether launches become nodes of a graph.
__attribute__((visibility("default"))) void cuda_host_capture(bool capturing) { cuda_host::capturing = capturing; }

// Fills with 0 since the last call.
__attribute__((visibility("default"))) int64_t cuda_host_fills() { return std::exchange(cuda_host::fills, 0); }

// Calls found(kernel, blocks, threads, bytes of dynamic shared memory) for every launch since the last call.
__attribute__((visibility("default"))) void cuda_host_launches(void (*found)(const void*, int64_t, int64_t, int64_t)) {
  for (const cuda_host::Launch& one : cuda_host::listed) found(one.kernel, one.blocks, one.threads, one.shared);
  cuda_host::listed.clear();
}
}
