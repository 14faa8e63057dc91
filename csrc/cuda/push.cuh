// Combine in bulk, the way out. A few warps take rows, piece by piece, into registers and store
// them, quantized or as they are, straight into the peers' inboxes; one warp raises the flags of
// rows that have arrived. Nothing here waits for a peer.
#pragma once

#include "piece.cuh"

namespace moe_a2a::cuda {

// Of the block's pieces and units, in shared memory.
struct Progress {
  static constexpr int kRing = 32;
  static constexpr int kMostWarps = 8;
  static_assert(kPushPlain.warps <= kMostWarps && kPushQuantized.warps <= kMostWarps);

  uint32_t made[kMostWarps];  // how many pieces each pushing warp has stored its parts of
  uint32_t dead;
  uint32_t dealt, taken;  // units: by the first warp, and by the last one that goes through them
  uint32_t unit[kRing];
};

// The tag of the first line of a cell that carries no data. Only tags are ever stored in this
// place, so that nothing that a small round left there can look like this round's flag.
__device__ __forceinline__ uint64_t* flag(const CombineLaunch& p, int owner, int from, int index) {
  uint8_t* line = p.c.window[owner] + p.flags + from * p.flags_per_source + index * kCell;
  return reinterpret_cast<uint64_t*>(line + kLine - 8);
}

__device__ __forceinline__ uint8_t* inbox_row(const CombineLaunch& p, int owner, int from,
                                              int slot) {
  return p.c.window[owner] + p.c.combine +
         (static_cast<int64_t>(from) * p.c.max_tokens + slot) * p.c.combine_bytes;
}

// ---- which rows ------------------------------------------------------------------------------

// What is pushed: chunks of rows that share a flag, in the order in which the peers sum them, by
// slot first, a peer after the other, each rank beginning with the one after it.
struct Units {
  int peers, count = 0;
  int low = 0, high = 0;  // rows from sources `lane` and `lane + 32`

  __device__ __forceinline__ explicit Units(const CombineLaunch& p)
      : peers(max(p.c.ep_size - 1, 1)) {}

  __device__ __forceinline__ void find(const CombineLaunch& p) {
    const int lane = threadIdx.x % kWarp;
    low = rows_from(p.c, lane);
    high = rows_from(p.c, lane + kWarp);
    const uint32_t most = __reduce_max_sync(kAllLanes, static_cast<uint32_t>(max(low, high)));
    count = (static_cast<int>(most) + p.rows_per_flag - 1) / p.rows_per_flag * peers;
  }
  __device__ __forceinline__ int rows(int source) const {
    return __shfl_sync(kAllLanes, source < kWarp ? low : high, source % kWarp);
  }

 private:
  static __device__ __forceinline__ int rows_from(const Context& c, int source) {
    return source < c.ep_size && source != c.rank ? c.state->received[source] : 0;
  }
};

struct Unit {
  int source, flag, first, last;  // rows

  __device__ __forceinline__ Unit(const CombineLaunch& p, const Units& units, int index) {
    flag = index / units.peers;
    source = p.c.rank + 1 + index - flag * units.peers;
    if (source >= p.c.ep_size) source -= p.c.ep_size;
    first = flag * p.rows_per_flag;
    last = min(first + p.rows_per_flag, units.rows(source));
  }
};

// One warp of a block deals units to all of it: the first one is the block's own, the others come
// from a counter of the grid. The link serves some multiprocessors better than others, by a fifth;
// with equal shares the last ones would have it to themselves at the end.
class Dealer {
 public:
  __device__ __forceinline__ Dealer() : asked_(blockIdx.x - gridDim.x) {}

  __device__ __forceinline__ void deal(const CombineLaunch& p, const Units& units,
                                       Progress& progress) {
    const int lane = threadIdx.x % kWarp;
    if (over_) return;
    int index;
#pragma unroll 1
    for (;;) {
      index = static_cast<int>(__shfl_sync(kAllLanes, asked_, 0) + gridDim.x);
      over_ = index >= units.count;
      if (over_) break;
      // On its way until the next one is dealt, so nothing is made of it here.
      if (lane == 0) asked_ = count_up(&p.c.state->units);
      const Unit unit(p, units, index);
      if (unit.first < unit.last) break;  // a source with fewer rows than others has empty ones
    }
    while (dealt_ - load_acquire_block(&progress.taken) >= Progress::kRing) {
    }
    if (lane == 0) {
      progress.unit[dealt_ % Progress::kRing] = min(index, units.count);
      store_release_block(&progress.dealt, dealt_ + 1);
    }
    ++dealt_;
  }

 private:
  uint32_t asked_, dealt_ = 0;
  bool over_ = false;
};

// A place in the block's sequence of pieces. Every warp that stores them or raises their flags goes
// through all of it, with all its lanes.
class Cursor {
 public:
  __device__ __forceinline__ Cursor(const CombineLaunch& p, const Units& units,
                                    const Progress& progress) {
    take(p, units, progress);
  }
  __device__ __forceinline__ bool over() const { return over_; }
  __device__ __forceinline__ bool begins_unit() const { return piece_ == 0 && slot_ == first_; }
  __device__ __forceinline__ bool ends_unit(const CombineLaunch& p) const {
    return piece_ + 1 == p.pieces && slot_ + 1 == last_;
  }
  __device__ __forceinline__ int source() const { return source_; }
  __device__ __forceinline__ int slot() const { return slot_; }
  __device__ __forceinline__ int flag() const { return flag_; }
  __device__ __forceinline__ int piece() const { return piece_; }
  __device__ __forceinline__ uint32_t taken() const { return taken_; }

  __device__ __forceinline__ void next(const CombineLaunch& p, const Units& units,
                                       const Progress& progress) {
    if (++piece_ < p.pieces) return;
    piece_ = 0;
    if (++slot_ == last_) take(p, units, progress);
  }

 private:
  __device__ __forceinline__ void take(const CombineLaunch& p, const Units& units,
                                       const Progress& progress) {
    while (load_acquire_block(&progress.dealt) == taken_) {
    }
    __syncwarp();
    const int index = static_cast<int>(progress.unit[taken_ % Progress::kRing]);
    ++taken_;
    over_ = index >= units.count;
    const Unit unit(p, units, index);
    source_ = unit.source;
    flag_ = unit.flag;
    first_ = slot_ = unit.first;
    last_ = unit.last;
  }

  uint32_t taken_ = 0;
  bool over_ = false;
  int source_, flag_, first_, slot_, last_, piece_ = 0;
};

// ---- pushing ---------------------------------------------------------------------------------

// One warp of those that have a piece together. Dealing comes before the loads, for it ends in a
// barrier for memory.
template <class Row, int kScalar>
class Pusher {
 public:
  __device__ __forceinline__ Pusher(const CombineLaunch& p, const Units& units, Progress& progress)
      : p_(p), units_(units), progress_(progress) {}

  // The next part is asked for before the stores of this one, which wait for the link, and is not
  // waited for until they are under way. A part has come, or is a copy of one that has, before the
  // next one is asked for: a wait is for all loads on their way, whosever they are.
  __device__ __forceinline__ void push_ahead() {
    deal();
    Cursor at(p_, units_, progress_);
    if (at.over()) return;
    Part<Row, kScalar> part, ahead;
    load<true>(part, at);
    part.await();
#pragma unroll 1
    for (;;) {
      at.next(p_, units_, progress_);
      const bool more = !at.over();
      if (more) load<true>(ahead, at);
      store(part);
      if (!more) break;
      part = ahead;
    }
  }
  // Rows of y at odd addresses: loading them byte by byte is slow, and takes the registers.
  __device__ __forceinline__ void push_odd() {
    deal();
#pragma unroll 1
    for (Cursor at(p_, units_, progress_); !at.over(); at.next(p_, units_, progress_)) {
      Part<Row, kScalar> part;
      load<false>(part, at);
      store(part);
    }
  }

 private:
  __device__ __forceinline__ void deal() {
    if (threadIdx.x < kWarp) dealer_.deal(p_, units_, progress_);
  }
  template <bool kAligned>
  __device__ __forceinline__ void load(Part<Row, kScalar>& part, const Cursor& at) {
    if (at.begins_unit()) deal();
    part.template load<kAligned>(
        p_.a.y + at.source() * p_.a.source_stride + at.slot() * p_.a.row_stride,
        inbox_row(p_, at.source(), p_.c.rank, at.slot()), Extent<Row>(p_, at.piece()));
  }
  __device__ __forceinline__ void store(const Part<Row, kScalar>& part) {
    part.store(p_);
    ++made_;
    __syncwarp();
    // Release: what the lanes have stored, ordered before this lane by the barrier, happens before
    // what a thread does that acquires this.
    if (threadIdx.x % kWarp == 0) store_release_block(&progress_.made[threadIdx.x / kWarp], made_);
  }

  const CombineLaunch& p_;
  const Units& units_;
  Progress& progress_;
  Dealer dealer_;
  uint32_t made_ = 0;
};

template <class Row, int kScalar>
__device__ __forceinline__ void push_rows(const CombineLaunch& p, const Units& units,
                                          Progress& progress) {
  Pusher<Row, kScalar> pusher(p, units, progress);
  if (aligned(p.a.y, 16) && ((p.a.source_stride | p.a.row_stride) & 15) == 0)
    pusher.push_ahead();
  else
    pusher.push_odd();
}

// One warp raises the flags of the units that are complete, after a fence for as many as there are.
// The fence takes long, 10 us where the link is busy, since it waits for all that is on its way
// from this multiprocessor: so it has a warp of its own.
//
// Rows were stored by other warps, each of which has released what its lanes stored. Every lane
// acquires, though each looks at one warp only, and none knows of the others by the reduction,
// which exchanges values and orders nothing. The barrier of the warp puts all the acquires before
// the fence of one lane, and so all the stores: its fence and the flags after it are a release.
template <class Row>
__device__ __forceinline__ void raise_flags(const CombineLaunch& p, const Units& units,
                                            uint64_t tag, Progress& progress) {
  const int lane = threadIdx.x % kWarp;
  Cursor at(p, units, progress);
  uint32_t raised = 0;
#pragma unroll 1
  while (!at.over()) {
    const uint32_t own = load_acquire_block(&progress.made[lane % kPush<Row>.warps]);
    const uint32_t made = __reduce_min_sync(kAllLanes, own);
    if (made == raised) continue;
    __syncwarp();
    if (lane == 0) fence_acq_rel_sys();
#pragma unroll 1
    for (; raised < made; ++raised) {
      if (lane == 0 && at.ends_unit(p))
        store_relaxed_sys(flag(p, at.source(), p.c.rank, at.flag()), tag);
      at.next(p, units, progress);
    }
    if (lane == 0) store_release_block(&progress.taken, at.taken());
    __syncwarp();
  }
}

}  // namespace moe_a2a::cuda
