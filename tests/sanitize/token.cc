#include "token.h"

#include "draw.h"

namespace sanitize {
namespace {

using namespace moe_a2a;

template <class T>
void append(Bytes& out, T value) {
  const auto* bytes = reinterpret_cast<const uint8_t*>(&value);
  out.insert(out.end(), bytes, bytes + sizeof(T));
}

// Counts the experts off, rank by rank.
int owner_of(const Setup& s, int64_t expert) {
  int64_t end = 0;
  for (int rank = 0;; ++rank) {
    end += s.experts / s.ranks + (rank < s.experts % s.ranks ? 1 : 0);
    if (expert < end) return rank;
  }
}

int64_t draw_id(const Setup& s, const Round& round, uint64_t drawn) {
  const auto n = static_cast<int64_t>(drawn >> 8);
  switch (round.routing) {
    case kNowhere:
      return -1 - n % 3;
    case kHot:
      return s.experts - 1;
    case kInRange:
      return n % s.experts;
    default:
      if (round.wide_ids && drawn % 16 == 0) return int64_t{1} << 40;
      return n % (s.experts + 4) - 2;
  }
}

}  // namespace

Round round_of(const Setup& s, int64_t n) {
  const auto seed = static_cast<int64_t>(draw({s.wire, s.combine_wire, s.ranks, s.hidden, n}));
  const auto pick = [&](int64_t what, int64_t below) {
    return static_cast<int64_t>(draw({seed, what}) % static_cast<uint64_t>(below));
  };
  Round r{};
  r.seed = seed;
  r.rows = n % 8 == 5 ? 0 : 1 + pick(1, s.capacity);
  for (int64_t rank = 0; rank < s.ranks; ++rank)
    r.tokens.push_back(pick(100 + rank, 4) == 0 ? r.rows : pick(200 + rank, r.rows + 1));
  r.active = s.leave_after >= 0 && n >= s.leave_after ? s.all() >> 1 : s.all();
  std::vector<Input> inputs{Input::kMove};
  if (quantized(s.wire))
    inputs = {Input::kQuantize, Input::kQuantize, Input::kMove, Input::kAnyBits};
  if (s.allow_defer) inputs.push_back(Input::kDefer);
  r.input = inputs[pick(3, static_cast<int64_t>(inputs.size()))];
  r.scalar = static_cast<int>(pick(4, 3));
  r.combine_scalar = s.combine_wire == kBf16   ? kScalarBf16
                     : s.combine_wire == kFp16 ? kScalarFp16
                     : s.combine_wire == kFp32 ? kScalarFp32
                                               : static_cast<int>(pick(5, 3));
  r.routing = n % 4 == 0 ? static_cast<Routing>(pick(6, kRoutings)) : kAnywhere;
  r.wide_ids = pick(7, 2) == 0;
  r.strided = pick(8, 2) == 0;
  r.global_scale = s.wire == kNvfp4 && pick(9, 2) == 0 ? 2 : 1;
  r.slice_ns = pick(10, 4) == 0 ? 20'000 : 1'000'000'000;
  return r;
}

Choices choices_of(const Setup& s, const Round& round, int64_t source, int64_t t) {
  Choices out{};
  for (int64_t k = 0; k < s.top_k; ++k) {
    const int64_t id = draw_id(s, round, draw({round.seed, source, t, k, 6}));
    const auto weight = static_cast<float>(1 + draw({round.seed, source, t, k, 7}) % 1000);
    const bool exists = id >= 0 && id < s.experts;
    const uint64_t bit = exists ? (uint64_t{1} << owner_of(s, id)) & round.active : 0;
    out.ranks |= bit;
    if (round.wide_ids)
      append(out.given_ids, id);
    else
      append(out.given_ids, static_cast<int32_t>(id));
    append(out.given_weights, weight);
    append(out.delivered_ids, bit != 0 ? static_cast<int32_t>(id) : s.invalid_id);
    append(out.delivered_weights, bit != 0 ? weight : 0.0f);
  }
  return out;
}

Content content_of(const Setup& s, const Round& round, int64_t source, int64_t t) {
  const Widths widths = s.widths();
  const auto seed = static_cast<int64_t>(draw({round.seed, source, t, 8}));
  Content out;
  switch (round.input) {
    case Input::kQuantize:
      out.wire = known_row(s.wire, widths, s.hidden, round.global_scale, seed);
      out.x = exactly(out.wire.values, round.scalar);
      break;
    case Input::kAnyBits:
      out.x = random_bytes(s.hidden * bytes_of(round.scalar), seed);
      break;
    case Input::kMove:
      out.x = out.wire.payload = random_bytes(widths.payload, seed);
      out.wire.scales = random_bytes(widths.scales, seed + 1);
      break;
    case Input::kDefer:
      out.x = out.wire.payload = random_bytes(s.hidden * 2, seed);
      break;
  }
  return out;
}

Bytes extra_of(const Setup& s, const Round& round, int64_t source, int64_t t, size_t index) {
  const auto seed = draw({round.seed, source, t, static_cast<int64_t>(index), 9});
  return random_bytes(s.extras[index], static_cast<int64_t>(seed));
}

}  // namespace sanitize
