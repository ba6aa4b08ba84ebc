// compact_ for CUDA tensors: turns tensors into rows of bytes and launches on the current stream.
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>

#include <array>
#include <cstdint>
#include <limits>
#include <optional>
#include <vector>

#include "../compact.h"
#include "compact_kernel.h"

namespace {

using torch::stable::Tensor;

int num_multiprocessors(int device) {
  int value = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, cudaDevAttrMultiProcessorCount, device));
  return value;
}

bool in_pinned_memory(const Tensor& tensor) {
  std::array<StableIValue, 2> stack{torch::stable::detail::from(tensor),
                                    torch::stable::detail::from(std::nullopt)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::is_pinned", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<bool>(stack[0]);
}

// The widest access that fits a tensor's address, row stride and row length.
lgvit::Rows as_rows(const Tensor& tensor) {
  const lgvit::RowBytes rows = lgvit::row_bytes(tensor);
  const uint64_t bits = reinterpret_cast<uint64_t>(rows.data) | uint64_t(rows.stride) |
                        uint64_t(rows.bytes) | 16;
  const uint64_t width = bits & (~bits + 1);  // the lowest bit set in any: a power of two <= 16
  const uint64_t units = uint64_t(rows.bytes) / width;
  LGVIT_CHECK_VALUE(units <= uint64_t(std::numeric_limits<int32_t>::max()), "a row of ", rows.bytes,
                    " bytes is too long");
  return {rows.data, rows.stride, uint32_t(units), uint32_t(width)};
}

void compact_(const std::vector<Tensor>& tensors, const Tensor& keep, const Tensor& count) {
  lgvit::check_compact(tensors, keep, count);
  LGVIT_CHECK_VALUE(keep.size(0) <= lgvit::kMaxRows, "at most ", lgvit::kMaxRows, " rows, got ",
                    keep.size(0));
  LGVIT_CHECK_VALUE(keep.is_cuda(), "keep is on ", lgvit::device_text(keep), ", expected a CUDA device");
  LGVIT_CHECK_VALUE(count.is_cuda() ? count.device() == keep.device() : in_pinned_memory(count),
                    "count must be in pinned memory or on ", lgvit::device_text(keep),
                    ", got ", lgvit::device_text(count));
  const torch::stable::accelerator::DeviceGuard guard(keep.get_device_index());
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_get_current_cuda_stream(keep.get_device_index(), &stream));

  lgvit::CompactArgs args{};
  args.keep = static_cast<const uint8_t*>(keep.const_data_ptr());
  args.keep_stride = keep.stride(0);
  args.batch = int(keep.size(0));
  args.count = count.mutable_data_ptr<int64_t>();
  auto launch = [&] {
    STD_CUDA_CHECK(lgvit::launch_compact(args, num_multiprocessors(keep.get_device_index()),
                                         static_cast<cudaStream_t>(stream)));
    args.num_tensors = 0;
  };
  for (const Tensor& tensor : tensors) {
    if (args.num_tensors == lgvit::kMaxTensors) launch();
    const lgvit::Rows rows = as_rows(tensor);
    if (rows.units) args.tensors[args.num_tensors++] = rows;
  }
  launch();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lgvit_fast, CUDA, m) { m.impl("compact_", TORCH_BOX(&compact_)); }
