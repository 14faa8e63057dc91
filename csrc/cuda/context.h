// What the kernels of one endpoint share. Plain data, read by host and device code.
#pragma once

#include <cstdint>

#include "../args.h"
#include "../epoch.h"
#include "../layout.h"
#include "../routing.h"

namespace moe_a2a::cuda {

// Names an operation on every rank: the epoch in the low word, which is never 0; above it how often
// the epoch has wrapped around, and above that the generation, which only a reset advances. So a
// tag never comes again, and ranks on both sides of a wrap-around are of one generation. (4,096
// wrap-arounds take two years of operations of 5 us.)
constexpr int kGenerationShift = 44;
MOE_HD uint64_t next_tag(uint64_t tag) {
  const uint64_t next = tag + 1;
  return static_cast<uint32_t>(next) == 0 ? next + 1 : next;
}
MOE_HD uint32_t epoch_of(uint64_t tag) { return static_cast<uint32_t>(tag); }
MOE_HD uint32_t generation_of(uint64_t tag) {
  return static_cast<uint32_t>(tag >> kGenerationShift);
}

// The state of the round, on the device, so that graphs replay in any order. Dispatch reads its own
// words and writes combine's, and the other way round: no block can see a word advance that it has
// yet to read, and no kernel needs to count its blocks.
struct alignas(kLine) State {
  uint64_t dispatch_tag, combine_tag;
  uint32_t dispatch_round, combine_round;
  uint32_t failed;   // a kernel gave up: those after it return at once
  uint32_t failing;  // taken by the warp that gives up
  uint32_t units;    // that combine has dealt; dispatch begins it at 0
  uint64_t waiting;  // operation in which a wait has looked around, and since when
  uint64_t waiting_since;
  int32_t received[kMaxRanks];  // rows from each source, in the round under way
};

enum StatusKind : uint32_t { kFine = 0, kPeerTimeout = 1, kMismatch = 2, kExcluded = 3 };

// Why a kernel gave up: memory of the host that the device writes.
struct alignas(kLine) Status {
  uint32_t kind;  // stored last
  uint32_t phase, round;
  int32_t peer;  // of a mismatch
  uint64_t missing, accusers;
  int64_t waited_ns;
  RoundFacts mine, theirs;
  int32_t operations_ago[kMaxRanks];  // since each rank was last seen, -1 for never
};

// n / d as a product, exact for all n below 2^31: with 2^(shift-1) < d <= 2^shift the magic number
// is 2^(31+shift) / d, rounded up by less than 1, which n times over is less than 1 / d too much.
struct FastDivisor {
  uint32_t magic;
  int32_t shift;
};

inline FastDivisor fast_divisor(int64_t divisor) {
  const uint64_t d = divisor < 1 ? 1 : static_cast<uint64_t>(divisor);
  int shift = 0;
  while (uint64_t{1} << shift < d) ++shift;
  return {static_cast<uint32_t>(((uint64_t{1} << (31 + shift)) + d - 1) / d), shift};
}

MOE_HD uint32_t operator/(uint32_t n, const FastDivisor& f) {
  return static_cast<uint32_t>(uint64_t{2 * n} * f.magic >> 32) >> f.shift;
}

// The same without the shift, exact where n * d < 2^31: for experts, of which a token has many.
struct ExpertDivisor {
  uint32_t magic;
};

inline ExpertDivisor expert_divisor(int64_t divisor) {
  const uint64_t d = divisor < 1 ? 1 : static_cast<uint64_t>(divisor);
  return {static_cast<uint32_t>((uint64_t{1} << 31) / d + 1)};
}

MOE_HD uint32_t operator/(uint32_t n, const ExpertDivisor& f) {
  return static_cast<uint32_t>(uint64_t{2 * n} * f.magic >> 32);
}

// One part of a row: where it lies in the row's image and in the window.
struct Segment {
  int32_t image, bytes;
  int64_t region;
};
constexpr int kSegments = 4 + kMaxExtras;
enum SegmentId : int { kSegmentPayload, kSegmentScales, kSegmentIds, kSegmentWeights };

// What a block sends to two ranks fits into 16 bytes: tally.cuh.
struct Chunk;
constexpr int kMostBlocks = 256;  // of a grid
constexpr int kTallyRanks = 2;
MOE_HD int tallies(int ep_size) { return (ep_size + kTallyRanks - 1) / kTallyRanks; }

struct Context {
  uint8_t* window[kMaxRanks];
  State* state;
  Status* status;
  uint64_t* token_ranks;  // [Tmax] mask of the ranks that a token went to
  int32_t* token_slots;   // [Tmax, W] its slot there
  Chunk* tallies;         // [pairs of ranks, kMostBlocks]
  int64_t payload, scales, ids, weights, combine, dispatch_inbox;  // offsets
  int64_t extra[kMaxExtras];
  int64_t dispatch_outbox;      // this rank's part of a peer's inbox
  int64_t dispatch_peer_bytes;  // of an inbox, for one source
  int64_t timeout_ns, combine_bytes;
  int32_t ep_size, rank, num_experts, top_k, hidden, padded, max_tokens, num_extras;
  int32_t invalid_id;
  int32_t larger_end;  // experts below it live on ranks that own one more than the others
  int32_t larger_ranks;
  ExpertDivisor larger, smaller;  // experts per rank; there are fewer than 2^15
  bool scrub_all, debug;
  bool strict;  // nothing but what the memory model promises: see send_header()

  MOE_HD uint8_t* control(int owner, ControlRow row, int source) const {
    return window[owner] + (1 + static_cast<int64_t>(row) * ep_size + source) * kLine;
  }
};

// Arguments of the dispatch kernels.
struct DispatchLaunch {
  Context c;
  DispatchArgs a;
  const float* global_scale;  // device memory, or null for 1
  Segment segment[kSegments];
  int32_t segments, image_bytes;
  int32_t pitch;  // bytes of a row in the inbox
  int32_t runs;   // of strips, in a row
  int32_t share;  // of a block: runs, or tokens in bulk
  int32_t parts;  // that a row is split into, in bulk
  int32_t steps;  // of a warp, in a part
  // Words of a token's ids, and bytes that they are loaded by, 16, 8 or 4: what their rows are a
  // multiple of. No words where ids go the long way: experts are not shared out evenly, or there
  // are more than 32 ranks.
  int32_t id_words, id_bytes;
  bool everyone;     // is active
  bool odd_choices;  // rows of ids or weights are not int32 and fp32 in whole chunks of 16 bytes
  FastDivisor by_runs, by_parts, by_peers;  // the last: the other ranks
  // Warps of a block that send while the others receive, and nanoseconds that these sleep between
  // polls. 0: all warps send, and then all receive.
  int32_t senders, nap;
  RoundFacts facts;
};

// Arguments of the combine kernels.
struct CombineLaunch {
  Context c;
  CombineArgs a;
  bool odd;  // y has rows that do not begin on 16 bytes
  int32_t tokens;
  int32_t push_runs, runs;  // of steps, in a row that is pushed, and in one that is summed
  int32_t units;            // runs that may be pushed
  int32_t pushers;          // warps of a block that push while the others sum; 0: all do both
  uint32_t nap;             // ns between polls of those
  int32_t targets;          // ranks that rows are pushed to: the others
  FastDivisor by_push_runs, by_runs, by_targets;
  RoundFacts facts;
};

// The same where rows are grouped by expert. What the others need not know comes behind it.
struct GroupedLaunch : CombineLaunch {
  Grouped grouped;
};

}  // namespace moe_a2a::cuda
