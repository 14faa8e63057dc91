#include "failures.h"

#include <chrono>
#include <thread>
#include <vector>

#include "rounds.h"

namespace sanitize {
namespace {

using namespace moe_a2a;

constexpr int64_t kLimit = 1'000'000'000;   // ns; a rank that comes is seldom as late as that
constexpr int64_t kBefore = 2, kAfter = 4;  // rounds

Setup setup_of(const char* name, int64_t ranks) {
  Setup s{name, ranks, 3 * ranks, 3, 64, 6, kMxfp8, kBf16};
  s.extras = {5};
  s.allow_defer = s.debug = true;
  return s;
}

// Something that ranks wait for without its ordering anything.
struct Gate {
  std::atomic<int64_t> passed{0};
  void pass() { passed.fetch_add(1, std::memory_order_relaxed); }
  void wait_for(int64_t wanted) const {
    while (passed.load(std::memory_order_relaxed) < wanted)
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
};

void play_rounds(Rank& rank, int64_t first, int64_t end, uint64_t active) {
  for (int64_t n = first; n < end; ++n) {
    Round round = round_of(rank.setup, n);
    round.active = active;
    play_round(rank, round);
  }
}

struct Absence {
  Setup setup;
  bool in_combine;   // the last rank dispatches, but does not combine
  bool left_behind;  // the others restart without it, and later with it
  Gate gave_up, went_on;
};

void find_it_missing(Rank& rank, Absence& a, const Round& round) {
  Endpoint& e = rank.endpoint;
  const auto last = static_cast<int>(rank.setup.ranks - 1);
  e.timeout_ns = kLimit;
  if (a.in_combine) require(rank, dispatch_round(rank, round) == cpu::kDone, "all have dispatched");
  const cpu::Status status =
      a.in_combine ? combine_round(rank, round) : dispatch_round(rank, round);
  require(rank, status == cpu::kFailed && e.failure.kind == cpu::kPeerTimeout, "a rank is missing");
  require(rank, e.failure.missing == uint64_t{1} << last, "it is the last one that is missing");
  require(rank, e.failure.waited_ns >= kLimit, "it was waited for");
  require(rank, cpu::last_seen(e, last) == 1, "it did its part of the last operation");
  count(tally.failures);
  a.gave_up.pass();
  // The missing rank comes about now.
  if (!a.left_behind)
    for (int i = 0; i < 100; ++i) {
      require(rank, cpu::last_seen(e, last) >= -1, "it comes while somebody looks");
      std::this_thread::sleep_for(std::chrono::microseconds(100));
    }
}

// It does not know that it is late: it plays on until it is told.
void come_late(Rank& rank, Absence& a, const Round& round) {
  Endpoint& e = rank.endpoint;
  e.timeout_ns = kLimit;
  if (a.in_combine) require(rank, dispatch_round(rank, round) == cpu::kDone, "all have dispatched");
  (a.left_behind ? a.went_on : a.gave_up).wait_for(rank.setup.ranks - 1);
  const bool first = !a.in_combine;
  // The others announced what they gave up in, so it goes through; the next operation does not.
  require(rank, (first ? dispatch_round(rank, round) : combine_round(rank, round)) == cpu::kDone,
          "the others had come");
  const Round next = round_of(rank.setup, kBefore + 1);
  const cpu::Status status = first ? combine_round(rank, round) : dispatch_round(rank, next);
  require(rank, status == cpu::kFailed && e.failure.kind == cpu::kPeerTimeout, "they had given up");
  require(rank, e.failure.missing == uint64_t{1} << e.rank, "on this rank");
  require(rank, e.failure.accusers == rank.setup.all() >> 1, "all of them had");
  count(tally.failures);
}

void play_absence(Rank& rank, Absence& a) {
  const uint64_t all = rank.setup.all(), members = a.left_behind ? all >> 1 : all;
  const bool last = rank.endpoint.rank == rank.setup.ranks - 1;
  play_rounds(rank, 0, kBefore, all);
  Round round = round_of(rank.setup, kBefore);
  round.active = all;
  if (last)
    come_late(rank, a, round);
  else
    find_it_missing(rank, a, round);
  rank.endpoint.timeout_ns = kPatience;
  if (!last || !a.left_behind) {
    rank.reset(members);
    play_rounds(rank, kBefore, kAfter, members);
    a.went_on.pass();
  }
  if (!a.left_behind) return;
  rank.reset(all);
  play_rounds(rank, kAfter, kAfter + 2, all);
}

struct Disagreement {
  Setup setup;
  void (*differ)(Round&);  // what the first rank calls it with
};

// The rows of a rank with another R, or with rows of another size, come to lie among those of other
// sources. Nobody reads any of them, and all stay inside the window, so that is what a failed round
// may do; but two ranks then store to the same bytes, which ThreadSanitizer rightly calls a race.
// So there the rank that differs has no rows.
#if !defined(__has_feature)
#define __has_feature(name) 0
#endif
#if defined(__SANITIZE_THREAD__) || __has_feature(thread_sanitizer)
constexpr bool kRowsMayMeet = false;
#else
constexpr bool kRowsMayMeet = true;
#endif

void play_disagreement(Rank& rank, const Disagreement& d) {
  const uint64_t all = rank.setup.all();
  play_rounds(rank, 0, kBefore, all);
  Round round = round_of(rank.setup, kBefore);
  round.rows = 3;
  for (int64_t& tokens : round.tokens) tokens = 3;
  round.input = Input::kQuantize;
  round.routing = kHot;  // to one rank, and so many that they do meet
  if (!kRowsMayMeet) round.tokens.front() = 0;
  if (rank.endpoint.rank == 0) d.differ(round);
  require(rank, dispatch_round(rank, round) == cpu::kFailed, "the ranks disagree");
  require(rank, rank.endpoint.failure.kind == cpu::kMismatch, "they know that they do");
  require(rank, rank.endpoint.failure.peer >= 0, "with whom");
  count(tally.failures);
  rank.reset(all);
  play_rounds(rank, kBefore, kAfter, all);
}

}  // namespace

void play_absences() {
  std::vector<std::thread> cases;  // at the same time, since they mostly wait
  for (int64_t ranks : {2, 3, 4})
    for (bool in_combine : {false, true})
      cases.emplace_back([=] {
        const char* name = in_combine ? "absent in combine" : "absent in dispatch";
        Absence a{setup_of(name, ranks), in_combine, (ranks + in_combine) % 2 == 0, {}, {}};
        run_ranks(a.setup, [&a](Rank& rank) { play_absence(rank, a); });
      });
  for (auto& each : cases) each.join();
}

void play_disagreements() {
  const Disagreement all[] = {
      {setup_of("another R", 3),
       [](Round& r) {
         r.tokens[0] += r.tokens[0] != 0;
         r.rows = 4;
       }},
      {setup_of("deferred or not", 2), [](Round& r) { r.input = Input::kDefer; }},
      {setup_of("another global scale", 4), [](Round& r) { r.global_scale = 2; }},
      {setup_of("other active ranks", 3), [](Round& r) { r.active = 0b101; }},
  };
  for (const Disagreement& d : all)
    run_ranks(d.setup, [&d](Rank& rank) { play_disagreement(rank, d); });
}

}  // namespace sanitize
