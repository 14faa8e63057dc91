// Rows that whoever is through first sends: the last quarter of each block's tokens, in units of a
// few parts of a row, dealt by a counter of the grid. The link serves some multiprocessors a
// quarter better than others; with fixed shares the last ones would have it almost to themselves.
// Only a quarter, since one word can't count for all parts in time.
#pragma once

#include "bulk_rows.cuh"

namespace moe_a2a::cuda {

// A block says here that the slots of all its tokens are in the context.
__device__ __forceinline__ Chunk* open_flag(const Context& c, int block) {
  return tally_of(c, tallies(c.ep_size), block);
}

class Pool {
 public:
  // All threads, behind the barrier after the block's last slots.
  static __device__ __forceinline__ void open(const DispatchLaunch& p, uint64_t tag) {
    if (p.pool_rows == 0 || threadIdx.x != kBulkThreads - kWarp) return;
    fence_acq_rel_sys();
    store_relaxed_sys(open_flag(p.c, blockIdx.x), {tag, 0});
  }

  // Asks for the number of a unit, which is on its way until it is taken.
  __device__ __forceinline__ void ask(const DispatchLaunch& p) {
    if (p.pool_rows > 0 && threadIdx.x % kWarp == 0) dealt_ = count_up(&p.c.state->pool);
  }
  // The parts of that unit, and in the warp's own row of `routes` where they go. False where there
  // are no more.
  __device__ __forceinline__ bool take(const DispatchLaunch& p, uint64_t tag, Routes& routes,
                                       Parts& parts) {
    if (p.pool_rows == 0) return false;
#pragma unroll 1
    for (;; ask(p)) {
      const int index = __shfl_sync(kAllLanes, dealt_, 0);
      if (index >= p.pool_units) return false;
      const int row = index / p.by_units, first = (index - row * p.row_units) * p.unit_parts;
      const int in_block = row / p.by_movers, block = row - in_block * p.movers;
      const int t = (block + 1) * p.share - p.pool_rows + in_block;
      if (t >= p.a.tokens) continue;  // of a block with fewer tokens
      const int own = kTile + static_cast<int>(threadIdx.x / kWarp);
      find_ways(p, tag, block, t, own, routes);
      parts = Parts(p, t, own, first, min(first + p.unit_parts, p.parts));
      return true;
    }
  }

 private:
  static __device__ __forceinline__ void find_ways(const DispatchLaunch& p, uint64_t tag, int block,
                                                   int t, int row, Routes& routes) {
    const Context& c = p.c;
    while (!__all_sync(kAllLanes, load_acquire_sys(open_flag(c, block)).lo == tag)) {
    }
    const uint64_t ranks = c.token_ranks[t];
    const int lane = threadIdx.x % kWarp;
#pragma unroll 1
    for (int d = lane; d < c.ep_size; d += kWarp)
      if ((ranks >> d & 1) != 0)
        routes.set(p, row, ranks, d, c.token_slots[static_cast<int64_t>(t) * c.ep_size + d]);
    if (lane == 0) routes.begin(row, ranks);
    __syncwarp();
  }

  int dealt_ = 0;
};

}  // namespace moe_a2a::cuda
