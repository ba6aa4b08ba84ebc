// What the CPU and the CUDA implementation of compact_ share: its arguments, checked.
#pragma once

#include <ATen/core/Tensor.h>

namespace lgvit {

// A tensor [B, ...] as B runs of bytes.
struct RowBytes {
  char* data;
  int64_t stride;  // bytes from one row to the next
  int64_t bytes;   // bytes of one row
};

inline void check_compact(at::TensorList tensors, const at::Tensor& keep, const at::Tensor& count) {
  TORCH_CHECK_VALUE(keep.dim() == 1 && keep.scalar_type() == at::kBool,
                    "keep must be bool [B], got ", keep.scalar_type(), " ", keep.sizes());
  TORCH_CHECK_VALUE(count.numel() == 1 && count.scalar_type() == at::kLong,
                    "count must be int64 [1], got ", count.scalar_type(), " ", count.sizes());
  for (const at::Tensor& tensor : tensors) {
    TORCH_CHECK_VALUE(tensor.dim() > 0 && tensor.size(0) == keep.size(0), "expected [",
                      keep.size(0), ", ...], got ", tensor.sizes());
    TORCH_CHECK_VALUE(tensor.device() == keep.device(), "tensor is on ", tensor.device(),
                      ", keep on ", keep.device());
    int64_t expected = 1;
    for (int64_t dim = tensor.dim() - 1; dim > 0; --dim) {
      TORCH_CHECK_VALUE(tensor.size(dim) == 1 || tensor.stride(dim) == expected ||
                            tensor.numel() == 0,
                        "rows must be contiguous, got strides ", tensor.strides());
      expected *= tensor.size(dim);
    }
    TORCH_CHECK_VALUE(tensor.size(0) < 2 || tensor.stride(0) >= expected,
                      "rows overlap: stride ", tensor.stride(0), ", length ", expected);
  }
}

inline RowBytes row_bytes(const at::Tensor& tensor) {
  const int64_t rows = tensor.size(0);
  const int64_t width = rows ? tensor.numel() / rows : 0;
  const int64_t itemsize = tensor.element_size();
  return {static_cast<char*>(tensor.mutable_data_ptr()), tensor.stride(0) * itemsize,
          width * itemsize};
}

}  // namespace lgvit
