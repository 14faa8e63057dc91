// Headers by which ranks announce an operation, and waits that end.
#pragma once

#include "packet.cuh"

namespace moe_a2a::cuda {

constexpr int64_t kGraceNs = 500'000'000;  // for the posts of other ranks whose wait expired
constexpr uint32_t kAllBlocks = 1u << 16;  // what the blocks of a rank add up to, whatever its grid

// What is known of the operation under way when a kernel begins.
struct Operation {
  uint64_t tag;
  uint32_t round;
  bool dead;  // an earlier kernel gave up: nothing may be sent
};

// The words come with loads of their own, so that nothing waits for one before the other is asked
// for; kernels look at `dead` only where they would send.
__device__ __forceinline__ Operation begin(const Context& c, Phase phase) {
  wait_for_earlier_kernels();
  allow_next_kernel();
  const State& s = *c.state;
  const uint64_t tag = phase == kDispatch ? s.dispatch_tag : s.combine_tag;
  const uint32_t round = phase == kDispatch ? s.dispatch_round : s.combine_round;
  return {tag, round, s.failed != 0};
}

// ---- headers --------------------------------------------------------------------------------

// Two packets of 16 bytes, each with the epoch. The line's last content is that of the operation
// of this phase before, so 32 bits of epoch are enough to tell it from.
struct Header {
  bool fresh;
  int32_t count;
  RoundFacts facts;
};

__device__ __forceinline__ Chunk* header_line(const Context& c, Phase phase, int owner, int from) {
  const ControlRow row = phase == kDispatch ? kArriveDispatch : kArriveCombine;
  return reinterpret_cast<Chunk*>(c.control(owner, row, from));
}

// Where a rank leaves the tag of the operation that it is about to begin, with debug=True.
__device__ __forceinline__ Chunk* meeting_line(const Context& c, int owner, int from) {
  return reinterpret_cast<Chunk*>(c.control(owner, kMeet, from));
}

// By it a peer knows that this rank's earlier operations are over: it may then write where they
// read. In a dispatch in bulk the same warp fences at system scope before, which makes the header a
// release. In packets, and in combine, it does so only where the memory model is taken at its word
// (c.strict): that fence takes 0.6 us, longer than the way to the first packet, and what it orders
// are accesses of kernels before this one to memory of this GPU. Those were performed, in its own
// L2, when wait_for_earlier_kernels() returned (and at the kernel's start, where there is no early
// launch); what a peer writes comes to the same L2, and later than the header.
__device__ __forceinline__ void send_header(const Context& c, uint64_t tag, const RoundFacts& f,
                                            int to, int count) {
  Chunk* line = header_line(c, static_cast<Phase>(f.phase), to, c.rank);
  const uint64_t epoch = epoch_of(tag);
  const uint64_t form = f.format | static_cast<uint64_t>(f.phase) << 16;
  store_relaxed_sys(line, {epoch | static_cast<uint64_t>(count) << 32, f.rows | form << 32});
  store_relaxed_sys(line + 1, {epoch | static_cast<uint64_t>(f.global_scale_bits) << 32, f.active});
}

__device__ __forceinline__ Header read_header(const Context& c, Phase phase, uint64_t tag,
                                              int from) {
  const Chunk* line = header_line(c, phase, c.rank, from);
  // The fence of the sender stands before both, so acquiring one of them is enough.
  const Chunk a = load_relaxed_sys(line), b = load_acquire_sys(line + 1);
  Header h;
  h.fresh =
      static_cast<uint32_t>(a.lo) == epoch_of(tag) && static_cast<uint32_t>(b.lo) == epoch_of(tag);
  h.count = static_cast<int32_t>(a.lo >> 32);
  const uint32_t form = static_cast<uint32_t>(a.hi >> 32);
  h.facts = {form >> 16, static_cast<uint32_t>(a.hi), form & 0xFFFFu,
             static_cast<uint32_t>(b.lo >> 32), b.hi};
  return h;
}

// The count alone; -1 until it has come.
__device__ __forceinline__ int read_count(const Context& c, uint64_t tag, int from) {
  const Chunk a = load_relaxed_sys(header_line(c, kDispatch, c.rank, from));
  return static_cast<uint32_t>(a.lo) == epoch_of(tag) ? static_cast<int>(a.lo >> 32) : -1;
}

// ---- giving up ------------------------------------------------------------------------------

__device__ __forceinline__ uint64_t bit(int rank) { return uint64_t{1} << rank; }

// Out of line and rare: waits must not pay registers or instructions for them.
static __device__ __noinline__ void give_up(const Context& c, const RoundFacts& facts, Operation op,
                                            uint64_t start, uint64_t suspects, int disagrees_with);
// When the wait began; 0 once the operation is given up.
static __device__ __noinline__ uint64_t look_around(const Context& c, const RoundFacts& facts,
                                                    Operation op, uint64_t start,
                                                    uint64_t suspects);

struct Wait {
  uint64_t start = 0;
  int polls = 0;
};

// Called by a whole warp after a poll in vain; false once the operation is given up. `suspects`:
// ranks whose data this warp waits for.
__device__ __forceinline__ bool keep_waiting(const Context& c, const RoundFacts& facts,
                                             const Operation& op, Wait& w, uint64_t suspects) {
  if ((++w.polls & 63) != 0) return true;
  w.start = look_around(c, facts, op, w.start, suspects);
  return w.start != 0;
}

// A source's count; the warp waits for it. Negative where the round is given up.
__device__ __forceinline__ int await_count(const DispatchLaunch& p, const Operation& op,
                                           int source) {
  if ((p.a.active >> source & 1) == 0) return 0;
  Wait wait;
  int count = read_count(p.c, op.tag, source);
  while (__any_sync(kAllLanes, count < 0)) {
    if (!keep_waiting(p.c, p.facts, op, wait, bit(source))) return -1;
    count = read_count(p.c, op.tag, source);
  }
  return count;
}

// ---- the wait that ends every operation -------------------------------------------------------

// One warp waits for the headers of all active ranks and compares their facts with this rank's;
// also for ranks that share no token: that is what makes a single buffer safe. With `blocks` it
// waits for all blocks of the peers too. Calls deliver(source, count) for every source.
template <class Deliver>
__device__ __forceinline__ bool await_all(const Context& c, const RoundFacts& facts,
                                          const Operation& op, bool blocks, Deliver deliver) {
  Wait w;
  const int lane = threadIdx.x % kWarp;
  const Phase phase = static_cast<Phase>(facts.phase);
  for (int first = 0; first < c.ep_size; first += kWarp) {
    const int source = first + lane;
    const bool exists = source < c.ep_size;
    const bool active = exists && (facts.active >> source & 1) != 0;
    Header h{!active, 0, facts};
    bool here = !active;
    for (;;) {
      if (!h.fresh) h = read_header(c, phase, op.tag, source);
      const auto* counter =
          reinterpret_cast<const uint32_t*>(c.control(c.rank, kBlocks, exists ? source : 0));
      here = here ||
             (h.fresh && (!blocks || source == c.rank || load_acquire_sys(counter) == kAllBlocks));
      const unsigned missing = __ballot_sync(kAllLanes, !here);
      const bool differs = h.fresh && active &&
                           (h.facts.phase != facts.phase || h.facts.rows != facts.rows ||
                            h.facts.format != facts.format || h.facts.active != facts.active ||
                            (c.debug && h.facts.global_scale_bits != facts.global_scale_bits));
      const unsigned wrong = __ballot_sync(kAllLanes, differs);
      if (wrong != 0) {
        give_up(c, facts, op, w.start, 0, first + __ffs(wrong) - 1);
        return false;
      }
      if (missing == 0) break;
      if (!keep_waiting(c, facts, op, w, static_cast<uint64_t>(missing) << first)) return false;
    }
    if (exists) deliver(source, h.count);
  }
  __syncwarp();
  return true;
}

}  // namespace moe_a2a::cuda
