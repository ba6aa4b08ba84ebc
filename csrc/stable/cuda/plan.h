// How a block learns where each survivor goes, and how it copies rows. Shared by compact_ and end_exit_.
//
// With n survivors, hole h (the h-th row below n that leaves) is filled by the survivor that has h
// survivors after it, which stands at a row >= n. Sources and holes are disjoint, so blocks never
// meet. Every block makes the whole plan for itself: a scan of B flags in shared memory is cheaper
// than a second launch.
#pragma once

#include "rows.h"

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

// Fills the plan; returns the number of survivors. Each thread owns a run of consecutive rows;
// `kept(row)` says whether a row stays.
template <typename Kept>
__device__ int make_plan(Plan& plan, int batch, const Kept& kept) {
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int run = (batch + kThreads - 1) / kThreads;
  const int first = min(int(threadIdx.x) * run, batch);
  const int last = min(first + run, batch);

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

// The moves of a plan: survivors from the end into the holes of the same tensor.
struct FillHoles {
  const Plan& plan;
  __device__ int count() const { return plan.num_moves; }
  __device__ int source(int move) const { return plan.source[move]; }
  __device__ int target(int move) const { return plan.hole[move]; }
};

// Copies one tile, the accesses [first, first + kTile) of all `total` that the moves of rows take.
template <typename Unit, typename Moves>
__device__ void copy_tile(const Moves& moves, const Rows& from, const Rows& to, uint64_t first,
                          uint64_t total) {
  const uint32_t move = uint32_t(first / from.units);
  const uint32_t start = uint32_t(first % from.units);
  Unit value[kInFlight];
  char* target[kInFlight];
#pragma unroll
  for (int i = 0; i < kInFlight; ++i) {
    const uint32_t step = threadIdx.x + i * kThreads;
    target[i] = nullptr;
    if (first + step < total) {
      const uint32_t m = move + (start + step) / from.units;
      const int64_t offset = int64_t((start + step) % from.units) * sizeof(Unit);
      value[i] = *reinterpret_cast<const Unit*>(from.data + moves.source(m) * from.stride + offset);
      target[i] = to.data + moves.target(m) * to.stride + offset;
    }
  }
#pragma unroll
  for (int i = 0; i < kInFlight; ++i) {
    if (target[i]) *reinterpret_cast<Unit*>(target[i]) = value[i];
  }
}

// Makes this block's share of the moves of rows. The tiles of all tensors of a launch are dealt to the
// blocks in turn: `tile` is the block's next one, counted from the first tile of this tensor, and is
// counted from the first of the next tensor afterwards.
template <typename Moves>
__device__ void copy_rows(const Moves& moves, const Rows& from, const Rows& to, uint64_t& tile) {
  const uint64_t total = uint64_t(moves.count()) * from.units;
  const uint64_t tiles = (total + kTile - 1) / kTile;
  for (; tile < tiles; tile += gridDim.x) {
    switch (from.width) {
      case 16: copy_tile<uint4>(moves, from, to, tile * kTile, total); break;
      case 8: copy_tile<uint2>(moves, from, to, tile * kTile, total); break;
      case 4: copy_tile<uint32_t>(moves, from, to, tile * kTile, total); break;
      case 2: copy_tile<uint16_t>(moves, from, to, tile * kTile, total); break;
      default: copy_tile<uint8_t>(moves, from, to, tile * kTile, total);
    }
  }
  tile -= tiles;
}

// Tiles that `moves` moves of rows take.
inline uint64_t tiles_of(const Rows& rows, uint64_t moves) { return (moves * rows.units + kTile - 1) / kTile; }

}  // namespace
}  // namespace lgvit
