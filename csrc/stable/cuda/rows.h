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

// The widest access that fits an address, a row stride and a row length.
inline uint32_t access_width(const char* data, int64_t stride, int64_t bytes) {
  const uint64_t bits = reinterpret_cast<uint64_t>(data) | uint64_t(stride) | uint64_t(bytes) | 16;
  return uint32_t(bits & (~bits + 1));  // the lowest bit set in any: a power of two <= 16
}

}  // namespace lgvit
