// The CUDA kernel of compact_, free of torch so that it compiles in seconds for every architecture.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace lgvit {

constexpr int kMaxTensors = 16;  // of one launch
constexpr int kMaxRows = 8192;   // B; the plan is kept in shared memory

// A tensor [B, ...] as B rows of `units` accesses of `width` bytes.
struct Rows {
  char* data;
  int64_t stride;  // bytes from one row to the next
  uint32_t units;
  uint32_t width;  // 1, 2, 4, 8 or 16; divides data, stride and the bytes of a row
};

struct CompactArgs {
  Rows tensors[kMaxTensors];
  int num_tensors;
  const uint8_t* keep;  // batch flags
  int64_t keep_stride;  // from one flag to the next
  int batch;            // <= kMaxRows
  int64_t* count;       // receives the number of survivors; device or pinned memory
};

// One launch on `stream`. No allocation, no synchronisation: may be captured into a CUDA graph.
cudaError_t launch_compact(const CompactArgs& args, int num_multiprocessors, cudaStream_t stream);

}  // namespace lgvit
