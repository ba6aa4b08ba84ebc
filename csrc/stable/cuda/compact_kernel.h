// The CUDA kernel of compact_.
#pragma once

#include "rows.h"

namespace lgvit {

constexpr int kMaxTensors = 16;  // of one launch

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
