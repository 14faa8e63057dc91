// A row as one image of bytes: payload, scales, ids, weights, extras, each from a multiple of 16
// bytes on. Taken from the caller's tensors on one side, put into the receive views on the other.
//
// The payload's way is short; the rest is few bytes, but of every row.
#pragma once

#include "packet.cuh"
#include "route.cuh"

namespace moe_a2a::cuda {

__device__ __forceinline__ int segment_at(const DispatchLaunch& p, int offset) {
  int i = (offset >= p.segment[kSegmentScales].image) + (offset >= p.segment[kSegmentIds].image) +
          (offset >= p.segment[kSegmentWeights].image);
#pragma unroll 1
  while (i + 1 < p.segments && offset >= p.segment[i + 1].image) ++i;
  return i;
}

// Choices from `first` on, four ids or weights, as they travel: a choice that routes nowhere as the
// invalid id with weight 0, so that no expert has to look twice.
__device__ __forceinline__ Chunk load_choices(const DispatchLaunch& p, int t, int first, int count,
                                              bool weights) {
  const auto* ids = reinterpret_cast<const uint32_t*>(p.a.ids.row(t));
  const auto* weight = reinterpret_cast<const uint32_t*>(p.a.weights.row(t));
  const int step = p.a.wide_ids ? 2 : 1;
  uint32_t low[4], high[4], value[4];
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const int at = first + k;
    low[k] = k < count ? ids[at * step] : 0;
    high[k] = k < count && step == 2 ? ids[at * 2 + 1] : 0;
    value[k] = k < count && weights ? weight[at] : 0;
  }
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const bool counts = routed(p, low[k], high[k]);
    if (!weights) value[k] = counts ? low[k] : static_cast<uint32_t>(p.c.invalid_id);
    if (weights && !counts) value[k] = 0;
  }
  return {value[0] | static_cast<uint64_t>(value[1]) << 32,
          value[2] | static_cast<uint64_t>(value[3]) << 32};
}

// `count` (8 or 16) bytes of token t's image, payload and scales from the caller's rows.
__device__ __forceinline__ Chunk load_image(const DispatchLaunch& p, int t, int offset, int count) {
  if (offset + count <= p.segment[kSegmentPayload].bytes)
    return load_bytes(p.a.payload.row(t) + offset, count);
  if (offset >= p.image_bytes) return {0, 0};
  const int i = segment_at(p, offset);
  const int at = offset - p.segment[i].image, valid = min(count, p.segment[i].bytes - at);
  if (valid <= 0) return {0, 0};
  if (i == kSegmentIds || i == kSegmentWeights)
    return load_choices(p, t, at / 4, valid / 4, i == kSegmentWeights);
  const Rows& rows = i == kSegmentPayload  ? p.a.payload
                     : i == kSegmentScales ? p.a.scales
                                           : p.a.extra[i - 4];
  return load_odd_bytes(rows.row(t) + at, valid);
}

// Out of line, as the other ways of odd bytes.
static __device__ __noinline__ Chunk load_odd_image(const DispatchLaunch& p, int t, int offset) {
  return load_image(p, t, offset, 16);
}

// Where 16 bytes of a row's image come from, as far as the arguments tell: found before the kernels
// ahead are over, loaded as soon as they are, settled when they are needed.
class Origin {
 public:
  Origin() = default;
  __device__ __forceinline__ Origin(const DispatchLaunch& p, int t, int offset) {
    const Segment& payload = p.segment[kSegmentPayload];
    const int i = offset + 16 <= payload.bytes ? kSegmentPayload : segment_at(p, offset);
    const int at = offset - p.segment[i].image;
    const bool choices = i == kSegmentIds || i == kSegmentWeights;
    const Rows& rows = i == kSegmentPayload   ? p.a.payload
                       : i == kSegmentScales  ? p.a.scales
                       : i == kSegmentIds     ? p.a.ids
                       : i == kSegmentWeights ? p.a.weights
                                              : p.a.extra[i - 4];
    const int wide = p.a.wide_ids ? 2 : 1;
    const int valid = offset >= p.image_bytes ? 0 : min(16, p.segment[i].bytes - at);
    from_ = hold(rows.row(t) + (i == kSegmentIds ? wide * at : at));
    ids_ = hold(p.a.ids.row(t) + wide * at);
    words_ = hold(p.odd_choices && choices ? max(valid, 0) / 4 : 0);
    kind_ = hold(valid <= 0                          ? kNothing
                 : choices                           ? kIds + (i == kSegmentWeights)
                 : valid == 16 && aligned(from_, 16) ? kBytes
                                                     : kOdd);
  }
  __device__ __forceinline__ void load(const DispatchLaunch& p, int t, int offset) {
    data_ = choices_ = {0, 0};
    const bool chunks = words_ == 0;
    if (kind_ > kOdd && chunks) data_ = load_chunk(from_);
    if (kind_ > kIds && chunks) choices_ = load_chunk(ids_);
    if (kind_ == kOdd) data_ = load_odd_image(p, t, offset);
#pragma unroll
    for (int k = 0; k < 4; ++k) low_[k] = high_[k] = value_[k] = 0;
    if (!p.odd_choices) return;
    const auto* id = reinterpret_cast<const uint32_t*>(ids_);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (k < words_) low_[k] = id[p.a.wide_ids ? 2 * k : k];
      if (k < words_ && p.a.wide_ids) high_[k] = id[2 * k + 1];
      if (k < words_ && kind_ == kWeights) value_[k] = reinterpret_cast<const uint32_t*>(from_)[k];
    }
  }
  // A choice that routes nowhere travels as the invalid id with weight 0.
  __device__ __forceinline__ Chunk settle(const DispatchLaunch& p) const {
    if (kind_ < kIds) return data_;
    const Chunk ids = words_ > 0      ? chunk_of({low_[0], low_[1], low_[2], low_[3]})
                      : kind_ == kIds ? data_
                                      : choices_;
    const uint32_t id[4] = {static_cast<uint32_t>(ids.lo), static_cast<uint32_t>(ids.lo >> 32),
                            static_cast<uint32_t>(ids.hi), static_cast<uint32_t>(ids.hi >> 32)};
    const uint64_t nowhere = kind_ == kIds ? static_cast<uint32_t>(p.c.invalid_id) : 0u;
    constexpr uint64_t kLow = 0xFFFFFFFFu;
    Chunk c = kind_ == kIds ? ids
              : words_ > 0  ? chunk_of({value_[0], value_[1], value_[2], value_[3]})
                            : data_;
    if (!routed(p, id[0], high_[0])) c.lo = (c.lo & ~kLow) | nowhere;
    if (!routed(p, id[1], high_[1])) c.lo = (c.lo & kLow) | nowhere << 32;
    if (!routed(p, id[2], high_[2])) c.hi = (c.hi & ~kLow) | nowhere;
    if (!routed(p, id[3], high_[3])) c.hi = (c.hi & kLow) | nowhere << 32;
    return c;
  }

 private:
  enum Kind { kNothing, kOdd, kBytes, kIds, kWeights };
  int kind_ = kNothing, words_ = 0;  // choices that come one by one
  const uint8_t* from_;
  const uint8_t* ids_;
  Chunk data_, choices_;
  uint32_t low_[4], high_[4], value_[4];
};

// Where `count` bytes of a row's image belong in a window; what to put there if the
// row is padding: the invalid ids and weights of 0, and, if asked for, zeros in place of payload
// and scales.
struct Place {
  uint8_t* to;
  int count;
  bool scrubbed;
  uint32_t fill;

  __device__ __forceinline__ void put(const Chunk& data) const {
    if (count > 0) store_bytes(to, data, count);
  }
  __device__ __forceinline__ void scrub() const {
    const uint64_t words = fill | static_cast<uint64_t>(fill) << 32;
    if (scrubbed) put({words, words});
  }
};

// `row` is source * R + slot.
__device__ __forceinline__ Place place_of(const DispatchLaunch& p, uint8_t* window, int64_t row,
                                          int offset, int count) {
  const int payload = p.segment[kSegmentPayload].bytes;
  if (offset + count <= payload)
    return {window + p.c.payload + row * payload + offset, count, p.c.scrub_all, 0};
  if (offset >= p.image_bytes) return {window, 0, false, 0};
  const int i = segment_at(p, offset);
  const Segment& s = p.segment[i];
  const int at = offset - s.image;
  const bool choices = i == kSegmentIds || i == kSegmentWeights;
  return {window + s.region + row * s.bytes + at, min(count, s.bytes - at),
          choices || (p.c.scrub_all && i < kSegmentIds),
          i == kSegmentIds ? static_cast<uint32_t>(p.c.invalid_id) : 0u};
}

__device__ __forceinline__ void store_image(const DispatchLaunch& p, uint8_t* window, int64_t row,
                                            int offset, int count, Chunk data, bool scrub) {
  const Place place = place_of(p, window, row, offset, count);
  if (scrub)
    place.scrub();
  else
    place.put(data);
}

}  // namespace moe_a2a::cuda
