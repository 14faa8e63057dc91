// Rows on their way into a sum: eight columns a lane, decoded to fp32 and added in rank order.
#pragma once

#include "quantize.cuh"

namespace moe_a2a::cuda {

// Where the rows of a token are: its ranks, and its slots in ranks `lane` and `lane + 32`.
struct Slots {
  uint64_t ranks = 0;
  int low = 0, high = 0;

  // None past the last token.
  static __device__ __forceinline__ Slots of_token(const CombineLaunch& p, int token) {
    const Context& c = p.c;
    const int lane = threadIdx.x % kWarp;
    const int32_t* row = c.token_slots + static_cast<int64_t>(token) * c.ep_size;
    Slots slots;
    if (token >= p.tokens) return slots;
    slots.ranks = c.token_ranks[token];
    if (lane < c.ep_size) slots.low = row[lane];
    if (lane + kWarp < c.ep_size) slots.high = row[lane + kWarp];
    return slots;
  }
  __device__ __forceinline__ bool has(int rank) const { return (ranks >> rank & 1) != 0; }
  // The whole warp.
  __device__ __forceinline__ int of(int rank) const {
    return __shfl_sync(kAllLanes, rank < kWarp ? low : high, rank % kWarp);
  }
};

// ---- chunks of 16 (or 8) bytes of a row, as a packet carries them ----------------------------

template <int kScalar>
struct Elements {
  static constexpr int kItem = kScalar == kScalarFp32 ? 4 : 2;
  static constexpr int kCount = 16 / kItem;
};

template <int kScalar>
__device__ __forceinline__ void add_chunk(const Chunk& c, float (&sum)[Elements<kScalar>::kCount]) {
  const uint32_t w[4] = {static_cast<uint32_t>(c.lo), static_cast<uint32_t>(c.lo >> 32),
                         static_cast<uint32_t>(c.hi), static_cast<uint32_t>(c.hi >> 32)};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (kScalar == kScalarFp32) {
      sum[i] += __uint_as_float(w[i]);
    } else if constexpr (kScalar == kScalarBf16) {
      sum[2 * i] += low_bf16(w[i]);
      sum[2 * i + 1] += high_bf16(w[i]);
    } else {
      sum[2 * i] += low_fp16(w[i]);
      sum[2 * i + 1] += low_fp16(w[i] >> 16);
    }
  }
}

template <int kScalar>
__device__ __forceinline__ Chunk round_chunk(const float (&sum)[Elements<kScalar>::kCount]) {
  uint32_t w[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (kScalar == kScalarFp32)
      w[i] = __float_as_uint(sum[i]);
    else if constexpr (kScalar == kScalarBf16)
      w[i] = two_bf16(sum[2 * i], sum[2 * i + 1]);
    else
      w[i] = two_fp16(sum[2 * i], sum[2 * i + 1]);
  }
  return {w[0] | static_cast<uint64_t>(w[1]) << 32, w[2] | static_cast<uint64_t>(w[3]) << 32};
}

// ---- eight columns of a row ------------------------------------------------------------------

// Columns of a row of y: `first`, and every `step` columns up to `last`; after that the last ones
// again, since a load that may not happen keeps others from being in flight beside it. For the same
// reason it is asked once a row whether it is aligned.
template <int kScalar, int kSteps>
__device__ __forceinline__ void load_row(const uint8_t* row, int first, int step, int last,
                                         RawColumns (&raw)[kSteps]) {
  constexpr int kItem = Elements<kScalar>::kItem;
  const auto load = [&](auto load_16) {
#pragma unroll
    for (int u = 0; u < kSteps; ++u) {
      const uint8_t* from = row + min(first + u * step, last - kColumns) * kItem;
      raw[u].low = load_16(from);
      if constexpr (kScalar == kScalarFp32) raw[u].high = load_16(from + 16);
    }
  };
  if (aligned(row, 16))
    load([](const uint8_t* at) { return load_chunk(at); });
  else
    load([](const uint8_t* at) { return load_odd_bytes(at, 16); });
}

struct InboxRow {
  const uint8_t* data;  // aligned to 16 bytes; not by way of a read-only cache
  int hidden;
};

// Plain rows: loaded first, added later, so that all loads of a part are in flight.
template <int kScalar>
struct Plain {
  static constexpr bool kQuantized = false;
  using Loaded = RawColumns;

  static __device__ __forceinline__ Loaded load(const InboxRow& row, int col) {
    const auto* from = reinterpret_cast<const Chunk*>(row.data + col * Elements<kScalar>::kItem);
    Loaded l;
    l.low = from[0];
    if constexpr (kScalar == kScalarFp32) l.high = from[1];
    return l;
  }
  // The rank's own row, from y.
  template <int, int kSteps>
  static __device__ __forceinline__ void prepare(RawColumns (&)[kSteps]) {}
  static __device__ __forceinline__ Loaded prepared(const RawColumns& own) { return own; }
  static __device__ __forceinline__ void add(const Loaded& l, float (&sum)[kColumns]) {
    float v[kColumns];
    decode_columns(l, kScalar, v);
#pragma unroll
    for (int i = 0; i < kColumns; ++i) sum[i] += v[i];
  }
};

// Codes in front, scales after them: code * scale in fp32, then the add, not fused.
template <int kWire>
struct Scaled {
  static constexpr bool kQuantized = true;
  static constexpr int kBlock = kWire == kMxfp8 ? 32 : 128;  // columns that share a scale
  struct Loaded {
    uint2 codes{0, 0};
    uint32_t scale = 0;  // as it lies in the row, so that nothing waits for it
  };

  static __device__ __forceinline__ Loaded load(const InboxRow& row, int col) {
    const uint8_t* scales = row.data + row.hidden;
    Loaded l;
    l.codes = *reinterpret_cast<const uint2*>(row.data + col);
    if constexpr (kWire == kMxfp8)
      l.scale = scales[col / 32];
    else
      l.scale = reinterpret_cast<const uint32_t*>(scales)[col / 128];
    return l;
  }
  // Of a lane's columns in several steps, `raw` and on: the largest magnitude in the block of each.
  // The whole warp. Lanes ask each other about all steps before they look at an answer.
  template <int kScalar, int kSteps>
  static __device__ __forceinline__ void largest_of_blocks(const RawColumns* raw,
                                                           uint32_t (&amax)[kSteps]) {
#pragma unroll
    for (int u = 0; u < kSteps; ++u) {
      float v[kColumns];
      decode_columns(raw[u], kScalar, v);
      amax[u] = largest(v);
    }
#pragma unroll
    for (int step = 1; step < kBlock / kColumns; step *= 2) {
      uint32_t theirs[kSteps];
#pragma unroll
      for (int u = 0; u < kSteps; ++u) theirs[u] = __shfl_xor_sync(kAllLanes, amax[u], step);
#pragma unroll
      for (int u = 0; u < kSteps; ++u) amax[u] = max(amax[u], theirs[u]);
    }
  }
  template <int kScalar>
  static __device__ __forceinline__ Loaded quantize(const RawColumns& raw, uint32_t amax) {
    float v[kColumns];
    decode_columns(raw, kScalar, v);
    if constexpr (kWire == kMxfp8) {
      const uint32_t e = mxfp8_exponent(amax);
      return {encode_e4m3(v, e8m0_inverse(e)), e};
    } else {
      const Fp8Scale s = fp8_scale(amax);
      return {encode_e4m3(v, s.inverse), __float_as_uint(s.scale)};
    }
  }
  // The rank's own row takes the same way without leaving the registers, nor taking up more. The
  // whole warp.
  template <int kScalar, int kSteps>
  static __device__ __forceinline__ void prepare(RawColumns (&own)[kSteps]) {
    // As many as fit into the registers, which divisions take up too.
    constexpr int kTogether = kWire == kMxfp8 ? 2 : 1;
#pragma unroll
    for (int first = 0; first < kSteps; first += kTogether) {
      uint32_t amax[kTogether];
      largest_of_blocks<kScalar>(own + first, amax);
#pragma unroll
      for (int u = 0; u < kTogether; ++u) {
        const Loaded l = quantize<kScalar>(own[first + u], amax[u]);
        own[first + u].low = {l.codes.x | static_cast<uint64_t>(l.codes.y) << 32, l.scale};
      }
    }
  }
  static __device__ __forceinline__ Loaded prepared(const RawColumns& own) {
    return {{static_cast<uint32_t>(own.low.lo), static_cast<uint32_t>(own.low.lo >> 32)},
            static_cast<uint32_t>(own.low.hi)};
  }
  static __device__ __forceinline__ void add(const Loaded& l, float (&sum)[kColumns]) {
    const float scale = kWire == kMxfp8 ? e8m0_decode(l.scale) : __uint_as_float(l.scale);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t word = i < 2 ? l.codes.x : l.codes.y;
      const uint32_t pair = half2_of_e4m3x2(static_cast<uint16_t>(word >> (16 * (i % 2))));
      sum[2 * i] += low_fp16(pair) * scale;
      sum[2 * i + 1] += low_fp16(pair >> 16) * scale;
    }
  }
};

// Eight sums, rounded once, to columns `col`... of an output row.
template <int kScalar>
__device__ __forceinline__ void store_sums(uint8_t* row, int col, const float (&sum)[kColumns]) {
  if constexpr (kScalar == kScalarFp32) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float part[4] = {sum[4 * i], sum[4 * i + 1], sum[4 * i + 2], sum[4 * i + 3]};
      store_bytes(row + (col + 4 * i) * 4, round_chunk<kScalarFp32>(part), 16);
    }
  } else {
    store_bytes(row + col * 2, round_chunk<kScalar>(sum), 16);
  }
}

}  // namespace moe_a2a::cuda
