// Dispatch of a large round: rows go straight to where the experts of their ranks read them, then
// every block tells every rank that it is through. The receiver unpacks nothing.
#include "bulk_rows.cuh"
#include "finish.cuh"
#include "wait_failed.cuh"

namespace moe_a2a::cuda {
namespace {

// What follows the payload in the images of a tile's tokens: a piece of 16 bytes a thread, the last
// warps first, since the first one is late from finding the slots.
__device__ __forceinline__ void send_rest(const DispatchLaunch& p, const Routes& routes, int begins,
                                          int ends, int first) {
  const int pieces = (p.image_bytes - first + 15) / 16, lane = threadIdx.x % kWarp;
  const int warp = static_cast<int>(blockDim.x - 1 - threadIdx.x) / kWarp;
#pragma unroll 1
  for (int i = warp * kWarp + lane; i < (ends - begins) * pieces; i += blockDim.x) {
    const int in_tile = i / pieces, at = first + (i - in_tile * pieces) * 16;
    const Chunk data = load_image(p, begins + in_tile, at, 16);
    for_each_rank(p, routes, in_tile, [&](uint8_t* window, int slot) {
      store_image(p, window, p.c.rank * p.a.max_rows + slot, at, 16, data, false);
    });
  }
}

// A tile of tokens. Its slots are found while the first parts of its rows are loaded and quantized.
// Where an earlier kernel gave up nothing is sent; but later blocks may wait for what this one
// says.
template <class Source>
__device__ __forceinline__ void send_tile(const DispatchLaunch& p, const Operation& op,
                                          Source& source, Slots& slots, Parts parts,
                                          Routes& routes) {
  bool more = parts.more();
  Part part = parts.part();
  const auto load = [&] {
    if (more) source.load(p, part);
  };
  const bool finds = Slots::finds(p);
  if (finds)
    // Ids first: behind the loads of the rows they would wait until half of these have come.
    slots.find(p, op.tag, routes, load);
  else
    load();
  source.settle();
  // Warps that find slots prepare their first part once all have met, the others before.
  bool met = false;
#pragma unroll 1
  for (bool first = true;;) {
    if ((met || !finds) && more) source.prepare(p, part);
    if (!met) {
      __syncthreads();
      met = true;
      if (finds) continue;
    }
    if (op.dead) break;
    const Part ready = part;
    const bool any = more;
    parts.advance();
    part = parts.part();
    more = parts.more();
    // Ahead of the stores: where the link is the limit, they wait for it. Not before the slots are
    // known, which would only come later.
    load();
    if (any) source.send(p, routes, ready, more && part.follows(ready));
    // Behind the first rows: the code is long, and its data are not on their way yet.
    if (first) send_rest(p, routes, parts.begins(), parts.ends(), Source::rest(p));
    first = false;
    if (!more) break;
  }
  __syncthreads();  // the next tile overwrites the slots
}

// The tokens of a block.
struct Tokens {
  int first, last;

  __device__ __forceinline__ explicit Tokens(const DispatchLaunch& p) {
    const int total = static_cast<int>(p.a.tokens);
    first = min(static_cast<int>(blockIdx.x) * p.share, total);
    last = min(first + p.share, total);
  }
};

template <class Source>
__device__ __forceinline__ void send_rows(const DispatchLaunch& p, const Operation& op,
                                          Source& source, const Tokens& tokens, Slots& slots,
                                          Parts parts, Routes& routes) {
  // At least once: a block without tokens has to say so to the others.
#pragma unroll 1
  for (;;) {
    send_tile(p, op, source, slots, parts, routes);
    const int begins = parts.ends();
    if (begins >= tokens.last) return;
    parts = Parts(p, begins, min(begins + kTile, tokens.last), Source::kTogether);
  }
}

// Release: the block's stores happen before the counter that the receiver acquires. The first block
// tops up what the others add, so that the sum does not depend on the grid. All threads meet
// before.
__device__ __forceinline__ void announce_block(const DispatchLaunch& p) {
  const uint32_t share = blockIdx.x == 0 ? kAllBlocks - (gridDim.x - 1) : 1;
  for (int to = threadIdx.x; to < p.c.ep_size; to += blockDim.x)
    if (to != p.c.rank && (p.a.active >> to & 1) != 0)
      add_release_sys(reinterpret_cast<uint32_t*>(p.c.control(to, kBlocks, p.c.rank)), share);
}

// Ids and weights (with scrub="all" payload and scales too) of the rows that nobody fills.
__device__ __forceinline__ void scrub_rows(const DispatchLaunch& p, const Operation& op) {
  const int lane = threadIdx.x % kWarp, rows = static_cast<int>(p.a.max_rows);
  const int warps = blockDim.x / kWarp, warp = blockIdx.x * warps + threadIdx.x / kWarp;
  const int from = p.c.scrub_all ? 0 : p.segment[kSegmentIds].image;
  const int to = p.segment[kSegmentWeights].image + p.segment[kSegmentWeights].bytes;
  for (int source = 0; source < p.c.ep_size; ++source) {
    const int count = await_count(p, op, source);
    if (count < 0) return;
    for (int i = count + warp; i < rows; i += gridDim.x * warps)
      for (int at = from + lane * 16; at < to; at += kStepBytes)
        store_image(p, p.c.window[p.c.rank], static_cast<int64_t>(source) * rows + i, at, 16,
                    {0, 0}, true);
  }
}

template <class Source>
__global__ void __launch_bounds__(kBulkThreads, 1)
    dispatch_bulk(const DispatchLaunch __grid_constant__ p) {
  MOE_SHARED(Routes, routes);
  MOE_DYNAMIC_SHARED(stages);
  const int block = blockIdx.x, last = gridDim.x - 1, movers = max(last, 1);
  const Tokens tokens(p);
  const Parts parts(p, tokens.first, min(tokens.first + kTile, tokens.last), Source::kTogether);
  Slots slots(p, tokens.first, tokens.last);
  Source source(p, stages + threadIdx.x / kWarp * Source::kStage);
  const Operation op = begin(p.c, kDispatch);
  source.begin(p);
  if (block < movers) send_rows(p, op, source, tokens, slots, parts, routes);
  if (block == last && !op.dead) announce_tallies(p, op.tag, movers);
  // Together: a warp that begins late may know more than the others, and has sent less.
  if (__syncthreads_or(op.dead)) return;
  announce_block(p);
  scrub_rows(p, op);
  if (block == last && threadIdx.x < kWarp) finish_dispatch(p, op, true);
}

template <class Source>
BulkKernel kernel() {
  return {reinterpret_cast<const void*>(dispatch_bulk<Source>), kBulkWarps * Source::kStage};
}

}  // namespace

BulkKernel dispatch_bulk_kernel(int wire, bool aligned) {
  if (wire < 0) return aligned ? kernel<Direct<true>>() : kernel<Direct<false>>();
  if (!aligned) return kernel<Quantized<kAny, kAny>>();
  switch (wire) {
    case kFp8:
      return kernel<Quantized<kFp8, kAlignedBf16>>();
    case kFp8Block128:
      return kernel<Quantized<kFp8Block128, kAlignedBf16>>();
    case kMxfp8:
      return kernel<Quantized<kMxfp8, kAlignedBf16>>();
    case kMxfp4:
      return kernel<Quantized<kMxfp4, kAlignedBf16>>();
    default:
      return kernel<Quantized<kNvfp4, kAlignedBf16>>();
  }
}

}  // namespace moe_a2a::cuda
