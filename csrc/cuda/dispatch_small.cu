// Dispatch of the smallest rounds, in packets. The ids of up to 128 tokens are looked at by four
// warps at once, and from then on every warp finds slots by itself, in registers: one barrier
// stands between the ids and the first row on its way.
#include "finish.cuh"
#include "launch.h"
#include "receive.cuh"
#include "wait_failed.cuh"

namespace moe_a2a::cuda {
namespace {

constexpr int kMost = 512;  // threads
constexpr int kGroups = kSmallTokens / kWarp;

struct Masks {  // in shared memory
  uint32_t of[kSmallTokens];
};

// Ranks of all tokens: a lane has those of tokens `lane`, `lane + 32`, ...
struct Routes {
  uint32_t ranks[kGroups];

  // A warp looks at a group of tokens, for the whole block; a barrier must follow.
  static __device__ __forceinline__ void look(const DispatchLaunch& p, Masks& masks) {
    const int t = threadIdx.x;
    if (t < kSmallTokens) masks.of[t] = ranks_of<uint32_t>(p, t, static_cast<int>(p.a.tokens));
  }
  __device__ __forceinline__ explicit Routes(const Masks& masks) {
#pragma unroll
    for (int g = 0; g < kGroups; ++g) ranks[g] = masks.of[g * kWarp + threadIdx.x % kWarp];
  }
  __device__ __forceinline__ uint32_t of(int t) const {
    uint32_t mine = ranks[0];
#pragma unroll
    for (int g = 1; g < kGroups; ++g)
      if (t >= g * kWarp) mine = ranks[g];
    return __shfl_sync(kAllLanes, mine, t % kWarp);
  }
  // Tokens before t that go to rank d.
  __device__ __forceinline__ int before(int t, int d) const {
    int count = 0;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      if (g * kWarp >= t) break;
      const unsigned going = __ballot_sync(kAllLanes, ranks[g] >> d & 1);
      const int left = t - g * kWarp;
      count += __popc(left < kWarp ? going & ((1u << left) - 1) : going);
    }
    return count;
  }
};

// A run of token t to every rank that it goes to, this one last, which has no way to go; the first
// run of a token also notes its ranks and slots for the combine of this round.
template <int kRun>
__device__ __forceinline__ void send_run(const DispatchLaunch& p, uint64_t tag,
                                         const Routes& routes, int t, Run<Line128, kRun> run,
                                         const Chunk (&data)[kRun]) {
  const Context& c = p.c;
  const bool notes = run.strip == 0 && threadIdx.x % kWarp == 0;
  const uint32_t all = routes.of(t), self = 1u << c.rank;
  if (notes) c.token_ranks[t] = all;
#pragma unroll 1
  for (uint32_t left = all; left != 0;) {
    const uint32_t remote = left & ~self;
    const int to = __ffs(remote != 0 ? remote : left) - 1, slot = routes.before(t, to);
    left &= ~(1u << to);
    if (notes) c.token_slots[t * c.ep_size + to] = slot;
    if (to == c.rank)
      store_run(p, c.rank * p.a.max_rows + slot, run, data, false);
    else
      run.send(c.window[to] + c.dispatch_inbox + c.rank * c.dispatch_peer_bytes +
                   static_cast<int64_t>(slot) * p.pitch,
               p.pitch, tag, data);
  }
}

// One warp, after its fence: counts of all tokens to all ranks, this one included.
__device__ __forceinline__ void announce_counts(const DispatchLaunch& p, uint64_t tag,
                                                const Routes& routes) {
  const int lane = threadIdx.x % kWarp;
  int count = 0;
#pragma unroll 1
  for (int d = 0; d < p.c.ep_size; ++d) {
    const int sent = routes.before(static_cast<int>(p.a.tokens), d);
    if (d == lane) count = sent;
  }
  if (lane < p.c.ep_size && (p.a.active >> lane & 1) != 0)
    send_header(p.c, tag, p.facts, lane, count);
}

template <int kRun>
__global__ void __launch_bounds__(kMost, 1)
    dispatch_small(const DispatchLaunch __grid_constant__ p) {
  MOE_SHARED(Masks, masks);
  const int warps = blockDim.x / kWarp, warp = threadIdx.x / kWarp;
  const int last = gridDim.x - 1, movers = max(last, 1);
  const bool moves = static_cast<int>(blockIdx.x) < movers;
  // The last warp has the headers: it fences while the first ones look at ids.
  const bool finishes = static_cast<int>(blockIdx.x) == last && warp == warps - 1;
  const int total = static_cast<int>(p.a.tokens) * p.runs, stride = movers * warps;
  int at = blockIdx.x * warps + warp, t = at / p.by_runs;
  Run<Line128, kRun> run{(at - t * p.runs) * kRun};
  const Operation op = begin(p.c, kDispatch);
  Chunk data[kRun];
  const bool sends = moves && at < total;
  if (sends) load_run(p, t, run, data);
  Routes::look(p, masks);
  if (finishes) fence_acq_rel_sys();
  __syncthreads();
  if (op.dead || !(moves || finishes)) return;
  const Routes routes(masks);
  if (sends) send_run(p, op.tag, routes, t, run, data);
  if (finishes) announce_counts(p, op.tag, routes);
  if (moves) {
    // Only where there are more runs than warps.
#pragma unroll 1
    for (at += stride; at < total; at += stride) {
      t = at / p.by_runs;
      run.strip = (at - t * p.runs) * kRun;
      load_run(p, t, run, data);
      send_run(p, op.tag, routes, t, run, data);
    }
    Counts counts;
    counts.know(p.c.rank, routes.before(static_cast<int>(p.a.tokens), p.c.rank));
    receive_rows<Line128, kRun>(p, op, movers, counts);
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
