// compact_ on the CPU: pairs the holes from the front with the survivors from the back, then copies.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "compact.h"

namespace {

using torch::stable::Tensor;

constexpr int64_t kGrainBytes = 1 << 16;  // a thread is worth waking for 64 KB

void compact_(const std::vector<Tensor>& tensors, const Tensor& keep, const Tensor& count) {
  lgvit::check_compact(tensors, keep, count);
  const auto* flags = static_cast<const uint8_t*>(keep.const_data_ptr());  // any byte may be in a view
  const int64_t stride = keep.stride(0);

  std::vector<std::pair<int64_t, int64_t>> moves;  // (survivor, hole)
  int64_t front = 0;                               // every row before it is a survivor or filled
  int64_t back = keep.size(0);                     // every row from it on has left or been moved
  while (true) {
    while (front < back && flags[front * stride]) ++front;
    while (front < back && !flags[(back - 1) * stride]) --back;
    if (front == back) break;
    moves.emplace_back(--back, front++);
  }
  *count.mutable_data_ptr<int64_t>() = front;

  for (const Tensor& tensor : tensors) {
    const lgvit::RowBytes rows = lgvit::row_bytes(tensor);
    if (rows.bytes == 0) continue;
    const int64_t grain = std::max<int64_t>(1, kGrainBytes / rows.bytes);
    torch::stable::parallel_for(0, moves.size(), grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const auto [survivor, hole] = moves[i];
        std::memcpy(rows.data + hole * rows.stride, rows.data + survivor * rows.stride, rows.bytes);
      }
    });
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lgvit_fast, CPU, m) { m.impl("compact_", TORCH_BOX(&compact_)); }
