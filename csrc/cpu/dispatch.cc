// Dispatch: each row once to every rank that owns one of its experts, quantized on the way.
#include <algorithm>
#include <cstring>

#include "endpoint.h"

namespace moe_a2a::cpu {
namespace {

struct Choices {
  uint64_t ranks;
  int32_t ids[kMaxTopK];
  float weights[kMaxTopK];
};

// A choice that routes nowhere (no such expert, or its rank is inactive) travels as the invalid id
// with weight 0, so that no expert has to look twice.
template <class Id>
void read_choices(const Endpoint& e, const DispatchArgs& a, int64_t t, Choices& out) {
  const auto* ids = reinterpret_cast<const Id*>(a.ids.row(t));
  const auto* weights = reinterpret_cast<const float*>(a.weights.row(t));
  out.ranks = 0;
  for (int64_t k = 0; k < e.geometry.top_k; ++k) {
    const int64_t id = ids[k];
    const bool exists = id >= 0 && id < e.geometry.num_experts;
    const uint64_t bit = exists ? (uint64_t{1} << e.owner[id]) & a.active : 0;
    out.ids[k] = bit ? static_cast<int32_t>(id) : e.shape.invalid_id;
    out.weights[k] = bit ? weights[k] : 0.0f;
    out.ranks |= bit;
  }
}

struct RowBytes {
  const uint8_t* payload;
  const uint8_t* scales;
};

struct RowSizes {
  int64_t payload, scales;
};

RowSizes row_sizes(const Endpoint& e, bool deferred) {
  if (deferred) return {e.shape.hidden * 2, 0};
  return {e.shape.payload_row, e.shape.scale_row};
}

// What one dispatch needs for each of its rows.
struct Sender {
  Endpoint& e;
  const DispatchArgs& a;
  RowSizes bytes;
  RowQuantizer quantizer;  // null where the caller's bytes move as they are
  Copy copy;

  Sender(Endpoint& endpoint, const DispatchArgs& args)
      : e(endpoint),
        a(args),
        bytes(row_sizes(e, a.deferred)),
        quantizer(a.input < 0 ? nullptr : row_quantizer(a.wire, a.input)),
        copy(e.copy_of(a.tokens * bytes.payload * std::min(e.geometry.ep_size, e.geometry.top_k))) {
  }

  RowBytes wire_row(int64_t t) const {
    if (quantizer == nullptr) return {a.payload.row(t), a.scales.data ? a.scales.row(t) : nullptr};
    uint8_t* payload = e.scratch.data();
    uint8_t* scales = payload + round_up(e.geometry.payload_bytes, kLine);
    quantizer(a.payload.row(t), payload, scales, {e.shape.hidden, e.shape.padded, a.global_scale});
    return {payload, scales};
  }

  void write(int64_t t, const RowBytes& row, const Choices& choices, int to, int64_t index) const {
    const int64_t k_bytes = e.geometry.top_k * 4;
    copy(e.region(to, kPayload) + index * bytes.payload, row.payload, bytes.payload);
    if (bytes.scales != 0)
      std::memcpy(e.region(to, kScales) + index * bytes.scales, row.scales, bytes.scales);
    std::memcpy(e.region(to, kIds) + index * k_bytes, choices.ids, k_bytes);
    std::memcpy(e.region(to, kWeights) + index * k_bytes, choices.weights, k_bytes);
    for (int i = 0; i < e.geometry.num_extras; ++i) {
      const int64_t nbytes = e.geometry.extra_bytes[i];
      std::memcpy(e.region(to, kExtra + i) + index * nbytes, a.extra[i].row(t), nbytes);
    }
  }
};

template <class Id>
void send_rows(Endpoint& e, const DispatchArgs& a, int32_t* sent) {
  const Sender sender(e, a);
  Choices choices;
  for (int64_t t = 0; t < a.tokens; ++t) {
    read_choices<Id>(e, a, t, choices);
    e.ranks_of_token[t] = choices.ranks;
    if (choices.ranks == 0) continue;
    const RowBytes row = sender.wire_row(t);
    for_each_rank(choices.ranks, [&](int to) {
      sender.write(t, row, choices, to, e.rank * a.max_rows + sent[to]++);
    });
  }
}

// Rows that no source filled: experts skip them by their ids, or multiply by weight 0.
void scrub(Endpoint& e) {
  const RowSizes bytes = row_sizes(e, (e.facts.format & kDeferred) != 0);
  const int64_t k = e.geometry.top_k;
  for (int source = 0; source < e.geometry.ep_size; ++source) {
    const int64_t first = source * e.max_rows + e.received[source];
    const int64_t rows = e.max_rows - e.received[source];
    auto* ids = reinterpret_cast<int32_t*>(e.region(e.rank, kIds)) + first * k;
    std::fill(ids, ids + rows * k, e.shape.invalid_id);
    std::memset(e.region(e.rank, kWeights) + first * k * 4, 0, rows * k * 4);
    if (!e.shape.scrub_all) continue;
    std::memset(e.region(e.rank, kPayload) + first * bytes.payload, 0, rows * bytes.payload);
    std::memset(e.region(e.rank, kScales) + first * bytes.scales, 0, rows * bytes.scales);
  }
}

}  // namespace

Status dispatch(Endpoint& e, const DispatchArgs& a, int64_t slice_ns) {
  FloatEnvironment environment;
  e.epoch = next_epoch(e.epoch);
  ++e.round;
  e.tokens = a.tokens;
  e.max_rows = a.max_rows;
  e.counts_out = a.counts;
  e.facts = {kDispatch, static_cast<uint32_t>(a.max_rows),
             static_cast<uint32_t>(a.wire) | (a.deferred ? kDeferred : 0u), 0, a.active};
  std::memcpy(&e.facts.global_scale_bits, &a.global_scale, 4);
  if (e.shape.debug) begin_debug(e);
  int32_t sent[kMaxRanks] = {};
  if (a.wide_ids)
    send_rows<int64_t>(e, a, sent);
  else
    send_rows<int32_t>(e, a, sent);
  e.received[e.rank] = sent[e.rank];
  announce(e, kArriveDispatch, sent);
  return finish_dispatch(e, slice_ns);
}

Status finish_dispatch(Endpoint& e, int64_t slice_ns) {
  const Status status = await_arrivals(e, kArriveDispatch, slice_ns);
  if (status != kDone) return status;
  for (int source = 0; source < e.geometry.ep_size; ++source) {
    if (source != e.rank)
      e.received[source] = (e.facts.active >> source & 1) == 0
                               ? 0
                               : e.line<Arrival>(e.rank, kArriveDispatch, source).count;
    e.counts_out[source] = e.received[source];
  }
  scrub(e);
  return kDone;
}

}  // namespace moe_a2a::cpu
