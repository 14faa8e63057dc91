// The two ends of a dispatch in packets: runs of rows from the caller's tensors, and into the views
// of this rank's experts.
#pragma once

#include "row.cuh"
#include "run.cuh"
#include "wait.cuh"

namespace moe_a2a::cuda {

// Which pieces a warp takes of work that several share: every so many, from `first` on.
struct Turn {
  int first, stride;
};

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
  for (int u = 0; u < kRun; ++u) data[u] = load_image(p, t, run.chunk(u), Packet::kLoad);
}

// Where a lane puts its pieces of a run: found before the run is there.
template <class Packet, int kRun>
class Places {
 public:
  __device__ __forceinline__ Places(const DispatchLaunch& p, int64_t index, Run<Packet, kRun> run)
      : run_(run) {
    const int payload = p.segment[kSegmentPayload].bytes, me = p.c.rank;
    uint8_t* row = p.c.window[me] + p.c.payload + index * payload;
    inside_ = run.inside(payload) && aligned(row, 16);
    to_ = hold(row + run.offset(0));
    if (inside_) return;
#pragma unroll
    for (int u = 0; u < kRun; ++u)
      of_[u] = place_of(p, p.c.window[me], index, run.offset(u), Packet::bytes(run.lane()));
  }
  __device__ __forceinline__ void put(const Chunk (&data)[kRun]) const {
    if (inside_) {
      run_.store_inside(to_, data);
      return;
    }
#pragma unroll
    for (int u = 0; u < kRun; ++u) of_[u].put(Packet::own(data[u], run_.lane()));
  }
  __device__ __forceinline__ void scrub(const DispatchLaunch& p) const {
    if (inside_) {
      const Chunk zeros[kRun] = {};
      if (p.c.scrub_all) run_.store_inside(to_, zeros);
      return;
    }
#pragma unroll
    for (int u = 0; u < kRun; ++u) of_[u].scrub();
  }

 private:
  Run<Packet, kRun> run_;
  bool inside_;  // all payload, in aligned memory
  uint8_t* to_;
  Place of_[kRun];
};

enum Arrival { kRow, kPadding, kNothing };  // the last where the round is given up

// Polls a run until it is there, or known to be padding. kNaps: not as often as can be.
template <class Packet, int kRun, bool kNaps>
__device__ __forceinline__ Arrival await_run(const DispatchLaunch& p, const Operation& op,
                                             int source, int slot, Run<Packet, kRun> run,
                                             Chunk (&data)[kRun], Wait& wait) {
  const uint8_t* from =
      hold(p.c.window[p.c.rank] + p.c.dispatch_inbox + source * p.c.dispatch_peer_bytes +
           static_cast<int64_t>(slot) * p.pitch + run.at(0));
  for (;;) {
    const bool fresh = run.receive(from, p.pitch, op.tag, data);
    const int count = read_count(p.c, op.tag, source);  // looked at only where there is no row
    if (__all_sync(kAllLanes, fresh)) return kRow;
    if (__all_sync(kAllLanes, count >= 0 && slot >= count)) return kPadding;
    if (!keep_waiting(p.c, p.facts, op, wait, bit(source))) return kNothing;
    if (kNaps && p.nap > 0) __nanosleep(p.nap);
  }
}

// Runs of rows that may come from other ranks, a warp one after the other: unpacked, or scrubbed.
// In the order in which they come: the first rows of all ranks, then the next ones.
template <class Packet, int kRun, bool kNaps = false>
__device__ __forceinline__ void receive_rows(const DispatchLaunch& p, const Operation& op,
                                             Turn turn) {
  const Context& c = p.c;
  const int peers = c.ep_size - 1, total = peers * static_cast<int>(p.a.max_rows) * p.runs;
  Wait wait;
#pragma unroll 1
  for (int index = turn.first; index < total; index += turn.stride) {
    const int row = index / p.by_runs, slot = row / p.by_peers, peer = row - slot * peers;
    const Run<Packet, kRun> run((index - row * p.runs) * kRun);
    const int source = peer + (peer >= c.rank);
    if ((p.a.active >> source & 1) == 0) continue;
    const Places<Packet, kRun> places(p, source * p.a.max_rows + slot, run);
    Chunk data[kRun];
    const Arrival arrival = await_run<Packet, kRun, kNaps>(p, op, source, slot, run, data, wait);
    if (arrival == kNothing) return;
    if (arrival == kRow)
      places.put(data);
    else
      places.scrub(p);
  }
}

// Padding of sources that send no packets: of this rank itself, past its `own` rows, and of those
// that are not active.
template <class Packet, int kRun>
__device__ __forceinline__ void scrub_silent(const DispatchLaunch& p, int own, Turn turn) {
  const int rows = static_cast<int>(p.a.max_rows);
  const int first = p.c.scrub_all ? 0 : p.segment[kSegmentIds].image / (kRun * 2 * Packet::kData);
#pragma unroll 1
  for (int source = 0; source < p.c.ep_size; ++source) {
    const bool silent = source == p.c.rank || (p.a.active >> source & 1) == 0;
    const int count = source == p.c.rank ? own : 0;
    if (!silent) continue;
#pragma unroll 1
    for (int slot = count + turn.first; slot < rows; slot += turn.stride)
#pragma unroll 1
      for (int index = first; index < p.runs; ++index)
        Places<Packet, kRun>(p, source * p.a.max_rows + slot, Run<Packet, kRun>(index * kRun))
            .scrub(p);
  }
}

}  // namespace moe_a2a::cuda
