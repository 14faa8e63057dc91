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

// The packets of a row in an inbox.
__device__ __forceinline__ uint8_t* packets_at(const CombineLaunch& p, int owner, int from,
                                               int slot) {
  return p.c.window[owner] + p.c.combine_inbox + from * p.c.combine_peer_bytes +
         static_cast<int64_t>(slot) * p.pitch;
}

// A run of a row that may have come from another rank.
struct Outgoing {
  int source, slot, strip;

  __device__ __forceinline__ Outgoing(const CombineLaunch& p, int index, int run) {
    const int row = index / p.by_runs, peer = row / p.by_rows;
    strip = (index - row * p.runs) * run;
    slot = row - peer * p.max_rows;
    source = p.c.rank + 1 + peer;
    if (source >= p.c.ep_size) source -= p.c.ep_size;
  }
};

template <class Packet, int kRun>
__device__ __forceinline__ void push_rows(const CombineLaunch& p, const Operation& op, int movers) {
  const Context& c = p.c;
  const int warps = blockDim.x / kWarp;
  const int total = (c.ep_size - 1) * p.max_rows * p.runs;
#pragma unroll 1
  for (int index = blockIdx.x * warps + threadIdx.x / kWarp; index < total;
       index += movers * warps) {
    const Outgoing out(p, index, kRun);
    // A row at or past the count is nobody's, and is not read.
    if (op.dead || out.slot >= c.state->received[out.source]) continue;
    const Run<Packet, kRun> run{out.strip};
    Chunk data[kRun];
    run.load(p.a.y + out.source * p.a.source_stride + out.slot * p.a.row_stride,
             static_cast<int>(c.combine_bytes), data);
    run.send(packets_at(p, out.source, c.rank, out.slot), p.pitch, op.tag, data);
  }
}

// Where the rows of one token are.
struct Places {
  uint64_t ranks;
  int low, high;  // slots in ranks `lane` and `lane + 32`

  __device__ __forceinline__ Places(const Context& c, int token, bool exists) {
    const int lane = threadIdx.x % kWarp;
    const int32_t* slots = c.token_slots + static_cast<int64_t>(token) * c.ep_size;
    ranks = exists ? c.token_ranks[token] : 0;
    low = exists && lane < c.ep_size ? slots[lane] : 0;
    high = exists && lane + kWarp < c.ep_size ? slots[lane + kWarp] : 0;
  }
  __device__ __forceinline__ int slot(int rank) const {
    return __shfl_sync(kAllLanes, rank < kWarp ? low : high, rank % kWarp);
  }
};

// A run of an output row: rows are polled two ranks at a time and added in rank order; the rank's
// own comes straight from y.
template <class Packet, int kScalar, int kRun>
__device__ __forceinline__ bool sum_run(const CombineLaunch& p, const Operation& op, int token,
                                        Run<Packet, kRun> run, const Places& places, Wait& wait) {
  constexpr int kAhead = 2;
  const Context& c = p.c;
  const int bytes = static_cast<int>(c.combine_bytes);
  float sum[kRun][Elements<kScalar>::kCount] = {};
#pragma unroll 1
  for (uint64_t ranks = places.ranks; ranks != 0;) {
    int rank[kAhead];
    const uint8_t* packets[kAhead];
    Chunk data[kAhead][kRun];
    bool here[kAhead];
#pragma unroll
    for (int r = 0; r < kAhead; ++r) {
      rank[r] = ranks == 0 ? -1 : __ffsll(ranks) - 1;
      ranks &= ranks - 1;
      const int slot = places.slot(max(rank[r], 0));
      here[r] = rank[r] < 0 || rank[r] == c.rank;
      packets[r] = packets_at(p, c.rank, max(rank[r], 0), slot);
      if (rank[r] == c.rank)
        run.load(p.a.y + c.rank * p.a.source_stride + slot * p.a.row_stride, bytes, data[r]);
    }
    for (;;) {
      uint64_t suspects = 0;
      bool fresh[kAhead];
#pragma unroll
      for (int r = 0; r < kAhead; ++r)
        fresh[r] = here[r] || run.receive(packets[r], p.pitch, op.tag, data[r]);
#pragma unroll
      for (int r = 0; r < kAhead; ++r) {
        here[r] = __all_sync(kAllLanes, fresh[r]);
        if (!here[r]) suspects |= bit(rank[r]);
      }
      if (suspects == 0) break;
      if (!keep_waiting(c, p.facts, op, wait, suspects)) return false;
    }
#pragma unroll
    for (int r = 0; r < kAhead; ++r)
      if (rank[r] >= 0) {
#pragma unroll
        for (int u = 0; u < kRun; ++u) add_chunk<kScalar>(data[r][u], sum[u]);
      }
  }
  Chunk rounded[kRun];
#pragma unroll
  for (int u = 0; u < kRun; ++u) rounded[u] = round_chunk<kScalar>(sum[u]);
  run.store(p.a.out + token * p.a.out_stride, bytes, rounded);
  return true;
}

template <class Packet, int kScalar, int kRun>
__global__ void __launch_bounds__(kMost<kRun>, 1)
    combine_packets(const CombineLaunch __grid_constant__ p) {
  const int warps = blockDim.x / kWarp, warp = threadIdx.x / kWarp;
  const int last = gridDim.x - 1, movers = max(last, 1);
  const bool finishes = static_cast<int>(blockIdx.x) == last && warp == 0;
  const int stride = movers * warps, total = p.tokens * p.runs;
  int index = blockIdx.x * warps + warp, token = index / p.by_runs;
  const Operation op = begin(p.c, kCombineOp);
  if (finishes && !op.dead) send_combine_headers(p, op.tag);
  if (static_cast<int>(blockIdx.x) < movers) {
    Places places(p.c, token, index < total);  // known by the time that the rows are on their way
    push_rows<Packet, kRun>(p, op, movers);
    if (op.dead) return;
    Wait wait;
#pragma unroll 1
    while (index < total) {
      const Run<Packet, kRun> run{(index - token * p.runs) * kRun};
      if (!sum_run<Packet, kScalar, kRun>(p, op, token, run, places, wait)) return;
      index += stride;
      token = index / p.by_runs;
      places = Places(p.c, token, index < total);
    }
  }
  if (finishes && !op.dead) finish_combine(p, op);
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
