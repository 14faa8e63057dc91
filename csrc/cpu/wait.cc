// Announcing a round to the peers, and waiting, for a bounded time, until they have announced
// theirs.
#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <ctime>

#include "endpoint.h"

namespace moe_a2a::cpu {
namespace {

using Clock = std::chrono::steady_clock;
constexpr int64_t kGraceNs = 500'000'000;  // for the posts of other ranks whose wait expired

int64_t since_ns(Clock::time_point start) {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now() - start).count();
}

// Not FUTEX_PRIVATE: the word is in memory that processes share.
void futex_wait(std::atomic<uint32_t>& word, uint32_t seen, int64_t ns) {
  const timespec limit{ns / 1'000'000'000, ns % 1'000'000'000};
  syscall(SYS_futex, &word, FUTEX_WAIT, seen, &limit, nullptr, 0);
}

// The count is raised before `sleeping` is read, and a waiter raises `sleeping` before the kernel
// compares the count: whichever comes first, either the waker sees the sleeper or the kernel
// sees the new count. Both are sequentially consistent for that.
void ring(Header& header) {
  header.doorbell.fetch_add(1, std::memory_order_seq_cst);
  if (header.sleeping.load(std::memory_order_seq_cst) != 0)
    syscall(SYS_futex, &header.doorbell, FUTEX_WAKE, 1, nullptr, nullptr, 0);
}

void pause_briefly() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// Waits until `ready()` or until `ns` have passed: polls for the endpoint's spin time, then sleeps
// on the doorbell. Polling gives the core away every microsecond, since the peer that it waits for
// may be on the same one: without that two ranks stay in lockstep of one spin time each.
template <class Ready>
bool wait_for(Endpoint& e, int64_t ns, Ready ready) {
  const auto start = Clock::now();
  do {
    for (int i = 0; i < 64; ++i) {
      if (ready()) return true;
      pause_briefly();
    }
    sched_yield();
  } while (since_ns(start) < std::min(ns, e.spin_ns));
  Header& header = e.header(e.rank);
  for (;;) {
    const uint32_t seen = header.doorbell.load(std::memory_order_seq_cst);
    header.sleeping.store(1, std::memory_order_seq_cst);
    const int64_t left = ns - since_ns(start);
    const bool done = ready();
    if (!done && left > 0) futex_wait(header.doorbell, seen, left);
    header.sleeping.store(0, std::memory_order_seq_cst);
    if (done || ready()) return true;
    if (left <= 0) return false;
  }
}

template <class T>
T load_acquire(const T& word) {
  return __atomic_load_n(&word, __ATOMIC_ACQUIRE);
}

uint64_t missing_ranks(const Endpoint& e, ControlRow row) {
  uint64_t missing = 0;
  for_each_rank(e.facts.active & ~(uint64_t{1} << e.rank), [&](int peer) {
    // Acquire pairs with the release in announce(): this source's rows are visible after it.
    if (load_acquire(e.line<Arrival>(e.rank, row, peer).epoch) != e.epoch)
      missing |= uint64_t{1} << peer;
  });
  return missing;
}

// Ranks that have given up; `by_now`: in the operation under way or before it.
uint64_t posters(const Endpoint& e, bool by_now) {
  uint64_t mask = 0;
  for_each_rank(e.facts.active & ~(uint64_t{1} << e.rank), [&](int peer) {
    const Post& post = e.line<Post>(e.rank, kPost, peer);
    if (load_acquire(post.generation) == e.generation &&
        !(by_now && operations_since(e.epoch, post.epoch) > 0))
      mask |= uint64_t{1} << peer;
  });
  return mask;
}

// Also to ranks that this one takes for inactive: they may see that differently.
void post_all(Endpoint& e, uint64_t missing, bool disagrees) {
  for (int peer = 0; peer < e.geometry.ep_size; ++peer) {
    if (peer == e.rank || e.window[peer] == nullptr) continue;
    Post& post = e.line<Post>(peer, kPost, e.rank);
    post.epoch = e.epoch;
    __atomic_store_n(&post.missing, missing, __ATOMIC_RELAXED);
    __atomic_store_n(&post.concluded, 0, __ATOMIC_RELAXED);
    post.disagrees = disagrees;
    post.facts = e.facts;
    __atomic_store_n(&post.generation, e.generation, __ATOMIC_RELEASE);
    ring(e.header(peer));
  }
}

// To those whose own wait ends later: they may be among the missing.
void conclude(Endpoint& e, uint64_t missing) {
  for (int peer = 0; peer < e.geometry.ep_size; ++peer) {
    if (peer == e.rank || e.window[peer] == nullptr) continue;
    Post& post = e.line<Post>(peer, kPost, e.rank);
    __atomic_store_n(&post.missing, missing, __ATOMIC_RELAXED);
    __atomic_store_n(&post.concluded, 1, __ATOMIC_RELEASE);
  }
}

// This rank's wait is over. Survivors tell each other whom they missed: the union, less everyone
// who is alive enough to post, is who is gone. What a peer misses in a later operation is not said
// of this one: it has come by way of this one, and whom it misses there may just be giving up here.
// Peers that have concluded without this rank go on without it, and it reports what they do.
void expire(Endpoint& e, ControlRow row) {
  const uint64_t self = uint64_t{1} << e.rank;
  // What those do not send that have given up on this rank is no reason to miss them.
  uint64_t mine = missing_ranks(e, row);
  for_each_rank(posters(e, true), [&](int peer) {
    const uint64_t missing =
        __atomic_load_n(&e.line<Post>(e.rank, kPost, peer).missing, __ATOMIC_RELAXED);
    if ((missing & self) != 0) mine &= ~(uint64_t{1} << peer);
  });
  post_all(e, mine, false);
  uint64_t posted = 0, missed = 0, without_me = 0;
  wait_for(e, kGraceNs, [&] {
    posted = posters(e, false);
    return (e.facts.active & ~self & ~posted) == 0;
  });
  for_each_rank(posters(e, true), [&](int peer) {
    const Post& post = e.line<Post>(e.rank, kPost, peer);
    const bool concluded = load_acquire(post.concluded) != 0;
    const uint64_t missing = __atomic_load_n(&post.missing, __ATOMIC_RELAXED);
    missed |= missing;
    if ((missing & self) == 0) return;
    e.failure.accusers |= uint64_t{1} << peer;
    if (concluded) without_me |= missing;
  });
  e.failure.kind = kPeerTimeout;
  e.failure.missing = without_me != 0 ? without_me : (mine | missed) & ~posted & ~self;
  // All are alive by now: whoever was late, be it one that this rank has not missed itself.
  if (e.failure.missing == 0)
    e.failure.missing = e.failure.accusers != 0 ? self : missed != 0 ? missed : mine;
  e.failure.waited_ns = since_ns(e.wait_start);
  conclude(e, e.failure.missing);
}

void disagree(Endpoint& e, int peer, const RoundFacts& theirs) {
  e.failure.kind = kMismatch;
  e.failure.peer = peer;
  e.failure.mine = e.facts;
  e.failure.theirs = theirs;
}

bool agree(const Endpoint& e, const RoundFacts& a, const RoundFacts& b) {
  return a.phase == b.phase && a.rows == b.rows && a.format == b.format && a.active == b.active &&
         (!e.shape.debug || a.global_scale_bits == b.global_scale_bits);
}

bool check_facts(Endpoint& e, ControlRow row) {
  for_each_rank(e.facts.active & ~(uint64_t{1} << e.rank), [&](int peer) {
    const Arrival& arrival = e.line<Arrival>(e.rank, row, peer);
    if (e.failure.kind == kNoFailure && !agree(e, e.facts, arrival.facts))
      disagree(e, peer, arrival.facts);
  });
  // Some may wait in vain for this rank, which need not have announced anything to them.
  if (e.failure.kind != kNoFailure) post_all(e, 0, true);
  return e.failure.kind == kNoFailure;
}

// Why peers gave the round up, if it was for a disagreement and not for a missing rank.
bool heard_of_disagreement(Endpoint& e) {
  for_each_rank(posters(e, true), [&](int peer) {
    const Post& post = e.line<Post>(e.rank, kPost, peer);
    if (post.disagrees && e.failure.kind == kNoFailure) disagree(e, peer, post.facts);
  });
  return e.failure.kind != kNoFailure;
}

}  // namespace

void announce(Endpoint& e, ControlRow row, const int32_t* counts) {
  copies_done();
  for_each_rank(e.facts.active & ~(uint64_t{1} << e.rank), [&](int peer) {
    Arrival& arrival = e.line<Arrival>(peer, row, e.rank);
    arrival.count = counts == nullptr ? 0 : counts[peer];
    arrival.facts = e.facts;
    // Release: the rows written to this peer happen before the epoch that announces them. Nobody
    // reads the line's other words until then: the peer finished the last round of this phase
    // before it announced the operation that let this rank begin the present one.
    __atomic_store_n(&arrival.epoch, e.epoch, __ATOMIC_RELEASE);
    ring(e.header(peer));
  });
  e.wait_start = Clock::now();
  if (e.shape.debug) note_sent(e);
}

Status await_arrivals(Endpoint& e, ControlRow row, int64_t slice_ns) {
  // A peer's post is looked at only while this rank lacks something.
  const auto settled = [&] {
    const uint64_t missing = missing_ranks(e, row);
    if (e.shape.debug) note_arrivals(e, missing);
    return missing == 0;
  };
  const int64_t left = e.timeout_ns - since_ns(e.wait_start);
  const bool woken = wait_for(e, std::clamp<int64_t>(left, 0, slice_ns),
                              [&] { return settled() || posters(e, true) != 0; });
  if (settled()) return check_facts(e, row) ? kDone : kFailed;
  if (!woken && left > slice_ns) return kPending;
  if (!heard_of_disagreement(e)) expire(e, row);
  return kFailed;
}

int64_t last_seen(const Endpoint& e, int peer) {
  int64_t ago = -1;
  for (ControlRow row : {kArriveDispatch, kArriveCombine}) {
    // Whoever is missed may come just now: a plain load would race with its announcement.
    const uint32_t seen = load_acquire(e.line<Arrival>(e.rank, row, peer).epoch);
    const int64_t behind = operations_since(seen, e.epoch);
    if (seen != 0 && (ago < 0 || behind < ago)) ago = behind;
  }
  return ago;
}

}  // namespace moe_a2a::cpu
