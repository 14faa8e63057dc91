// Dispatch of a small round: rows travel as packets into the inboxes of their ranks, which poll
// the packets themselves and unpack them to where the experts read. No fence, no flag. The last
// block announces the counts and hears those of the others; the rest of the grid moves rows.
#include "finish.cuh"
#include "launch.h"
#include "quantize.cuh"
#include "row.cuh"
#include "wait_failed.cuh"

namespace moe_a2a::cuda {
namespace {

constexpr int kMost = 512;  // threads

// The strips of a row that a warp moves in one go.
template <class Packet, int kRun>
struct Run {
  int strip;  // the first

  static __device__ __forceinline__ int lane() { return threadIdx.x % kWarp; }
  // In the row's image, and in its packets.
  __device__ __forceinline__ int offset(int u) const {
    return (strip + u) * 2 * Packet::kData + Packet::offset(lane());
  }
  __device__ __forceinline__ int at(int u) const {
    return (strip + u) * static_cast<int>(kStrip) + lane() * 16;
  }
};

template <class Packet, int kRun>
__device__ __forceinline__ void send_run(const DispatchLaunch& p, uint64_t tag, const Route& route,
                                         int in_tile, Run<Packet, kRun> run,
                                         const Chunk (&data)[kRun]) {
  const Context& c = p.c;
  const int lane = threadIdx.x % kWarp;
#pragma unroll 1
  for (uint64_t ranks = route.ranks[in_tile]; ranks != 0; ranks &= ranks - 1) {
    const int to = __ffsll(ranks) - 1, slot = route.slot[in_tile][to];
    if (to == c.rank) {
      const int64_t row = c.rank * p.a.max_rows + slot;
#pragma unroll
      for (int u = 0; u < kRun; ++u)
        store_image(p, to, row, run.offset(u), Packet::bytes(lane), data[u], false);
    } else {
      uint8_t* inbox = c.window[to] + c.dispatch_inbox + c.rank * c.dispatch_peer_bytes +
                       static_cast<int64_t>(slot) * p.pitch;
#pragma unroll
      for (int u = 0; u < kRun; ++u)
        if (run.at(u) < p.pitch)
          store_relaxed_sys(reinterpret_cast<Chunk*>(inbox + run.at(u)),
                            Packet::seal(data[u], tag, lane));
    }
  }
}

// The runs of this block, a tile of tokens at a time.
struct Share {
  int lo, hi, first, last;  // runs; tokens

  __device__ __forceinline__ explicit Share(const DispatchLaunch& p) {
    const int total = static_cast<int>(p.a.tokens) * p.runs;
    lo = min(static_cast<int>(blockIdx.x) * p.share, total);
    hi = min(lo + p.share, total);
    first = lo / p.by_runs;
    last = lo < hi ? (hi - 1) / p.by_runs + 1 : first;
  }
};

// Rows that the caller's tensors hold as they travel: a warp a run, the first one loaded while the
// slots are found.
template <class Packet, int kRun>
struct Direct {
  static __device__ __forceinline__ void send(const DispatchLaunch& p, const Operation& op,
                                              Route& route) {
    const Share share(p);
    const int warps = blockDim.x / kWarp;
    Tiles tiles;
#pragma unroll 1
    for (int tile = share.first; tile < share.last; tile += kTile) {
      const int end = min(tile + kTile, share.last), stop = min(share.hi, end * p.runs);
      int at = max(share.lo, tile * p.runs) + static_cast<int>(threadIdx.x / kWarp);
      bool found = false;
#pragma unroll 1
      do {
        const int t = at / p.by_runs;
        const Run<Packet, kRun> run{(at - t * p.runs) * kRun};
        Chunk data[kRun];
        if (at < stop) {
#pragma unroll
          for (int u = 0; u < kRun; ++u)
            data[u] = load_image(p, t, run.offset(u), Packet::bytes(run.lane()));
        }
        if (!found) tiles.next(p, tile, end, tile == share.first, route);
        found = true;
        if (at < stop && !op.dead) send_run<Packet, kRun>(p, op.tag, route, t - tile, run, data);
        at += warps;
      } while (at < stop);
      __syncthreads();  // the next tile overwrites the slots
    }
  }
};

// Rows that are quantized on the way: the block makes the image of one token in shared memory,
// then sends its strips. Its share is whole rows.
template <class Packet, int kRun>
struct Staged {
  static __device__ __forceinline__ Fp8Scale row_scale(const DispatchLaunch& p,
                                                       const uint8_t* row) {
    __shared__ uint32_t amax;
    const int warps = blockDim.x / kWarp, warp = threadIdx.x / kWarp;
    const int share = (p.c.hidden / warps + kWarpColumns) / kWarpColumns * kWarpColumns;
    if (threadIdx.x == 0) amax = 0;
    __syncthreads();
    const int from = min(warp * share, p.c.hidden);
    const uint32_t own = largest_of_columns(row, p.a.input, from, min(from + share, p.c.hidden));
    if (threadIdx.x % kWarp == 0) atomicMax(&amax, own);
    __syncthreads();
    return fp8_scale(amax);
  }

  static __device__ __forceinline__ void make_image(const DispatchLaunch& p, int t,
                                                    uint8_t* image) {
    const Context& c = p.c;
    const int warps = blockDim.x / kWarp, warp = threadIdx.x / kWarp;
    QuantizeRow r{p.a.payload.row(t),
                  p.a.input,
                  p.a.wire,
                  c.hidden,
                  c.padded,
                  p.global_scale == nullptr ? 1.0f : *p.global_scale,
                  {}};
    uint8_t* scales = image + p.segment[kSegmentScales].image;
    if (p.a.wire == kFp8) {
      r.row_scale = row_scale(p, r.data);
      if (threadIdx.x == 0) *reinterpret_cast<float*>(scales) = r.row_scale.scale;
    }
#pragma unroll 1
    for (int col = warp * kWarpColumns; col < c.padded; col += warps * kWarpColumns)
      quantize_columns<1>(r, col, min(col + kWarpColumns, c.padded), image, scales);
    const int tail = p.segment[kSegmentIds].image;
#pragma unroll 1
    for (int at = tail + threadIdx.x * 16; at < p.image_bytes; at += blockDim.x * 16)
      *reinterpret_cast<Chunk*>(image + at) = load_image(p, t, at, 16);
  }

  static __device__ __forceinline__ void send(const DispatchLaunch& p, const Operation& op,
                                              Route& route) {
    extern __shared__ __align__(16) uint8_t image[];
    const Share share(p);
    const int warps = blockDim.x / kWarp;
    Tiles tiles;
#pragma unroll 1
    for (int t = share.first; t < share.last; ++t) {
      const int in_tile = (t - share.first) % kTile;
      make_image(p, t, image);
      __syncthreads();
      if (in_tile == 0) tiles.next(p, t, min(t + kTile, share.last), t == share.first, route);
#pragma unroll 1
      for (int at = threadIdx.x / kWarp; at < p.runs && !op.dead; at += warps) {
        const Run<Packet, kRun> run{at * kRun};
        Chunk data[kRun];
#pragma unroll
        for (int u = 0; u < kRun; ++u) {
          const bool inside = run.offset(u) < p.image_bytes;
          const auto* words = reinterpret_cast<const uint64_t*>(image + run.offset(u));
          data[u].lo = inside ? words[0] : 0;
          data[u].hi = inside && Packet::bytes(run.lane()) == 16 ? words[1] : 0;
        }
        send_run<Packet, kRun>(p, op.tag, route, in_tile, run, data);
      }
      __syncthreads();
    }
  }
};

// Counts of the sources, as far as they have come: a lane has those of ranks `lane`, `lane + 32`.
struct Counts {
  int low = -1, high = -1;

  static __device__ __forceinline__ int look(const DispatchLaunch& p, uint64_t tag, int source) {
    if (source >= p.c.ep_size || (p.a.active >> source & 1) == 0) return 0;
    return read_count(p.c, tag, source);
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
                                             int movers) {
  const Context& c = p.c;
  const int lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
  const int total = c.ep_size * static_cast<int>(p.a.max_rows) * p.runs;
  Counts counts;
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
      bool fresh = true;
#pragma unroll
      for (int u = 0; u < kRun; ++u)
        if (!silent && run.at(u) < p.pitch)
          data[u] = load_relaxed_sys(reinterpret_cast<const Chunk*>(inbox + run.at(u)));
      const int count = counts.of(p, op.tag, source);
#pragma unroll
      for (int u = 0; u < kRun; ++u)
        if (run.at(u) < p.pitch) fresh = fresh && Packet::fresh(data[u], op.tag, lane);
      const bool padding = count >= 0 && slot >= count;
      if (padding || (!silent && __all_sync(kAllLanes, fresh))) {
#pragma unroll
        for (int u = 0; u < kRun; ++u)
          store_image(p, c.rank, source * p.a.max_rows + slot, run.offset(u), Packet::bytes(lane),
                      data[u], padding);
        break;
      }
      if (silent && count >= 0) break;  // a row of its own, stored by its sender
      if (!keep_waiting(c, p.facts, op, wait, bit(source))) return;
    }
  }
}

template <class Packet, template <class, int> class Source, int kRun>
__global__ void __launch_bounds__(kMost, 1)
    dispatch_packets(const __grid_constant__ DispatchLaunch p) {
  __shared__ Route route;
  const Operation op = begin(p.c, kDispatch);
  const int last = gridDim.x - 1, movers = max(last, 1);
  const bool moves = static_cast<int>(blockIdx.x) < movers;
  const bool finishes = static_cast<int>(blockIdx.x) == last;
  if (moves) Source<Packet, kRun>::send(p, op, route);
  if (op.dead) return;
  if (finishes) announce_counts(p, op.tag, route);
  if (moves) receive_rows<Packet, kRun>(p, op, movers);
  if (finishes && threadIdx.x < kWarp) finish_dispatch(p, op, false);
}

}  // namespace

const void* dispatch_packets_kernel(bool lines, bool staged, int run) {
  if (!lines)
    return staged ? reinterpret_cast<const void*>(dispatch_packets<Packet16, Staged, 1>)
                  : reinterpret_cast<const void*>(dispatch_packets<Packet16, Direct, 1>);
  if (staged) return reinterpret_cast<const void*>(dispatch_packets<Line128, Staged, 1>);
  switch (run) {
    case 1:
      return reinterpret_cast<const void*>(dispatch_packets<Line128, Direct, 1>);
    case 2:
      return reinterpret_cast<const void*>(dispatch_packets<Line128, Direct, 2>);
    default:
      return reinterpret_cast<const void*>(dispatch_packets<Line128, Direct, 4>);
  }
}

}  // namespace moe_a2a::cuda
