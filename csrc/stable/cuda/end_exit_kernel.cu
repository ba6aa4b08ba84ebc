// end_exit_ on the GPU in one launch: the plan (plan.h), the answers of the images that leave, and the
// moves of those that stay.
//
// Every block reads `rows` to write answers, so `rows` itself is compacted by the block that is the last
// to finish, when nobody reads it any more.
#include <algorithm>

#include "end_exit_kernel.h"
#include "plan.h"

namespace lgvit {
namespace {

// The moves that gather all survivors into the first rows of another tensor.
struct Gather {
  const uint16_t* order;  // the row that comes to each place
  int survivors;
  __device__ int count() const { return survivors; }
  __device__ int source(int move) const { return order[move]; }
  __device__ int target(int move) const { return move; }
};

// One warp copies one row, or its lanes' share of it.
template <typename Unit>
__device__ void copy_row(const char* from, char* to, uint32_t units) {
  for (uint32_t unit = threadIdx.x % 32; unit < units; unit += 32)
    reinterpret_cast<Unit*>(to)[unit] = reinterpret_cast<const Unit*>(from)[unit];
}

// A warp an image, in turn over all blocks.
__device__ void write_answers(const EndExitArgs& args, int entering) {
  const int step = gridDim.x * kWarps;
  for (int i = blockIdx.x * kWarps + threadIdx.x / 32; i < entering; i += step) {
    const int64_t row = args.rows[i];
    if (row < 0 || row >= args.answers) continue;  // no such answer: never write beyond the buffer
    const bool leader = threadIdx.x % 32 == 0;
    if (leader && !args.valid[i]) args.nonfinite[row] = 1;
    if (!args.leave[i]) continue;
    if (leader) {
      args.exit_index[row] = args.index;
      args.exit_layer[row] = args.layer;
    }
    const char* from = args.logits.data + i * args.logits.stride;
    char* to = args.answer_logits.data + row * args.answer_logits.stride;
    switch (args.logits.width) {
      case 16: copy_row<uint4>(from, to, args.logits.units); break;
      case 8: copy_row<uint2>(from, to, args.logits.units); break;
      case 4: copy_row<uint32_t>(from, to, args.logits.units); break;
      case 2: copy_row<uint16_t>(from, to, args.logits.units); break;
      default: copy_row<uint8_t>(from, to, args.logits.units);
    }
  }
}

// Whether this block is the last of the grid to come here: all that the others did before is then over.
// Leaves the counter at zero for the next launch.
__device__ bool last_to_finish(uint32_t* finished) {
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();  // what this block read and wrote comes before it counts as finished,
    last = atomicInc(finished, gridDim.x - 1) == gridDim.x - 1;
    __threadfence();  // and what the others did before anything the last one does next
  }
  __syncthreads();
  return last;
}

template <bool kInto>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    end_exit_kernel(const __grid_constant__ EndExitArgs args) {
  __shared__ Plan plan;
  __shared__ uint16_t order[kInto ? kMaxRows : 1];
  const int entering =
      args.entering ? int(min(max(*args.entering, int64_t(0)), int64_t(args.batch))) : args.batch;
  const int n = make_plan(plan, entering, [&](int row) { return args.leave[row] == 0; });
  if (blockIdx.x == 0 && threadIdx.x == 0)
    for (int64_t* count : args.counts)
      if (count) *count = n;

  write_answers(args, entering);
  uint64_t tile = blockIdx.x;
  if constexpr (kInto) {
    for (int row = threadIdx.x; row < n; row += kThreads) order[row] = uint16_t(row);
    __syncthreads();
    for (int move = threadIdx.x; move < plan.num_moves; move += kThreads)
      order[plan.hole[move]] = plan.source[move];
    __syncthreads();
    copy_rows(Gather{order, n}, args.tokens, args.into, tile);
  } else {
    copy_rows(FillHoles{plan}, args.tokens, args.tokens, tile);
  }
  copy_rows(FillHoles{plan}, args.state, args.state, tile);

  if (!last_to_finish(args.finished)) return;
  for (int move = threadIdx.x; move < plan.num_moves; move += kThreads)
    args.rows[plan.hole[move]] = args.rows[plan.source[move]];
}

}  // namespace

cudaError_t launch_end_exit(const EndExitArgs& args, int num_multiprocessors, cudaStream_t stream) {
  // The host does not know how many rows will move.
  const bool into = args.into.data != nullptr;
  const uint64_t tiles = 1 + tiles_of(args.tokens, into ? args.batch : args.batch / 2) +
                         tiles_of(args.state, args.batch / 2);
  const uint64_t answers = (uint64_t(args.batch) + kWarps - 1) / kWarps;
  const uint64_t resident = uint64_t(num_multiprocessors) * kBlocksPerMultiprocessor;
  const unsigned blocks = unsigned(std::min(std::max(tiles, answers), resident));
  const auto kernel = into ? end_exit_kernel<true> : end_exit_kernel<false>;
  kernel<<<blocks, kThreads, 0, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace lgvit
