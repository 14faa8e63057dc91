// Pieces of rows on their way into an inbox in a combine in bulk: loaded, and stored as they are or
// quantized, straight from registers.
#pragma once

#include "sum.cuh"

namespace moe_a2a::cuda {

template <class Row>
constexpr Push kPush = Row::kQuantized ? kPushQuantized : kPushPlain;

// A lane's columns of a piece, or, of a plain row, its bytes: 16 in each step of its warp. The
// steps of a warp lie one after the other.
template <class Row>
struct Extent {
  int first, end;  // the end: of the warp's part, where the row does not end before

  __device__ __forceinline__ Extent(const CombineLaunch& p, int piece) {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    const int all = Row::kQuantized ? p.c.hidden : static_cast<int>(p.c.combine_bytes);
    const int begin = (piece * kPush<Row>.warps + warp) * p.push_steps * kPushStep;
    first = begin + lane * 16;
    end = min(begin + p.push_steps * kPushStep, all);
  }
  __device__ __forceinline__ int at(int u) const { return first + u * kPushStep; }
  __device__ __forceinline__ bool inside(int u) const { return at(u) < end; }
  // Past the end, or where the warp has no part, the last ones once more: a load that may not
  // happen would part the others.
  __device__ __forceinline__ int clamped(int u) const { return min(at(u), end - 16); }
};

// What a lane has of a piece, in registers; all of it is asked for before any of it is used.
template <int kSteps, int kItem>  // chunks of a lane in a step: bytes of 16 columns, or 16 bytes
struct Chunks {
  Chunk chunk[kSteps][kItem];

  // Each with `load_16`, from `y`, the row's begin.
  template <class Row, class F>
  __device__ __forceinline__ void load(const uint8_t* y, const Extent<Row>& e, F load_16) {
#pragma unroll
    for (int u = 0; u < kSteps; ++u)
#pragma unroll
      for (int i = 0; i < kItem; ++i) chunk[u][i] = load_16(y + e.clamped(u) * kItem + i * 16);
  }
  // Waits for the loads, by an instruction that needs what they bring and stays where it is. The
  // whole warp.
  __device__ __forceinline__ void await() {
#pragma unroll
    for (int u = 0; u < kSteps; ++u)
#pragma unroll
      for (int i = 0; i < kItem; ++i)
        chunk[u][i].lo = __shfl_sync(kAllLanes, chunk[u][i].lo, threadIdx.x % kWarp);
  }
};

// A part of a piece, and where it goes. kAligned: rows of y begin on 16 bytes.
template <class Row, int kScalar>
class Part {  // of a plain row
  static constexpr int kSteps = kPush<Row>.steps;

 public:
  template <bool kAligned>
  __device__ __forceinline__ void load(const uint8_t* y, uint8_t* inbox, const Extent<Row>& e) {
    data_.load(y, e, [](const uint8_t* from) {
      return kAligned ? load_chunk(from) : load_odd_bytes(from, 16);
    });
    to_ = inbox + e.first;
    bytes_ = e.end - e.first;
  }
  __device__ __forceinline__ void await() { data_.await(); }
  __device__ __forceinline__ void store(const CombineLaunch&) const {
#pragma unroll
    for (int u = 0; u < kSteps; ++u)
      if (u * kPushStep < bytes_) store_weak(to_ + u * kPushStep, data_.chunk[u][0]);
  }

 private:
  Chunks<kSteps, 1> data_;
  uint8_t* to_;
  int bytes_;
};

// Sixteen columns a lane, so that their codes are one store; 8 lanes share a scale, or 2.
template <int kWire, int kScalar>
class Part<Scaled<kWire>, kScalar> {
  using Row = Scaled<kWire>;
  static constexpr int kSteps = kPush<Row>.steps;
  static constexpr int kLanes = Row::kBlock / 16;
  static constexpr int kItem = Elements<kScalar>::kItem;
  static_assert(kSteps <= kLanes);

 public:
  template <bool kAligned>
  __device__ __forceinline__ void load(const uint8_t* y, uint8_t* inbox, const Extent<Row>& e) {
    data_.load(y, e, [](const uint8_t* from) {
      return kAligned ? load_neighbour(from) : load_odd_bytes(from, 16);
    });
    inbox_ = inbox;
    first_ = e.first;
    end_ = e.end;
  }
  __device__ __forceinline__ void await() { data_.await(); }
  // The whole warp.
  __device__ __forceinline__ void store(const CombineLaunch& p) const {
    const int lane = threadIdx.x % kWarp;
    // That of the lane's block in step u lies with the lane of the block that is to store it: so
    // the scales of all steps, which lie side by side, are one store of the warp.
    uint32_t scale = 0;
    int column = end_;
#pragma unroll
    for (int u = 0; u < kSteps; ++u) {
      const int at = first_ + u * kPushStep;
      if (at - lane * 16 >= end_) break;
      const RawColumns first = columns(u, 0), second = columns(u, 1);
      const uint32_t amax = largest_of_lanes<kLanes>(max(magnitude(first), magnitude(second)));
      const auto low = Row::template quantize<kScalar>(first, amax);
      const auto high = Row::template quantize<kScalar>(second, amax);
      if (at < end_)
        store_weak(inbox_ + at, Chunk{low.codes.x | static_cast<uint64_t>(low.codes.y) << 32,
                                      high.codes.x | static_cast<uint64_t>(high.codes.y) << 32});
      if (lane % kLanes == u) {
        scale = low.scale;
        column = at;
      }
    }
    if (column >= end_) return;
    uint8_t* scales = inbox_ + p.c.hidden;
    if constexpr (kWire == kMxfp8)
      store_weak(scales + column / Row::kBlock, static_cast<uint8_t>(scale));
    else
      store_weak(scales + column / Row::kBlock * 4, scale);
  }

 private:
  // Eight of the lane's columns in a step.
  __device__ __forceinline__ RawColumns columns(int u, int half) const {
    const Chunk* at = data_.chunk[u] + half * (kItem / 2);
    RawColumns raw;
    raw.low = at[0];
    if constexpr (kScalar == kScalarFp32) raw.high = at[1];
    return raw;
  }
  static __device__ __forceinline__ uint32_t magnitude(const RawColumns& raw) {
    float v[kColumns];
    decode_columns(raw, kScalar, v);
    return largest(v);
  }

  Chunks<kSteps, kItem> data_;
  uint8_t* inbox_;
  int first_, end_;
};

}  // namespace moe_a2a::cuda
