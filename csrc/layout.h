// The workspace of one rank: which region lies where. Compiled by g++ and nvcc alike, asked by
// Python.
//
// Every offset is a function of the Geometry alone, never of a round's R or format: a rank that is
// already in the next round must not find a region where a slow rank still reads another one.
// Inside a payload region row i of source s lies at row s * R + i, so that the view [W, R, row] is
// contiguous; that is safe because combine reads nothing in the receive regions.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define MOE_HD __host__ __device__ __forceinline__
#else
#define MOE_HD inline
#endif

namespace moe_a2a {

constexpr int kMaxRanks = 64;   // one bit each in a 64-bit rank mask
constexpr int kMaxExtras = 16;  // further payloads that ride along
constexpr int kMaxTopK = 32;
constexpr int64_t kLine = 128;  // alignment of regions, and the unit of false sharing

// Low-latency packets: 128-byte lines that carry 120 bytes of data and an 8-byte tag, two lines a
// cell, so that 16 lanes move 15 chunks of 16 bytes. A round that needs more of cells from one peer
// is faster in bulk, so no more is reserved.
constexpr int64_t kCell = 2 * kLine;
constexpr int64_t kCellData = 240;
constexpr int64_t kInboxPerPeer = int64_t{2} << 20;
constexpr int64_t kInboxTotal = int64_t{32} << 20;

struct Geometry {
  int64_t ep_size, num_experts, top_k, max_tokens;
  int64_t
      payload_bytes;    // per token: the wire's row, or the deferred bf16 row where that is larger
  int64_t scale_bytes;  // per token
  int64_t combine_bytes;  // per token: H elements of the combine wire and their scales
  int64_t num_extras;
  int64_t extra_bytes[kMaxExtras];
};

enum RegionId : int {
  kControl,
  kPayload,
  kScales,
  kIds,
  kWeights,
  kCombine,
  kDispatchInbox,
  kExtra,  // extras are kExtra + 0, kExtra + 1, ...
  kRegionCount = kExtra + kMaxExtras
};

struct Region {
  int64_t offset, nbytes;
};

struct Layout {
  Region region[kRegionCount];
  int64_t committed;  // bytes up to the low-latency inbox: all that a backend without it touches
  int64_t total;
};

MOE_HD int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

MOE_HD int64_t min_bytes(int64_t a, int64_t b) { return a < b ? a : b; }

// Control: one header line, then a line per source rank for each of these.
enum ControlRow : int { kArriveDispatch, kArriveCombine, kPost, kMeet, kBlocks, kControlRows };

MOE_HD int64_t control_bytes(int64_t ep_size) { return kLine * (1 + kControlRows * ep_size); }

// A row on its way: its parts one after the other, each from a multiple of 16 bytes on.
constexpr int64_t kChunk = 16;

MOE_HD int64_t packet_bytes(int64_t image_bytes, int64_t cell_data) {
  return (image_bytes + cell_data - 1) / cell_data * kCell;
}

// `bulk` bounds the inbox, at what packets of large rows need: with tiny rows a cell would
// otherwise cost several times the row. A round that does not fit goes in bulk.
MOE_HD int64_t inbox_bytes(const Geometry& g, int64_t image_bytes, int64_t bulk) {
  const int64_t all = g.ep_size * g.max_tokens * packet_bytes(image_bytes, kCellData);
  const int64_t cap = min_bytes(kInboxTotal, g.ep_size * kInboxPerPeer);
  return min_bytes(min_bytes(all, cap), bulk * 23 / 20 / kLine * kLine);
}

MOE_HD Layout make_layout(const Geometry& g) {
  Layout layout{};
  int64_t at = 0;
  const int64_t rows = g.ep_size * g.max_tokens;
  auto place = [&](int id, int64_t nbytes) {
    layout.region[id] = {at, round_up(nbytes, kLine)};
    at += layout.region[id].nbytes;
  };
  place(kControl, control_bytes(g.ep_size));
  place(kPayload, rows * g.payload_bytes);
  place(kScales, rows * g.scale_bytes);
  place(kIds, rows * g.top_k * 4);
  place(kWeights, rows * g.top_k * 4);
  int64_t image_bytes = round_up(g.payload_bytes, kChunk) + round_up(g.scale_bytes, kChunk) +
                        2 * round_up(g.top_k * 4, kChunk);
  for (int i = 0; i < g.num_extras; ++i) {
    place(kExtra + i, rows * g.extra_bytes[i]);
    image_bytes += round_up(g.extra_bytes[i], kChunk);
  }
  const int64_t received = at - layout.region[kPayload].offset;
  place(kCombine, rows * g.combine_bytes);
  layout.committed = at;
  place(kDispatchInbox, inbox_bytes(g, image_bytes, received));
  layout.total = at;
  return layout;
}

}  // namespace moe_a2a
