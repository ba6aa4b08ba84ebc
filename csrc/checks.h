// Argument checks that the heads' operators share. Each is made before any pointer is taken: what calls an
// operator need not be the Python beside it.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <limits>
#include <string>

#include "memory.h"

namespace lgvit {

// A dense tensor whose elements all lie in its storage.
inline void check_memory(const std::string& name, const at::Tensor& tensor) {
  TORCH_CHECK_VALUE(tensor.defined(), name, " is missing");
  TORCH_CHECK_VALUE(tensor.layout() == at::kStrided, name, " is ", tensor.layout(),
                    ", expected a dense tensor");
  if (tensor.numel() == 0) return;
  const Memory memory{tensor.sizes().data(),     tensor.strides().data(),
                      tensor.dim(),              tensor.storage_offset(),
                      tensor.element_size(),     tensor.storage().nbytes()};
  const std::string problem = memory.problem();
  TORCH_CHECK_VALUE(problem.empty(), name, problem);
}

inline void check_like(const std::string& name, const at::Tensor& tensor, at::ScalarType dtype,
                       at::Device device) {
  check_memory(name, tensor);
  TORCH_CHECK_VALUE(tensor.scalar_type() == dtype, name, " is ", tensor.scalar_type(),
                    ", expected ", dtype);
  TORCH_CHECK_VALUE(tensor.device() == device, name, " is on ", tensor.device(), ", expected ",
                    device);
}

inline void check_shape(const std::string& name, const at::Tensor& tensor, at::IntArrayRef shape) {
  TORCH_CHECK_VALUE(tensor.sizes() == shape, name, " has shape ", tensor.sizes(), ", expected ",
                    shape);
}

// float32 or bfloat16, dense: what the CPU kernels compute in.
inline void check_compute_dtype(const std::string& name, const at::Tensor& tensor) {
  check_memory(name, tensor);
  TORCH_CHECK_VALUE(
      tensor.scalar_type() == at::kFloat || tensor.scalar_type() == at::kBFloat16, name, " is ",
      tensor.scalar_type(), ", expected Float or BFloat16");
}

inline void check_channels(const std::string& name, int64_t channels) {
  TORCH_CHECK_VALUE(channels > 0 && channels <= std::numeric_limits<int32_t>::max(), name, " has ",
                    channels, " channels, expected 1 to 2^31 - 1");
}

// tokens [B, prefix + height * width, C] of the grid.
inline void check_tokens(const at::Tensor& tokens, int64_t prefix, int64_t height, int64_t width) {
  check_compute_dtype("tokens", tokens);
  TORCH_CHECK_VALUE(tokens.dim() == 3, "tokens has shape ", tokens.sizes(),
                    ", expected [B, P + N, C]");
  check_channels("tokens", tokens.size(2));
  int64_t patches = 0, rows = 0;
  TORCH_CHECK_VALUE(prefix >= 0 && height > 0 && width > 0 &&
                        !mul_overflows(height, width, patches) &&
                        !__builtin_add_overflow(prefix, patches, &rows) && rows == tokens.size(1),
                    "tokens has ", tokens.size(1), " rows an image, expected ", prefix,
                    " prefix tokens + ", height, " x ", width, " patches");
}

}  // namespace lgvit
