// The CUDA kernel of lph_tail.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace lgvit {

enum class Scalar { float32, bfloat16, float16 };

// Tokens [B, N, C] whose channels lie side by side.
struct Map {
  const void* data;  // the first image's first patch
  int64_t image;     // elements from one image to the next
  int64_t token;     // and from one token to the next
};

struct LphTailArgs {
  Scalar type;               // of `hidden` and `tokens`
  Map hidden;                // x W^T of the patches, without the bias
  Map tokens;                // x
  const float* bias;         // [C]
  const float* scale;        // [C]; null for the light head, as all up to depthwise_bias
  const float* shift;        // [C]
  const float* taps;         // [C, 9]
  const float* depthwise_bias;  // [C]
  float* pooled;             // [B, 2, C]
  int64_t batch;
  int height, width, channels;
};

// One launch on `stream`. No allocation, no synchronisation: may be captured into a CUDA graph.
cudaError_t launch_lph_tail(const LphTailArgs& args, int num_multiprocessors, cudaStream_t stream);

}  // namespace lgvit
