// Argument checks on tensors of torch's stable ABI, which has neither TORCH_CHECK_VALUE nor names of
// devices. Each is made before any pointer is taken: what calls an operator need not be the Python
// beside it.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/shim_utils.h>

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>

#include "../memory.h"

// Python gets std::invalid_argument as ValueError.
#define LGVIT_CHECK_VALUE(condition, ...) \
  do {                                    \
    if (!(condition)) throw std::invalid_argument(lgvit::message(__VA_ARGS__)); \
  } while (0)

namespace lgvit {

using torch::stable::Tensor;

template <typename... Args>
std::string message(const Args&... parts) {
  std::ostringstream out;
  ((out << parts), ...);
  return out.str();
}

inline std::string shape_text(const Tensor& tensor) {
  return list_text(tensor.sizes().data(), tensor.dim());
}

inline std::string stride_text(const Tensor& tensor) {
  return list_text(tensor.strides().data(), tensor.dim());
}

inline std::string device_text(const Tensor& tensor) {
  if (tensor.is_cpu()) return "cpu";
  if (tensor.is_cuda()) return "cuda:" + std::to_string(tensor.get_device_index());
  return "a device of type " + std::to_string(static_cast<int>(tensor.device().type()));
}

// A dense tensor whose elements all lie in its storage.
inline void check_memory(const std::string& name, const Tensor& tensor) {
  LGVIT_CHECK_VALUE(tensor.defined(), name, " is missing");
  LGVIT_CHECK_VALUE(tensor.layout() == torch::headeronly::Layout::Strided, name,
                    " is not strided, expected a dense tensor");
  if (tensor.numel() == 0) return;
  int64_t bytes = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(tensor.get(), &bytes));
  const Memory memory{tensor.sizes().data(),
                      tensor.strides().data(),
                      tensor.dim(),
                      tensor.storage_offset(),
                      static_cast<int64_t>(tensor.element_size()),
                      static_cast<uint64_t>(bytes)};
  const std::string problem = memory.problem();
  LGVIT_CHECK_VALUE(problem.empty(), name, problem);
}

}  // namespace lgvit
