// Combine of a small round: every rank pushes the rows it computed, as packets, into the inboxes of
// the ranks they came from, which poll them and sum. Any y will do, and nothing is staged. The last
// block announces this rank and hears the others; the rest of the grid moves rows.
#include "finish.cuh"
#include "launch.h"
#include "sum.cuh"
#include "wait_failed.cuh"

namespace moe_a2a::cuda {
namespace {

constexpr int kMost = 512;  // threads

// Where a strip of a row lies in an inbox.
__device__ __forceinline__ Chunk* packet_at(const CombineLaunch& p, int owner, int from, int slot,
                                            int at) {
  uint8_t* inbox = p.c.window[owner] + p.c.combine_inbox + from * p.c.combine_peer_bytes;
  return reinterpret_cast<Chunk*>(inbox + static_cast<int64_t>(slot) * p.pitch + at);
}

// Rows that came from other ranks, one after the other: a lane has how many those up to it sent.
struct Outgoing {
  int through_low, through_high;  // ranks up to `lane`, and up to `lane + 32`

  static __device__ __forceinline__ int sum_below(int value) {
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int step = 1; step < kWarp; step *= 2) {
      const int below = __shfl_up_sync(kAllLanes, value, step);
      if (lane >= step) value += below;
    }
    return value;
  }
  __device__ __forceinline__ explicit Outgoing(const Context& c) {
    const int lane = threadIdx.x % kWarp;
    const auto rows = [&](int source) {
      return source < c.ep_size && source != c.rank ? c.state->received[source] : 0;
    };
    through_low = sum_below(rows(lane));
    through_high = 0;
    if (c.ep_size > kWarp)
      through_high = __shfl_sync(kAllLanes, through_low, kWarp - 1) + sum_below(rows(lane + kWarp));
  }
  __device__ __forceinline__ int total(const Context& c) const {
    return __shfl_sync(kAllLanes, c.ep_size > kWarp ? through_high : through_low, kWarp - 1);
  }
  // The source of a row, which becomes its slot.
  __device__ __forceinline__ int source_of(const Context& c, int& row) const {
    const unsigned low = __ballot_sync(kAllLanes, through_low <= row);
    int source = __popc(low), before = 0;
    if (source > 0) before = __shfl_sync(kAllLanes, through_low, source - 1);
    if (c.ep_size > kWarp && source == kWarp) {
      source += __popc(__ballot_sync(kAllLanes, through_high <= row));
      if (source > kWarp) before = __shfl_sync(kAllLanes, through_high, source - kWarp - 1);
    }
    row -= before;
    return source;
  }
};

template <class Packet, int kRun>
__device__ __forceinline__ void push_rows(const CombineLaunch& p, const Operation& op, int movers) {
  const Context& c = p.c;
  const int lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
  const Outgoing out(c);
  if (op.dead) return;  // what was received is not known
  const int total = out.total(c) * p.runs, bytes = static_cast<int>(c.combine_bytes);
#pragma unroll 1
  for (int index = blockIdx.x * warps + threadIdx.x / kWarp; index < total;
       index += movers * warps) {
    int slot = index / p.by_runs;
    const int strip = (index - slot * p.runs) * kRun, source = out.source_of(c, slot);
    const int offset = strip * 2 * Packet::kData + Packet::offset(lane);
    const int at = strip * static_cast<int>(kStrip) + lane * 16;
    const uint8_t* y = p.a.y + source * p.a.source_stride + slot * p.a.row_stride + offset;
    Chunk* inbox = packet_at(p, source, c.rank, slot, at);
    Chunk data[kRun];
#pragma unroll
    for (int u = 0; u < kRun; ++u) {
      const int from = u * 2 * Packet::kData,
                count = min(Packet::bytes(lane), bytes - offset - from);
      data[u] = count > 0 ? load_bytes(y + from, count) : Chunk{0, 0};
    }
#pragma unroll
    for (int u = 0; u < kRun; ++u)
      if (at + u * static_cast<int>(kStrip) < p.pitch)
        store_relaxed_sys(inbox + u * kStrip / 16, Packet::seal(data[u], op.tag, lane));
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
                                        int strip, const Places& places, Wait& wait) {
  constexpr int kAhead = 2;
  const Context& c = p.c;
  const int lane = threadIdx.x % kWarp, bytes = static_cast<int>(c.combine_bytes);
  const int offset = strip * 2 * Packet::kData + Packet::offset(lane);
  const int at = strip * static_cast<int>(kStrip) + lane * 16;
  const auto count = [&](int u) {
    return min(Packet::bytes(lane), bytes - offset - u * 2 * Packet::kData);
  };
  const auto mine = [&](int u) { return at + u * static_cast<int>(kStrip) < p.pitch; };
  float sum[kRun][Elements<kScalar>::kCount] = {};
#pragma unroll 1
  for (uint64_t ranks = places.ranks; ranks != 0;) {
    int rank[kAhead], slot[kAhead];
    Chunk data[kAhead][kRun];
    bool here[kAhead];
#pragma unroll
    for (int r = 0; r < kAhead; ++r) {
      rank[r] = ranks == 0 ? -1 : __ffsll(ranks) - 1;
      ranks &= ranks - 1;
      slot[r] = places.slot(max(rank[r], 0));
      here[r] = rank[r] < 0 || rank[r] == c.rank;
      if (rank[r] != c.rank) continue;
      const uint8_t* y = p.a.y + c.rank * p.a.source_stride + slot[r] * p.a.row_stride + offset;
#pragma unroll
      for (int u = 0; u < kRun; ++u)
        data[r][u] = count(u) > 0 ? load_bytes(y + u * 2 * Packet::kData, count(u)) : Chunk{0, 0};
    }
    for (;;) {
#pragma unroll
      for (int r = 0; r < kAhead; ++r)
#pragma unroll
        for (int u = 0; u < kRun; ++u)
          if (!here[r] && mine(u))
            data[r][u] =
                load_relaxed_sys(packet_at(p, c.rank, rank[r], slot[r], at) + u * kStrip / 16);
      uint64_t suspects = 0;
#pragma unroll
      for (int r = 0; r < kAhead; ++r) {
        if (here[r]) continue;
        bool fresh = true;
#pragma unroll
        for (int u = 0; u < kRun; ++u)
          fresh = fresh && (!mine(u) || Packet::fresh(data[r][u], op.tag, lane));
        here[r] = __all_sync(kAllLanes, fresh);
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
  uint8_t* out = p.a.out + token * p.a.out_stride + offset;
#pragma unroll
  for (int u = 0; u < kRun; ++u)
    if (count(u) > 0)
      store_bytes(out + u * 2 * Packet::kData, round_chunk<kScalar>(sum[u]), count(u));
  return true;
}

template <class Packet, int kScalar, int kRun>
__global__ void __launch_bounds__(kMost, 1)
    combine_packets(const __grid_constant__ CombineLaunch p) {
  const Operation op = begin(p.c, kCombineOp);
  const int warps = blockDim.x / kWarp, warp = threadIdx.x / kWarp;
  const int last = gridDim.x - 1, movers = max(last, 1);
  const bool finishes = static_cast<int>(blockIdx.x) == last && warp == 0;
  if (finishes && !op.dead) send_combine_headers(p, op.tag);
  if (static_cast<int>(blockIdx.x) < movers) {
    const int stride = movers * warps, total = p.tokens * p.runs;
    int index = blockIdx.x * warps + warp, token = index / p.by_runs;
    Places places(p.c, token, index < total);  // known by the time that the rows are on their way
    push_rows<Packet, kRun>(p, op, movers);
    if (op.dead) return;
    Wait wait;
#pragma unroll 1
    while (index < total) {
      const int strip = (index - token * p.runs) * kRun;
      if (!sum_run<Packet, kScalar, kRun>(p, op, token, strip, places, wait)) return;
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
