// Dispatch of a large round: rows go straight to where the experts of their ranks read them, then
// every block tells every rank that it is through. The receiver unpacks nothing.
#include "finish.cuh"
#include "launch.h"
#include "quantize.cuh"
#include "row.cuh"
#include "wait_failed.cuh"

namespace moe_a2a::cuda {
namespace {

constexpr int kMost = 512;  // threads
constexpr int kWarps = kMost / kWarp;
constexpr int kStepBytes = kWarp * 16;

// The tile of tokens that a block is at. Its slots are found when the first warp asks for them, by
// then with data in its hands: every warp asks, once a tile at least, since there is a barrier.
struct Tile {
  const DispatchLaunch& p;
  Route& route;
  Tiles& tiles;
  int first, last;
  bool is_first, found = false;

  __device__ __forceinline__ void find() {
    if (!found) tiles.next(p, first, last, is_first, route);
    found = true;
  }
};

// A part of a token's row: a run of the payload, never empty; the last one also has the rest.
struct Part {
  int t, in_tile, index;
};

// fn(rank, row there) for each rank of the token; this one last, which has no way to go.
template <class F>
__device__ __forceinline__ void for_each_row(const Tile& tile, int in_tile, F fn) {
  const DispatchLaunch& p = tile.p;
  const uint64_t self = bit(p.c.rank);
#pragma unroll 1
  for (uint64_t left = tile.route.ranks[in_tile]; left != 0;) {
    const uint64_t remote = left & ~self;
    const int to = __ffsll(remote != 0 ? remote : left) - 1;
    left &= ~bit(to);
    fn(to, p.c.rank * p.a.max_rows + tile.route.slot[in_tile][to]);
  }
}

// From byte `first` of the image to its end, small pieces all.
__device__ __forceinline__ void send_rest(Tile& tile, const Part& part, int first) {
  const DispatchLaunch& p = tile.p;
#pragma unroll 1
  for (int at = first + static_cast<int>(threadIdx.x % kWarp) * 16; at < p.image_bytes;
       at += kStepBytes) {
    const Chunk data = load_image(p, part.t, at, 16);
    for_each_row(tile, part.in_tile,
                 [&](int to, int64_t row) { store_image(p, to, row, at, 16, data, false); });
  }
}

// The caller's bytes as they are.
struct Direct {
  static constexpr int kStage = 0;  // bytes a warp

  static __device__ __forceinline__ void send(Tile& tile, const Part& part, uint8_t*) {
    constexpr int kAhead = 7;  // loads in flight
    const DispatchLaunch& p = tile.p;
    const int lane = threadIdx.x % kWarp, bytes = p.segment[kSegmentPayload].bytes;
    const int steps = (bytes + kStepBytes - 1) / kStepBytes;
    const int from = steps * part.index / p.parts, to_step = steps * (part.index + 1) / p.parts;
    const uint8_t* source = p.a.payload.row(part.t);
#pragma unroll 1
    for (int step = from; step < to_step; step += kAhead) {
      Chunk data[kAhead];
#pragma unroll
      for (int u = 0; u < kAhead; ++u) {
        const int at = (step + u) * kStepBytes + lane * 16;
        if (step + u < to_step && at < bytes)
          data[u] = load_bytes(source + at, min(16, bytes - at));
      }
      tile.find();
      for_each_row(tile, part.in_tile, [&](int to, int64_t row) {
        uint8_t* target = p.c.window[to] + p.c.payload + row * bytes;
#pragma unroll
        for (int u = 0; u < kAhead; ++u) {
          const int at = (step + u) * kStepBytes + lane * 16;
          if (step + u < to_step && at < bytes)
            store_bytes(target + at, data[u], min(16, bytes - at));
        }
      });
    }
    if (part.index == p.parts - 1) send_rest(tile, part, p.segment[kSegmentScales].image);
  }
};

// Quantized in a stage of shared memory, which is then copied to every rank.
struct Quantized {
  static constexpr int kStage = kStageBytes;

  static __device__ __forceinline__ void send(Tile& tile, const Part& part, uint8_t* stage) {
    const DispatchLaunch& p = tile.p;
    const Context& c = p.c;
    const int lane = threadIdx.x % kWarp, wire = p.a.wire;
    QuantizeRow r(p.a.payload.row(part.t), p.a.input, wire, c.hidden, c.padded, p.global_scale);
    if (wire == kFp8) r.row_scale = fp8_scale(largest_of_columns(r.data, r.scalar, 0, c.hidden));
    const int steps = (c.padded + kWarpColumns - 1) / kWarpColumns;
    const int from = steps * part.index / p.parts * kWarpColumns;
    const int end = min(steps * (part.index + 1) / p.parts * kWarpColumns, c.padded);
    const int codes = p.segment[kSegmentPayload].bytes, scales = p.segment[kSegmentScales].bytes;
    uint8_t* stage_scales = stage + kStageColumns;
#pragma unroll 1
    for (int col = from; col < end; col += kStageColumns) {
      const int last = min(col + kStageColumns, end);
      const int first_code = code_bytes(wire, col), first_scale = scale_bytes(wire, col);
      quantize_columns<4>(r, col, last, stage - first_code, stage_scales - first_scale);
      __syncwarp();
      tile.find();
      for_each_row(tile, part.in_tile, [&](int to, int64_t row) {
        copy_bytes(c.window[to] + c.payload + row * codes + first_code, stage,
                   code_bytes(wire, last) - first_code, lane);
        if (wire != kFp8)
          copy_bytes(c.window[to] + c.scales + row * scales + first_scale, stage_scales,
                     scale_bytes(wire, last) - first_scale, lane);
        else if (part.index == 0 && lane == 0)
          *reinterpret_cast<float*>(c.window[to] + c.scales + row * 4) = r.row_scale.scale;
      });
      __syncwarp();
    }
    if (part.index == p.parts - 1) send_rest(tile, part, p.segment[kSegmentIds].image);
  }
};

template <class Source>
__device__ __forceinline__ void send_rows(const DispatchLaunch& p, Route& route, uint8_t* stage) {
  const int total = static_cast<int>(p.a.tokens), warps = blockDim.x / kWarp;
  const int first = min(static_cast<int>(blockIdx.x) * p.share, total);
  const int last = min(first + p.share, total);
  Tiles tiles;
#pragma unroll 1
  for (int begins = first; begins < last; begins += kTile) {
    Tile tile{p, route, tiles, begins, min(begins + kTile, last), begins == first};
#pragma unroll 1
    for (int item = threadIdx.x / kWarp; item < (tile.last - begins) * p.parts; item += warps) {
      const int in_tile = item / p.parts;
      Source::send(tile, {begins + in_tile, in_tile, item - in_tile * p.parts}, stage);
    }
    tile.find();
    __syncthreads();  // the next tile overwrites the slots
  }
}

// Release: the block's stores happen before the counter that the receiver acquires. The first block
// tops up what the others add, so that the sum does not depend on the grid.
__device__ __forceinline__ void announce_block(const DispatchLaunch& p) {
  __syncthreads();
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
        store_image(p, p.c.rank, static_cast<int64_t>(source) * rows + i, at, 16, {0, 0}, true);
  }
}

template <class Source>
struct alignas(16) Stage {  // in shared memory
  uint8_t bytes[Source::kStage == 0 ? 16 : kWarps * Source::kStage];
};

template <class Source>
__global__ void __launch_bounds__(kMost, 1)
    dispatch_bulk(const DispatchLaunch __grid_constant__ p) {
  MOE_SHARED(Route, route);
  MOE_SHARED(Stage<Source>, stage);
  const Operation op = begin(p.c, kDispatch);
  if (op.dead) return;
  const int last = gridDim.x - 1, movers = max(last, 1);
  const bool finishes = static_cast<int>(blockIdx.x) == last;
  if (finishes) announce_counts(p, op.tag, true, route);
  if (finishes) __syncthreads();  // a block that is alone goes on to use the same memory
  if (static_cast<int>(blockIdx.x) < movers)
    send_rows<Source>(p, route, stage.bytes + threadIdx.x / kWarp * Source::kStage);
  announce_block(p);
  scrub_rows(p, op);
  if (finishes && threadIdx.x < kWarp) finish_dispatch(p, op, true);
}

}  // namespace

const void* dispatch_bulk_kernel(bool quantized) {
  return quantized ? reinterpret_cast<const void*>(dispatch_bulk<Quantized>)
                   : reinterpret_cast<const void*>(dispatch_bulk<Direct>);
}

}  // namespace moe_a2a::cuda
