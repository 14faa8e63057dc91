// Combine in bulk, the way out. A few warps make the image of a row, piece by piece, in stages of
// shared memory; one thread hands the stages to the bulk copy engine; one warp raises the flags of
// rows that have arrived. Nothing here waits for a peer.
//
// The engine takes a row off the multiprocessor at one instruction, and no warp waits for the link.
#pragma once

#include "sum.cuh"

namespace moe_a2a::cuda {

constexpr int kPushWarps = 4;
constexpr int kPushSteps = 8;  // loads of a lane in flight: a piece is all of them, of all warps
static_assert(kPushWarps * kPushSteps * kWarp * 16 == kPlainPiece);
static_assert(kPushWarps * kPushSteps * kWarpColumns == kQuantizedPiece);

// Of the block's pieces and units, in shared memory.
struct Progress {
  static constexpr int kRing = 32;

  uint32_t made[kPushWarps];  // how many pieces each pushing warp has behind it
  uint32_t complete;          // how many the engine has
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

// A place in the block's sequence of pieces. Every warp that makes, ships or completes them goes
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

// ---- pieces ----------------------------------------------------------------------------------

// A piece of a row: `bytes` bytes of it, or of its codes, from `first` on.
template <class Row>
struct Extent {
  static constexpr int kMost = Row::kQuantized ? kQuantizedPiece : kPlainPiece;
  int first, bytes;

  __device__ __forceinline__ Extent(const CombineLaunch& p, int piece) : first(piece * kMost) {
    const int all = Row::kQuantized ? p.c.hidden : static_cast<int>(p.c.combine_bytes);
    bytes = min(kMost, all - first);
  }
};

// What a warp has of a piece, in registers. All of it is asked for before any of it is used; past
// the end the last bytes once more, since a load that may not happen would part the others.
template <class Row, int kScalar>
struct Part {  // of a plain row
  Chunk data[kPushSteps];

  static __device__ __forceinline__ int at(int u) {
    return (u * kPushWarps * kWarp + static_cast<int>(threadIdx.x)) * 16;
  }
  __device__ __forceinline__ void load(const uint8_t* y, const Extent<Row>& e) {
    y += e.first;
    if (aligned(y, 16)) {
#pragma unroll
      for (int u = 0; u < kPushSteps; ++u) data[u] = load_chunk(y + min(at(u), e.bytes - 16));
    } else {
#pragma unroll
      for (int u = 0; u < kPushSteps; ++u)
        data[u] = load_odd_bytes(y + min(at(u), e.bytes - 16), 16);
    }
  }
  __device__ __forceinline__ void store(uint8_t* stage, const Extent<Row>& e) const {
#pragma unroll
    for (int u = 0; u < kPushSteps; ++u)
      if (at(u) < e.bytes) *reinterpret_cast<Chunk*>(stage + at(u)) = data[u];
  }
};

template <int kWire, int kScalar>
struct Part<Scaled<kWire>, kScalar> {
  RawColumns raw[kPushSteps];

  static __device__ __forceinline__ int at(int u) {
    return (u * kPushWarps * kWarp + static_cast<int>(threadIdx.x)) * kColumns;
  }
  __device__ __forceinline__ void load(const uint8_t* y, const Extent<Scaled<kWire>>& e) {
    load_row<kScalar>(y, e.first + at(0), kPushWarps * kWarpColumns, e.first + e.bytes, raw);
  }
  __device__ __forceinline__ void store(uint8_t* stage, const Extent<Scaled<kWire>>& e) const {
    constexpr int kTogether = 4;
#pragma unroll
    for (int first = 0; first < kPushSteps; first += kTogether) {
      // The first lane's column: lanes past the end of the row have their part in the shuffles.
      if (at(first) - static_cast<int>(threadIdx.x % kWarp) * kColumns >= e.bytes) break;
      uint32_t amax[kTogether];
      Scaled<kWire>::template largest_of_blocks<kScalar>(raw + first, amax);
#pragma unroll
      for (int u = 0; u < kTogether; ++u) {
        const auto row = Scaled<kWire>::template quantize<kScalar>(raw[first + u], amax[u]);
        if (at(first + u) < e.bytes)
          Scaled<kWire>::store(row, at(first + u), stage, stage + e.bytes);
      }
    }
  }
};

__device__ __forceinline__ uint8_t* stage_of(const CombineLaunch& p, uint8_t* stages, int piece) {
  return stages + piece % kStages * p.stage_bytes;
}

template <class Row, int kScalar>
__device__ __forceinline__ void push_rows(const CombineLaunch& p, const Units& units,
                                          Progress& progress, uint8_t* stages) {
  const bool deals = threadIdx.x < kWarp;
  Dealer dealer;
  if (deals) dealer.deal(p, units, progress);
  int made = 0;
#pragma unroll 1
  for (Cursor at(p, units, progress); !at.over(); at.next(p, units, progress)) {
    if (deals && at.begins_unit()) dealer.deal(p, units, progress);
    const Extent<Row> extent(p, at.piece());
    Part<Row, kScalar> part;
    part.load(p.a.y + at.source() * p.a.source_stride + at.slot() * p.a.row_stride, extent);
    // Acquire, by every lane: the engine has read what was in the stage before.
    while (static_cast<int>(load_acquire_block(&progress.complete)) + kStages <= made) {
    }
    __syncwarp();
    part.store(stage_of(p, stages, made), extent);
    fence_for_bulk_copies();
    __syncwarp();
    ++made;
    // Release: what the lanes wrote and fenced, ordered before this lane by the barrier, happens
    // before what the shipping thread does next.
    if (threadIdx.x % kWarp == 0) store_release_block(&progress.made[threadIdx.x / kWarp], made);
  }
}

// ---- shipping --------------------------------------------------------------------------------

// Until the oldest of `flying` pieces is complete; the instruction takes a constant.
__device__ __forceinline__ void await_oldest(int flying) {
  static_assert(kStages == 4);
  switch (flying) {
    case 4:
      return await_bulk_copies<3>();
    case 3:
      return await_bulk_copies<2>();
    case 2:
      return await_bulk_copies<1>();
    default:
      return await_bulk_copies<0>();
  }
}

// One thread.
template <class Row>
__device__ __forceinline__ void ship(const CombineLaunch& p, const Cursor& at,
                                     const uint8_t* stage) {
  const Extent<Row> e(p, at.piece());
  uint8_t* row = inbox_row(p, at.source(), p.c.rank, at.slot());
  bulk_copy(row + e.first, stage, e.bytes);
  if constexpr (Row::kQuantized)  // up to the row's end, which is that of 16 bytes too
    bulk_copy(row + p.c.hidden + e.first / 32, stage + e.bytes,
              static_cast<uint32_t>(round_up(e.bytes / 32, 16)));
  commit_bulk_copies();
}

// One warp, of which one lane has all the copies: groups are a thread's own.
template <class Row>
__device__ __forceinline__ void ship_rows(const CombineLaunch& p, const Units& units,
                                          Progress& progress, uint8_t* stages) {
  const int lane = threadIdx.x % kWarp;
  Cursor at(p, units, progress);
  int shipped = 0, complete = 0;
#pragma unroll 1
  while (!at.over() || complete < shipped) {
    // Acquire: what the warps wrote to the stage, and fenced, happens before the copy.
    const uint32_t own = load_acquire_block(&progress.made[lane % kPushWarps]);
    const int made = static_cast<int>(__reduce_min_sync(kAllLanes, own));
    if (shipped < made) {
      __syncwarp();  // what one lane has acquired, all have
      if (lane == 0) ship<Row>(p, at, stage_of(p, stages, shipped));
      ++shipped;
      at.next(p, units, progress);
      continue;
    }
    // A piece that flies alone is not waited for while others are still to be made: the link would
    // have nothing to do until the next one follows.
    const int flying = shipped - complete;
    if (flying == 0 || (flying == 1 && !at.over())) continue;
    ++complete;
    if (lane == 0) {
      await_oldest(flying);
      store_release_block(&progress.complete, complete);
    }
    __syncwarp();
  }
}

// One warp raises the flags of the units that are complete, after a fence for as many as there are.
// The engine's writes are visible to the thread that waited for them, which releases them to this
// one, and the fence makes them visible to whoever acquires a flag. It takes long, 10 us where the
// link is busy, since it waits for all that is on its way from this multiprocessor: so it has a
// warp of its own. (Without it rows were seen that had not come: complete does not mean that.)
__device__ __forceinline__ void raise_flags(const CombineLaunch& p, const Units& units,
                                            uint64_t tag, Progress& progress) {
  const int lane = threadIdx.x % kWarp;
  Cursor at(p, units, progress);
  int raised = 0;
#pragma unroll 1
  while (!at.over()) {
    const int own = static_cast<int>(load_acquire_block(&progress.complete));
    const int complete = __shfl_sync(kAllLanes, own, 0);
    if (complete == raised) continue;
    if (lane == 0) fence_acq_rel_sys();
#pragma unroll 1
    for (; raised < complete; ++raised) {
      if (lane == 0 && at.ends_unit(p))
        store_relaxed_sys(flag(p, at.source(), p.c.rank, at.flag()), tag);
      at.next(p, units, progress);
    }
    if (lane == 0) store_release_block(&progress.taken, at.taken());
    __syncwarp();
  }
}

}  // namespace moe_a2a::cuda
