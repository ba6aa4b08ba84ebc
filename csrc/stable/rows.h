// Tensors [B, ...] as rows of bytes, and the moves that fill the holes of those that leave.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <string>
#include <utility>
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
    stride = rows > 1 ? tensor.stride(0) * itemsize : 0;  // of a single row it means nothing
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

// A tensor [rows, ...] whose rows are contiguous and share no memory.
inline void check_rows(const std::string& name, const Tensor& tensor, int64_t rows) {
  check_memory(name, tensor);
  LGVIT_CHECK_VALUE(tensor.dim() > 0 && tensor.size(0) == rows, name, ": expected [", rows,
                    ", ...], got ", shape_text(tensor));
  if (tensor.numel() == 0) return;
  int64_t expected = 1;
  for (int64_t dim = tensor.dim() - 1; dim > 0; --dim) {
    LGVIT_CHECK_VALUE(tensor.size(dim) == 1 || tensor.stride(dim) == expected, name,
                      ": rows must be contiguous, got strides ", stride_text(tensor));
    expected *= tensor.size(dim);
  }
  LGVIT_CHECK_VALUE(rows < 2 || tensor.stride(0) >= expected, name,
                    ": rows overlap: stride ", tensor.stride(0), ", length ", expected);
}

inline RowBytes row_bytes(const Tensor& tensor) {
  const int64_t rows = tensor.size(0);
  const int64_t width = rows ? tensor.numel() / rows : 0;
  const int64_t itemsize = tensor.element_size();
  return {static_cast<char*>(tensor.mutable_data_ptr()), tensor.stride(0) * itemsize,
          width * itemsize};
}

// Which survivor fills which hole: the first hole takes the last survivor.
struct Moves {
  std::vector<std::pair<int64_t, int64_t>> pairs;  // (survivor, hole)
  int64_t survivors;

  // `kept(row)` says whether a row stays.
  template <typename Kept>
  Moves(int64_t batch, const Kept& kept) {
    int64_t front = 0;     // every row before it is a survivor or filled
    int64_t back = batch;  // every row from it on has left or been moved
    while (true) {
      while (front < back && kept(front)) ++front;
      while (front < back && !kept(back - 1)) --back;
      if (front == back) break;
      pairs.emplace_back(--back, front++);
    }
    survivors = front;
  }
};

constexpr int64_t kGrainBytes = 1 << 16;  // a thread is worth waking for 64 KB

// Copies rows of `from` to rows of `to`, which has rows of the same length: `pairs` of (source, target).
inline void copy_rows(const RowBytes& from, const RowBytes& to,
                      const std::vector<std::pair<int64_t, int64_t>>& pairs) {
  if (from.bytes == 0) return;
  const int64_t grain = std::max<int64_t>(1, kGrainBytes / from.bytes);
  torch::stable::parallel_for(0, pairs.size(), grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const auto [source, target] = pairs[i];
      std::memcpy(to.data + target * to.stride, from.data + source * from.stride, from.bytes);
    }
  });
}

}  // namespace lgvit
