// Rows on their way into a sum: eight columns a lane, decoded to fp32 and added in rank order.
#pragma once

#include "quantize.cuh"

namespace moe_a2a::cuda {

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

// ---- eight columns of a row in an inbox ------------------------------------------------------

struct InboxRow {
  const uint8_t* data;
  int hidden;
};

// Plain rows: loaded first, added later, so that several loads are in flight.
template <int kScalar>
struct Plain {
  static constexpr bool kQuantized = false;
  static constexpr int kChunks = kScalar == kScalarFp32 ? 2 : 1;
  struct Loaded {
    Chunk chunk[kChunks];
  };
  static __device__ __forceinline__ Loaded load(const InboxRow& row, int col) {
    Loaded l;
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      l.chunk[i] = load_arrived(row.data + (col * Elements<kScalar>::kItem) + 16 * i);
    }
    return l;
  }
  static __device__ __forceinline__ void add(const Loaded& l, float (&sum)[kColumns]) {
    if constexpr (kChunks == 1) {
      add_chunk<kScalar>(l.chunk[0], sum);
    } else {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        sum[4 * i] += __uint_as_float(static_cast<uint32_t>(l.chunk[i].lo));
        sum[4 * i + 1] += __uint_as_float(static_cast<uint32_t>(l.chunk[i].lo >> 32));
        sum[4 * i + 2] += __uint_as_float(static_cast<uint32_t>(l.chunk[i].hi));
        sum[4 * i + 3] += __uint_as_float(static_cast<uint32_t>(l.chunk[i].hi >> 32));
      }
    }
  }
};

// Codes in front, scales after them: code * scale in fp32, then the add, not fused.
template <int kWire>
struct Scaled {
  static constexpr bool kQuantized = true;
  struct Loaded {
    uint2 codes;
    float scale;
  };
  static __device__ __forceinline__ Loaded load(const InboxRow& row, int col) {
    const uint8_t* scales = row.data + row.hidden;
    Loaded l;
    l.codes = *reinterpret_cast<const uint2*>(row.data + col);
    if constexpr (kWire == kMxfp8)
      l.scale = e8m0_decode(scales[col / 32]);
    else
      l.scale = reinterpret_cast<const float*>(scales)[col / 128];
    return l;
  }
  // The rank's own row takes the same way without leaving the registers. The whole warp.
  static __device__ __forceinline__ Loaded quantize(const float (&v)[kColumns]) {
    if constexpr (kWire == kMxfp8) {
      const uint32_t e = mxfp8_exponent(largest_of_lanes<4>(largest(v)));
      return {encode_e4m3(v, e8m0_inverse(e)), e8m0_decode(e)};
    } else {
      const Fp8Scale s = fp8_scale(largest_of_lanes<16>(largest(v)));
      return {encode_e4m3(v, s.inverse), s.scale};
    }
  }
  static __device__ __forceinline__ void add(const Loaded& l, float (&sum)[kColumns]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t word = i < 2 ? l.codes.x : l.codes.y;
      const uint32_t pair = half2_of_e4m3x2(static_cast<uint16_t>(word >> (16 * (i % 2))));
      sum[2 * i] += low_fp16(pair) * l.scale;
      sum[2 * i + 1] += low_fp16(pair >> 16) * l.scale;
    }
  }
};

// Eight sums, rounded once, to columns `col`... of an output row.
__device__ __forceinline__ void store_sums(uint8_t* row, int scalar, int col,
                                           const float (&sum)[kColumns]) {
  if (scalar == kScalarFp32) {
    for (int i = 0; i < 2; ++i) {
      const float part[4] = {sum[4 * i], sum[4 * i + 1], sum[4 * i + 2], sum[4 * i + 3]};
      store_bytes(row + (col + 4 * i) * 4, round_chunk<kScalarFp32>(part), 16);
    }
  } else if (scalar == kScalarBf16) {
    store_bytes(row + col * 2, round_chunk<kScalarBf16>(sum), 16);
  } else {
    store_bytes(row + col * 2, round_chunk<kScalarFp16>(sum), 16);
  }
}

}  // namespace moe_a2a::cuda
