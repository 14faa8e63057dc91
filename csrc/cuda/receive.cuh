// The receiving half of a dispatch in packets.
#pragma once

#include "row.cuh"
#include "run.cuh"
#include "wait.cuh"

namespace moe_a2a::cuda {

// A run of token t's image from the caller's tensors.
template <class Packet, int kRun>
__device__ __forceinline__ void load_run(const DispatchLaunch& p, int t, Run<Packet, kRun> run,
                                         Chunk (&data)[kRun]) {
  const int payload = p.segment[kSegmentPayload].bytes;
  if (run.inside(payload)) {
    run.load(p.a.payload.row(t), payload, data);
    return;
  }
#pragma unroll
  for (int u = 0; u < kRun; ++u)
    data[u] = load_image(p, t, run.offset(u), Packet::bytes(run.lane()));
}

// Puts a run to where this rank's experts read it, or scrubs it.
template <class Packet, int kRun>
__device__ __forceinline__ void store_run(const DispatchLaunch& p, int64_t row,
                                          Run<Packet, kRun> run, const Chunk (&data)[kRun],
                                          bool scrub) {
  const int payload = p.segment[kSegmentPayload].bytes, me = p.c.rank;
  if (run.inside(payload) && !scrub) {
    run.store(p.c.window[me] + p.c.payload + row * payload, payload, data);
    return;
  }
#pragma unroll
  for (int u = 0; u < kRun; ++u)
    store_image(p, me, row, run.offset(u), Packet::bytes(run.lane()), data[u], scrub);
}

// Counts of the sources, as far as they have come: a lane has those of ranks `lane`, `lane + 32`.
struct Counts {
  int low = -1, high = -1;

  static __device__ __forceinline__ int look(const DispatchLaunch& p, uint64_t tag, int source) {
    if (source >= p.c.ep_size || (p.a.active >> source & 1) == 0) return 0;
    return read_count(p.c, tag, source);
  }
  __device__ __forceinline__ void know(int source, int count) {
    const int lane = threadIdx.x % kWarp;
    if (lane == source) low = count;
    if (lane + kWarp == source) high = count;
  }
  __device__ __forceinline__ int of(const DispatchLaunch& p, uint64_t tag, int source) {
    const int lane = threadIdx.x % kWarp;
    if (low < 0) low = look(p, tag, lane);
    if (source < kWarp) return __shfl_sync(kAllLanes, low, source);
    if (high < 0) high = look(p, tag, lane + kWarp);
    return __shfl_sync(kAllLanes, high, source - kWarp);
  }
};

// Runs of rows that may come, a warp one after the other: unpacked, or scrubbed as padding.
template <class Packet, int kRun>
__device__ __forceinline__ void receive_rows(const DispatchLaunch& p, const Operation& op,
                                             int movers, Counts counts) {
  const Context& c = p.c;
  const int warps = blockDim.x / kWarp;
  const int total = c.ep_size * static_cast<int>(p.a.max_rows) * p.runs;
  Wait wait;
#pragma unroll 1
  for (int index = blockIdx.x * warps + threadIdx.x / kWarp; index < total;
       index += movers * warps) {
    const int row = index / p.by_runs, source = row / p.by_rows;
    const int slot = row - source * static_cast<int>(p.a.max_rows);
    const Run<Packet, kRun> run{(index - row * p.runs) * kRun};
    const bool silent = source == c.rank || (p.a.active >> source & 1) == 0;
    // Nothing comes there but, perhaps, the ids of padding.
    if (silent && !c.scrub_all &&
        (run.strip + kRun) * 2 * Packet::kData <= p.segment[kSegmentIds].image)
      continue;
    const uint8_t* inbox = c.window[c.rank] + c.dispatch_inbox + source * c.dispatch_peer_bytes +
                           static_cast<int64_t>(slot) * p.pitch;
    for (;;) {
      Chunk data[kRun];
      const bool fresh = !silent && run.receive(inbox, p.pitch, op.tag, data);
      const int count = counts.of(p, op.tag, source);
      const bool padding = count >= 0 && slot >= count;
      if (padding || __all_sync(kAllLanes, fresh)) {
        store_run(p, source * p.a.max_rows + slot, run, data, padding);
        break;
      }
      if (silent && count >= 0) break;  // a row of its own, stored by its sender
      if (!keep_waiting(c, p.facts, op, wait, bit(source))) return;
    }
  }
}

}  // namespace moe_a2a::cuda
