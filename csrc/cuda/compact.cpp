// compact_ for CUDA tensors: turns tensors into rows of bytes and launches on the current stream.
#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <limits>

#include "../compact.h"
#include "compact_kernel.h"

namespace {

int num_multiprocessors(int device) {
  int value = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&value, cudaDevAttrMultiProcessorCount, device));
  return value;
}

// The widest access that fits a tensor's address, row stride and row length.
lgvit::Rows as_rows(const at::Tensor& tensor) {
  const lgvit::RowBytes rows = lgvit::row_bytes(tensor);
  const uint64_t bits = reinterpret_cast<uint64_t>(rows.data) | uint64_t(rows.stride) |
                        uint64_t(rows.bytes) | 16;
  const uint64_t width = bits & (~bits + 1);  // the lowest bit set in any: a power of two <= 16
  const uint64_t units = uint64_t(rows.bytes) / width;
  TORCH_CHECK_VALUE(units <= uint64_t(std::numeric_limits<int32_t>::max()), "a row of ", rows.bytes,
                    " bytes is too long");
  return {rows.data, rows.stride, uint32_t(units), uint32_t(width)};
}

void compact_(at::TensorList tensors, const at::Tensor& keep, const at::Tensor& count) {
  lgvit::check_compact(tensors, keep, count);
  TORCH_CHECK_VALUE(keep.size(0) <= lgvit::kMaxRows, "at most ", lgvit::kMaxRows, " rows, got ",
                    keep.size(0));
  TORCH_CHECK_VALUE(keep.is_cuda(), "keep is on ", keep.device(), ", expected a CUDA device");
  TORCH_CHECK_VALUE(count.is_cuda() ? count.device() == keep.device() : count.is_pinned(),
                    "count must be in pinned memory or on ", keep.device(), ", got ",
                    count.device());
  const c10::cuda::CUDAGuard guard(keep.device());
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream(keep.device().index());

  lgvit::CompactArgs args{};
  args.keep = static_cast<const uint8_t*>(keep.const_data_ptr());
  args.keep_stride = keep.stride(0);
  args.batch = int(keep.size(0));
  args.count = count.mutable_data_ptr<int64_t>();
  auto launch = [&] {
    C10_CUDA_CHECK(lgvit::launch_compact(args, num_multiprocessors(keep.get_device()), stream));
    args.num_tensors = 0;
  };
  for (const at::Tensor& tensor : tensors) {
    if (args.num_tensors == lgvit::kMaxTensors) launch();
    const lgvit::Rows rows = as_rows(tensor);
    if (rows.units) args.tensors[args.num_tensors++] = rows;
  }
  launch();
}

}  // namespace

TORCH_LIBRARY_IMPL(lgvit_fast, CUDA, m) { m.impl("compact_", compact_); }
