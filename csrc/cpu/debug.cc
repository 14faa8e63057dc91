// debug=True: poison where no peer can be writing, and what an operation took.
#include <algorithm>
#include <cstring>

#include "endpoint.h"

namespace moe_a2a::cpu {
namespace {

int64_t now_ns() {
  const auto since = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration_cast<std::chrono::nanoseconds>(since).count();
}

void fill(Endpoint& e, int id, int byte, int64_t row_bytes) {
  const Geometry& g = e.geometry;
  std::memset(e.region(e.rank, id), byte, g.ep_size * g.max_tokens * row_bytes);
}

// NaN in every format that has one; no expert has such an id.
constexpr int kPoison = 0xFF, kNoExpert = 0x7F;

// Peers push into the inbox of a combine when they have heard of the dispatch that begins here, and
// all of the combine before has arrived. They write rows when they are through with the combine
// that begins here, for which they have to hear of it, and all of this round's rows have arrived.
void poison(Endpoint& e) {
  const Geometry& g = e.geometry;
  if (e.facts.phase == kDispatch) {
    fill(e, kCombine, kPoison, g.combine_bytes);
    return;
  }
  fill(e, kPayload, kPoison, g.payload_bytes);
  fill(e, kScales, kPoison, g.scale_bytes);
  fill(e, kIds, kNoExpert, g.top_k * 4);
  fill(e, kWeights, kPoison, g.top_k * 4);
  for (int i = 0; i < g.num_extras; ++i) fill(e, kExtra + i, kPoison, g.extra_bytes[i]);
}

}  // namespace

void begin_debug(Endpoint& e) {
  e.times = {};
  e.times.begin = now_ns();
  std::fill_n(e.times.waits, kMaxRanks, -1);
  poison(e);
}

void note_sent(Endpoint& e) {
  e.times.sent = now_ns();
  e.times.awaited = e.facts.active & ~(uint64_t{1} << e.rank);
}

void note_arrivals(Endpoint& e, uint64_t missing) {
  const int64_t now = now_ns();
  for_each_rank(e.times.awaited & ~missing,
                [&](int peer) { e.times.waits[peer] = now - e.times.sent; });
  e.times.awaited &= missing;
  if (e.times.awaited == 0 && e.times.arrived == 0) e.times.arrived = now;
}

// Those that never came were waited for until now.
void end_debug(Endpoint& e) {
  note_arrivals(e, 0);
  e.times.end = now_ns();
}

}  // namespace moe_a2a::cpu
