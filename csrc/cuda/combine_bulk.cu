// Combine of a large round: a few warps of every block push rows into the inboxes of the ranks they
// came from, raising a flag for each; the others sum what has arrived, token by token, while the
// rest is on its way. Summing at the end would cost as long as a quarter of the transfer.
#include "finish.cuh"
#include "launch.h"
#include "sum.cuh"
#include "wait_failed.cuh"

namespace moe_a2a::cuda {
namespace {

constexpr int kMost = 512;  // threads
// Few, so that rows are complete one after the other and not all at the end.
constexpr int kPushWarps = 4;

// The tag of a line that carries no data. Only tags are ever stored in this place of a line, so
// that nothing that a small round left there can look like this round's flag.
__device__ __forceinline__ uint64_t* flag(const CombineLaunch& p, int owner, int from, int index) {
  uint8_t* line = p.c.window[owner] + p.flags + from * p.flags_per_source + index * kLine;
  return reinterpret_cast<uint64_t*>(line + kLine - 8);
}

__device__ __forceinline__ int flag_of(const CombineLaunch& p, int slot, int part) {
  return slot / p.rows_per_flag * p.parts + part;
}

// Columns of a part: whole steps of a warp.
struct Columns {
  int first, last;
};

__device__ __forceinline__ Columns columns_of(const CombineLaunch& p, int part) {
  const int steps = (p.c.hidden + kWarpColumns - 1) / kWarpColumns;
  return {min(steps * part / p.parts * kWarpColumns, p.c.hidden),
          min(steps * (part + 1) / p.parts * kWarpColumns, p.c.hidden)};
}

__device__ __forceinline__ uint8_t* inbox_row(const CombineLaunch& p, int owner, int from,
                                              int slot) {
  return p.c.window[owner] + p.c.combine +
         (static_cast<int64_t>(from) * p.c.max_tokens + slot) * p.c.combine_bytes;
}

__device__ __forceinline__ void push_plain(const CombineLaunch& p, const uint8_t* y, uint8_t* inbox,
                                           Columns columns) {
  constexpr int kAhead = 8;  // loads in flight
  const int item = static_cast<int>(p.c.combine_bytes) / p.c.hidden, lane = threadIdx.x % kWarp;
  const int end = columns.last * item;
#pragma unroll 1
  for (int at = columns.first * item + lane * 16; at < end; at += kAhead * kWarp * 16) {
    Chunk data[kAhead];
#pragma unroll
    for (int u = 0; u < kAhead; ++u)
      if (at + u * kWarp * 16 < end) data[u] = load_bytes(y + at + u * kWarp * 16, 16);
#pragma unroll
    for (int u = 0; u < kAhead; ++u)
      if (at + u * kWarp * 16 < end) store_bytes(inbox + at + u * kWarp * 16, data[u], 16);
  }
}

__device__ __forceinline__ void push_quantized(const CombineLaunch& p, const uint8_t* y,
                                               uint8_t* inbox, Columns columns, uint8_t* stage) {
  const Context& c = p.c;
  const int lane = threadIdx.x % kWarp;
  const QuantizeRow r{y, p.a.scalar, c.combine_wire, c.hidden, c.hidden, 1.0f, {}};
  uint8_t* stage_scales = stage + kStageColumns;
  for (int col = columns.first; col < columns.last; col += kStageColumns) {
    const int last = min(col + kStageColumns, columns.last);
    const int first_scale = scale_bytes(c.combine_wire, col);
    quantize_columns<4>(r, col, last, stage - col, stage_scales - first_scale);
    __syncwarp();
    copy_bytes(inbox + col, stage, last - col, lane);
    copy_bytes(inbox + c.hidden + first_scale, stage_scales,
               scale_bytes(c.combine_wire, last) - first_scale, lane);
    __syncwarp();
  }
}

// Rows in the order in which the peers sum them: by slot first, a peer after the other, each rank
// beginning with the one after it.
template <class Row>
__device__ __forceinline__ void push_rows(const CombineLaunch& p, uint64_t tag, uint8_t* stage) {
  const Context& c = p.c;
  const int lane = threadIdx.x % kWarp, peers = c.ep_size - 1;
  int most = 0;
  for (int s = lane; s < c.ep_size; s += kWarp)
    if (s != c.rank) most = max(most, c.state->received[s]);
  most = static_cast<int>(largest_of_lanes<kWarp>(most));
  const int chunks = (most + p.rows_per_flag - 1) / p.rows_per_flag;
  const int warp = blockIdx.x * kPushWarps + threadIdx.x / kWarp;
#pragma unroll 1
  for (int unit = warp; unit < chunks * p.parts * peers; unit += gridDim.x * kPushWarps) {
    const int index = unit / peers, part = index % p.parts, chunk = index / p.parts;
    const int source = (c.rank + 1 + unit - index * peers) % c.ep_size;
    const int first = chunk * p.rows_per_flag;
    const int last = min(first + p.rows_per_flag, c.state->received[source]);
    if (first >= last) continue;
    const Columns columns = columns_of(p, part);
#pragma unroll 1
    for (int slot = first; slot < last; ++slot) {
      const uint8_t* y = p.a.y + source * p.a.source_stride + slot * p.a.row_stride;
      uint8_t* inbox = inbox_row(p, source, c.rank, slot);
      if constexpr (Row::kQuantized)
        push_quantized(p, y, inbox, columns, stage);
      else
        push_plain(p, y, inbox, columns);
    }
    // Release: what the lanes stored, ordered before this lane by the barrier, happens before the
    // flag.
    __syncwarp();
    if (lane == 0) store_release_sys(flag(p, source, c.rank, flag_of(p, first, part)), tag);
  }
}

// Slots of a token: of ranks `lane` and `lane + 32`.
struct Slots {
  int low, high;
  __device__ __forceinline__ int of(int rank) const {
    const int a = __shfl_sync(kAllLanes, low, rank % kWarp);
    const int b = __shfl_sync(kAllLanes, high, rank % kWarp);
    return rank < kWarp ? a : b;
  }
};

// Until the rows of a token have come from all `ranks`: a lane polls the flag of each.
__device__ __forceinline__ bool await_rows(const CombineLaunch& p, uint64_t ranks,
                                           const Slots& slots, int part, const Operation& op) {
  Wait wait;
  const int lane = threadIdx.x % kWarp;
  const auto here = [&](int rank, int slot) {
    return (ranks >> rank & 1) == 0 || rank == p.c.rank ||
           load_acquire_sys(flag(p, p.c.rank, rank, flag_of(p, slot, part))) == op.tag;
  };
  bool low = false, high = p.c.ep_size <= kWarp;
  for (;;) {
    low = low || lane >= p.c.ep_size || here(lane, slots.low);
    high = high || lane + kWarp >= p.c.ep_size || here(lane + kWarp, slots.high);
    const unsigned missing = __ballot_sync(kAllLanes, !low);
    const unsigned missing_high = __ballot_sync(kAllLanes, !high);
    if ((missing | missing_high) == 0) return true;
    __nanosleep(100);  // hundreds of warps wait while rows arrive, and their polls take bandwidth
    if (!keep_waiting(p.c, p.facts, op, wait,
                      missing | static_cast<uint64_t>(missing_high) << kWarp))
      return false;
  }
}

template <class Row>
__device__ __forceinline__ typename Row::Loaded load_row(const CombineLaunch& p, int rank, int slot,
                                                         int col, bool inside) {
  const Context& c = p.c;
  if (rank != c.rank)
    return inside ? Row::load({inbox_row(p, c.rank, rank, slot), c.hidden}, col)
                  : typename Row::Loaded{};
  const uint8_t* y = p.a.y + rank * p.a.source_stride + slot * p.a.row_stride;
  if constexpr (Row::kQuantized) {
    float v[kColumns] = {};
    if (inside) load_columns(y, p.a.scalar, col, v);
    return Row::quantize(v);
  } else {
    return inside ? Row::load({y, c.hidden}, col) : typename Row::Loaded{};
  }
}

template <class Row>
__device__ __forceinline__ void sum_columns(const CombineLaunch& p, int token, uint64_t all,
                                            const Slots& slots, Columns columns) {
  constexpr int kAhead = 4;  // steps whose loads are in flight
  const int lane = threadIdx.x % kWarp;
  uint8_t* out = p.a.out + token * p.a.out_stride;
#pragma unroll 1
  for (int first = columns.first; first < columns.last; first += kAhead * kWarpColumns) {
    float sum[kAhead][kColumns] = {};
#pragma unroll 1
    for (uint64_t ranks = all; ranks != 0; ranks &= ranks - 1) {
      const int rank = __ffsll(ranks) - 1, slot = slots.of(rank);
      typename Row::Loaded loaded[kAhead];
#pragma unroll
      for (int u = 0; u < kAhead; ++u) {
        const int col = first + u * kWarpColumns + lane * kColumns;
        loaded[u] = load_row<Row>(p, rank, slot, col, col < columns.last);
      }
#pragma unroll
      for (int u = 0; u < kAhead; ++u) Row::add(loaded[u], sum[u]);
    }
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      const int col = first + u * kWarpColumns + lane * kColumns;
      if (col < columns.last) store_sums(out, p.a.scalar, col, sum[u]);
    }
  }
}

template <class Row>
__device__ __forceinline__ bool sum_rows(const CombineLaunch& p, const Operation& op) {
  const int lane = threadIdx.x % kWarp, sum_warps = blockDim.x / kWarp - kPushWarps;
  const int warp = blockIdx.x * sum_warps + threadIdx.x / kWarp - kPushWarps;
  const Context& c = p.c;
#pragma unroll 1
  for (int unit = warp; unit < p.tokens * p.parts; unit += gridDim.x * sum_warps) {
    const int token = unit / p.parts, part = unit - token * p.parts;
    const uint64_t ranks = c.token_ranks[token];
    const int32_t* row = c.token_slots + static_cast<int64_t>(token) * c.ep_size;
    const Slots slots{lane < c.ep_size ? row[lane] : 0,
                      lane + kWarp < c.ep_size ? row[lane + kWarp] : 0};
    if (!await_rows(p, ranks, slots, part, op)) return false;
    sum_columns<Row>(p, token, ranks, slots, columns_of(p, part));
  }
  return true;
}

template <class Row>
__global__ void __launch_bounds__(kMost, 1) combine_bulk(const __grid_constant__ CombineLaunch p) {
  __shared__ __align__(16) uint8_t stage[Row::kQuantized ? kPushWarps * kStageBytes : 16];
  const Operation op = begin(p.c, kCombineOp);
  if (op.dead) return;
  const int warp = threadIdx.x / kWarp;
  if (blockIdx.x == 0 && warp == kPushWarps) send_combine_headers(p, op.tag);
  if (warp < kPushWarps) {
    push_rows<Row>(p, op.tag, stage + (Row::kQuantized ? warp * kStageBytes : 0));
  } else if (sum_rows<Row>(p, op)) {
    if (blockIdx.x == 0 && warp == kPushWarps) finish_combine(p, op);
  }
}

}  // namespace

const void* combine_bulk_kernel(int combine_wire) {
  switch (combine_wire) {
    case kBf16:
      return reinterpret_cast<const void*>(combine_bulk<Plain<kScalarBf16>>);
    case kFp16:
      return reinterpret_cast<const void*>(combine_bulk<Plain<kScalarFp16>>);
    case kFp32:
      return reinterpret_cast<const void*>(combine_bulk<Plain<kScalarFp32>>);
    case kFp8Block128:
      return reinterpret_cast<const void*>(combine_bulk<Scaled<kFp8Block128>>);
    default:
      return reinterpret_cast<const void*>(combine_bulk<Scaled<kMxfp8>>);
  }
}

}  // namespace moe_a2a::cuda
