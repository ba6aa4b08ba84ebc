// compact_ on the GPU, plan (plan.h) and copy in one launch.
#include <algorithm>

#include "compact_kernel.h"
#include "plan.h"

namespace lgvit {
namespace {

__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    compact_kernel(const __grid_constant__ CompactArgs args) {
  __shared__ Plan plan;
  const int n = make_plan(plan, args.batch, [&](int row) { return args.keep[row * args.keep_stride] != 0; });
  if (blockIdx.x == 0 && threadIdx.x == 0) *args.count = n;

  uint64_t tile = blockIdx.x;
  for (int k = 0; k < args.num_tensors; ++k)
    copy_rows(FillHoles{plan}, args.tensors[k], args.tensors[k], tile);
}

}  // namespace

cudaError_t launch_compact(const CompactArgs& args, int num_multiprocessors, cudaStream_t stream) {
  // The host does not know how many rows will move, only that half of them can at most.
  uint64_t tiles = 1;
  for (int k = 0; k < args.num_tensors; ++k) tiles += tiles_of(args.tensors[k], args.batch / 2);
  const uint64_t resident = uint64_t(num_multiprocessors) * kBlocksPerMultiprocessor;
  compact_kernel<<<unsigned(std::min(tiles, resident)), kThreads, 0, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace lgvit
