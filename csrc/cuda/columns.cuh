// Tokens as columns of bits, one for each rank that they go to, in shared memory: whoever has a
// column finds a token's slot there by counting the bits before its own, without asking anybody.
#pragma once

#include "launch.h"
#include "route.cuh"

namespace moe_a2a::cuda {

// Of few tokens: a lane counts the bits of a whole column.
struct alignas(16) FewColumns {
  static constexpr int kTokens = kSmallTokens, kLooks = 1;  // a thread's tokens
  static constexpr int kGroups = kTokens / kWarp;

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
  };

  uint32_t of[kSmallRanks][kGroups];

  __device__ __forceinline__ void set(int rank, int group, uint32_t bits) {
    of[rank][group] = bits;
  }
  // Between the last set() and what follows, by all threads.
  __device__ __forceinline__ void close(const DispatchLaunch&) { __syncthreads(); }

  // Tokens before this one that go to rank `lane`: its slot there.
  __device__ __forceinline__ int slot(const Position& p) const {
    const uint4 c = *reinterpret_cast<const uint4*>(of[threadIdx.x % kWarp]);
    return __popc(c.x & p.before[0]) + __popc(c.y & p.before[1]) + __popc(c.z & p.before[2]) +
           __popc(c.w & p.before[3]);
  }
  __device__ __forceinline__ bool goes(const Position& p) const {
    return (of[threadIdx.x % kWarp][p.group] >> p.bit & 1) != 0;
  }
  // Of so many tokens, those that go to rank `lane`.
  __device__ __forceinline__ int count(int tokens) const { return slot(Position(tokens)); }
};

// Of more: the tokens of earlier groups are added up for all. A row more than there are ranks keeps
// lanes apart that read a column.
struct ManyColumns {
  static constexpr int kTokens = kManyTokens, kLooks = kTokens / kColumnThreads;
  static constexpr int kGroups = kTokens / kWarp;
  static_assert(kGroups == kWarp, "a lane a group");

  struct Position {
    int t, group, bit;
    __device__ __forceinline__ explicit Position(int token)
        : t(hold(token)), group(token / kWarp), bit(token % kWarp) {}
  };

  uint32_t of[kGroups][kSmallRanks + 1];
  int32_t before[kGroups][kSmallRanks + 1];

  __device__ __forceinline__ void set(int rank, int group, uint32_t bits) {
    of[group][rank] = bits;
  }
  __device__ __forceinline__ void close(const DispatchLaunch& p) {
    const int lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
    __syncthreads();
#pragma unroll 1
    for (int rank = threadIdx.x / kWarp; rank < p.c.ep_size; rank += warps) {
      const int own = __popc(of[lane][rank]);
      int sum = own;
#pragma unroll
      for (int step = 1; step < kWarp; step *= 2) {
        const int earlier = __shfl_up_sync(kAllLanes, sum, step);
        if (lane >= step) sum += earlier;
      }
      before[lane][rank] = sum - own;
    }
    __syncthreads();
  }

  __device__ __forceinline__ int slot(const Position& p) const {
    const int lane = threadIdx.x % kWarp;
    return before[p.group][lane] + __popc(of[p.group][lane] & ((1u << p.bit) - 1));
  }
  __device__ __forceinline__ bool goes(const Position& p) const {
    return (of[p.group][threadIdx.x % kWarp] >> p.bit & 1) != 0;
  }
  __device__ __forceinline__ int count(int) const {
    const int lane = threadIdx.x % kWarp;
    return before[kGroups - 1][lane] + __popc(of[kGroups - 1][lane]);
  }
};

// Out of line: the way that is seldom taken must not make the other one longer.
static __device__ __noinline__ uint32_t ranks_of_odd_ids(const DispatchLaunch& p, int t) {
  return ranks_of<uint32_t>(p, t, static_cast<int>(p.a.tokens));
}

// Looks at the ids, a thread a token or two, and fills in the columns, which are to be closed then.
template <class Columns>
class Look {
 public:
  __device__ __forceinline__ explicit Look(const DispatchLaunch& p) {
#pragma unroll
    for (int u = 0; u < kLooks; ++u) {
      left_[u] = token(u) < p.a.tokens ? p.id_words : 0;
      from_[u] = p.a.ids.row(token(u));
    }
  }

  __device__ __forceinline__ void load(const DispatchLaunch& p) { load(p, 0); }

  __device__ __forceinline__ void mark(const DispatchLaunch& p, Columns& columns) {
    if (threadIdx.x >= Columns::kTokens) return;
    uint32_t ranks[kLooks] = {};
    add(p, ranks);
#pragma unroll 1
    for (int first = IdWords::kWords; first < p.id_words; first += IdWords::kWords) {
      load(p, first);
      add(p, ranks);
    }
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int u = 0; u < kLooks; ++u) {
      if (p.id_words == 0) ranks[u] = ranks_of_odd_ids(p, token(u));
      ranks[u] &= static_cast<uint32_t>(p.a.active);
      uint32_t column = 0;  // of rank `lane`
#pragma unroll 2
      for (int d = 0; d < p.c.ep_size; ++d) {
        const uint32_t going = __ballot_sync(kAllLanes, ranks[u] >> d & 1);
        if (lane == d) column = going;
      }
      columns.set(lane, token(u) / kWarp, column);
    }
  }

 private:
  static constexpr int kLooks = Columns::kLooks;

  static __device__ __forceinline__ uint32_t token(int u) {
    return threadIdx.x + u * kColumnThreads;
  }

  __device__ __forceinline__ void load(const DispatchLaunch& p, int first) {
    by_unit(p, [&](auto unit) {
#pragma unroll
      for (int u = 0; u < kLooks; ++u)
        ids_[u].template load<decltype(unit)>(from_[u] + 4 * first, left_[u] - first);
    });
  }
  __device__ __forceinline__ void add(const DispatchLaunch& p, uint32_t (&ranks)[kLooks]) const {
#pragma unroll
    for (int u = 0; u < kLooks; ++u)
      if (u * kColumnThreads < p.a.tokens || u == 0)
        ranks[u] |=
            p.a.wide_ids ? ids_[u].template ranks<true>(p.c) : ids_[u].template ranks<false>(p.c);
  }

  int left_[kLooks];  // words of its rows
  const uint8_t* from_[kLooks];
  IdWords ids_[kLooks];
};

}  // namespace moe_a2a::cuda
