// Where a token of a small round goes, found by a warp in all ranks at once, a lane each.
#pragma once

#include "columns.cuh"
#include "receive.cuh"

namespace moe_a2a::cuda {

class Targets {
 public:
  // `outbox`: where the packets for rank `lane` begin.
  template <class Columns>
  __device__ __forceinline__ Targets(const DispatchLaunch& p, const Columns& columns,
                                     const typename Columns::Position& position, uint8_t* outbox)
      : slot_(columns.slot(position)),
        all_(__ballot_sync(kAllLanes, columns.goes(position))),
        packets_(reinterpret_cast<uint64_t>(outbox + static_cast<int64_t>(slot_) * p.pitch)) {}

  // A run of token t to every rank that it goes to, this one last, which has no way to go; the
  // first run also notes ranks and slots for the combine of this round.
  template <int kRun>
  __device__ __forceinline__ void send(const DispatchLaunch& p, uint64_t tag, int t,
                                       const Run<Line128, kRun>& run,
                                       const Chunk (&data)[kRun]) const {
    const Context& c = p.c;
    const int lane = threadIdx.x % kWarp;
    const uint32_t self = 1u << c.rank;
#pragma unroll 1
    for (uint32_t left = all_ & ~self; left != 0; left &= left - 1) {
      const uint64_t to = __shfl_sync(kAllLanes, packets_, __ffs(left) - 1);
      run.send(reinterpret_cast<uint8_t*>(to), p.pitch, tag, data);
    }
    if ((all_ & self) != 0) {
      const int own = __shfl_sync(kAllLanes, slot_, c.rank);
      Places<Line128, kRun>(p, c.rank * p.a.max_rows + own, run).put(data);
    }
    if (run.strip() != 0) return;
    if (lane == 0) c.token_ranks[t] = all_;
    if (lane < c.ep_size) c.token_slots[t * c.ep_size + lane] = slot_;
  }

 private:
  int slot_;
  uint32_t all_;
  uint64_t packets_;
};

}  // namespace moe_a2a::cuda
