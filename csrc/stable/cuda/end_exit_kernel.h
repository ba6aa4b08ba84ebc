// The CUDA kernel of end_exit_.
#pragma once

#include "rows.h"

namespace lgvit {

struct EndExitArgs {
  int batch;                // rows, <= kMaxRows
  const int64_t* entering;  // how many of them hold images; null: all
  const uint8_t* leave;     // [batch]
  const uint8_t* valid;     // [batch]
  int64_t* rows;            // [batch] each image's place in the answer; compacted
  Rows logits;              // [batch, K]
  Rows answer_logits;       // [answers, K], the same width and units as `logits`
  int64_t answers;
  int64_t* exit_index;  // [answers]
  int64_t* exit_layer;  // [answers]
  uint8_t* nonfinite;   // [answers]
  int64_t index, layer;
  Rows tokens;
  Rows into;  // where the survivors' tokens go; data null: to the first rows of `tokens`
  Rows state;
  int64_t* counts[2];  // receive the number of survivors; device or pinned memory, or null
  uint32_t* finished;  // zero before and after: how many blocks have read `rows` for the last time
};

// One launch on `stream`. No allocation, no synchronisation: may be captured into a CUDA graph.
cudaError_t launch_end_exit(const EndExitArgs& args, int num_multiprocessors, cudaStream_t stream);

}  // namespace lgvit
