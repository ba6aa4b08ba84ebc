// How the extension was built, as plain Python values. Links against no torch library, so that it
// can be read before anything that might not fit the running torch is loaded.
#include <pybind11/pybind11.h>

#include <string>

namespace {

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#else
  return "unknown";
#endif
}

std::string summary() {
  const std::string cuda = LGVIT_CUDA_VERSION;
  return cuda.empty() ? std::string("compiled without CUDA")
                      : "compiled with CUDA " + cuda + " for " + LGVIT_CUDA_ARCHS;
}

}  // namespace

PYBIND11_MODULE(_build, m) {
  m.doc() = "How the extension was built.";
  m.attr("torch_version") = LGVIT_TORCH_VERSION;
  m.attr("stable_target") = LGVIT_STABLE_TARGET;  // oldest torch that csrc/stable runs on
  m.attr("cuda_version") = LGVIT_CUDA_VERSION;  // "" without CUDA
  m.attr("cuda_archs") = LGVIT_CUDA_ARCHS;      // separated by blanks
  m.attr("compiler") = compiler();
  m.attr("cxx11_abi") = bool(LGVIT_CXX11_ABI);
  m.attr("summary") = summary();
}
