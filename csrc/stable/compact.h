// What the CPU and the CUDA implementation of compact_ share: its arguments, checked.
#pragma once

#include <algorithm>
#include <string>
#include <vector>

#include "rows.h"

namespace lgvit {

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
    LGVIT_CHECK_VALUE(tensor.device() == keep.device(), name, " is on ", device_text(tensor),
                      ", keep on ", device_text(keep));
    check_rows(name, tensor, batch);
    if (tensor.numel() != 0) spans.emplace_back(name, tensor);
  }
  // With one row nothing is moved, but the count is always written.
  if (batch > 1) spans.emplace_back("keep", keep);
  spans.emplace_back("count", count);
  for (size_t i = 0; i < spans.size(); ++i)
    for (size_t j = i + 1; j < spans.size(); ++j)
      LGVIT_CHECK_VALUE((batch < 2 && j + 1 < spans.size()) || !spans[i].meets(spans[j]),
                        spans[i].name, " and ", spans[j].name, " share memory");
}

}  // namespace lgvit
