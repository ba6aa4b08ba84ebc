// compact_ on the CPU: pairs the holes from the front with the survivors from the back, then copies.
#include <torch/csrc/stable/library.h>

#include <vector>

#include "compact.h"

namespace {

using torch::stable::Tensor;

void compact_(const std::vector<Tensor>& tensors, const Tensor& keep, const Tensor& count) {
  lgvit::check_compact(tensors, keep, count);
  const auto* flags = static_cast<const uint8_t*>(keep.const_data_ptr());  // any byte may be in a view
  const int64_t stride = keep.stride(0);
  const lgvit::Moves moves(keep.size(0), [&](int64_t row) { return flags[row * stride] != 0; });
  *count.mutable_data_ptr<int64_t>() = moves.survivors;
  for (const Tensor& tensor : tensors) {
    const lgvit::RowBytes rows = lgvit::row_bytes(tensor);
    lgvit::copy_rows(rows, rows, moves.pairs);
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lgvit_fast, CPU, m) { m.impl("compact_", TORCH_BOX(&compact_)); }
