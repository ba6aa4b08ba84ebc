// Tensors as rows for the kernels, free of torch so that they compile in seconds for every architecture.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace lgvit {

constexpr int kMaxRows = 8192;  // B; a plan is kept in shared memory

// A tensor [B, ...] as B rows of `units` accesses of `width` bytes.
struct Rows {
  char* data;
  int64_t stride;  // bytes from one row to the next
  uint32_t units;
  uint32_t width;  // 1, 2, 4, 8 or 16; divides data, stride and the bytes of a row
};

}  // namespace lgvit
