// Dispatch of small and middling rounds, in packets. Every block looks at all ids at once, and from
// then on every warp finds slots by itself, those in all ranks at a time: of up to 128 tokens one
// barrier stands between the ids and the first row on its way, of up to 1,024 two. All that follows
// from the arguments alone is computed before the kernels ahead are over.
#include <type_traits>

#include "finish.cuh"
#include "targets.cuh"
#include "wait_failed.cuh"

namespace moe_a2a::cuda {
namespace {

// A run of a row of this rank: where it comes from and goes to, as far as the arguments tell.
template <int kRun, class Columns>
struct Outgoing {
  bool exists, inside;  // all payload, in aligned memory
  typename Columns::Position position;
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
  __device__ __forceinline__ void send(const DispatchLaunch& p, uint64_t tag, uint8_t* outbox,
                                       const Columns& columns, Chunk (&data)[kRun]) const {
    const Targets targets(p, columns, position, outbox);
    if (!inside) {
#pragma unroll
      for (int u = 0; u < kRun; ++u) data[u] = origin[u].settle(p);
    }
    targets.send(p, tag, position.t, run, data);
  }
};

// What a warp has to do. In small rounds all send and then receive, but for those of the last
// block, which has the headers. Where a warp would have several runs, unpacking would be left to
// the end: there the first warps of each block send, the others receive, and the last one has the
// headers.
struct Role {
  bool sends, receives, finishes;
  Turn sending, receiving;

  __device__ __forceinline__ Role(const DispatchLaunch& p, bool divided) {
    const int warps = blockDim.x / kWarp, warp = threadIdx.x / kWarp;
    const int block = blockIdx.x, last = gridDim.x - 1, movers = max(last, 1);
    finishes = block == last && warp == warps - 1;
    sends = receives = block < movers;
    sending = receiving = {block * warps + warp, movers * warps};
    if (!divided) return;
    const int receivers = warps - p.senders;
    sends = warp < p.senders;
    receives = !sends && !finishes;
    sending = {block * p.senders + warp, static_cast<int>(gridDim.x) * p.senders};
    receiving = {block * receivers + warp - p.senders, static_cast<int>(gridDim.x) * receivers - 1};
  }
};

template <int kRun, class Columns>
__global__ void __launch_bounds__(kColumnThreads, 1)
    dispatch_small(const DispatchLaunch __grid_constant__ p) {
  constexpr bool kMany = std::is_same_v<Columns, ManyColumns>;
  MOE_SHARED(Columns, columns);
  const int lane = threadIdx.x % kWarp, tokens = static_cast<int>(p.a.tokens);
  const Role role(p, kMany && p.senders != 0);
  Outgoing<kRun, Columns> out(p, role.sending.first, role.sends);
  uint8_t* const outbox = hold(p.c.window[min(lane, p.c.ep_size - 1)] + p.c.dispatch_outbox);
  Look<Columns> look(p);
  const Operation op = begin(p.c, kDispatch);
  Chunk data[kRun];
  look.load(p);
  out.load(p, data);
  look.mark(p, columns);
  columns.close(p);
  if (op.dead || !(role.sends || role.receives || role.finishes)) return;
  if (out.exists) out.send(p, op.tag, outbox, columns, data);
  const int count = columns.count(tokens);  // of all tokens, to rank `lane`
  if (role.finishes && lane < p.c.ep_size && (p.a.active >> lane & 1) != 0)
    send_header(p.c, op.tag, p.facts, lane, count);
  if (role.sends) {
    // Only where there are more runs than warps.
    const auto [first, stride] = role.sending;
#pragma unroll 1
    for (int index = first + stride; index < tokens * p.runs; index += stride) {
      Outgoing<kRun, Columns> next(p, index, true);
      next.load(p, data);
      next.send(p, op.tag, outbox, columns, data);
    }
  }
  if (role.receives) {
    scrub_silent<Line128, kRun>(p, __shfl_sync(kAllLanes, count, p.c.rank), role.receiving);
    receive_rows<Line128, kRun, kMany>(p, op, role.receiving);
  }
  if (role.finishes) finish_dispatch(p, op, false);
}

template <class Columns>
const void* kernel(int run) {
  return run == 1 ? reinterpret_cast<const void*>(dispatch_small<1, Columns>)
                  : reinterpret_cast<const void*>(dispatch_small<2, Columns>);
}

}  // namespace

const void* dispatch_small_kernel(bool many, int run) {
  return many ? kernel<ManyColumns>(run) : kernel<FewColumns>(run);
}

}  // namespace moe_a2a::cuda
