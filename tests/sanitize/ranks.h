// Ranks as threads over windows of ordinary memory.
//
// Nothing here orders one rank's accesses before another's: what orders them has to be in the
// kernels, or ThreadSanitizer says so. Hence relaxed counters, and no barrier between rounds.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "cpu/endpoint.h"
#include "material.h"

namespace sanitize {

using moe_a2a::cpu::Endpoint;

struct Setup {
  std::string name;
  int64_t ranks, experts, top_k, hidden, capacity;
  int wire, combine_wire;
  std::vector<int64_t> extras = {};
  bool scrub_all = false, allow_defer = false, debug = false;
  bool streaming = false;  // rows past the cache
  int64_t alignment = 32;
  int32_t invalid_id = -1;
  uint32_t epoch = 0;        // of the last operation before the first
  int64_t leave_after = -1;  // round from which on the last rank takes no part

  uint64_t all() const { return (uint64_t{1} << ranks) - 1; }
  Widths widths() const { return widths_of(wire, hidden, alignment); }
};

// ns that a rank waits for another one that does come: far more than any takes.
constexpr int64_t kPatience = 30'000'000'000;

// Zeroed. With AddressSanitizer everything in it that is no row may not be touched.
class Window {
 public:
  Window(const moe_a2a::Geometry& geometry, const moe_a2a::Layout& layout);
  ~Window();
  uint8_t* data() const { return data_; }

 private:
  uint8_t* data_;
  int64_t nbytes_;
};

class Rank {
 public:
  Rank(const Setup& setup, int rank, const std::vector<uint8_t*>& windows);

  // Fresh windows, a new generation, and a later epoch for the ranks in the mask, all of which call
  // this. The windows that the endpoints were opened with are where they meet.
  void reset(uint64_t members);

  const Setup& setup;
  Endpoint endpoint;

 private:
  const std::vector<uint8_t*> lobby_;
  std::vector<std::unique_ptr<Window>> fresh_;  // a rank left behind may still write to old ones
  int64_t attempt_ = 0;
  std::vector<int64_t> seen_;  // [W] the attempt by which each rank was met last
};

// What has been looked at, over all threads: a run in which nothing was is no success.
struct Tally {
  std::atomic<int64_t> rounds{0}, rows{0}, sums{0}, failures{0};
};
extern Tally tally;

inline void count(std::atomic<int64_t>& what, int64_t n = 1) {
  what.fetch_add(n, std::memory_order_relaxed);
}

[[noreturn]] void die(const Rank& rank, const std::string& what);
inline void require(const Rank& rank, bool holds, const std::string& what) {
  if (!holds) die(rank, what);
}

// `play` on a thread for each rank; returns when all have.
void run_ranks(const Setup& setup, const std::function<void(Rank&)>& play);

}  // namespace sanitize
