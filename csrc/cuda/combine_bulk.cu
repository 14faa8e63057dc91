// Combine of a large round. In every block some warps push rows into the inboxes of the ranks they
// came from, one says which have arrived (push.cuh), and the others sum what has come, token by
// token, while the rest is on its way: summing at the end would cost as long as a quarter of the
// transfer.
#include "finish.cuh"
#include "launch.h"
#include "push.cuh"
#include "wait_failed.cuh"

namespace moe_a2a::cuda {
namespace {

constexpr int kMost = 512;  // threads

template <class Row>
constexpr int kFlagger = kPush<Row>.warps;
template <class Row>
constexpr int kFirstSummer = kFlagger<Row> + 1;

template <int kScalar>
constexpr int kSteps = kScalar == kScalarFp32 ? kPartStepsFp32 : kPartSteps;

// The flag of a rank's row; null where none is to be waited for.
__device__ __forceinline__ const uint64_t* flag_of(const CombineLaunch& p, const Slots& slots,
                                                   int rank, int slot) {
  if (rank >= p.c.ep_size || rank == p.c.rank || !slots.has(rank)) return nullptr;
  return flag(p, p.c.rank, rank, slot / p.rows_per_flag);
}

// Until the rows of a token have come from all its ranks: a lane polls the flag of each.
__device__ __forceinline__ bool await_rows(const CombineLaunch& p, const Slots& slots,
                                           const Operation& op) {
  Wait wait;
  const int lane = threadIdx.x % kWarp;
  const uint64_t* low = flag_of(p, slots, lane, slots.low);
  const uint64_t* high = flag_of(p, slots, lane + kWarp, slots.high);
  for (;;) {
    if (low != nullptr && load_acquire_sys(low) == op.tag) low = nullptr;
    if (high != nullptr && load_acquire_sys(high) == op.tag) high = nullptr;
    const unsigned missing = __ballot_sync(kAllLanes, low != nullptr);
    const unsigned missing_high = __ballot_sync(kAllLanes, high != nullptr);
    if ((missing | missing_high) == 0) break;
    __nanosleep(40);  // hundreds of warps wait while rows arrive, and their polls take bandwidth
    if (!keep_waiting(p.c, p.facts, op, wait,
                      missing | static_cast<uint64_t>(missing_high) << kWarp))
      return false;
  }
  __syncwarp();  // what a lane has acquired, all lanes may read
  return true;
}

// A lane's columns of a part of a row: whole steps of its warp, at most kSteps.
struct Columns {
  int first, last;

  __device__ __forceinline__ Columns(const CombineLaunch& p, int part) {
    const int steps = (p.c.hidden + kWarpColumns - 1) / kWarpColumns;
    first = steps * part / p.parts * kWarpColumns + threadIdx.x % kWarp * kColumns;
    last = min(steps * (part + 1) / p.parts * kWarpColumns, p.c.hidden);
  }
  __device__ __forceinline__ int at(int u) const { return first + u * kWarpColumns; }
  __device__ __forceinline__ bool inside(int u) const { return at(u) < last; }
};

// Rows of a part, in the order of ranks, two at a time: what is to be loaded of both is asked for
// before one is added. `own`: the own row's columns, asked for earlier still.
template <class Row, int kScalar>
__device__ __forceinline__ void add_rows(const CombineLaunch& p, const Slots& slots,
                                         const Columns& columns, RawColumns (&own)[kSteps<kScalar>],
                                         float (&sum)[kSteps<kScalar>][kColumns]) {
  constexpr int kRows = 2;
  const int me = p.c.rank;
#pragma unroll 1
  for (uint64_t left = slots.ranks; left != 0;) {
    const bool begins = left == slots.ranks;
    int rank[kRows];
    typename Row::Loaded loaded[kRows][kSteps<kScalar>];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      rank[r] = left == 0 ? -1 : __ffsll(left) - 1;
      left &= left - 1;
      if (rank[r] < 0 || rank[r] == me) continue;
      const InboxRow row{inbox_row(p, me, rank[r], slots.of(rank[r])), p.c.hidden};
#pragma unroll
      for (int u = 0; u < kSteps<kScalar>; ++u)
        loaded[r][u] = Row::load(row, min(columns.at(u), columns.last - kColumns));
    }
    // Quantized, if at all, while the others are being loaded.
    if (begins && slots.has(me)) Row::template prepare<kScalar>(own);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (rank[r] < 0) break;
#pragma unroll
      for (int u = 0; u < kSteps<kScalar>; ++u) {
        if (rank[r] == me) loaded[r][u] = Row::prepared(own[u]);
        Row::add(loaded[r][u], sum[u]);
      }
    }
  }
}

// False once the operation is given up.
template <class Row, int kScalar>
__device__ __forceinline__ bool sum_part(const CombineLaunch& p, const Operation& op, int token,
                                         const Columns& columns, const Slots& slots) {
  const int me = p.c.rank;
  RawColumns own[kSteps<kScalar>];
  if (slots.has(me)) {
    const uint8_t* y = p.a.y + me * p.a.source_stride + slots.of(me) * p.a.row_stride;
    load_row<kScalar>(y, columns.first, kWarpColumns, columns.last, own);
  }
  if (!await_rows(p, slots, op)) return false;
  float sum[kSteps<kScalar>][kColumns] = {};
  add_rows<Row, kScalar>(p, slots, columns, own, sum);
  uint8_t* out = p.a.out + token * p.a.out_stride;
#pragma unroll
  for (int u = 0; u < kSteps<kScalar>; ++u)
    if (columns.inside(u)) store_sums<kScalar>(out, columns.at(u), sum[u]);
  return true;
}

template <class Row, int kScalar>
__device__ __forceinline__ void sum_rows(const CombineLaunch& p, const Operation& op) {
  const int summers = blockDim.x / kWarp - kFirstSummer<Row>, stride = gridDim.x * summers;
  int unit = blockIdx.x * summers + threadIdx.x / kWarp - kFirstSummer<Row>;
  int token = unit / p.parts;
  Slots slots = Slots::of_token(p, token);
#pragma unroll 1
  while (token < p.tokens) {
    const int following = (unit + stride) / p.parts;
    const Slots next =
        Slots::of_token(p, following);  // known by the time that this token is summed
    if (!sum_part<Row, kScalar>(p, op, token, Columns(p, unit - token * p.parts), slots)) return;
    unit += stride;
    token = following;
    slots = next;
  }
}

template <class Row, int kScalar>
__global__ void __launch_bounds__(kMost, 1) combine_bulk(const CombineLaunch __grid_constant__ p) {
  MOE_SHARED(Progress, progress);
  const int warp = threadIdx.x / kWarp;
  if (threadIdx.x < Progress::kMostWarps) progress.made[threadIdx.x] = 0;
  if (threadIdx.x == 0) progress.dead = progress.dealt = progress.taken = 0;
  __syncthreads();
  Units units(p);
  const Operation op = begin(p.c, kCombineOp);
  units.find(p);  // asked for together with the words above
  // Warps wait for each other, so they have to agree, also if another block gives up just now.
  if (op.dead) progress.dead = 1;
  __syncthreads();
  if (progress.dead != 0) return;
  if (warp < kPush<Row>.warps) {
    push_rows<Row, kScalar>(p, units, progress);
  } else if (warp == kFlagger<Row>) {
    if (blockIdx.x == 0) send_combine_headers(p, op.tag, true);
    raise_flags<Row>(p, units, op.tag, progress);
    if (blockIdx.x == 0) finish_combine(p, op);
  } else {
    sum_rows<Row, kScalar>(p, op);
  }
}

template <int kWire>
const void* quantized_kernel(int scalar) {
  switch (scalar) {
    case kScalarBf16:
      return reinterpret_cast<const void*>(combine_bulk<Scaled<kWire>, kScalarBf16>);
    case kScalarFp16:
      return reinterpret_cast<const void*>(combine_bulk<Scaled<kWire>, kScalarFp16>);
    default:
      return reinterpret_cast<const void*>(combine_bulk<Scaled<kWire>, kScalarFp32>);
  }
}

template <int kScalar>
const void* plain_kernel() {
  return reinterpret_cast<const void*>(combine_bulk<Plain<kScalar>, kScalar>);
}

}  // namespace

const void* combine_bulk_kernel(int combine_wire, int scalar) {
  switch (combine_wire) {
    case kBf16:
      return plain_kernel<kScalarBf16>();
    case kFp16:
      return plain_kernel<kScalarFp16>();
    case kFp32:
      return plain_kernel<kScalarFp32>();
    case kFp8Block128:
      return quantized_kernel<kFp8Block128>(scalar);
    default:
      return quantized_kernel<kMxfp8>(scalar);
  }
}

}  // namespace moe_a2a::cuda
