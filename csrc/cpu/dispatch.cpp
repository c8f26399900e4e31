#include "dispatch.h"

#include <atomic>
#include <cstring>

namespace cem_fast {

namespace baseline {
extern const Kernels kernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
#endif

namespace {

// The kernels named `capability` that this processor can run, the widest for a null name; null where there are none.
const Kernels* find(const char* capability) {
  const auto wanted = [&](const Kernels& k) {
    return capability == nullptr || std::strcmp(capability, k.capability) == 0;
  };
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vl");
  if (v4 && wanted(avx512::kernels)) return &avx512::kernels;
  if (v3 && wanted(avx2::kernels)) return &avx2::kernels;
#endif
  return wanted(baseline::kernels) ? &baseline::kernels : nullptr;
}

std::atomic<const Kernels*>& selected() {
  static std::atomic<const Kernels*> kernels{find(nullptr)};
  return kernels;
}

}  // namespace

const Kernels& kernels() { return *selected().load(std::memory_order_relaxed); }

}  // namespace cem_fast

const char* cem_fast_cpu_capability() { return cem_fast::kernels().capability; }

int cem_fast_cpu_select(const char* capability) {
  const cem_fast::Kernels* found = cem_fast::find(capability);
  if (found == nullptr) return 1;
  cem_fast::selected().store(found, std::memory_order_relaxed);
  return 0;
}
