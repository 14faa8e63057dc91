// What a warp does whose wait is over: survivors tell each other whom they missed, and the host is
// told. Compiled into every kernel, called by none that goes well.
#pragma once

#include "debug.h"
#include "wait.cuh"

namespace moe_a2a::cuda {

__device__ inline uint64_t or_over_warp(uint64_t v) {
  for (int step = kWarp / 2; step > 0; step /= 2) v |= __shfl_xor_sync(kAllLanes, v, step);
  return v;
}

// Negative where the clock of one multiprocessor is a little behind another's.
__device__ inline int64_t elapsed(uint64_t from, uint64_t to) {
  return static_cast<int64_t>(to - from);
}

struct Posts {
  uint64_t posted = 0, missed = 0, accusers = 0, disagree = 0;
  uint64_t without_me = 0;  // whom peers report that have concluded without this rank
  bool excluded = false;
};

// What a post says to a rank in operation `tag`.
struct Notice {
  bool given_up;  // in this generation
  bool by_now;    // in this operation or before it
  bool excluded;  // a reset has left this rank out

  __device__ __forceinline__ Notice(const Post* post, uint64_t tag) {
    const uint32_t seen = load_acquire_sys(&post->generation), own = generation_of(tag);
    const uint32_t epoch = *const_cast<const volatile uint32_t*>(&post->epoch);
    given_up = seen == own;
    by_now = given_up && operations_since(epoch_of(tag), epoch) <= 0;
    excluded = seen > own;
  }
};

__device__ inline Posts read_posts(const Context& c, uint64_t active, uint64_t tag) {
  Posts p;
  for (int peer = threadIdx.x % kWarp; peer < c.ep_size; peer += kWarp) {
    if (peer == c.rank) continue;
    const auto* post = reinterpret_cast<const Post*>(c.control(c.rank, kPost, peer));
    const Notice notice(post, tag);
    p.excluded |= notice.excluded;
    if (!notice.given_up) continue;
    const auto* words = reinterpret_cast<const volatile Post*>(post);
    if (words->disagrees != 0 && notice.by_now) p.disagree |= bit(peer);
    if ((active >> peer & 1) == 0) continue;
    p.posted |= bit(peer);
    // What it misses in a later operation is not said of this one: it has come by way of this one,
    // and whom it misses there may just be giving up here.
    if (!notice.by_now) continue;
    const bool concluded = load_acquire_sys(&post->concluded) != 0;
    const uint64_t missing = words->missing;
    p.missed |= missing;
    if ((missing >> c.rank & 1) == 0) continue;
    p.accusers |= bit(peer);
    if (concluded) p.without_me |= missing;
  }
  p.posted = or_over_warp(p.posted);
  p.missed = or_over_warp(p.missed);
  p.accusers = or_over_warp(p.accusers);
  p.disagree = or_over_warp(p.disagree);
  p.without_me = or_over_warp(p.without_me);
  p.excluded = __any_sync(kAllLanes, p.excluded);
  return p;
}

// Also to ranks that this one takes for inactive: they may see that differently.
__device__ inline void post_to_all(const Context& c, const RoundFacts& facts, uint64_t tag,
                                   uint64_t missing, bool disagrees) {
  for (int peer = threadIdx.x % kWarp; peer < c.ep_size; peer += kWarp) {
    if (peer == c.rank || c.window[peer] == nullptr) continue;
    auto* post = reinterpret_cast<Post*>(c.control(peer, kPost, c.rank));
    post->epoch = epoch_of(tag);
    post->missing = missing;
    post->concluded = 0;
    post->disagrees = disagrees;
    post->facts = facts;
    store_release_sys(&post->generation, generation_of(tag));
  }
  __syncwarp();
}

// To those whose own wait ends later: they may be among the missing.
__device__ inline void conclude(const Context& c, uint64_t missing) {
  for (int peer = threadIdx.x % kWarp; peer < c.ep_size; peer += kWarp) {
    if (peer == c.rank || c.window[peer] == nullptr) continue;
    auto* post = reinterpret_cast<Post*>(c.control(peer, kPost, c.rank));
    *const_cast<volatile uint64_t*>(&post->missing) = missing;
    store_release_sys(&post->concluded, 1);
  }
  __syncwarp();
}

__device__ inline uint64_t missing_ranks(const Context& c, const RoundFacts& facts, uint64_t tag) {
  uint64_t missing = 0;
  for (int peer = threadIdx.x % kWarp; peer < c.ep_size; peer += kWarp) {
    const bool counts = peer != c.rank && (facts.active >> peer & 1) != 0;
    if (!counts) continue;
    const bool here = (facts.phase & kMeeting) != 0
                          ? load_relaxed_sys(meeting_line(c, c.rank, peer)).lo == tag
                          : read_header(c, static_cast<Phase>(facts.phase), tag, peer).fresh;
    if (!here) missing |= bit(peer);
  }
  return or_over_warp(missing);
}

__device__ inline void note_last_seen(const Context& c, uint64_t tag) {
  for (int peer = threadIdx.x % kWarp; peer < c.ep_size; peer += kWarp) {
    int32_t ago = -1;
    for (Phase phase : {kDispatch, kCombineOp}) {
      const auto seen =
          static_cast<uint32_t>(load_relaxed_sys(header_line(c, phase, c.rank, peer)).lo);
      const int32_t behind = operations_since(seen, epoch_of(tag));
      if (seen != 0 && behind >= 0 && (ago < 0 || behind < ago)) ago = behind;
    }
    c.status->operations_ago[peer] = ago;
  }
}

static __device__ __noinline__ void give_up(const Context& c, const RoundFacts& facts, Operation op,
                                            uint64_t start, uint64_t suspects, int disagrees_with) {
  const int lane = threadIdx.x % kWarp;
  uint32_t taken = lane == 0 ? atomicExch(&c.state->failing, 1u) : 0;
  if (__shfl_sync(kAllLanes, taken, 0) != 0) return;
  const uint64_t self = bit(c.rank);
  uint64_t missing = missing_ranks(c, facts, op.tag) | (suspects & ~self);
  Posts posts = read_posts(c, facts.active, op.tag);
  // What those do not send that have given up on this rank is no reason to miss them.
  missing &= ~posts.accusers;
  StatusKind kind = posts.excluded ? kExcluded : kPeerTimeout;
  RoundFacts theirs = facts;
  int peer = disagrees_with;
  if (peer >= 0) {
    theirs = read_header(c, static_cast<Phase>(facts.phase), op.tag, peer).facts;
  } else if (posts.disagree != 0) {
    peer = __ffsll(posts.disagree) - 1;
    theirs = reinterpret_cast<const Post*>(c.control(c.rank, kPost, peer))->facts;
  }
  if (peer >= 0 && kind == kPeerTimeout) kind = kMismatch;
  post_to_all(c, facts, op.tag, kind == kPeerTimeout ? missing : 0, kind == kMismatch);
  if (kind == kPeerTimeout) {
    const uint64_t posted_at = nanoseconds();
    // The lanes read the time one after the other: they have to agree on whether it is over.
    while ((facts.active & ~self & ~posts.posted) != 0 &&
           __all_sync(kAllLanes, elapsed(posted_at, nanoseconds()) < kGraceNs))
      posts = read_posts(c, facts.active, op.tag);
    posts = read_posts(c, facts.active, op.tag);
    const uint64_t mine = missing;
    // Peers that have concluded without this rank go on without it, and it reports what they do.
    missing =
        posts.without_me != 0 ? posts.without_me : (missing | posts.missed) & ~posts.posted & ~self;
    // All are alive by now: whoever was late, be it one that this rank has not missed itself.
    if (missing == 0)
      missing = posts.accusers != 0 ? self : posts.missed != 0 ? posts.missed : mine;
    conclude(c, missing);
  }
  note_last_seen(c, op.tag);
  __syncwarp();
  if (lane == 0) {
    Status& s = *c.status;
    s.phase = facts.phase & ~kMeeting;
    s.round = op.round;
    s.peer = peer;
    s.missing = missing;
    s.accusers = posts.accusers;
    s.waited_ns = start == 0 ? 0 : max(elapsed(start, nanoseconds()), int64_t{0});
    s.mine = facts;
    s.mine.phase &= ~kMeeting;
    s.theirs = theirs;
    c.state->failed = 1;
  }
  __syncwarp();
  // Lanes wrote parts of the record: each makes its own visible before the word that announces it.
  __threadfence_system();
  __syncwarp();
  if (lane == 0) store_release_sys(&c.status->kind, kind);
}

// When a wait of operation `tag` first looked around: the limit is one of the operation, not of
// each of its waits. The time is there before the tag that vouches for it; two warps that both
// write it are a moment apart.
__device__ inline uint64_t first_look(State& state, uint64_t tag, uint64_t now) {
  volatile State& s = state;
  uint64_t since = now;
  if (threadIdx.x % kWarp == 0) {
    if (s.waiting == tag) {
      __threadfence();
      since = s.waiting_since;
    } else {
      s.waiting_since = now;
      __threadfence();
      s.waiting = tag;
    }
  }
  return __shfl_sync(kAllLanes, since, 0);
}

// The time, and whether others have given up. A peer's post is looked at only here, so only while
// this rank lacks something.
static __device__ __noinline__ uint64_t look_around(const Context& c, const RoundFacts& facts,
                                                    Operation op, uint64_t start,
                                                    uint64_t suspects) {
  const bool given_up = *const_cast<volatile uint32_t*>(&c.state->failing) != 0;
  if (__any_sync(kAllLanes, given_up)) return 0;
  const uint64_t now = nanoseconds();
  if (start == 0) start = first_look(*c.state, op.tag, now);
  bool posted = false;
  for (int peer = threadIdx.x % kWarp; peer < c.ep_size; peer += kWarp) {
    const auto* post = reinterpret_cast<const Post*>(c.control(c.rank, kPost, peer));
    const Notice notice(post, op.tag);
    posted |= notice.by_now || notice.excluded;
  }
  const bool over = elapsed(start, now) > c.timeout_ns;
  if (!__any_sync(kAllLanes, posted || over)) return start;
  give_up(c, facts, op, start, suspects, -1);
  return 0;
}

}  // namespace moe_a2a::cuda
