// Combine of a small round: every rank pushes the rows it computed, as packets, into the inboxes of
// the ranks they came from, which poll them and sum. Any y will do, and nothing is staged. The last
// block announces this rank and hears the others; the rest of the grid moves rows.
#include "finish.cuh"
#include "launch.h"
#include "run.cuh"
#include "sum.cuh"
#include "wait_failed.cuh"

namespace moe_a2a::cuda {
namespace {

template <int kRun>
constexpr int kMost = kRun == 4 ? 256 : 512;  // threads

// A run of a row that may have come from another rank: where it is in y, and where its packets go.
template <class Packet, int kRun>
struct Outgoing {
  int source, slot;
  Run<Packet, kRun> run;
  const uint8_t* row;
  uint8_t* packets;

  __device__ __forceinline__ Outgoing(const CombineLaunch& p, int index) {
    const int at = index / p.by_runs, peer = at / p.by_rows;
    run = Run<Packet, kRun>((index - at * p.runs) * kRun);
    slot = hold(at - peer * p.max_rows);
    source = p.c.rank + 1 + min(peer, p.c.ep_size - 1);
    if (source >= p.c.ep_size) source -= p.c.ep_size;
    row = hold(p.a.y + source * p.a.source_stride + slot * p.a.row_stride);
    packets = hold(p.c.window[source] + p.c.combine_outbox + static_cast<int64_t>(slot) * p.pitch);
  }
  // How many rows came from there: a row at or past the count is nobody's, and is not read.
  __device__ __forceinline__ int rows(const CombineLaunch& p) const {
    return p.c.state->received[source];
  }
  __device__ __forceinline__ void push(const CombineLaunch& p, const Operation& op) const {
    Chunk data[kRun];
    run.load(row, static_cast<int>(p.c.combine_bytes), data);
    run.send(packets, p.pitch, op.tag, data);
  }
};

// What one rank adds to a run of an output row: packets, or, of this rank itself, a row of y. The
// same loads serve for both, so that they are all on their way before the first is waited for.
template <class Packet, int kRun>
struct Addend {
  int rank = -1;
  bool own, here = true;
  const uint8_t* from;
  int step, at, end;  // of this lane: bytes from strip to strip, into the row or its packets
  Chunk data[kRun] = {};

  __device__ __forceinline__ void find(const CombineLaunch& p, int r, int slot,
                                       Run<Packet, kRun> run) {
    const Context& c = p.c;
    rank = r;
    own = r == c.rank;
    const uint8_t* row = p.a.y + r * p.a.source_stride + slot * p.a.row_stride;
    const uint8_t* packets = c.window[c.rank] + c.combine_inbox + r * c.combine_peer_bytes +
                             static_cast<int64_t>(slot) * p.pitch;
    here = own && !(Packet::kLoad == 16 && aligned(row, 16));
    if (here) run.load(row, static_cast<int>(c.combine_bytes), data);
    at = own ? run.chunk(0) : run.at(0);
    end = own ? static_cast<int>(c.combine_bytes) : p.pitch;
    step = own ? Run<Packet, kRun>::kStripData : static_cast<int>(kStrip);
    from = hold((own ? row : packets) + at);
  }
  __device__ __forceinline__ void load() {
    if (here) return;
#pragma unroll
    for (int u = 0; u < kRun; ++u)
      if (at + u * step < end)
        data[u] = load_relaxed_sys(reinterpret_cast<const Chunk*>(from + u * step));
  }
  __device__ __forceinline__ bool arrived(uint64_t tag) {
    if (here) return true;
    bool fresh = true;
#pragma unroll
    for (int u = 0; u < kRun; ++u)
      if (at + u * step < end)
        fresh = fresh && Packet::fresh(data[u], tag, Run<Packet, kRun>::lane());
    here = __all_sync(kAllLanes, fresh || own);
    return here;
  }
};

// A run of an output row: the rows are polled two ranks at a time and added in rank order.
template <class Packet, int kScalar, int kRun>
__device__ __forceinline__ bool sum_run(const CombineLaunch& p, const Operation& op, int token,
                                        Run<Packet, kRun> run, const Slots& slots, Wait& wait) {
  constexpr int kAhead = 2;
  uint8_t* const to = hold(p.a.out + token * p.a.out_stride);
  float sum[kRun][Elements<kScalar>::kCount] = {};
#pragma unroll 1
  for (uint64_t ranks = slots.ranks; ranks != 0;) {
    Addend<Packet, kRun> addend[kAhead];
#pragma unroll
    for (int r = 0; r < kAhead; ++r) {
      const int rank = __ffsll(ranks) - 1;
      if (ranks != 0) addend[r].find(p, rank, slots.of(rank), run);
      ranks &= ranks - 1;
    }
    for (;;) {
      uint64_t suspects = 0;
#pragma unroll
      for (int r = 0; r < kAhead; ++r) addend[r].load();
#pragma unroll
      for (int r = 0; r < kAhead; ++r)
        if (!addend[r].arrived(op.tag)) suspects |= bit(addend[r].rank);
      if (suspects == 0) break;
      if (!keep_waiting(p.c, p.facts, op, wait, suspects)) return false;
    }
#pragma unroll
    for (int r = 0; r < kAhead; ++r) {
      if (addend[r].rank < 0) continue;
#pragma unroll
      for (int u = 0; u < kRun; ++u) add_chunk<kScalar>(addend[r].data[u], sum[u]);
    }
  }
  Chunk rounded[kRun];
#pragma unroll
  for (int u = 0; u < kRun; ++u) rounded[u] = round_chunk<kScalar>(sum[u]);
  run.store(to, static_cast<int>(p.c.combine_bytes), rounded);
  return true;
}

template <class Packet, int kScalar, int kRun>
__global__ void __launch_bounds__(kMost<kRun>, 1)
    combine_packets(const CombineLaunch __grid_constant__ p) {
  const int warps = blockDim.x / kWarp, warp = threadIdx.x / kWarp;
  const int last = gridDim.x - 1, movers = max(last, 1);
  const bool moves = static_cast<int>(blockIdx.x) < movers;
  const bool finishes = static_cast<int>(blockIdx.x) == last && warp == 0;
  const int stride = movers * warps, pushes = (p.c.ep_size - 1) * p.max_rows * p.runs;
  const int first = blockIdx.x * warps + warp, total = p.tokens * p.runs;
  const Outgoing<Packet, kRun> out(p, first);
  int token = first / p.by_runs;
  const Operation op = begin(p.c, kCombineOp);
  // Known by the time that the rows are on their way.
  Slots slots = Slots::of_token(p, moves ? token : p.tokens);
  const int rows = out.rows(p);
  if (moves && first < pushes && out.slot < rows && !op.dead) out.push(p, op);
  if (finishes && !op.dead) send_combine_headers(p, op.tag, p.c.strict);
  if (op.dead) return;
  if (moves) {
#pragma unroll 1
    for (int index = first + stride; index < pushes; index += stride) {
      const Outgoing<Packet, kRun> next(p, index);
      if (next.slot < next.rows(p)) next.push(p, op);
    }
    Wait wait;
#pragma unroll 1
    for (int index = first; index < total; index += stride) {
      const Run<Packet, kRun> run((index - token * p.runs) * kRun);
      if (!sum_run<Packet, kScalar, kRun>(p, op, token, run, slots, wait)) return;
      token = (index + stride) / p.by_runs;
      slots = Slots::of_token(p, token);
    }
  }
  if (finishes) finish_combine(p, op);
}

template <class Packet, int kRun>
const void* kernel_of(int wire) {
  switch (wire) {
    case kBf16:
      return reinterpret_cast<const void*>(combine_packets<Packet, kScalarBf16, kRun>);
    case kFp16:
      return reinterpret_cast<const void*>(combine_packets<Packet, kScalarFp16, kRun>);
    default:
      return reinterpret_cast<const void*>(combine_packets<Packet, kScalarFp32, kRun>);
  }
}

}  // namespace

const void* combine_packets_kernel(bool lines, int combine_wire, int run) {
  if (!lines) return kernel_of<Packet16, 1>(combine_wire);
  return run == 1   ? kernel_of<Line128, 1>(combine_wire)
         : run == 2 ? kernel_of<Line128, 2>(combine_wire)
                    : kernel_of<Line128, 4>(combine_wire);
}

}  // namespace moe_a2a::cuda
