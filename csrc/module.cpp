// What was built, and how. No kernel is registered here, so that importing this forces no backend on anyone.
#include <pybind11/pybind11.h>

namespace {

pybind11::dict build_info() {
  pybind11::dict info;
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#else
  info["compiler"] = "gcc " __VERSION__;
#endif
  info["flags"] = CEM_FAST_FLAGS;
  info["torch"] = CEM_FAST_TORCH;
#if defined(__x86_64__)
  info["cpu"] = pybind11::make_tuple("default", "avx2", "avx512");
#else
  info["cpu"] = pybind11::make_tuple("default");
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("build_info", &build_info,
        "Returns the compiler, its flags, the torch release built with, and the CPU capabilities that were built.");
}
