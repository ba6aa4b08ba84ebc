// Argument checks that the operators share. Each is made before any pointer is taken: what calls an
// operator need not be the Python beside it.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <limits>
#include <string>

namespace lgvit {

inline bool mul_overflows(int64_t a, int64_t b, int64_t& out) {
  return __builtin_mul_overflow(a, b, &out);
}

// Elements from a tensor's first to one past its last; it has some.
inline int64_t extent(const std::string& name, const at::Tensor& tensor) {
  int64_t last = 0;
  for (int64_t dim = 0; dim < tensor.dim(); ++dim) {
    int64_t step = 0;
    TORCH_CHECK_VALUE(!mul_overflows(tensor.size(dim) - 1, tensor.stride(dim), step) &&
                          !__builtin_add_overflow(last, step, &last),
                      name, " has sizes ", tensor.sizes(), " and strides ", tensor.strides(),
                      " that overflow");
  }
  return last + 1;
}

// A dense tensor whose elements all lie in its storage.
inline void check_memory(const std::string& name, const at::Tensor& tensor) {
  TORCH_CHECK_VALUE(tensor.defined(), name, " is missing");
  TORCH_CHECK_VALUE(tensor.layout() == at::kStrided, name, " is ", tensor.layout(),
                    ", expected a dense tensor");
  if (tensor.numel() == 0) return;
  int64_t bytes = 0;
  TORCH_CHECK_VALUE(
      !__builtin_add_overflow(tensor.storage_offset(), extent(name, tensor), &bytes) &&
          !mul_overflows(bytes, tensor.element_size(), bytes) &&
          static_cast<uint64_t>(bytes) <= tensor.storage().nbytes(),
      name, " needs more memory than its storage has (", tensor.storage().nbytes(),
      " bytes): was the storage resized?");
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
