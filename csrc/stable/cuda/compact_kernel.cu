// compact_ on the GPU, plan and copy in one launch.
//
// With n survivors, hole h (the h-th row below n that leaves) is filled by the survivor that has h
// survivors after it, which stands at a row >= n. Sources and holes are disjoint, so blocks never
// meet. Every block makes the whole plan for itself (a scan of B flags in shared memory: cheaper
// than a second launch) and then copies its share: all moves of a tensor, laid end to end, are cut
// into tiles of kTile accesses, and the tiles of all tensors are dealt to the blocks in turn.
#include <algorithm>

#include "compact_kernel.h"

namespace lgvit {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kInFlight = 4;  // independent loads of a thread
constexpr int kTile = kThreads * kInFlight;
constexpr int kBlocksPerMultiprocessor = 4;

struct Plan {
  uint16_t source[kMaxRows / 2];
  uint16_t hole[kMaxRows / 2];
  int warp_survivors[kWarps];
  int num_moves;
};

// Fills the plan; returns the number of survivors. Each thread owns a run of consecutive flags.
__device__ int make_plan(Plan& plan, const CompactArgs& args) {
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int run = (args.batch + kThreads - 1) / kThreads;
  const int first = min(int(threadIdx.x) * run, args.batch);
  const int last = min(first + run, args.batch);
  auto kept = [&](int row) { return args.keep[row * args.keep_stride] != 0; };

  int survivors = 0;
  for (int row = first; row < last; ++row) survivors += kept(row);
  int inclusive = survivors;
  for (int offset = 1; offset < 32; offset *= 2) {
    const int below = __shfl_up_sync(0xffffffffu, inclusive, offset);
    if (lane >= offset) inclusive += below;
  }
  if (lane == 31) plan.warp_survivors[warp] = inclusive;
  if (threadIdx.x == 0) plan.num_moves = 0;
  __syncthreads();

  int before = inclusive - survivors;  // survivors at rows before the one at hand
  int n = 0;
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp) before += plan.warp_survivors[w];
    n += plan.warp_survivors[w];
  }
  int holes = 0;
  for (int row = first; row < last; ++row) {
    if (kept(row)) {
      if (row >= n) plan.source[n - 1 - before] = uint16_t(row);
      ++before;
    } else if (row < n) {
      plan.hole[row - before] = uint16_t(row);
      ++holes;
    }
  }
  if (holes) atomicAdd(&plan.num_moves, holes);
  __syncthreads();
  return n;
}

// Copies one tile, the accesses [first, first + kTile) of all `total` that a tensor's moves take.
template <typename Unit>
__device__ void copy_tile(const Plan& plan, const Rows& rows, uint64_t first, uint64_t total) {
  const uint32_t move = uint32_t(first / rows.units);
  const uint32_t start = uint32_t(first % rows.units);
  Unit value[kInFlight];
  char* target[kInFlight];
#pragma unroll
  for (int i = 0; i < kInFlight; ++i) {
    const uint32_t step = threadIdx.x + i * kThreads;
    target[i] = nullptr;
    if (first + step < total) {
      const uint32_t m = move + (start + step) / rows.units;
      const int64_t offset = int64_t((start + step) % rows.units) * sizeof(Unit);
      value[i] = *reinterpret_cast<const Unit*>(rows.data + plan.source[m] * rows.stride + offset);
      target[i] = rows.data + plan.hole[m] * rows.stride + offset;
    }
  }
#pragma unroll
  for (int i = 0; i < kInFlight; ++i) {
    if (target[i]) *reinterpret_cast<Unit*>(target[i]) = value[i];
  }
}

__global__ void __launch_bounds__(kThreads) compact_kernel(const __grid_constant__ CompactArgs args) {
  __shared__ Plan plan;
  const int n = make_plan(plan, args);
  if (blockIdx.x == 0 && threadIdx.x == 0) *args.count = n;

  uint64_t tile = blockIdx.x;
  for (int k = 0; k < args.num_tensors; ++k) {
    const Rows rows = args.tensors[k];
    const uint64_t total = uint64_t(plan.num_moves) * rows.units;
    const uint64_t tiles = (total + kTile - 1) / kTile;
    for (; tile < tiles; tile += gridDim.x) {
      switch (rows.width) {
        case 16: copy_tile<uint4>(plan, rows, tile * kTile, total); break;
        case 8: copy_tile<uint2>(plan, rows, tile * kTile, total); break;
        case 4: copy_tile<uint32_t>(plan, rows, tile * kTile, total); break;
        case 2: copy_tile<uint16_t>(plan, rows, tile * kTile, total); break;
        default: copy_tile<uint8_t>(plan, rows, tile * kTile, total);
      }
    }
    tile -= tiles;
  }
}

}  // namespace

cudaError_t launch_compact(const CompactArgs& args, int num_multiprocessors, cudaStream_t stream) {
  // The host does not know how many rows will move, only that half of them can at most.
  uint64_t tiles = 1;
  for (int k = 0; k < args.num_tensors; ++k) {
    tiles += (uint64_t(args.batch / 2) * args.tensors[k].units + kTile - 1) / kTile;
  }
  const uint64_t resident = uint64_t(num_multiprocessors) * kBlocksPerMultiprocessor;
  compact_kernel<<<unsigned(std::min(tiles, resident)), kThreads, 0, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace lgvit
