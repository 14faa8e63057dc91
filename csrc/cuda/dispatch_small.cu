// Dispatch of the smallest rounds, in packets: every warp finds the slots of all tokens by itself,
// in registers, so that no barrier stands between the ids and the first row on its way.
#include "finish.cuh"
#include "launch.h"
#include "receive.cuh"
#include "wait_failed.cuh"

namespace moe_a2a::cuda {
namespace {

constexpr int kMost = 512;  // threads
constexpr int kGroups = kSmallTokens / kWarp;

// Ranks of all tokens: a lane has those of tokens `lane`, `lane + 32`, ...
struct Routes {
  uint32_t ranks[kGroups] = {};

  template <class Id>
  static __device__ __forceinline__ uint32_t ranks_of(const DispatchLaunch& p, int t) {
    constexpr int kAhead = 8;  // loads in flight
    const auto* ids = reinterpret_cast<const Id*>(p.a.ids.row(t));
    uint32_t mask = 0;
#pragma unroll 1
    for (int first = 0; first < p.c.top_k; first += kAhead) {
      Id id[kAhead];
#pragma unroll
      for (int k = 0; k < kAhead; ++k) id[k] = first + k < p.c.top_k ? ids[first + k] : Id(-1);
#pragma unroll
      for (int k = 0; k < kAhead; ++k)
        if (id[k] < static_cast<Id>(p.c.num_experts))
          mask |= 1u << owner_of(p.c, static_cast<uint32_t>(id[k]));
    }
    return mask;
  }

  template <class Id>
  __device__ __forceinline__ void find(const DispatchLaunch& p) {
    const int lane = threadIdx.x % kWarp, tokens = static_cast<int>(p.a.tokens);
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      if (g * kWarp >= tokens) break;  // the whole warp
      const int t = g * kWarp + lane;
      if (t < tokens) ranks[g] = ranks_of<Id>(p, t) & static_cast<uint32_t>(p.a.active);
    }
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

template <int kRun>
__device__ __forceinline__ void load_run(const DispatchLaunch& p, int t, Run<Line128, kRun> run,
                                         Chunk (&data)[kRun]) {
#pragma unroll
  for (int u = 0; u < kRun; ++u)
    data[u] = load_image(p, t, run.offset(u), Line128::bytes(run.lane()));
}

// A run of token t to every rank that it goes to; the first run of a token also notes its ranks and
// slots for the combine of this round.
template <int kRun>
__device__ __forceinline__ void send_run(const DispatchLaunch& p, uint64_t tag,
                                         const Routes& routes, int t, Run<Line128, kRun> run,
                                         const Chunk (&data)[kRun]) {
  const Context& c = p.c;
  const int lane = threadIdx.x % kWarp;
  const bool notes = run.strip == 0 && lane == 0;
  const uint32_t all = routes.of(t);
  if (notes) c.token_ranks[t] = all;
  const uint32_t self = 1u << c.rank;
  // This rank's own row comes last: it has no way to go.
#pragma unroll 1
  for (uint32_t left = all; left != 0;) {
    const uint32_t remote = left & ~self;
    const int to = __ffs(remote != 0 ? remote : left) - 1, slot = routes.before(t, to);
    left &= ~(1u << to);
    if (notes) c.token_slots[t * c.ep_size + to] = slot;
    if (to == c.rank) {
      const int64_t row = c.rank * p.a.max_rows + slot;
#pragma unroll
      for (int u = 0; u < kRun; ++u)
        store_image(p, to, row, run.offset(u), Line128::bytes(lane), data[u], false);
    } else {
      uint8_t* inbox = c.window[to] + c.dispatch_inbox + c.rank * c.dispatch_peer_bytes +
                       static_cast<int64_t>(slot) * p.pitch;
#pragma unroll
      for (int u = 0; u < kRun; ++u)
        if (run.at(u) < p.pitch)
          store_relaxed_sys(reinterpret_cast<Chunk*>(inbox + run.at(u)),
                            Line128::seal(data[u], tag, lane));
    }
  }
}

// Counts of all tokens to all ranks, this one included, whose other blocks read them there.
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
    dispatch_small(const __grid_constant__ DispatchLaunch p) {
  const int warps = blockDim.x / kWarp, warp = threadIdx.x / kWarp;
  const int last = gridDim.x - 1, movers = max(last, 1);
  const bool moves = static_cast<int>(blockIdx.x) < movers;
  const bool finishes = static_cast<int>(blockIdx.x) == last && warp == 0;
  const int total = static_cast<int>(p.a.tokens) * p.runs, stride = movers * warps;
  int at = blockIdx.x * warps + warp, t = at / p.by_runs;
  Run<Line128, kRun> run{(at - t * p.runs) * kRun};
  const Operation op = begin(p.c, kDispatch);
  if (!moves && !finishes) return;
  Routes routes;
  bool found = false;
#pragma unroll 1
  do {
    const bool sends = moves && at < total;
    Chunk data[kRun];
    if (sends) load_run(p, t, run, data);
    if (!found) {
      if (p.a.wide_ids)
        routes.find<uint64_t>(p);
      else
        routes.find<uint32_t>(p);
      if (op.dead) return;
      if (finishes) fence_acq_rel_sys();
      found = true;
    }
    if (sends) send_run(p, op.tag, routes, t, run, data);
    at += stride;
    t = at / p.by_runs;
    run.strip = (at - t * p.runs) * kRun;
  } while (moves && at < total);
  if (finishes) announce_counts(p, op.tag, routes);
  if (moves) {
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
