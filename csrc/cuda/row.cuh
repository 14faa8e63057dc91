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

// Puts `count` bytes of a row's image to where the experts read them; `row` is source * R + slot.
// With `scrub` the row is padding: the invalid ids and weights of 0 go there, and, if asked for,
// zeros in place of payload and scales.
__device__ __forceinline__ void store_image(const DispatchLaunch& p, int owner, int64_t row,
                                            int offset, int count, Chunk data, bool scrub) {
  const int payload = p.segment[kSegmentPayload].bytes;
  uint8_t* window = p.c.window[owner];
  if (scrub) data = {0, 0};
  if (offset + count <= payload) {
    if (!scrub || p.c.scrub_all)
      store_bytes(window + p.c.payload + row * payload + offset, data, count);
    return;
  }
  if (offset >= p.image_bytes) return;
  const int i = segment_at(p, offset);
  const Segment& s = p.segment[i];
  const int at = offset - s.image, valid = min(count, s.bytes - at);
  if (scrub && !(i == kSegmentIds || i == kSegmentWeights || (p.c.scrub_all && i < kSegmentIds)))
    return;
  if (scrub && i == kSegmentIds) {
    const uint64_t id = static_cast<uint32_t>(p.c.invalid_id);
    data = {id | id << 32, id | id << 32};
  }
  if (valid > 0) store_bytes(window + s.region + row * s.bytes + at, data, valid);
}

}  // namespace moe_a2a::cuda
