// One rank's end of the exchange: its window, the windows of its peers, and the state of its round.
#pragma once

#include <atomic>
#include <cfenv>
#include <chrono>
#include <cstdint>
#include <vector>

#include "../args.h"
#include "../epoch.h"
#include "../layout.h"
#include "copy.h"
#include "quantize.h"

namespace moe_a2a::cpu {

enum Status : int { kDone, kPending, kFailed };

enum FailureKind : int { kNoFailure, kPeerTimeout, kMismatch };

struct Failure {
  FailureKind kind = kNoFailure;
  int64_t waited_ns = 0;
  uint64_t missing = 0;   // after agreeing with the other survivors
  uint64_t accusers = 0;  // peers that gave up on this rank
  int peer = -1;          // of a mismatch
  RoundFacts mine{}, theirs{};
};

// With shape.debug: when an operation got where, in nanoseconds of the monotonic clock.
struct OperationTimes {
  int64_t begin, sent, arrived, end;
  int64_t waits[kMaxRanks];  // since `sent`; -1 where nobody waited
  uint64_t awaited;          // ranks that have not been seen yet
};

// The first line of a window's control region.
struct alignas(kLine) Header {
  std::atomic<uint32_t> doorbell;  // counts announcements; the futex word
  std::atomic<uint32_t> sleeping;  // 1 while the owner may be in the futex
};
static_assert(sizeof(Header) == kLine, "control_bytes counts one line");

struct Endpoint {
  Geometry geometry;
  Layout layout;
  Shape shape;
  int rank;
  int64_t timeout_ns, spin_ns;
  int64_t cached;  // bytes that all ranks may write in one operation and still find in the cache
  std::vector<uint8_t*> window;  // [W]
  std::vector<uint8_t> owner;    // [E]

  uint32_t epoch = 0, generation = 1;
  int64_t round = 0;
  RoundFacts facts{};  // of the operation under way
  int64_t tokens = 0, max_rows = 0;
  std::vector<uint64_t> ranks_of_token;  // [T] mask
  int32_t received[kMaxRanks] = {};      // rows from each source
  int32_t* counts_out = nullptr;
  CombineArgs combine{};
  bool sums = false;  // its rows were summed as they were pushed, the rank's own into its inbox
  Rows extra[kMaxExtras] = {};
  std::vector<uint8_t> scratch;  // one row of everything
  std::chrono::steady_clock::time_point wait_start;
  Failure failure;
  OperationTimes times{};

  uint8_t* region(int owner_rank, int id) const {
    return window[owner_rank] + layout.region[id].offset;
  }
  Header& header(int owner_rank) const { return *reinterpret_cast<Header*>(window[owner_rank]); }
  template <class Line>
  Line& line(int owner_rank, ControlRow row, int source) const {
    const int64_t index = 1 + row * geometry.ep_size + source;
    return *reinterpret_cast<Line*>(window[owner_rank] + index * kLine);
  }
  // For `nbytes` that this rank writes now, as every other rank does.
  Copy copy_of(int64_t nbytes) const {
    return nbytes * geometry.ep_size > cached ? copy_streaming : copy_cached;
  }
  // Where the row in `slot` of rank `from` lies in the combine inbox of rank `to`.
  uint8_t* inbox_row(int to, int from, int64_t slot) const {
    return region(to, kCombine) + (from * geometry.max_tokens + slot) * geometry.combine_bytes;
  }
};

// Kernels must not inherit flush-to-zero or another rounding mode from the calling thread.
class FloatEnvironment {
 public:
  FloatEnvironment() {
    std::fegetenv(&saved_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~FloatEnvironment() { std::fesetenv(&saved_); }
  FloatEnvironment(const FloatEnvironment&) = delete;
  FloatEnvironment& operator=(const FloatEnvironment&) = delete;

 private:
  std::fenv_t saved_;
};

template <class F>
inline void for_each_rank(uint64_t mask, F f) {
  for (; mask != 0; mask &= mask - 1) f(__builtin_ctzll(mask));
}

// endpoint.cc
void open_endpoint(Endpoint& e, const Geometry& geometry, const Shape& shape, int rank,
                   std::vector<uint8_t*> windows);
// A new generation over fresh, zeroed windows; null for a rank that takes no part.
void restart_endpoint(Endpoint& e, std::vector<uint8_t*> windows, uint32_t epoch,
                      uint32_t generation);

// The two operations and the rest of one whose status was kPending. Each waits for at most
// `slice_ns`, so that the caller gets to look at signals.
Status dispatch(Endpoint& e, const DispatchArgs& args, int64_t slice_ns);
// `grouped`: of what the rows of args.y, [size, H] then, are sums; null where they are [W, R, H].
Status combine(Endpoint& e, const CombineArgs& args, int64_t slice_ns,
               const Grouped* grouped = nullptr);
Status finish_dispatch(Endpoint& e, int64_t slice_ns);
Status finish_combine(Endpoint& e, int64_t slice_ns);

// wait.cc
void announce(Endpoint& e, ControlRow row, const int32_t* counts);
Status await_arrivals(Endpoint& e, ControlRow row, int64_t slice_ns);
// How many operations ago `peer` was last heard of, -1 for never.
int64_t last_seen(const Endpoint& e, int peer);

// debug.cc; only with shape.debug
void begin_debug(Endpoint& e);
void note_sent(Endpoint& e);
void note_arrivals(Endpoint& e, uint64_t missing);
void end_debug(Endpoint& e);

}  // namespace moe_a2a::cpu
