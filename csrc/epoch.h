// Epochs, and the packet by which a source announces its round. Host and device code.
#pragma once

#include <cstdint>

#include "layout.h"

namespace moe_a2a {

// An epoch names one operation (a dispatch or a combine). 0 is what cleared memory holds, so it is
// never an epoch.
MOE_HD uint32_t next_epoch(uint32_t epoch) { return epoch + 1 == 0 ? 1 : epoch + 1; }

// How many operations `seen` is behind `epoch`; negative where it is ahead. Ranks of one generation
// are far less than half of all operations apart.
MOE_HD int32_t operations_since(uint32_t seen, uint32_t epoch) {
  const int32_t behind = static_cast<int32_t>(epoch - seen);
  return behind > 0 && seen > epoch ? behind - 1 : behind;  // wrapped around: 0 was left out
}

enum Phase : uint32_t { kIdle = 0, kDispatch = 1, kCombineOp = 2 };

// What a source says of its round; the receiver compares everything but count with its own.
struct RoundFacts {
  uint32_t phase;
  uint32_t rows;    // R
  uint32_t format;  // index of the wire, plus kDeferred where bf16 travels instead
  uint32_t global_scale_bits;
  uint64_t active;  // mask of active ranks
};

constexpr uint32_t kDeferred = 0x100;

struct alignas(kLine) Arrival {
  uint32_t epoch;  // stored last, with release; read first, with acquire
  uint32_t count;  // rows that this source sent here
  RoundFacts facts;
};
static_assert(sizeof(Arrival) == kLine, "one line each: two sources never share one");

// A rank that gives an operation up tells its peers why: whom it missed, or that it disagrees with
// one. It will send nothing more, so a peer that waits in this operation or a later one waits in
// vain; but for an earlier one it has sent all, and what others owe may be on its way.
struct alignas(kLine) Post {
  uint32_t generation;  // stored last, with release
  uint32_t epoch;       // of the operation
  uint32_t disagrees;
  uint32_t concluded;  // stored later, with release: `missing` is then what this rank reports
  uint64_t missing;
  RoundFacts facts;
};
static_assert(sizeof(Post) == kLine, "one line each");

}  // namespace moe_a2a
