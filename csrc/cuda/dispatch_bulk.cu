// Dispatch of a large round: rows go straight to where the experts of their ranks read them, then
// every block tells every rank that it is through. The receiver unpacks nothing.
#include <type_traits>

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

// A part of a row: columns or bytes of some steps, one part of a warp after the other.
struct Part {
  int t, in_tile, first, last;  // steps
};

// The parts of a tile of tokens that a warp takes: every so many, in runs of parts of the same row
// where the source wants them together.
struct Parts {
  const DispatchLaunch& p;
  int begins, tokens, run, left;  // of the run
  int in_tile = 0, index = 0;     // of a part, in its row

  __device__ __forceinline__ Parts(const DispatchLaunch& launch, int first, int last, bool together)
      : p(launch), begins(first), tokens(last - first) {
    const int warps = blockDim.x / kWarp;
    run = together ? max(1, min(p.parts, tokens * p.parts / warps)) : 1;
    left = run;
    skip(static_cast<int>(threadIdx.x / kWarp) * run);
  }
  __device__ __forceinline__ bool more() const { return in_tile < tokens; }
  __device__ __forceinline__ Part part() const {
    const int first = index * p.steps;
    return {begins + in_tile, in_tile, first, first + p.steps};
  }
  __device__ __forceinline__ void advance() {
    const bool ends = --left == 0;
    if (ends) left = run;
    skip(ends ? (static_cast<int>(blockDim.x) / kWarp - 1) * run + 1 : 1);
  }

 private:
  // A few rows at most: a division would be longer.
  __device__ __forceinline__ void skip(int count) {
    index += count;
#pragma unroll 1
    for (; index >= p.parts; index -= p.parts) ++in_tile;
  }
};

// fn(window, slot) for each rank of the token; this one last, which has no way to go.
template <class F>
__device__ __forceinline__ void for_each_rank(const DispatchLaunch& p, const Route& route,
                                              int in_tile, F fn) {
  const uint64_t all = route.ranks[in_tile];
  uint64_t own = all & bit(p.c.rank), left = all ^ own;
#pragma unroll 1
  while ((left | own) != 0) {
    if (left == 0) {
      left = own;
      own = 0;
    }
    const int to = __ffsll(left) - 1;
    left &= left - 1;
    fn(to, route.slot[in_tile][to]);
  }
}

// Where this rank's rows begin in a window's region of rows of so many bytes.
__device__ __forceinline__ int64_t own_rows(const DispatchLaunch& p, const Segment& s) {
  return s.region + p.c.rank * p.a.max_rows * s.bytes;
}

// The caller's bytes as they are. kAligned: in chunks of 16.
template <bool kAligned>
struct Direct {
  static constexpr int kStage = 16;  // bytes a warp
  static constexpr bool kTogether = false, kAhead = kAligned;
  static constexpr int kSteps = kDirectSteps;
  struct Data {
    Chunk chunk[kSteps];
  };
  // Where the rest of the row's image begins.
  static __device__ __forceinline__ int rest(const DispatchLaunch& p) {
    return p.segment[kSegmentScales].image;
  }
  const int64_t rows;
  __device__ __forceinline__ explicit Direct(const DispatchLaunch& p)
      : rows(own_rows(p, p.segment[kSegmentPayload])) {}
  __device__ __forceinline__ void prepare() {}

  // fn(which step, bytes from the row's begin, bytes of the row) for the chunks of this lane.
  template <class F>
  static __device__ __forceinline__ void for_each_chunk(const DispatchLaunch& p, const Part& part,
                                                        F fn) {
    const int bytes = p.segment[kSegmentPayload].bytes, end = min(part.last * kStepBytes, bytes);
    const int begin = part.first * kStepBytes + static_cast<int>(threadIdx.x % kWarp) * 16;
#pragma unroll
    for (int u = 0; u < kSteps; ++u)
      if (begin + u * kStepBytes < end) fn(u, begin + u * kStepBytes, bytes);
  }
  __device__ __forceinline__ void load(const DispatchLaunch& p, const Part& part, Data& data) {
    const uint8_t* row = p.a.payload.row(part.t);
    for_each_chunk(p, part, [&](int u, int at, int bytes) {
      data.chunk[u] = kAligned ? load_chunk(row + at) : load_bytes(row + at, min(16, bytes - at));
    });
  }
  __device__ __forceinline__ void send(const DispatchLaunch& p, const Route& route,
                                       const Part& part, Data& data, uint8_t*) {
    for_each_rank(p, route, part.in_tile, [&](int to, int slot) {
      uint8_t* target = p.c.window[to] + rows + int64_t{slot} * p.segment[kSegmentPayload].bytes;
      for_each_chunk(p, part, [&](int u, int at, int bytes) {
        const Chunk& c = data.chunk[u];
        if (kAligned)
          *reinterpret_cast<ulonglong2*>(target + at) = make_ulonglong2(c.lo, c.hi);
        else
          store_bytes(target + at, c, min(16, bytes - at));
      });
    });
  }
};

// Codes and scales of a part in a stage of shared memory, on their way to several ranks: a lane's
// share is taken up once. kChunks: chunks of 16 bytes that a lane has at most.
template <int kChunks>
struct OutOfChunks {
  const uint8_t* scales;
  int code_bytes, scale_bytes;
  Chunk chunk[kChunks];
  uint64_t eight;  // of the scales: at most 256 bytes

  __device__ __forceinline__ OutOfChunks(const uint8_t* codes, int codes_size, const uint8_t* at,
                                         int scales_size)
      : scales(at), code_bytes(codes_size), scale_bytes(scales_size) {
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int i = 0; i < kChunks; ++i)
      chunk[i] = *reinterpret_cast<const Chunk*>(codes + (i * kWarp + lane) * 16);
    eight = lane * 8 < scale_bytes ? *reinterpret_cast<const uint64_t*>(scales + lane * 8) : 0;
  }
  __device__ __forceinline__ void store(uint8_t* codes_to, uint8_t* scales_to) const {
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int i = 0; i < kChunks; ++i)
      if ((i * kWarp + lane) * 16 < code_bytes)
        *reinterpret_cast<ulonglong2*>(codes_to + (i * kWarp + lane) * 16) =
            make_ulonglong2(chunk[i].lo, chunk[i].hi);
    if ((scale_bytes & 7) == 0 && aligned(scales_to, 8)) {
      if (lane * 8 < scale_bytes) *reinterpret_cast<uint64_t*>(scales_to + lane * 8) = eight;
    } else {
#pragma unroll 1
      for (int i = lane; i < scale_bytes; i += kWarp) scales_to[i] = scales[i];
    }
  }
};

// The same byte by byte if need be.
struct OutOfBytes {
  const uint8_t *codes, *scales;
  int code_bytes, scale_bytes;

  __device__ __forceinline__ OutOfBytes(const uint8_t* from, int codes_size, const uint8_t* at,
                                        int scales_size)
      : codes(from), scales(at), code_bytes(codes_size), scale_bytes(scales_size) {}
  __device__ __forceinline__ void store(uint8_t* codes_to, uint8_t* scales_to) const {
    copy_bytes(codes_to, codes, code_bytes, threadIdx.x % kWarp);
    copy_bytes(scales_to, scales, scale_bytes, threadIdx.x % kWarp);
  }
};

// Quantized in a stage of shared memory, which is then copied to every rank.
template <int kWire, int kInput>
struct Quantized {
  static constexpr int kSteps = kQuantizedSteps;
  static constexpr int kCodes = kSteps * kWarpColumns;
  static constexpr int kStage = kCodes + kCodes / 16;
  static constexpr int kBits = kWire == kNvfp4 || kWire == kMxfp4 ? 4 : 8;
  // The scale of an fp8 row takes the whole row, so the parts of one had better meet.
  static constexpr bool kTogether = kWire == kAny || kWire == kFp8;
  static constexpr bool kAhead = kInput != kAny;
  using Data = Batch<kInput, kSteps>;
  using Out = std::conditional_t<kInput == kAny, OutOfBytes,
                                 OutOfChunks<(kCodes * kBits / 8 + kStepBytes - 1) / kStepBytes>>;

  const int64_t rows, scale_rows;
  const float global_scale;
  float known_scale = 1.0f;
  int scaled = -1;  // the token that row_scale is of
  Fp8Scale row_scale{};

  static __device__ __forceinline__ int rest(const DispatchLaunch& p) {
    return p.segment[kSegmentIds].image;
  }
  __device__ __forceinline__ explicit Quantized(const DispatchLaunch& p)
      : rows(own_rows(p, p.segment[kSegmentPayload])),
        scale_rows(own_rows(p, p.segment[kSegmentScales])),
        global_scale(p.global_scale == nullptr ? 1.0f : *p.global_scale) {}
  __device__ __forceinline__ void prepare() { known_scale = arrived<kWire>(global_scale); }

  __device__ __forceinline__ void load(const DispatchLaunch& p, const Part& part, Data& data) {
    data.load(p.a.payload.row(part.t), p.a.input, p.c.hidden, part.first * kWarpColumns,
              kWarpColumns, part.last * kWarpColumns);
  }
  __device__ __forceinline__ void send(const DispatchLaunch& p, const Route& route,
                                       const Part& part, Data& data, uint8_t* stage) {
    const Context& c = p.c;
    const int wire = kWire == kAny ? p.a.wire : kWire, lane = threadIdx.x % kWarp;
    QuantizeRow r(p.a.payload.row(part.t), p.a.input, wire, c.hidden, c.padded, known_scale);
    if (wire == kFp8 && scaled != part.t) {
      row_scale = fp8_scale(largest_of_columns<kInput>(r.data, r.scalar, 0, c.hidden));
      scaled = part.t;
    }
    r.row_scale = row_scale;
    const int col = part.first * kWarpColumns, last = min(part.last * kWarpColumns, c.padded);
    const int first_code = code_bytes(wire, col), codes = code_bytes(wire, last) - first_code;
    const int first_scale = scale_bytes(wire, col), scales = scale_bytes(wire, last) - first_scale;
    uint8_t* stage_scales = stage + kCodes;
    data.template quantize<kWire>(r, col, kWarpColumns, last, stage - first_code,
                                  stage_scales - first_scale);
    // The scale of an fp8 row goes with its first part.
    const int own_scales = wire != kFp8 ? scales : part.first == 0 ? 4 : 0;
    if (wire == kFp8 && lane == 0) *reinterpret_cast<float*>(stage_scales) = row_scale.scale;
    __syncwarp();
    const Out out(stage, codes, stage_scales, own_scales);
    const int64_t codes_to = rows + first_code;
    const int64_t scales_to = scale_rows + (wire != kFp8 ? first_scale : 0);
    for_each_rank(p, route, part.in_tile, [&](int to, int slot) {
      out.store(c.window[to] + codes_to + int64_t{slot} * p.segment[kSegmentPayload].bytes,
                c.window[to] + scales_to + int64_t{slot} * p.segment[kSegmentScales].bytes);
    });
    __syncwarp();
  }
};

// What follows the payload in the images of a tile's tokens: a piece of 16 bytes a thread, the last
// warps first, since the first one is late from finding the slots.
__device__ __forceinline__ void send_rest(const DispatchLaunch& p, const Route& route, int begins,
                                          int ends, int first) {
  const int pieces = (p.image_bytes - first + 15) / 16, lane = threadIdx.x % kWarp;
  const int warp = static_cast<int>(blockDim.x - 1 - threadIdx.x) / kWarp;
#pragma unroll 1
  for (int i = warp * kWarp + lane; i < (ends - begins) * pieces; i += blockDim.x) {
    const int in_tile = i / pieces, at = first + (i - in_tile * pieces) * 16;
    const Chunk data = load_image(p, begins + in_tile, at, 16);
    for_each_rank(p, route, in_tile, [&](int to, int slot) {
      store_image(p, to, p.c.rank * p.a.max_rows + slot, at, 16, data, false);
    });
  }
}

// The slots of a tile are found while a warp's first loads are on their way, those of ids ahead of
// them: behind them they would wait until half of the first parts have come from memory. False
// where an earlier kernel gave up: nothing may be sent then.
template <class Source>
__device__ __forceinline__ bool send_tile(const DispatchLaunch& p, const Operation& op,
                                          Source& source, Tiles& tiles, int begins, int ends,
                                          bool is_first, Route& route, uint8_t* stage) {
  Parts parts(p, begins, ends, Source::kTogether);
  typename Source::Data data, ahead;
  bool more = parts.more();
  Part part = parts.part();
  tiles.next(p, begins, ends, is_first, route, [&] {
    if (more) source.load(p, part, data);
  });
  if (op.dead) return false;
  source.prepare();
  send_rest(p, route, begins, ends, Source::rest(p));
#pragma unroll 1
  while (more) {
    parts.advance();
    more = parts.more();
    const Part next = parts.part();
    // Ahead of the stores: where the link is the limit, they wait for it. Rows off any boundary
    // are slow anyway, and their loads take the registers.
    if (Source::kAhead && more) source.load(p, next, ahead);
    source.send(p, route, part, data, stage);
    part = next;
    if (Source::kAhead) data = ahead;
    if (!Source::kAhead && more) source.load(p, part, data);
  }
  __syncthreads();  // the next tile overwrites the slots
  return true;
}

template <class Source>
__device__ __forceinline__ bool send_rows(const DispatchLaunch& p, const Operation& op,
                                          Route& route, uint8_t* stage) {
  const int total = static_cast<int>(p.a.tokens);
  const int first = min(static_cast<int>(blockIdx.x) * p.share, total);
  const int last = min(first + p.share, total);
  Source source(p);
  Tiles tiles;
#pragma unroll 1
  for (int begins = first; begins < last; begins += kTile)
    if (!send_tile(p, op, source, tiles, begins, min(begins + kTile, last), begins == first, route,
                   stage))
      return false;
  return !op.dead;
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
  uint8_t bytes[kWarps * Source::kStage];
};

template <class Source>
__global__ void __launch_bounds__(kMost, 1)
    dispatch_bulk(const DispatchLaunch __grid_constant__ p) {
  MOE_SHARED(Route, route);
  MOE_SHARED(Stage<Source>, stage);
  const Operation op = begin(p.c, kDispatch);
  const int last = gridDim.x - 1, movers = max(last, 1);
  const bool finishes = static_cast<int>(blockIdx.x) == last;
  if (finishes) {
    if (op.dead) return;
    announce_counts(p, op.tag, true, route);
    __syncthreads();  // a block that is alone goes on to use the same memory
  }
  if (static_cast<int>(blockIdx.x) < movers &&
      !send_rows<Source>(p, op, route, stage.bytes + threadIdx.x / kWarp * Source::kStage))
    return;
  announce_block(p);
  scrub_rows(p, op);
  if (finishes && threadIdx.x < kWarp) finish_dispatch(p, op, true);
}

template <class Source>
const void* kernel() {
  return reinterpret_cast<const void*>(dispatch_bulk<Source>);
}

}  // namespace

const void* dispatch_bulk_kernel(int wire, bool aligned) {
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
