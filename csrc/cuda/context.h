// What the kernels of one endpoint share. Plain data, read by host and device code.
#pragma once

#include <cstdint>

#include "../args.h"
#include "../epoch.h"
#include "../layout.h"
#include "../routing.h"

namespace moe_a2a::cuda {

// Names an operation on every rank: generation in the high word, epoch in the low one, which is
// never 0. The high word also counts wrap-arounds of the low one, so that a tag never comes again.
MOE_HD uint64_t next_tag(uint64_t tag) {
  const uint64_t next = tag + 1;
  return static_cast<uint32_t>(next) == 0 ? next + 1 : next;
}
MOE_HD uint32_t epoch_of(uint64_t tag) { return static_cast<uint32_t>(tag); }
MOE_HD uint32_t generation_of(uint64_t tag) { return static_cast<uint32_t>(tag >> 32); }

// The state of the round, on the device, so that graphs replay in any order. Dispatch reads its own
// words and writes combine's, and the other way round: no block can see a word advance that it has
// yet to read, and no kernel needs to count its blocks.
struct alignas(kLine) State {
  uint64_t dispatch_tag, combine_tag;
  uint32_t dispatch_round, combine_round;
  uint32_t failed;              // a kernel gave up: those after it return at once
  uint32_t failing;             // taken by the warp that gives up
  uint32_t units;               // that combine in bulk has dealt; dispatch begins it at 0
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

// n / d as a product, exact where n * d < 2^31: every use says why it is.
struct FastDivisor {
  uint32_t magic;
};

inline FastDivisor fast_divisor(int64_t divisor) {
  const uint64_t d = divisor < 1 ? 1 : static_cast<uint64_t>(divisor);
  return {static_cast<uint32_t>((uint64_t{1} << 31) / d + 1)};
}

MOE_HD uint32_t operator/(uint32_t n, const FastDivisor& f) {
  return static_cast<uint32_t>(uint64_t{2 * n} * f.magic >> 32);
}

// One part of a row: where it lies in the row's image and in the window.
struct Segment {
  int32_t image, bytes;
  int64_t region;
};
constexpr int kSegments = 4 + kMaxExtras;
enum SegmentId : int { kSegmentPayload, kSegmentScales, kSegmentIds, kSegmentWeights };

struct Context {
  uint8_t* window[kMaxRanks];
  State* state;
  Status* status;
  uint64_t* token_ranks;  // [Tmax] mask of the ranks that a token went to
  int32_t* token_slots;   // [Tmax, W] its slot there
  int64_t payload, scales, ids, weights, combine, dispatch_inbox, combine_inbox;  // offsets
  int64_t extra[kMaxExtras];
  int64_t dispatch_outbox, combine_outbox;          // this rank's part of a peer's inboxes
  int64_t dispatch_peer_bytes, combine_peer_bytes;  // of an inbox, for one source
  int64_t timeout_ns, combine_bytes;
  int32_t ep_size, rank, num_experts, top_k, hidden, padded, max_tokens, num_extras;
  int32_t invalid_id, wire, combine_wire;
  int32_t larger_end;  // experts below it live on ranks that own one more than the others
  int32_t larger_ranks;
  FastDivisor larger, smaller;  // experts per rank; there are fewer than 2^15
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
  // Ids are int32 or int64 in vectors of 16 bytes, experts are shared out evenly among 32 ranks at
  // most.
  bool quick_ids;
  bool everyone;  // is active
  // In packets: an inbox holds fewer than 2^17 strips, a peer's part of it 2^14.
  FastDivisor by_runs, by_rows;
  RoundFacts facts;
};

// Warps of a block that push rows in a combine in bulk, and steps of a warp, 512 bytes of a plain
// row or columns of a quantized one, in its part of a piece at most: two parts are in registers.
struct Push {
  int warps, steps;
};
constexpr Push kPushPlain{4, 7}, kPushQuantized{8, 2};
constexpr int kPushStep = 512;
// Steps of a warp, 256 columns each, that a part of a sum has at most, by the dtype of y: what a
// warp has registers for.
constexpr int kPartSteps = 4, kPartStepsFp32 = 2;

// Arguments of the combine kernels.
struct CombineLaunch {
  Context c;
  CombineArgs a;
  int32_t tokens, max_rows;
  int32_t pitch, runs;  // bytes and runs of strips of a row in the inbox
  FastDivisor by_runs, by_rows;
  // In bulk: parts that a token is summed in, pieces that a row is pushed in, steps of a warp in
  // one.
  int32_t parts, pieces, push_steps;
  int32_t rows_per_flag;
  int64_t flags;             // offset of the first source's flags in a window
  int64_t flags_per_source;  // bytes
  RoundFacts facts;
};

}  // namespace moe_a2a::cuda
