// What the launchers of csrc/stable/cuda share: tensors as rows, the stream, and where counts may be.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <utility>

#include "../rows.h"
#include "rows.h"

namespace lgvit {

inline bool in_pinned_memory(const Tensor& tensor) {
  std::array<StableIValue, 2> stack{torch::stable::detail::from(tensor),
                                    torch::stable::detail::from(std::nullopt)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::is_pinned", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<bool>(stack[0]);
}

inline void check_on_gpu(const std::string& name, const Tensor& tensor) {
  LGVIT_CHECK_VALUE(tensor.size(0) <= kMaxRows, "at most ", kMaxRows, " rows, got ", tensor.size(0));
  LGVIT_CHECK_VALUE(tensor.is_cuda(), name, " is on ", device_text(tensor), ", expected a CUDA device");
}

// A count that a kernel on the device of `like` can write to.
inline void check_count_reachable(const Tensor& count, const Tensor& like) {
  LGVIT_CHECK_VALUE(count.is_cuda() ? count.device() == like.device() : in_pinned_memory(count),
                    "count must be in pinned memory or on ", device_text(like), ", got ",
                    device_text(count));
}

// A tensor's rows in accesses of at most `widest` bytes.
inline Rows as_rows(const Tensor& tensor, uint32_t widest = 16) {
  const RowBytes rows = row_bytes(tensor);
  const uint32_t width = std::min(widest, access_width(rows.data, rows.stride, rows.bytes));
  const int64_t units = rows.bytes / width;
  LGVIT_CHECK_VALUE(units <= std::numeric_limits<int32_t>::max(), "a row of ", rows.bytes,
                    " bytes is too long, ", width, " at a time");
  return {rows.data, rows.stride, uint32_t(units), width};
}

// Two tensors whose rows have the same length, in the same accesses.
inline std::pair<Rows, Rows> as_rows_alike(const Tensor& one, const Tensor& other) {
  const uint32_t width = std::min(as_rows(one).width, as_rows(other).width);
  return {as_rows(one, width), as_rows(other, width)};
}

// The device of a tensor, made current, and its current stream.
struct Launch {
  torch::stable::accelerator::DeviceGuard guard;
  int multiprocessors = 0;
  cudaStream_t stream = nullptr;

  explicit Launch(const Tensor& tensor) : guard(tensor.get_device_index()) {
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount,
                                          tensor.get_device_index()));
    void* current = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &current));
    stream = static_cast<cudaStream_t>(current);
  }
};

}  // namespace lgvit
