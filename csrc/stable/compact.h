// What the CPU and the CUDA implementation of compact_ share: its arguments, checked.
#pragma once

#include <algorithm>
#include <string>
#include <vector>

#include "checks.h"

namespace lgvit {

using torch::headeronly::ScalarType;

// A tensor [B, ...] as B runs of bytes.
struct RowBytes {
  char* data;
  int64_t stride;  // bytes from one row to the next
  int64_t bytes;   // bytes of one row
};

// The memory of a tensor's rows, as addresses.
struct Span {
  std::string name;
  uint64_t start, end, stride, width;

  Span(std::string name, const Tensor& tensor) : name(std::move(name)) {
    const uint64_t rows = tensor.dim() ? tensor.size(0) : 1, itemsize = tensor.element_size();
    width = rows ? tensor.numel() / rows * itemsize : 0;
    stride = tensor.dim() ? tensor.stride(0) * itemsize : 0;
    start = reinterpret_cast<uint64_t>(tensor.const_data_ptr());
    end = width ? start + (rows - 1) * stride + width : start;
  }

  // Whether a byte belongs to both; may say so of different row strides that interlock.
  bool meets(const Span& other) const {
    if (width == 0 || other.width == 0 || end <= other.start || other.end <= start) return false;
    if (stride != other.stride || stride == 0) return true;
    const uint64_t offset = (other.start % stride + stride - start % stride) % stride;
    return !(width <= offset && offset <= stride - other.width);
  }
};

inline void check_compact(const std::vector<Tensor>& tensors, const Tensor& keep, const Tensor& count) {
  check_memory("keep", keep);
  check_memory("count", count);
  LGVIT_CHECK_VALUE(keep.dim() == 1 && keep.scalar_type() == ScalarType::Bool,
                    "keep must be bool [B], got ", keep.scalar_type(), " ", shape_text(keep));
  LGVIT_CHECK_VALUE(count.numel() == 1 && count.scalar_type() == ScalarType::Long,
                    "count must be int64 [1], got ", count.scalar_type(), " ", shape_text(count));
  const int64_t batch = keep.size(0);
  std::vector<Span> spans;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const Tensor& tensor = tensors[i];
    const std::string name = i == 0 ? "tokens" : "companion " + std::to_string(i);
    check_memory(name, tensor);
    LGVIT_CHECK_VALUE(tensor.dim() > 0 && tensor.size(0) == batch, name, ": expected [", batch,
                      ", ...], got ", shape_text(tensor));
    LGVIT_CHECK_VALUE(tensor.device() == keep.device(), name, " is on ", device_text(tensor),
                      ", keep on ", device_text(keep));
    if (tensor.numel() == 0) continue;
    int64_t expected = 1;
    for (int64_t dim = tensor.dim() - 1; dim > 0; --dim) {
      LGVIT_CHECK_VALUE(tensor.size(dim) == 1 || tensor.stride(dim) == expected, name,
                        ": rows must be contiguous, got strides ", stride_text(tensor));
      expected *= tensor.size(dim);
    }
    LGVIT_CHECK_VALUE(batch < 2 || tensor.stride(0) >= expected, name,
                      ": rows overlap: stride ", tensor.stride(0), ", length ", expected);
    spans.emplace_back(name, tensor);
  }
  // With one row nothing is moved, but the count is always written.
  if (batch > 1) spans.emplace_back("keep", keep);
  spans.emplace_back("count", count);
  for (size_t i = 0; i < spans.size(); ++i)
    for (size_t j = i + 1; j < spans.size(); ++j)
      LGVIT_CHECK_VALUE((batch < 2 && j + 1 < spans.size()) || !spans[i].meets(spans[j]),
                        spans[i].name, " and ", spans[j].name, " share memory");
}

inline RowBytes row_bytes(const Tensor& tensor) {
  const int64_t rows = tensor.size(0);
  const int64_t width = rows ? tensor.numel() / rows : 0;
  const int64_t itemsize = tensor.element_size();
  return {static_cast<char*>(tensor.mutable_data_ptr()), tensor.stride(0) * itemsize,
          width * itemsize};
}

}  // namespace lgvit
