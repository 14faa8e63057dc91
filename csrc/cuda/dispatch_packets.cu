// Dispatch of a small round: rows travel as packets into the inboxes of their ranks, which poll
// the packets themselves and unpack them to where the experts read. No fence, no flag. The last
// block announces the counts and hears those of the others; the rest of the grid moves rows.
#include "finish.cuh"
#include "launch.h"
#include "receive.cuh"
#include "row_image.cuh"
#include "wait_failed.cuh"

namespace moe_a2a::cuda {
namespace {

constexpr int kMost = 512;  // threads

// This rank's own row comes last: it has no way to go.
template <class Packet, int kRun>
__device__ __forceinline__ void send_run(const DispatchLaunch& p, uint64_t tag, const Route& route,
                                         int in_tile, Run<Packet, kRun> run,
                                         const Chunk (&data)[kRun]) {
  const Context& c = p.c;
  const uint64_t self = bit(c.rank);
#pragma unroll 1
  for (uint64_t left = route.ranks[in_tile]; left != 0;) {
    const uint64_t remote = left & ~self;
    const int to = __ffsll(remote != 0 ? remote : left) - 1, slot = route.slot[in_tile][to];
    left &= ~bit(to);
    if (to == c.rank)
      Places<Packet, kRun>(p, c.rank * p.a.max_rows + slot, run).put(data);
    else
      run.send(c.window[to] + c.dispatch_outbox + static_cast<int64_t>(slot) * p.pitch, p.pitch,
               tag, data);
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
        const Run<Packet, kRun> run((at - t * p.runs) * kRun);
        Chunk data[kRun];
        if (at < stop) load_run(p, t, run, data);
        if (!found) tiles.next(p, tile, end, tile == share.first, route);
        found = true;
        if (at < stop && !op.dead) send_run<Packet, kRun>(p, op.tag, route, t - tile, run, data);
        at += warps;
      } while (at < stop);
      __syncthreads();  // the next tile overwrites the slots
    }
  }
};

// Rows that are quantized on the way, one after the other. A block's share is whole rows.
template <int kWire, int kInput>
struct Staged {
  using Image = RowImage<kWire, kInput>;

  template <class Packet, int kRun>
  struct Rows {
    static __device__ __forceinline__ void send_strips(const DispatchLaunch& p, uint64_t tag,
                                                       const Route& route, int in_tile,
                                                       const uint8_t* image) {
      const int warps = blockDim.x / kWarp;
#pragma unroll 1
      for (int at = threadIdx.x / kWarp; at < p.runs; at += warps) {
        const Run<Packet, kRun> run(at * kRun);
        Chunk data[kRun];
        load_image_run(p, image, run, data);
        send_run<Packet, kRun>(p, tag, route, in_tile, run, data);
      }
    }

    static __device__ __forceinline__ void send(const DispatchLaunch& p, const Operation& op,
                                                Route& route) {
      MOE_DYNAMIC_SHARED(image);
      const Share share(p);
      Tiles tiles;
      const float global_scale = p.global_scale == nullptr ? 1.0f : *p.global_scale;
      typename Image::Data data;
      if (share.first < share.last) Image::load(p, share.first, data);
#pragma unroll 1
      for (int t = share.first; t < share.last; ++t) {
        const int in_tile = (t - share.first) % kTile;
        Image::take_rest(p, t, image);
        if (in_tile == 0) tiles.next(p, t, min(t + kTile, share.last), t == share.first, route);
        Image::quantize(p, t, global_scale, data, image);
        __syncthreads();
        if (t + 1 < share.last) Image::load(p, t + 1, data);
        if (!op.dead) send_strips(p, op.tag, route, in_tile, image);
        __syncthreads();
      }
    }
  };
};

template <class Packet, template <class, int> class Source, int kRun>
__global__ void __launch_bounds__(kMost, 1)
    dispatch_packets(const DispatchLaunch __grid_constant__ p) {
  MOE_SHARED(Route, route);
  const Operation op = begin(p.c, kDispatch);
  const int last = gridDim.x - 1, movers = max(last, 1);
  const bool moves = static_cast<int>(blockIdx.x) < movers;
  const bool finishes = static_cast<int>(blockIdx.x) == last;
  if (moves) Source<Packet, kRun>::send(p, op, route);
  // The block that announces counts all tokens together, or not at all.
  if (finishes ? __syncthreads_or(op.dead) != 0 : op.dead) return;
  if (finishes) announce_counts(p, op.tag, p.c.strict, route);
  if (moves) {
    const int warps = blockDim.x / kWarp;
    const Turn turn{static_cast<int>(blockIdx.x * warps + threadIdx.x / kWarp), movers * warps};
    receive_rows<Packet, kRun>(p, op, turn);
    const int own = await_count(p, op, p.c.rank);
    if (own >= 0) scrub_silent<Packet, kRun>(p, own, turn);
  }
  if (finishes && threadIdx.x < kWarp) finish_dispatch(p, op, false);
}

template <class Packet, template <class, int> class Source, int kRun>
const void* kernel() {
  return reinterpret_cast<const void*>(dispatch_packets<Packet, Source, kRun>);
}

const void* staged_kernel(int wire) {
  switch (wire) {
    case kFp8:
      return kernel<Line128, Staged<kFp8, kAlignedBf16>::Rows, 1>();
    case kFp8Block128:
      return kernel<Line128, Staged<kFp8Block128, kAlignedBf16>::Rows, 1>();
    case kMxfp8:
      return kernel<Line128, Staged<kMxfp8, kAlignedBf16>::Rows, 1>();
    case kMxfp4:
      return kernel<Line128, Staged<kMxfp4, kAlignedBf16>::Rows, 1>();
    default:
      return kernel<Line128, Staged<kNvfp4, kAlignedBf16>::Rows, 1>();
  }
}

}  // namespace

const void* dispatch_packets_kernel(bool lines, int wire, bool aligned) {
  if (wire < 0) return lines ? kernel<Line128, Direct, 2>() : kernel<Packet16, Direct, 1>();
  if (lines && aligned) return staged_kernel(wire);
  return lines ? kernel<Line128, Staged<kAny, kAny>::Rows, 1>()
               : kernel<Packet16, Staged<kAny, kAny>::Rows, 1>();
}

}  // namespace moe_a2a::cuda
