// Combine of a large round. In every block some warps push rows into the inboxes of the ranks they
// came from, one warp raises the flags of rows that are through, and the others sum what has
// arrived, token by token, while the rest is on its way: summing at the end would cost as long as a
// quarter of the transfer.
#include "finish.cuh"
#include "launch.h"
#include "sum.cuh"
#include "wait_failed.cuh"

namespace moe_a2a::cuda {
namespace {

constexpr int kMost = 512;  // threads
// That push: a row at a time, together, so that rows are complete one after the other and not all
// at the end.
template <class Row>
constexpr int kPushWarps = Row::kQuantized ? 8 : 4;
template <class Row>
constexpr int kFirstSummer = kPushWarps<Row> + 1;

// How many units of the block each of its pushing warps has behind it; in shared memory.
struct Progress {
  uint32_t units[8];
};

// The tag of a line that carries no data. Only tags are ever stored in this place of a line, so
// that nothing that a small round left there can look like this round's flag.
__device__ __forceinline__ uint64_t* flag(const CombineLaunch& p, int owner, int from, int index) {
  uint8_t* line = p.c.window[owner] + p.flags + from * p.flags_per_source + index * kLine;
  return reinterpret_cast<uint64_t*>(line + kLine - 8);
}

// Columns of a part of a row: whole steps of a warp.
struct Columns {
  int first, last;

  __device__ __forceinline__ Columns(const CombineLaunch& p, int part, int parts) {
    const int steps = (p.c.hidden + kWarpColumns - 1) / kWarpColumns;
    first = min(steps * part / parts * kWarpColumns, p.c.hidden);
    last = min(steps * (part + 1) / parts * kWarpColumns, p.c.hidden);
  }
};

__device__ __forceinline__ uint8_t* inbox_row(const CombineLaunch& p, int owner, int from,
                                              int slot) {
  return p.c.window[owner] + p.c.combine +
         (static_cast<int64_t>(from) * p.c.max_tokens + slot) * p.c.combine_bytes;
}

// ---- pushing ---------------------------------------------------------------------------------

// What a block pushes: chunks of rows that share a flag, in the order in which the peers sum them.
// By slot first, a peer after the other, each rank beginning with the one after it.
struct Units {
  int chunks = 0, peers;  // of the fullest source

  __device__ __forceinline__ explicit Units(const CombineLaunch& p) : peers(p.c.ep_size - 1) {
    const Context& c = p.c;
    uint32_t most = 0;
    for (int s = threadIdx.x % kWarp; s < c.ep_size; s += kWarp)
      if (s != c.rank) most = max(most, static_cast<uint32_t>(c.state->received[s]));
    most = largest_of_lanes<kWarp>(most);
    chunks = (static_cast<int>(most) + p.rows_per_flag - 1) / p.rows_per_flag;
  }
  // Units of this block.
  __device__ __forceinline__ int count() const {
    const int all = chunks * peers, block = blockIdx.x, grid = gridDim.x;
    return (all - block + grid - 1) / grid;
  }
};

struct Unit {
  int source, first, last, flag;  // rows [first, last) of a source

  __device__ __forceinline__ Unit(const CombineLaunch& p, const Units& units, int index) {
    const Context& c = p.c;
    const int unit = blockIdx.x + index * gridDim.x;
    flag = unit / units.peers;
    source = c.rank + 1 + unit - flag * units.peers;
    if (source >= c.ep_size) source -= c.ep_size;
    first = flag * p.rows_per_flag;
    last = min(first + p.rows_per_flag, c.state->received[source]);
  }
};

__device__ __forceinline__ void push_plain(const CombineLaunch& p, const uint8_t* y, uint8_t* inbox,
                                           Columns columns) {
  constexpr int kAhead = 7;  // loads in flight
  const int item = p.a.scalar == kScalarFp32 ? 4 : 2, lane = threadIdx.x % kWarp;
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
  const QuantizeRow r(y, p.a.scalar, c.combine_wire, c.hidden, c.hidden, nullptr);
  uint8_t* stage_scales = stage + kStageColumns;
#pragma unroll 1
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

template <class Row>
__device__ __forceinline__ void push_rows(const CombineLaunch& p, Progress& progress,
                                          uint8_t* stage) {
  const Context& c = p.c;
  const int warp = threadIdx.x / kWarp;
  const Units units(p);
  const int count = units.count();
  const Columns columns(p, warp, kPushWarps<Row>);
#pragma unroll 1
  for (int index = 0; index < count; ++index) {
    const Unit unit(p, units, index);
#pragma unroll 1
    for (int slot = unit.first; slot < unit.last; ++slot) {
      const uint8_t* y = p.a.y + unit.source * p.a.source_stride + slot * p.a.row_stride;
      uint8_t* inbox = inbox_row(p, unit.source, c.rank, slot);
      if constexpr (Row::kQuantized)
        push_quantized(p, y, inbox, columns, stage);
      else
        push_plain(p, y, inbox, columns);
    }
    __syncwarp();
    // Release: what the lanes stored, ordered before this lane by the barrier, happens before.
    if (threadIdx.x % kWarp == 0) store_release_block(&progress.units[warp], index + 1);
  }
}

// One warp raises the flags of the units that all pushing warps have behind them. A fence for as
// many as have come to an end since the last one, so that no warp that pushes waits for its stores
// to arrive.
template <class Row>
__device__ __forceinline__ void raise_flags(const CombineLaunch& p, uint64_t tag,
                                            const Progress& progress) {
  const int lane = threadIdx.x % kWarp;
  const Units units(p);
  const int count = units.count();
  int raised = 0;
  while (raised < count) {
    // Acquire: the stores of the warps happen before the fence, and so before the flags.
    const uint32_t own = load_acquire_block(&progress.units[lane % kPushWarps<Row>]);
    const int through = static_cast<int>(__reduce_min_sync(kAllLanes, own));
    if (through == raised) continue;
    __syncwarp();  // what one lane has acquired, all have before they fence
    fence_acq_rel_sys();
    for (int index = raised + lane; index < through; index += kWarp) {
      const Unit unit(p, units, index);
      if (unit.first < unit.last) store_relaxed_sys(flag(p, unit.source, p.c.rank, unit.flag), tag);
    }
    raised = through;
  }
}

// ---- summing ---------------------------------------------------------------------------------

// Slots of a token: in ranks `lane` and `lane + 32`.
struct Slots {
  int low, high;
  __device__ __forceinline__ int of(int rank) const {
    return __shfl_sync(kAllLanes, rank < kWarp ? low : high, rank % kWarp);
  }
};

// Until the rows of a token have come from all `ranks`: a lane polls the flag of each.
__device__ __forceinline__ bool await_rows(const CombineLaunch& p, uint64_t ranks,
                                           const Slots& slots, const Operation& op) {
  Wait wait;
  const int lane = threadIdx.x % kWarp;
  const auto here = [&](int rank, int slot) {
    if (rank >= p.c.ep_size || (ranks >> rank & 1) == 0 || rank == p.c.rank) return true;
    return load_acquire_sys(flag(p, p.c.rank, rank, slot / p.rows_per_flag)) == op.tag;
  };
  bool low = false, high = p.c.ep_size <= kWarp;
  for (;;) {
    low = low || here(lane, slots.low);
    high = high || here(lane + kWarp, slots.high);
    const unsigned missing = __ballot_sync(kAllLanes, !low);
    const unsigned missing_high = __ballot_sync(kAllLanes, !high);
    if ((missing | missing_high) == 0) break;
    __nanosleep(100);  // hundreds of warps wait while rows arrive, and their polls take bandwidth
    if (!keep_waiting(p.c, p.facts, op, wait,
                      missing | static_cast<uint64_t>(missing_high) << kWarp))
      return false;
  }
  __syncwarp();  // what a lane has acquired, all lanes may read
  return true;
}

constexpr int kAhead = 4;  // steps whose loads are in flight

// Adds a row from memory: an inbox row, or, unquantized, one of y.
template <class Row>
__device__ __forceinline__ void add_row(const InboxRow& row, int first, int last,
                                        float (&sum)[kAhead][kColumns]) {
  typename Row::Loaded loaded[kAhead] = {};
#pragma unroll
  for (int u = 0; u < kAhead; ++u)
    if (first + u * kWarpColumns < last) loaded[u] = Row::load(row, first + u * kWarpColumns);
#pragma unroll
  for (int u = 0; u < kAhead; ++u) Row::add(loaded[u], sum[u]);
}

// Adds the rank's own row of y, quantized and decoded like everyone's.
template <class Row>
__device__ __forceinline__ void add_own_row(const uint8_t* y, int scalar, int first, int last,
                                            float (&sum)[kAhead][kColumns]) {
  RawColumns raw[kAhead];
#pragma unroll
  for (int u = 0; u < kAhead; ++u)
    if (first + u * kWarpColumns < last) raw[u] = load_columns(y, scalar, first + u * kWarpColumns);
#pragma unroll
  for (int u = 0; u < kAhead; ++u) {
    float v[kColumns];
    decode_columns(raw[u], scalar, v);
    Row::add(Row::quantize(v), sum[u]);
  }
}

template <class Row>
__device__ __forceinline__ void sum_columns(const CombineLaunch& p, int token, uint64_t all,
                                            const Slots& slots, Columns columns) {
  const Context& c = p.c;
  uint8_t* out = p.a.out + token * p.a.out_stride;
#pragma unroll 1
  for (int step = columns.first; step < columns.last; step += kAhead * kWarpColumns) {
    const int first = step + static_cast<int>(threadIdx.x % kWarp) * kColumns;
    float sum[kAhead][kColumns] = {};
#pragma unroll 1
    for (uint64_t ranks = all; ranks != 0; ranks &= ranks - 1) {
      const int rank = __ffsll(ranks) - 1, slot = slots.of(rank);
      const bool own = rank == c.rank;
      const uint8_t* y = p.a.y + rank * p.a.source_stride + slot * p.a.row_stride;
      if constexpr (Row::kQuantized) {
        if (own) {
          add_own_row<Row>(y, p.a.scalar, first, columns.last, sum);
          continue;
        }
      }
      const uint8_t* row = own ? y : inbox_row(p, c.rank, rank, slot);
      add_row<Row>({row, c.hidden}, first, columns.last, sum);
    }
#pragma unroll
    for (int u = 0; u < kAhead; ++u)
      if (first + u * kWarpColumns < columns.last)
        store_sums(out, p.a.scalar, first + u * kWarpColumns, sum[u]);
  }
}

template <class Row>
__device__ __forceinline__ void sum_rows(const CombineLaunch& p, const Operation& op) {
  const int lane = threadIdx.x % kWarp, summers = blockDim.x / kWarp - kFirstSummer<Row>;
  const int warp = blockIdx.x * summers + threadIdx.x / kWarp - kFirstSummer<Row>;
  const Context& c = p.c;
#pragma unroll 1
  for (int unit = warp; unit < p.tokens * p.parts; unit += gridDim.x * summers) {
    const int token = unit / p.parts;
    const uint64_t ranks = c.token_ranks[token];
    const int32_t* row = c.token_slots + static_cast<int64_t>(token) * c.ep_size;
    const Slots slots{lane < c.ep_size ? row[lane] : 0,
                      lane + kWarp < c.ep_size ? row[lane + kWarp] : 0};
    if (!await_rows(p, ranks, slots, op)) return;
    sum_columns<Row>(p, token, ranks, slots, Columns(p, unit - token * p.parts, p.parts));
  }
}

template <class Row>
struct alignas(16) Stage {  // in shared memory
  uint8_t bytes[Row::kQuantized ? kPushWarps<Row> * kStageBytes : 16];
};

template <class Row>
__global__ void __launch_bounds__(kMost, 1) combine_bulk(const CombineLaunch __grid_constant__ p) {
  MOE_SHARED(Stage<Row>, stage);
  MOE_SHARED(Progress, progress);
  const int warp = threadIdx.x / kWarp;
  if (threadIdx.x < 8) progress.units[threadIdx.x] = 0;
  __syncthreads();
  const Operation op = begin(p.c, kCombineOp);
  if (op.dead) return;
  if (warp < kPushWarps<Row>) {
    push_rows<Row>(p, progress, stage.bytes + (Row::kQuantized ? warp * kStageBytes : 0));
  } else if (warp > kPushWarps<Row>) {
    sum_rows<Row>(p, op);
  } else {
    if (blockIdx.x == 0) send_combine_headers(p, op.tag, true);
    raise_flags<Row>(p, op.tag, progress);
    if (blockIdx.x == 0) finish_combine(p, op);
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
