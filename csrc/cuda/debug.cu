// The kernels of debug=True.
#include "debug.h"
#include "packet.cuh"
#include "wait.cuh"
#include "wait_failed.cuh"

namespace moe_a2a::cuda {
namespace {

// The clock of one multiprocessor may be a little behind another's.
__device__ int64_t since(int64_t start) {
  const int64_t passed = elapsed(static_cast<uint64_t>(start), nanoseconds());
  return passed < 0 ? 0 : passed;
}

// A peer leaves its word for the next operation when it has heard of this rank in the present one,
// whose kernel comes after this: nobody's word is overwritten before it is read.
__global__ void meet_peers(const DebugLaunch __grid_constant__ p) {
  const Context& c = p.c;
  const int lane = threadIdx.x % kWarp;
  const Operation op = begin(c, static_cast<Phase>(p.facts.phase & ~kMeeting));
  OperationNote& note = p.book->notes[p.book->count % kNotes];
  const auto start = static_cast<int64_t>(nanoseconds());
  if (lane == 0) {
    note.phase = p.facts.phase & ~kMeeting;
    note.round = op.round;
    note.begin = note.met = note.end = start;
  }
  for (int peer = lane; peer < kMaxRanks; peer += kWarp) note.waits[peer] = -1;
  if (op.dead) return;
  for (int to = lane; to < c.ep_size; to += kWarp)
    if (to != c.rank && (p.facts.active >> to & 1) != 0)
      store_relaxed_sys(meeting_line(c, to, c.rank), {op.tag, op.tag});
  Wait w;
  for (int first = 0; first < c.ep_size; first += kWarp) {
    const int peer = first + lane;
    bool here = peer >= c.ep_size || peer == c.rank || (p.facts.active >> peer & 1) == 0;
    for (;;) {
      if (!here && load_relaxed_sys(meeting_line(c, c.rank, peer)).lo == op.tag) {
        here = true;
        note.waits[peer] = since(start);
      }
      const unsigned missing = __ballot_sync(kAllLanes, !here);
      if (missing == 0) break;
      if (keep_waiting(c, p.facts, op, w, static_cast<uint64_t>(missing) << first)) continue;
      if (!here) note.waits[peer] = since(start);
      return;
    }
  }
  if (lane == 0) note.met = static_cast<int64_t>(nanoseconds());
}

__global__ void note_end(const DebugLaunch __grid_constant__ p) {
  wait_for_earlier_kernels();
  if (threadIdx.x != 0) return;
  p.book->notes[p.book->count % kNotes].end = static_cast<int64_t>(nanoseconds());
  p.book->count += 1;
}

__global__ void note_clock(const DebugLaunch __grid_constant__ p) {
  wait_for_earlier_kernels();
  if (threadIdx.x == 0) p.book->clock = static_cast<int64_t>(nanoseconds());
}

}  // namespace

const void* meet_peers_kernel() { return reinterpret_cast<const void*>(meet_peers); }
const void* note_end_kernel() { return reinterpret_cast<const void*>(note_end); }
const void* note_clock_kernel() { return reinterpret_cast<const void*>(note_clock); }

}  // namespace moe_a2a::cuda
