// Dispatch of the smallest rounds, in packets. The ids of up to 128 tokens are looked at by four
// warps at once, and from then on every warp finds slots by itself, those in all ranks at a time:
// one barrier stands between the ids and the first row on its way. All that follows from the
// arguments alone is computed before the kernels ahead are over.
#include "finish.cuh"
#include "launch.h"
#include "receive.cuh"
#include "wait_failed.cuh"

namespace moe_a2a::cuda {
namespace {

constexpr int kMost = 512;  // threads
constexpr int kGroups = kSmallTokens / kWarp;

// Tokens that go to each rank, a bit each; in shared memory.
struct alignas(16) Columns {
  uint32_t of[kSmallRanks][kGroups];
};

// Out of line: the way that is seldom taken must not make the other one longer.
__device__ __noinline__ uint32_t ranks_of_odd_ids(const DispatchLaunch& p, int t) {
  return ranks_of<uint32_t>(p, t, static_cast<int>(p.a.tokens));
}

// Looks at the ids, a thread a token; a barrier must follow.
class Look {
 public:
  __device__ __forceinline__ explicit Look(const DispatchLaunch& p)
      : left_(hold(threadIdx.x < p.a.tokens ? p.id_words : 0)),
        from_(hold(p.a.ids.row(threadIdx.x))) {}

  __device__ __forceinline__ void load(const DispatchLaunch& p) { load(p, 0); }

  __device__ __forceinline__ void mark(const DispatchLaunch& p, Columns& columns) {
    if (threadIdx.x >= kSmallTokens) return;
    const int lane = threadIdx.x % kWarp, group = threadIdx.x / kWarp;
    uint32_t ranks = ranks_of_words(p);
#pragma unroll 1
    for (int first = IdWords::kWords; first < p.id_words; first += IdWords::kWords) {
      load(p, first);
      ranks |= ranks_of_words(p);
    }
    if (p.id_words == 0) ranks = ranks_of_odd_ids(p, threadIdx.x);
    ranks &= static_cast<uint32_t>(p.a.active);
    uint32_t column = 0;  // of rank `lane`
#pragma unroll 2
    for (int d = 0; d < p.c.ep_size; ++d) {
      const uint32_t going = __ballot_sync(kAllLanes, ranks >> d & 1);
      if (lane == d) column = going;
    }
    columns.of[lane][group] = column;
  }

 private:
  __device__ __forceinline__ void load(const DispatchLaunch& p, int first) {
    by_unit(p, [&](auto unit) { ids_.load<decltype(unit)>(from_ + 4 * first, left_ - first); });
  }
  __device__ __forceinline__ uint32_t ranks_of_words(const DispatchLaunch& p) const {
    return p.a.wide_ids ? ids_.ranks<true>(p.c) : ids_.ranks<false>(p.c);
  }

  int left_;  // words of this thread's row
  const uint8_t* from_;
  IdWords ids_;
};

// A token's bit, and those of the tokens before it.
struct Position {
  int t, group, bit;
  uint32_t before[kGroups];

  __device__ __forceinline__ explicit Position(int token)
      : t(hold(token)), group(hold(token / kWarp)), bit(hold(token % kWarp)) {
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      const int left = token - g * kWarp;
      const uint32_t bits = left >= kWarp ? kAllLanes : left > 0 ? (1u << left) - 1 : 0u;
      before[g] = static_cast<uint32_t>(hold(static_cast<int>(bits)));
    }
  }
  // Tokens before it that go to rank `lane`: its slot there.
  __device__ __forceinline__ int slot(const Columns& columns) const {
    const uint4 c = *reinterpret_cast<const uint4*>(columns.of[threadIdx.x % kWarp]);
    return __popc(c.x & before[0]) + __popc(c.y & before[1]) + __popc(c.z & before[2]) +
           __popc(c.w & before[3]);
  }
  __device__ __forceinline__ bool goes(const Columns& columns) const {
    return (columns.of[threadIdx.x % kWarp][group] >> bit & 1) != 0;
  }
};

// A run of a row of this rank: where it comes from and goes to, as far as the arguments tell.
template <int kRun>
struct Outgoing {
  bool exists, inside;  // all payload, in aligned memory
  Position position;
  Run<Line128, kRun> run;
  const uint8_t* from;
  Origin origin[kRun];

  __device__ __forceinline__ Outgoing(const DispatchLaunch& p, int index, bool moves)
      : exists(moves && index < static_cast<int>(p.a.tokens) * p.runs),
        position(index / p.by_runs),
        run((index - position.t * p.runs) * kRun) {
    const uint8_t* row = p.a.payload.row(position.t);
    const bool whole = run.inside(p.segment[kSegmentPayload].bytes) && aligned(row, 16);
    inside = hold(whole) != 0;
    from = hold(row + run.chunk(0));
    if (inside) return;
#pragma unroll
    for (int u = 0; u < kRun; ++u) origin[u] = Origin(p, position.t, run.chunk(u));
  }
  __device__ __forceinline__ void load(const DispatchLaunch& p, Chunk (&data)[kRun]) {
    if (!exists) return;
    if (inside) {
      run.load_inside(from, data);
      return;
    }
#pragma unroll
    for (int u = 0; u < kRun; ++u) origin[u].load(p, position.t, run.chunk(u));
  }
  // To every rank that the token goes to, this one last, which has no way to go; the first run of a
  // token also notes its ranks and slots for the combine of this round. `outbox`: where the packets
  // for rank `lane` begin.
  __device__ __forceinline__ void send(const DispatchLaunch& p, uint64_t tag, uint8_t* outbox,
                                       const Columns& columns, Chunk (&data)[kRun]) const {
    const Context& c = p.c;
    const int lane = threadIdx.x % kWarp, slot = position.slot(columns);
    const uint32_t all = __ballot_sync(kAllLanes, position.goes(columns)), self = 1u << c.rank;
    const auto packets = reinterpret_cast<uint64_t>(outbox + static_cast<int64_t>(slot) * p.pitch);
    if (!inside) {
#pragma unroll
      for (int u = 0; u < kRun; ++u) data[u] = origin[u].settle(p);
    }
#pragma unroll 1
    for (uint32_t left = all & ~self; left != 0; left &= left - 1) {
      const uint64_t to = __shfl_sync(kAllLanes, packets, __ffs(left) - 1);
      run.send(reinterpret_cast<uint8_t*>(to), p.pitch, tag, data);
    }
    if ((all & self) != 0) {
      const int own = __shfl_sync(kAllLanes, slot, c.rank);
      Places<Line128, kRun>(p, c.rank * p.a.max_rows + own, run).put(data);
    }
    if (run.strip() != 0) return;
    if (lane == 0) c.token_ranks[position.t] = all;
    if (lane < c.ep_size) c.token_slots[position.t * c.ep_size + lane] = slot;
  }
};

template <int kRun>
__global__ void __launch_bounds__(kMost, 1)
    dispatch_small(const DispatchLaunch __grid_constant__ p) {
  MOE_SHARED(Columns, columns);
  const int warps = blockDim.x / kWarp, warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int last = gridDim.x - 1, movers = max(last, 1), tokens = static_cast<int>(p.a.tokens);
  const bool moves = static_cast<int>(blockIdx.x) < movers;
  const bool finishes = static_cast<int>(blockIdx.x) == last && warp == warps - 1;
  const int stride = movers * warps, first = blockIdx.x * warps + warp;
  Outgoing<kRun> out(p, first, moves);
  uint8_t* const outbox = hold(p.c.window[min(lane, p.c.ep_size - 1)] + p.c.dispatch_outbox);
  Look look(p);
  const Operation op = begin(p.c, kDispatch);
  Chunk data[kRun];
  look.load(p);
  out.load(p, data);
  look.mark(p, columns);
  __syncthreads();
  if (op.dead || !(moves || finishes)) return;
  if (out.exists) out.send(p, op.tag, outbox, columns, data);
  const int count = Position(tokens).slot(columns);  // of all tokens, to rank `lane`
  if (finishes && lane < p.c.ep_size && (p.a.active >> lane & 1) != 0)
    send_header(p.c, op.tag, p.facts, lane, count);
  if (moves) {
    // Only where there are more runs than warps.
#pragma unroll 1
    for (int index = first + stride; index < tokens * p.runs; index += stride) {
      Outgoing<kRun> next(p, index, true);
      next.load(p, data);
      next.send(p, op.tag, outbox, columns, data);
    }
    scrub_silent<Line128, kRun>(p, __shfl_sync(kAllLanes, count, p.c.rank), movers);
    receive_rows<Line128, kRun>(p, op, movers);
  }
  if (finishes) finish_dispatch(p, op, false);
}

}  // namespace

const void* dispatch_small_kernel(int run) {
  return run == 1   ? reinterpret_cast<const void*>(dispatch_small<1>)
         : run == 2 ? reinterpret_cast<const void*>(dispatch_small<2>)
                    : reinterpret_cast<const void*>(dispatch_small<4>);
}

}  // namespace moe_a2a::cuda
