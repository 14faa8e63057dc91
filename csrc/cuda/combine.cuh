// Combine: every rank pushes the rows it computed into the inboxes of the ranks they came from, and
// sums what comes back to it. Any y will do, and nothing is staged. One kernel for rounds of every
// size: in small ones all warps push, then sum; in large ones some warps of each block push while
// the others sum, since sums at the end would have nothing to hide behind. One warp announces this
// rank and hears the others.
//
// A Source says what is pushed: rows as they lie in y (combine.cu), or sums of rows that are
// grouped by expert (combine_grouped.cu). It is looked at by `if constexpr` only, so that the
// kernels of the one are the same instructions whatever the other needs.
#pragma once

#include "finish.cuh"
#include "inbox.cuh"
#include "launch.h"
#include "wait_failed.cuh"

namespace moe_a2a::cuda {
namespace {

template <class Source, class Row, int kPush, int kRun>
constexpr int kMost = kWarp * (Source::kSums ? grouped_warps({kPush, kRun}, Row::kChunks)
                                             : combine_warps({kPush, kRun}));  // threads
constexpr int kNothing = 1 << 30;                                              // past every unit

// Which units a warp takes, a unit being a run of a row or of a token.
struct Share {
  int first, stride;
};

struct Roles {
  Share push{kNothing, 1}, sum{kNothing, 1};
  bool finishes;

  __device__ __forceinline__ explicit Roles(const CombineLaunch& p) {
    const int warps = blockDim.x / kWarp, warp = threadIdx.x / kWarp;
    const int block = blockIdx.x, last = gridDim.x - 1;
    if (p.pushers == 0) {
      // The last block has no rows, so that headers are not late.
      const int movers = max(last, 1);
      if (block < movers) push = sum = {block * warps + warp, movers * warps};
      finishes = block == last && warp == 0;
      return;
    }
    const int summers = warps - p.pushers;
    finishes = block == last && warp == warps - 1;
    if (warp < p.pushers)
      push = {block * p.pushers + warp, static_cast<int>(gridDim.x) * p.pushers};
    else if (!finishes)
      sum = {block * summers + warp - p.pushers, static_cast<int>(gridDim.x) * summers - 1};
  }
};

// Where the rows of a token are: its ranks, and its slots in ranks `lane` and `lane + 32`.
struct Slots {
  uint64_t ranks = 0;
  int low = 0, high = 0;

  // None past the last token.
  static __device__ __forceinline__ Slots of_token(const CombineLaunch& p, int token) {
    const Context& c = p.c;
    const int lane = threadIdx.x % kWarp;
    const int32_t* row = c.token_slots + static_cast<int64_t>(token) * c.ep_size;
    Slots slots;
    if (token >= p.tokens) return slots;
    slots.ranks = c.token_ranks[token];
    if (lane < c.ep_size) slots.low = row[lane];
    if (lane + kWarp < c.ep_size) slots.high = row[lane + kWarp];
    return slots;
  }
  // The whole warp.
  __device__ __forceinline__ int of(int rank) const {
    return __shfl_sync(kAllLanes, rank < kWarp ? low : high, rank % kWarp);
  }
};

// A run of a row of y; zeros past the row.
template <class Row, int kRun>
__device__ __forceinline__ void load_run(const CombineLaunch& p, const uint8_t* row,
                                         const Steps<Row, kRun>& steps,
                                         Chunk (&data)[kRun][Row::kChunks]) {
  constexpr int kItem = kItemBytes<Row::kScalarOf>;
  const uint8_t* from = row + steps.column(0) * kItem;
  const auto load = [&](bool wanted, auto load_16) {
#pragma unroll
    for (int u = 0; u < kRun; ++u)
#pragma unroll
      for (int i = 0; i < Row::kChunks; ++i)
        if (wanted && steps.column(u) < p.c.hidden)
          data[u][i] = load_16(from + u * steps.kColumns * kItem + i * 16);
  };
#pragma unroll
  for (int u = 0; u < kRun; ++u)
#pragma unroll
    for (int i = 0; i < Row::kChunks; ++i) data[u][i] = {0, 0};
  load(!p.odd,
       [](const uint8_t* at) { return Row::kChunks == 1 ? load_chunk(at) : load_neighbour(at); });
  if (p.odd) load(true, [](const uint8_t* at) { return load_odd_bytes(at, 16); });
}

__device__ __forceinline__ const uint8_t* row_of_y(const CombineLaunch& p, int source, int slot) {
  return p.a.y + source * p.a.source_stride + slot * p.a.row_stride;
}

// A run of a row that is pushed: by slot first, since tokens are summed in that order, a rank after
// the other, each rank beginning with the one after it.
template <class Source, class Row, int kRun>
struct Outgoing {
  int source, slot;
  Steps<Row, kRun> steps;
  const typename Source::Element* row;  // what is known of it
  uint8_t* inbox;

  __device__ __forceinline__ Outgoing(const typename Source::Launch& p, int index)
      : Outgoing(p, index / p.by_push_runs, index) {}

  // A row at or past the count of those that came is nobody's, and is not read.
  __device__ __forceinline__ bool exists(const CombineLaunch& p) const {
    return slot < p.c.state->received[source] && source != p.c.rank;
  }
  __device__ __forceinline__ void load(const CombineLaunch& p,
                                       Chunk (&data)[kRun][Row::kChunks]) const {
    load_run<Row, kRun>(p, row, steps, data);
  }
  __device__ __forceinline__ void send(const CombineLaunch& p,
                                       const Chunk (&data)[kRun][Row::kChunks]) const {
    typename Row::Item item[kRun];
#pragma unroll
    for (int u = 0; u < kRun; ++u) item[u] = Row::encode(data[u]);
    Row::template send<kRun>(p, inbox, steps, item);
  }

 private:
  __device__ __forceinline__ Outgoing(const typename Source::Launch& p, int at, int index)
      : slot(hold(static_cast<int>(at / p.by_targets))), steps((index - at * p.push_runs) * kRun) {
    source = p.c.rank + 1 + at - slot * p.targets;
    if (source >= p.c.ep_size) source -= p.c.ep_size;
    row = hold(Source::row(p, source, slot));
    inbox = hold(inbox_row(p, source, p.c.rank, slot));
  }
};

// The units that a warp takes after one another. In large rounds the last quarter comes from a
// counter of the grid: the link serves some multiprocessors better than others, by a fifth. Only
// the last quarter, because one word can't count for all of them in time.
class Sequence {
 public:
  __device__ __forceinline__ Sequence(const CombineLaunch& p, Share share, int total)
      : index_(share.first),
        stride_(share.stride),
        fixed_(p.pushers == 0 ? kNothing : total / 4 * 3 / share.stride),
        dealt_from_(p.pushers == 0 ? 0 : (fixed_ + 1) * share.stride) {
    ask(p);
  }
  __device__ __forceinline__ int index() const { return index_; }
  __device__ __forceinline__ void advance(const CombineLaunch& p) {
    if (fixed_-- > 0) {
      index_ += stride_;
      return;
    }
    index_ = dealt_from_ + __shfl_sync(kAllLanes, dealt_, 0);
    ask(p);
  }

 private:
  // What the counter says is on its way until it is needed.
  __device__ __forceinline__ void ask(const CombineLaunch& p) {
    if (p.pushers != 0 && threadIdx.x % kWarp == 0) dealt_ = count_up(&p.c.state->units);
  }
  int index_, stride_, fixed_, dealt_from_, dealt_ = 0;
};

// As many units as the source with the most rows has in this round, from each source.
__device__ __forceinline__ int units_to_push(const CombineLaunch& p) {
  const int lane = threadIdx.x % kWarp;
  const auto received = [&](int source) {
    return source < p.c.ep_size ? p.c.state->received[source] : 0;
  };
  const int rows = max(received(lane), received(lane + kWarp));
  const int most = __reduce_max_sync(kAllLanes, static_cast<uint32_t>(rows));
  return most * p.targets * p.push_runs;
}

// A run of an output row: what is to be loaded of two ranks is asked for before one is added, in
// the order of ranks. False once the operation is given up.
template <class Source, class Row, int kRun>
__device__ __forceinline__ bool sum_run(const typename Source::Launch& p, const Operation& op,
                                        int token, const Steps<Row, kRun>& steps,
                                        const Slots& slots, Wait& wait) {
  constexpr int kAhead = 2, kScalar = Row::kScalarOf;
  using Arriving = typename Row::template Arriving<kRun>;
  const int me = p.c.rank;
  uint8_t* const out = hold(p.a.out + token * p.a.out_stride);
  const typename Source::template Own<Row, kRun> mine(p, steps, slots);
  float sum[kRun][Row::kColumns] = {};
#pragma unroll 1
  for (uint64_t left = slots.ranks; left != 0;) {
    int rank[kAhead];
    int loaded[kAhead], awaited[kAhead];  // up to which column
    uint8_t* row[kAhead];
    typename Row::Item item[kAhead][kRun];
#pragma unroll
    for (int r = 0; r < kAhead; ++r) {
      rank[r] = __ffsll(left) - 1;
      left &= left - 1;
      const int from = max(rank[r], 0), slot = rank[r] < 0 ? 0 : slots.of(from);
      const bool own = rank[r] == me;
      loaded[r] = rank[r] < 0 ? 0 : p.c.hidden;
      awaited[r] = own ? 0 : loaded[r];
      if constexpr (Source::kSums) {
        row[r] = inbox_row(p, me, from, slot);
        if (own) loaded[r] = 0;
#pragma unroll
        for (int u = 0; u < kRun; ++u)
          if (own) item[r][u] = mine.item[u];
      } else {
        row[r] = own ? const_cast<uint8_t*>(row_of_y(p, me, slot)) : inbox_row(p, me, from, slot);
        if (own && (Row::kQuantizes || p.odd)) {
          Chunk data[kRun][Row::kChunks];
          load_run<Row, kRun>(p, row[r], steps, data);
#pragma unroll
          for (int u = 0; u < kRun; ++u) item[r][u] = Row::encode(data[u]);
          loaded[r] = 0;
        }
      }
    }
    const Arriving arriving[kAhead] = {Arriving(p, row[0], steps), Arriving(p, row[1], steps)};
    for (;;) {
      uint64_t missing = 0;
#pragma unroll
      for (int r = 0; r < kAhead; ++r) arriving[r].load(steps, loaded[r], item[r]);
#pragma unroll
      for (int r = 0; r < kAhead; ++r) {
        bool here = true;
#pragma unroll
        for (int u = 0; u < kRun; ++u)
          here &= (steps.column(u) >= awaited[r]) | Row::written(item[r][u]);
        if (!__all_sync(kAllLanes, here)) missing |= bit(rank[r]);
      }
      if (missing == 0) break;
      if (p.pushers != 0) __nanosleep(p.nap);  // hundreds of warps poll while rows arrive
      if (!keep_waiting(p.c, p.facts, op, wait, missing)) return false;
    }
#pragma unroll
    for (int r = 0; r < kAhead; ++r) {
      if (rank[r] < 0) break;
      arriving[r].clear(steps, awaited[r]);
#pragma unroll
      for (int u = 0; u < kRun; ++u) Row::add(item[r][u], sum[u]);
    }
  }
  constexpr int kItem = kItemBytes<kScalar>;
  uint8_t* const to = out + steps.column(0) * kItem;
#pragma unroll
  for (int u = 0; u < kRun; ++u)
#pragma unroll
    for (int i = 0; i < Row::kChunks; ++i)
      if (steps.column(u) < p.c.hidden)
        store_bytes(to + u * steps.kColumns * kItem + i * 16,
                    round_chunk<kScalar>(sum[u] + i * (16 / kItem)), 16);
  return true;
}

template <class Source, class Row, int kPush, int kRun>
__global__ void __launch_bounds__(kMost<Source, Row, kPush, kRun>, 1)
    combine(const typename Source::Launch __grid_constant__ p) {
  const Roles roles(p);
  const Outgoing<Source, Row, kPush> out(p, roles.push.first);
  int index = roles.sum.first, token = index / p.by_runs;
  const Operation op = begin(p.c, kCombineOp);
  // Known by the time that the first rows are on their way.
  Slots slots = Slots::of_token(p, token);
  const bool exists = out.exists(p);
  if constexpr (!Source::kSums) {
    if (p.pushers == 0 && exists && !op.dead) {
      Chunk data[kPush][Row::kChunks];
      out.load(p, data);
      out.send(p, data);
    }
  }
  if (roles.finishes && !op.dead) send_combine_headers(p, op.tag, p.c.strict);
  if (op.dead) return;
  const int pushed = !Source::kSums && p.pushers == 0 ? roles.push.stride : 0;
  Source::template push<Row, kPush>(p, {roles.push.first + pushed, roles.push.stride}, out);
  Wait wait;
#pragma unroll 1
  for (const int total = p.tokens * p.runs; index < total; index += roles.sum.stride) {
    const Steps<Row, kRun> steps((index - token * p.runs) * kRun);
    const int next = (index + roles.sum.stride) / p.by_runs;
    const Slots ahead = Slots::of_token(p, next);  // on their way while this one is summed
    if (!sum_run<Source, Row, kRun>(p, op, token, steps, slots, wait)) return;
    token = next;
    slots = ahead;
  }
  if (roles.finishes) finish_combine(p, op);
}

}  // namespace

}  // namespace moe_a2a::cuda
