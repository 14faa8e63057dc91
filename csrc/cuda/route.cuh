// Which ranks a token goes to, and its slot there: the number of earlier tokens of this rank that
// go to the same one. A count, so the layout is the same in every run and on every backend.
#pragma once

#include "ids.cuh"
#include "wait.cuh"

namespace moe_a2a::cuda {

constexpr int kTile = 32;  // tokens that a block has slots of at a time: a lane each
constexpr int kMostWarps = 32;

struct Route {            // in shared memory
  uint64_t ranks[kTile];  // mask
  union {                 // the first warp reads all parts before it writes slots
    int32_t slot[kTile][kMaxRanks];
    int32_t part[kMostWarps][kMaxRanks];  // rows to each rank, of the tokens a warp looked at
  };
};

// Whether a choice is delivered anywhere; an int64 id comes as two words.
__device__ __forceinline__ bool routed(const DispatchLaunch& p, uint32_t low, uint32_t high) {
  const bool exists = high == 0 && low < static_cast<uint32_t>(p.c.num_experts);
  return exists && (p.everyone || (p.a.active >> owner_of<false>(p.c, low) & 1) != 0);
}

template <class Mask, class Id, bool kEven>
__device__ __forceinline__ Mask ranks_of(const DispatchLaunch& p, int t) {
  constexpr int kAhead = 8;  // loads in flight
  const auto* ids = reinterpret_cast<const Id*>(p.a.ids.row(t));
  Mask mask = 0;
#pragma unroll 1
  for (int first = 0; first < p.c.top_k; first += kAhead) {
    Id id[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) id[k] = first + k < p.c.top_k ? ids[first + k] : Id(-1);
#pragma unroll
    for (int k = 0; k < kAhead; ++k)
      mask |= static_cast<Mask>(id[k] < static_cast<Id>(p.c.num_experts))
              << (owner_of<kEven>(p.c, static_cast<uint32_t>(id[k])) & (8 * sizeof(Mask) - 1));
  }
  return mask & static_cast<Mask>(p.a.active);
}

// Mask of the ranks that token t goes to; 0 past `end`. What is the same for all ids is decided
// once, outside: the way to the first row on the wire leads through here.
template <class Mask>
__device__ __forceinline__ Mask ranks_of(const DispatchLaunch& p, int t, int end) {
  if (t >= end) return 0;
  if (p.c.larger_end == 0)
    return p.a.wide_ids ? ranks_of<Mask, uint64_t, true>(p, t)
                        : ranks_of<Mask, uint32_t, true>(p, t);
  return p.a.wide_ids ? ranks_of<Mask, uint64_t, false>(p, t)
                      : ranks_of<Mask, uint32_t, false>(p, t);
}

// The tokens that a lane looks at in one go: token(u) of them, -1 for none. The first warp begins
// with the tile [first, last), the others, and it after that, with the tokens before `earlier`.
struct TokenBatch {
  int at, earlier, first, last;

  __device__ __forceinline__ bool used(int u) const {
    return at + u * static_cast<int>(blockDim.x) < earlier;
  }
  __device__ __forceinline__ int token(int u) const {
    const int lane = threadIdx.x % kWarp, t = at + u * static_cast<int>(blockDim.x) + lane;
    if (at < 0 && u == 0) return first + lane < last ? first + lane : -1;
    return t < earlier ? t : -1;
  }
};

// The first eight ids of a batch's tokens, four of int32 or two of int64, all in flight at once.
struct EarlyIds {
  static constexpr int kOctets = 4;
  IdWords octet[kOctets];  // a token's one after the other

  __device__ __forceinline__ void load(const DispatchLaunch& p, const TokenBatch& batch,
                                       int first = 0) {
    const int of_token = p.a.wide_ids ? 1 : 0;
    by_unit(p, [&](auto unit) {
#pragma unroll
      for (int i = 0; i < kOctets; ++i) {
        const int t = batch.token(i >> of_token);
        const int skipped = first + (i & of_token) * IdWords::kWords;
        octet[i].load<decltype(unit)>(p.a.ids.row(t) + 4 * skipped,
                                      t >= 0 ? p.id_words - skipped : 0);
      }
    });
  }
};

template <bool kWide>
struct QuickLook {
  using Mask = uint32_t;
  static constexpr int kOctets = kWide ? 2 : 1;  // of a token
  static constexpr int kTokens = EarlyIds::kOctets / kOctets;

  static __device__ __forceinline__ void look(const DispatchLaunch& p, const TokenBatch& batch,
                                              EarlyIds& ids, Mask (&ranks)[kTokens]) {
#pragma unroll
    for (int u = 0; u < kTokens; ++u) ranks[u] = 0;
    add(p, batch, ids, ranks);
#pragma unroll 1
    for (int first = 8; first < p.c.top_k; first += 8) {
      ids.load(p, batch, first * kOctets);
      add(p, batch, ids, ranks);
    }
#pragma unroll
    for (int u = 0; u < kTokens; ++u) ranks[u] &= static_cast<Mask>(p.a.active);
  }

 private:
  static __device__ __forceinline__ void add(const DispatchLaunch& p, const TokenBatch& batch,
                                             const EarlyIds& ids, Mask (&ranks)[kTokens]) {
#pragma unroll
    for (int i = 0; i < EarlyIds::kOctets; ++i)
      if (batch.used(i / kOctets)) ranks[i / kOctets] |= ids.octet[i].ranks<kWide>(p.c);
  }
};

// Out of line: the way that is seldom taken must not make the other one longer.
static __device__ __noinline__ uint64_t ranks_of_any(const DispatchLaunch& p, int t) {
  return ranks_of<uint64_t>(p, t, t + 1);
}

struct AnyLook {
  using Mask = uint64_t;
  static constexpr int kTokens = 2;

  static __device__ __forceinline__ void look(const DispatchLaunch& p, const TokenBatch& batch,
                                              EarlyIds&, Mask (&ranks)[kTokens]) {
#pragma unroll
    for (int u = 0; u < kTokens; ++u)
      ranks[u] = batch.token(u) >= 0 ? ranks_of_any(p, batch.token(u)) : 0;
  }
};

// Rows to each rank: those to ranks `lane` and `lane + 32`.
struct Tally {
  int32_t low = 0, high = 0;

  // Of a warp's tokens: four ranks a word, a byte each, summed over the lanes in one go.
  template <class Mask, int kTokens>
  __device__ __forceinline__ void add(int ep_size, const Mask (&ranks)[kTokens]) {
    static_assert(kTokens * kWarp < 256, "a byte holds the sum");
    const int lane = threadIdx.x % kWarp, shift = 8 * (lane % 4);
#pragma unroll 1
    for (int group = 0; 4 * group < ep_size; ++group) {
      uint32_t word = 0;
#pragma unroll
      for (int u = 0; u < kTokens; ++u) {
        const uint32_t four = static_cast<uint32_t>(ranks[u] >> (4 * group)) & 15u;
        word += four * 0x00204081u & 0x01010101u;  // bit i to byte i
      }
      const uint32_t sums = __reduce_add_sync(kAllLanes, word);
      const int32_t own = static_cast<int32_t>(sums >> shift & 0xFF);
      if (lane / 4 == group) low += own;
      if (lane / 4 + kWarp / 4 == group) high += own;
    }
  }
};

template <class Look>
__device__ __forceinline__ uint64_t look_at_batches(const DispatchLaunch& p, TokenBatch batch,
                                                    EarlyIds& ids, Route& route) {
  constexpr int kTokens = Look::kTokens;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  uint64_t tile = 0;
  Tally tally;
#pragma unroll 1
  while (batch.at < batch.earlier) {
    typename Look::Mask ranks[kTokens];
    Look::look(p, batch, ids, ranks);
    if (batch.at < 0) {
      tile = ranks[0];
      ranks[0] = 0;
    }
    if (batch.earlier > 0) tally.add(p.c.ep_size, ranks);
    batch.at += kTokens * blockDim.x;
    if (p.id_words != 0 && batch.at < batch.earlier) ids.load(p, batch);
  }
  if (batch.earlier > 0) {
    route.part[warp][lane] = tally.low;
    if (p.c.ep_size > kWarp) route.part[warp][lane + kWarp] = tally.high;
  }
  return tile;
}

// The warps of a block count what the tokens before `earlier` send, in `part`; the first warp looks
// at the tile [first, last) itself and returns the masks of its tokens, a lane each. A barrier
// must follow before the parts are read, none is needed where `earlier` is 0.
__device__ __forceinline__ uint64_t look_at_tokens(const DispatchLaunch& p, int earlier, int first,
                                                   int last, Route& route) {
  const int warp = threadIdx.x / kWarp;
  const TokenBatch batch{(warp - 1) * kWarp, earlier, first, last};
  EarlyIds ids;
  if (p.id_words != 0) ids.load(p, batch);
  if (p.id_words == 0) return look_at_batches<AnyLook>(p, batch, ids, route);
  return p.a.wide_ids ? look_at_batches<QuickLook<true>>(p, batch, ids, route)
                      : look_at_batches<QuickLook<false>>(p, batch, ids, route);
}

// What the tokens before `first` sent to rank d.
__device__ __forceinline__ int sum_of_parts(const Route& route, int first, int d) {
  const int warps = min(static_cast<int>(blockDim.x) / kWarp, first / kWarp + 2);
  int sum = 0;
  if (first > 0)
#pragma unroll 4
    for (int w = 0; w < warps; ++w) sum += route.part[w][d];
  return sum;
}

// One warp gives the tile's tokens their slots. `low` and `high` are what was sent before to ranks
// `lane` and `lane + 32`, and move on. The combine of this round finds the slots in the context.
__device__ __forceinline__ void route_tile(const DispatchLaunch& p, int first, int last,
                                           uint64_t ranks, int32_t& low, int32_t& high,
                                           Route& route) {
  const int lane = threadIdx.x % kWarp, t = first + lane;
  const Context& c = p.c;
#pragma unroll 1
  for (int d = 0; d < c.ep_size; ++d) {
    const unsigned going = __ballot_sync(kAllLanes, ranks >> d & 1);
    const int before = __shfl_sync(kAllLanes, d < kWarp ? low : high, d % kWarp);
    const int slot = before + __popc(going & ((1u << lane) - 1));
    route.slot[lane][d] = slot;
    if (t < last) c.token_slots[static_cast<int64_t>(t) * c.ep_size + d] = slot;
    if (d == lane) low += __popc(going);
    if (d == lane + kWarp) high += __popc(going);
  }
  route.ranks[lane] = ranks;
  if (t < last) c.token_ranks[t] = ranks;
}

// Slots of one tile after the other, for a whole block.
struct Tiles {
  int32_t low = 0, high = 0;  // in the first warp

  // Ends with a barrier. `first_tile`: the earlier tokens are counted too.
  __device__ __forceinline__ void next(const DispatchLaunch& p, int first, int last,
                                       bool first_tile, Route& route) {
    const int lane = threadIdx.x % kWarp;
    // Later tiles: only the first warp looks, and only at the tile.
    const int earlier = first_tile ? first : 0;
    const uint64_t ranks = look_at_tokens(p, earlier, first, last, route);
    if (earlier > 0) {
      __syncthreads();
      if (threadIdx.x < kWarp) {
        low = sum_of_parts(route, first, lane);
        if (p.c.ep_size > kWarp) high = sum_of_parts(route, first, lane + kWarp);
      }
    }
    if (threadIdx.x < kWarp) route_tile(p, first, last, ranks, low, high, route);
    __syncthreads();
  }
};

// A whole block counts all tokens of this rank and announces the counts; also to this rank itself,
// whose other blocks read them there.
__device__ __forceinline__ void announce_counts(const DispatchLaunch& p, uint64_t tag, bool fence,
                                                Route& route) {
  const int total = static_cast<int>(p.a.tokens);
  // Here, and not before the stores, so that it costs no time of its own.
  if (fence && threadIdx.x < kWarp) fence_acq_rel_sys();
  if (total > 0) look_at_tokens(p, total, total, total, route);
  __syncthreads();
  if (threadIdx.x >= kWarp) return;
#pragma unroll 1
  for (int to = threadIdx.x; to < p.c.ep_size; to += kWarp)
    if ((p.a.active >> to & 1) != 0)
      send_header(p.c, tag, p.facts, to, sum_of_parts(route, total, to));
}

}  // namespace moe_a2a::cuda
