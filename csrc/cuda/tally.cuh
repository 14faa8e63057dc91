// Slots in a large round. A block looks at the ids of its own tokens alone, and says in the rank's
// own memory how many of them go where; the blocks after it add that up. Were each to count all
// earlier tokens itself, the ids would be read once a block, from the same few lines of the L2 by
// all multiprocessors at once.
//
// What a block says depends on nothing but its tokens, and the blocks of a grid are resident
// together: whoever waits for it, waits for something that comes.
#pragma once

#include "launch.h"
#include "route.cuh"

namespace moe_a2a::cuda {

// A warp has two ranks at a time: what a block sends to them fits into 16 bytes, with the tag of
// the operation in front, so that nothing has to be cleared.
struct Counts {
  int32_t of[kTallyRanks] = {};
};

__device__ __forceinline__ Chunk* tally_of(const Context& c, int pair, int block) {
  return c.tallies + pair * kMostBlocks + block;
}

__device__ __forceinline__ void send_tally(const Context& c, uint64_t tag, int pair,
                                           const Counts& counts) {
  const uint64_t both = static_cast<uint32_t>(counts.of[0]) | static_cast<uint64_t>(counts.of[1])
                                                                  << 32;
  if (threadIdx.x % kWarp == 0) store_relaxed_sys(tally_of(c, pair, blockIdx.x), {tag, both});
}

// What the first `blocks` blocks send to the ranks of a pair.
__device__ __forceinline__ Counts sum_tallies(const Context& c, uint64_t tag, int pair,
                                              int blocks) {
  constexpr int kAhead = 5;  // loads in flight: all, where there are 160 blocks
  const int lane = threadIdx.x % kWarp;
  Counts sum;
#pragma unroll 1
  for (int first = 0; first < blocks; first += kAhead * kWarp) {
    const Chunk* from = tally_of(c, pair, first + lane);
    Chunk tally[kAhead];
    bool fresh;
#pragma unroll
    for (int u = 0; u < kAhead; ++u) tally[u] = {first + u * kWarp + lane < blocks ? ~tag : tag, 0};
    do {
      // Asked for again only while missing: all blocks look at the same few lines.
#pragma unroll
      for (int u = 0; u < kAhead; ++u)
        if (tally[u].lo != tag) tally[u] = load_relaxed_sys(from + u * kWarp);
      fresh = true;
#pragma unroll
      for (int u = 0; u < kAhead; ++u) fresh = fresh && tally[u].lo == tag;
    } while (!__all_sync(kAllLanes, fresh));
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      sum.of[0] += static_cast<int32_t>(tally[u].hi);
      sum.of[1] += static_cast<int32_t>(tally[u].hi >> 32);
    }
  }
#pragma unroll
  for (int k = 0; k < kTallyRanks; ++k) sum.of[k] = __reduce_add_sync(kAllLanes, sum.of[k]);
  return sum;
}

// Of a tile of tokens, in shared memory. A place more in a row than there are ranks keeps lanes
// apart that each write to one of its own.
struct Routes {
  uint64_t ranks[kTile];  // masks
  int32_t slot[kTile][kMaxRanks + 1];
  int32_t sent[kMaxRanks];             // to each rank before the tile
  int32_t ways[kTile];                 // of them, for each token
  uint8_t* way[kTile][kMaxRanks + 1];  // where its payload goes; to this rank itself last
};

// Where this rank's rows begin in a window's region of rows of so many bytes.
__device__ __forceinline__ int64_t own_rows(const DispatchLaunch& p, const Segment& s) {
  return s.region + p.c.rank * p.a.max_rows * s.bytes;
}

// Slots of a block's tokens [first, last), a tile at a time, a token a lane. Each warp finds those
// in the ranks of up to two pairs; most warps none. The combine of this round finds the slots in
// the context.
class Slots {
 public:
  __device__ __forceinline__ Slots(const DispatchLaunch& p, int first, int last)
      : first_(first),
        last_(last),
        at_(first),
        row_(hold(p.a.ids.row(first + static_cast<int>(threadIdx.x % kWarp)))) {}

  // Whether this warp finds any.
  static __device__ __forceinline__ bool finds(const DispatchLaunch& p) {
    return warp() < tallies(p.c.ep_size);
  }
  // Those of the next tile; a barrier must follow. `between`: what there is to do while the first
  // ids are on their way.
  template <class Between>
  __device__ __forceinline__ void find(const DispatchLaunch& p, uint64_t tag, Routes& routes,
                                       Between between) {
    const bool counts = at_ == first_;  // all the block's tokens
    uint64_t ranks = 0;
    Counts own[kPairs];
    int tile = at_;
#pragma unroll 1
    do {
      const uint64_t mask = look(p, tile, [&] {
        if (tile == at_) between();
      });
      if (tile == at_) ranks = mask;
#pragma unroll
      for (int i = 0; i < kPairs; ++i)
        if (pair(i) < tallies(p.c.ep_size)) count(mask, pair(i), own[i]);
      tile += kTile;
    } while (counts && tile < last_);
#pragma unroll 1
    for (int i = 0; i < kPairs && pair(i) < tallies(p.c.ep_size); ++i) {
      if (counts) exchange(p, tag, pair(i), i == 0 ? own[0] : own[1], routes);
      give_slots(p, ranks, pair(i), routes);
    }
    if (warp() == 0) {
      routes.ranks[lane()] = ranks;
      routes.ways[lane()] = __popcll(ranks);
      if (token(at_) >= 0) p.c.token_ranks[token(at_)] = ranks;
    }
    at_ += kTile;
  }

 private:
  static constexpr int kPairs = 2, kOctets = 2;
  static_assert(kBulkThreads / kWarp * kPairs * kTallyRanks == kMaxRanks, "each has its warp");

  static __device__ __forceinline__ int lane() { return threadIdx.x % kWarp; }
  static __device__ __forceinline__ int warp() { return threadIdx.x / kWarp; }
  static __device__ __forceinline__ int pair(int i) {
    return warp() + i * (kMaxRanks / kTallyRanks / kPairs);
  }
  // Of this lane, in the tile that begins at `tile`; -1 for none.
  __device__ __forceinline__ int token(int tile) const {
    return tile + lane() < last_ ? tile + lane() : -1;
  }

  // Mask of the ranks of this lane's token.
  template <class Between>
  __device__ __forceinline__ uint64_t look(const DispatchLaunch& p, int tile,
                                           Between between) const {
    const uint8_t* row = row_ + (tile - first_) * p.a.ids.stride;
    const int t = token(tile), words = t >= 0 ? p.id_words : 0;
    uint32_t mask = 0;
    int first = 0;
#pragma unroll 1
    do {
      IdWords octet[kOctets];
      by_unit(p, [&](auto unit) {
#pragma unroll
        for (int i = 0; i < kOctets; ++i) {
          const int at = first + i * IdWords::kWords;
          octet[i].load<decltype(unit)>(row + 4 * at, words - at);
        }
      });
      if (first == 0) between();
#pragma unroll
      for (int i = 0; i < kOctets; ++i)
        if (first + i * IdWords::kWords < p.id_words)
          mask |= p.a.wide_ids ? octet[i].template ranks<true>(p.c)
                               : octet[i].template ranks<false>(p.c);
      first += kOctets * IdWords::kWords;
    } while (first < p.id_words);
    if (p.id_words == 0) return t >= 0 ? ranks_of_any(p, t) : 0;
    return mask & static_cast<uint32_t>(p.a.active);
  }

  static __device__ __forceinline__ unsigned going(uint64_t ranks, int rank) {
    return __ballot_sync(kAllLanes, ranks >> rank & 1);
  }
  static __device__ __forceinline__ void count(uint64_t ranks, int pair, Counts& counts) {
#pragma unroll
    for (int k = 0; k < kTallyRanks; ++k)
      counts.of[k] += __popc(going(ranks, pair * kTallyRanks + k));
  }

  // Says what the block sends to the ranks of a pair, and finds what was sent before it.
  static __device__ __forceinline__ void exchange(const DispatchLaunch& p, uint64_t tag, int pair,
                                                  const Counts& own, Routes& routes) {
    send_tally(p.c, tag, pair, own);
    const Counts before = sum_tallies(p.c, tag, pair, blockIdx.x);
    if (lane() < kTallyRanks)
      routes.sent[pair * kTallyRanks + lane()] = lane() == 0 ? before.of[0] : before.of[1];
    __syncwarp();
  }

  __device__ __forceinline__ void give_slots(const DispatchLaunch& p, uint64_t ranks, int pair,
                                             Routes& routes) const {
    const Context& c = p.c;
    const Segment& payload = p.segment[kSegmentPayload];
    const int t = token(at_);
    const uint64_t behind = ranks & ~(2 * bit(c.rank) - 1);  // ranks that come before all others
#pragma unroll
    for (int k = 0; k < kTallyRanks; ++k) {
      const int d = pair * kTallyRanks + k;
      const unsigned lanes = going(ranks, d);
      const int before = routes.sent[d], slot = before + __popc(lanes & ((1u << lane()) - 1));
      routes.slot[lane()][d] = slot;
      if ((lanes >> lane() & 1) != 0) {
        const uint64_t earlier = (d > c.rank ? behind : ranks) & (bit(d) - 1);
        const int at = __popcll(earlier) + (d > c.rank ? 0 : __popcll(behind));
        routes.way[lane()][at] = c.window[d] + own_rows(p, payload) + int64_t{slot} * payload.bytes;
      }
      if (t >= 0 && d < c.ep_size) c.token_slots[static_cast<int64_t>(t) * c.ep_size + d] = slot;
      __syncwarp();
      if (lane() == 0) routes.sent[d] = before + __popc(lanes);
    }
  }

  const int first_, last_;
  int at_;  // the next tile
  const uint8_t* row_;
};

// One block adds up what all of them send, and announces it; also to this rank itself, whose other
// blocks read it there.
__device__ __forceinline__ void announce_tallies(const DispatchLaunch& p, uint64_t tag,
                                                 int blocks) {
  // Release: what peers may write to from here on was read by kernels before this one. Here, and
  // not before the stores, so that it costs no time of its own.
  if (threadIdx.x / kWarp < tallies(p.c.ep_size)) fence_acq_rel_sys();
#pragma unroll 1
  for (int pair = threadIdx.x / kWarp; pair < tallies(p.c.ep_size); pair += blockDim.x / kWarp) {
    const Counts sum = sum_tallies(p.c, tag, pair, blocks);
    const int k = threadIdx.x % kWarp, to = pair * kTallyRanks + k;
    if (k < kTallyRanks && to < p.c.ep_size && (p.a.active >> to & 1) != 0)
      send_header(p.c, tag, p.facts, to, k == 0 ? sum.of[0] : sum.of[1]);
  }
}

}  // namespace moe_a2a::cuda
