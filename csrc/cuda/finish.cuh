// The end of an operation: every active rank has been heard, and the next one may begin.
#pragma once

#include "wait.cuh"

namespace moe_a2a::cuda {

// One warp. What it writes, only kernels after this one read. With `blocks` the counters of the
// peers' blocks are complete now, and start from 0 again: a peer adds to them only when it has
// heard of a kernel after this one.
__device__ __forceinline__ void finish_dispatch(const DispatchLaunch& p, const Operation& op,
                                                bool blocks) {
  State& state = *p.c.state;
  const auto deliver = [&](int source, int count) {
    p.a.counts[source] = count;
    state.received[source] = count;
    if (blocks) *reinterpret_cast<uint32_t*>(p.c.control(p.c.rank, kBlocks, source)) = 0;
  };
  if (!await_all(p.c, p.facts, op, blocks, deliver)) return;
  if (threadIdx.x % kWarp == 0) {
    state.combine_tag = next_tag(op.tag);
    state.combine_round = op.round;
    state.units = 0;
  }
}

__device__ __forceinline__ void finish_combine(const CombineLaunch& p, const Operation& op) {
  if (!await_all(p.c, p.facts, op, false, [](int, int) {})) return;
  if (threadIdx.x % kWarp == 0) {
    p.c.state->dispatch_tag = next_tag(op.tag);
    p.c.state->dispatch_round = op.round + 1;
  }
}

// Announces that this rank's combine has begun: its dispatch is over, and what its peers wrote for
// it was read.
__device__ __forceinline__ void send_combine_headers(const CombineLaunch& p, uint64_t tag,
                                                     bool fence) {
  if (fence) fence_acq_rel_sys();
#pragma unroll 1
  for (int to = threadIdx.x % kWarp; to < p.c.ep_size; to += kWarp)
    if ((p.facts.active >> to & 1) != 0) send_header(p.c, tag, p.facts, to, 0);
}

}  // namespace moe_a2a::cuda
