// Row quantizers, a warp at a time: eight columns a lane, the largest magnitude of a block by
// shuffles between its lanes. Bit-exact to csrc/cpu/quantize.cc (docs/formats.md).
#pragma once

#include <cfloat>

#include "../codec.h"
#include "packet.cuh"

namespace moe_a2a::cuda {

constexpr int kColumns = 8;                     // of a lane
constexpr int kWarpColumns = kWarp * kColumns;  // of a warp's step

// In place of a wire or an input that a kernel is made for: it asks at run time, and is slower.
constexpr int kAny = -1;
constexpr int kAlignedBf16 = 0;  // rows of bf16 that begin on 16 bytes

__device__ __forceinline__ float low_bf16(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high_bf16(uint32_t pair) {
  return __uint_as_float(pair & 0xFFFF0000u);
}

// Eight elements of a row as they lie there: loaded first, decoded later, so that several loads are
// in flight.
struct RawColumns {
  Chunk low{0, 0}, high{0, 0};
};

__device__ __forceinline__ RawColumns load_columns(const uint8_t* row, int scalar, int col) {
  const uint8_t* at = row + col * (scalar == kScalarFp32 ? 4 : 2);
  RawColumns raw;
  raw.low = load_bytes(at, 16);
  if (scalar == kScalarFp32) raw.high = load_bytes(at + 16, 16);
  return raw;
}

__device__ __forceinline__ void decode_columns(const RawColumns& raw, int scalar,
                                               float (&v)[kColumns]) {
  const uint32_t w[4] = {static_cast<uint32_t>(raw.low.lo), static_cast<uint32_t>(raw.low.lo >> 32),
                         static_cast<uint32_t>(raw.low.hi),
                         static_cast<uint32_t>(raw.low.hi >> 32)};
  if (scalar == kScalarBf16) {
#pragma unroll
    for (int i = 0; i < 4; ++i) v[2 * i] = low_bf16(w[i]), v[2 * i + 1] = high_bf16(w[i]);
  } else if (scalar == kScalarFp16) {
#pragma unroll
    for (int i = 0; i < 4; ++i) v[2 * i] = low_fp16(w[i]), v[2 * i + 1] = low_fp16(w[i] >> 16);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) v[i] = __uint_as_float(w[i]);
    v[4] = __uint_as_float(static_cast<uint32_t>(raw.high.lo));
    v[5] = __uint_as_float(static_cast<uint32_t>(raw.high.lo >> 32));
    v[6] = __uint_as_float(static_cast<uint32_t>(raw.high.hi));
    v[7] = __uint_as_float(static_cast<uint32_t>(raw.high.hi >> 32));
  }
}

// Bits of the largest magnitude of eight bf16; NaN is passed over, as fmaxf does.
__device__ __forceinline__ uint32_t largest(const Chunk& c) {
  const uint32_t low =
      larger_magnitudes(static_cast<uint32_t>(c.lo), static_cast<uint32_t>(c.lo >> 32));
  const uint32_t high =
      larger_magnitudes(static_cast<uint32_t>(c.hi), static_cast<uint32_t>(c.hi >> 32));
  const uint32_t pair = larger_magnitudes(low, high);
  return __float_as_uint(fmaxf(fmaxf(fabsf(low_bf16(pair)), fabsf(high_bf16(pair))), 0.0f));
}

// The same of columns; the last fmaxf is for those that are all NaN.
__device__ __forceinline__ uint32_t largest(const float (&v)[kColumns]) {
  float amax[kColumns / 2];
#pragma unroll
  for (int i = 0; i < 4; ++i) amax[i] = fmaxf(fabsf(v[2 * i]), fabsf(v[2 * i + 1]));
  const float all = fmaxf(fmaxf(amax[0], amax[1]), fmaxf(amax[2], amax[3]));
  return __float_as_uint(fmaxf(all, 0.0f));
}

template <int kLanes>
__device__ __forceinline__ uint32_t largest_of_lanes(uint32_t amax) {
#pragma unroll
  for (int step = 1; step < kLanes; step *= 2)
    amax = max(amax, __shfl_xor_sync(kAllLanes, amax, step));
  return amax;
}

__device__ __forceinline__ uint2 encode_e4m3(const float (&v)[kColumns], float factor) {
  uint32_t pair[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) pair[i] = e4m3x2(v[2 * i] * factor, v[2 * i + 1] * factor);
  return {pair[0] | pair[1] << 16, pair[2] | pair[3] << 16};
}

#if defined(MOE_HAS_E2M1)
__device__ __forceinline__ uint32_t encode_e2m1(const float (&v)[kColumns], float factor) {
  uint32_t codes = 0;
#pragma unroll
  for (int i = 0; i < kColumns; i += 2)
    codes |= e2m1x2(v[i] * factor, v[i + 1] * factor) << (4 * i);
  return codes;
}
#else
// The top bytes of the even or of the odd columns.
__device__ __forceinline__ uint32_t top_bytes(const float (&x)[kColumns], int first) {
  const auto two = [&](int i) {
    return __byte_perm(__float_as_uint(x[i]), __float_as_uint(x[i + 2]), 0x0073);
  };
  return __byte_perm(two(first), two(first + 4), 0x5410);
}

// e2m1_encode() of codec.h in fewer instructions. A magnitude a has the code of the nearest integer
// to the least of 2a, a + 2 and a/2 + 4, the first below 2, the last from 4 on. Each is rounded
// once, by the adder, as the last bits of a sum with 1.5 * 2^23; the nearest of the least is the
// least of the nearest.
__device__ __forceinline__ uint32_t encode_e2m1(const float (&v)[kColumns], float factor) {
  constexpr float kSum = 12582912.0f;
  uint32_t codes = 0;
  float x[kColumns];
#pragma unroll
  for (int i = 0; i < kColumns; ++i) {
    x[i] = product(v[i], factor);
    const float a = fminf(fabsf(x[i]), 6.0f);  // NaN gives 6
    // As integers, which are in the same order, and of which one instruction takes three.
    const uint32_t twice = __float_as_uint(fmaf(a, 2.0f, kSum));
    const uint32_t same = __float_as_uint(a + (kSum + 2.0f));
    const uint32_t half = __float_as_uint(fmaf(a, 0.5f, kSum + 4.0f));
    codes += min(min(twice, same), half) << (4 * i);
  }
  constexpr uint32_t kExcess = 0x4B400000;  // kSum, of each of the addends
  codes -= kExcess * 0x11111111u;
  return codes | (top_bytes(x, 0) >> 4 & 0x08080808u) | (top_bytes(x, 1) & 0x80808080u);
}
#endif

struct Fp8Scale {
  float scale, inverse;
};

__device__ __forceinline__ Fp8Scale fp8_scale(uint32_t amax) {
  const float m = fminf(fmaxf(bits_float(amax), 1e-10f), FLT_MAX);
  return {m / 448.0f, 448.0f / m};
}

struct Nvfp4Scale {
  uint8_t code;
  float factor;
};

// `decode_scale` is 1 / global_scale.
__device__ __forceinline__ Nvfp4Scale nvfp4_scale(uint32_t amax, float global_scale,
                                                  float decode_scale) {
  const float v = (bits_float(amax) * bits_float(0x3E2AAAABu)) * global_scale;
  const uint32_t code = e4m3x2(fminf(v, 448.0f), 0.0f) & 0xFF;
  const float sf = low_fp16(half2_of_e4m3x2(static_cast<uint16_t>(code)));
  // 0 where amax is 0, or too small for a scale.
  return {static_cast<uint8_t>(code), sf == 0.0f ? 0.0f : __frcp_rn(sf * decode_scale)};
}

// The global scale, where it is used for the first time. Without something that stays where it is
// in the program the compiler takes the reciprocal, and so waits for the scale, as early as it can.
template <int kWire>
__device__ __forceinline__ float arrived(float global_scale) {
  return kWire == kAny || kWire == kNvfp4 ? __shfl_sync(kAllLanes, global_scale, 0) : 1.0f;
}

struct QuantizeRow {
  const uint8_t* data;
  int scalar, wire, hidden, padded;
  float global_scale, decode_scale;
  Fp8Scale row_scale;  // of wire fp8
};

// One step of a warp: codes of this lane's columns to `payload`, and, by one lane of a block,
// its scale to `scale`. `own`: the bits of their largest magnitude. Columns from `hidden` to
// `padded` count as zeros; `inside`: these are no later ones.
template <int kWire>
__device__ __forceinline__ void quantize_step(const QuantizeRow& r, const float (&v)[kColumns],
                                              uint32_t own, bool inside, uint8_t* payload,
                                              uint8_t* scale) {
  const int lane = threadIdx.x % kWarp;
  switch (kWire == kAny ? r.wire : kWire) {
    case kFp8:
      if (inside) *reinterpret_cast<uint2*>(payload) = encode_e4m3(v, r.row_scale.inverse);
      break;
    case kFp8Block128: {
      const Fp8Scale s = fp8_scale(largest_of_lanes<16>(own));
      if (inside) *reinterpret_cast<uint2*>(payload) = encode_e4m3(v, s.inverse);
      if (inside && lane % 16 == 0) *reinterpret_cast<float*>(scale) = s.scale;
      break;
    }
    case kMxfp8: {
      const uint32_t e = mxfp8_exponent(largest_of_lanes<4>(own));
      if (inside) *reinterpret_cast<uint2*>(payload) = encode_e4m3(v, e8m0_inverse(e));
      if (inside && lane % 4 == 0) *scale = static_cast<uint8_t>(e);
      break;
    }
    case kMxfp4: {
      const uint32_t e = mxfp4_exponent(largest_of_lanes<4>(own));
      if (inside) *reinterpret_cast<uint32_t*>(payload) = encode_e2m1(v, e8m0_inverse(e));
      if (inside && lane % 4 == 0) *scale = static_cast<uint8_t>(e);
      break;
    }
    default: {
      const Nvfp4Scale s = nvfp4_scale(largest_of_lanes<2>(own), r.global_scale, r.decode_scale);
      if (inside) *reinterpret_cast<uint32_t*>(payload) = encode_e2m1(v, s.factor);
      if (inside && lane % 2 == 0) *scale = s.code;
      break;
    }
  }
}

// Bytes of codes that a row's first `columns` take, and of scales.
__device__ __forceinline__ int code_bytes(int wire, int columns) {
  return wire == kNvfp4 || wire == kMxfp4 ? columns / 2 : columns;
}

__device__ __forceinline__ int scale_bytes(int wire, int columns) {
  switch (wire) {
    case kFp8:  // comes with the first column
      return columns == 0 ? 0 : 4;
    case kFp8Block128:
      return columns / 128 * 4;
    case kNvfp4:
      return columns / 16;
    default:
      return columns / 32;
  }
}

// Steps of a row in a warp's registers, from loads that are all in flight: columns `first`,
// `first + stride`, ... below `last`, at most kSteps of them; a lane's eight columns of each.
template <int kInput, int kSteps>
struct Batch {
  static constexpr bool kAligned = kInput == kAlignedBf16;
  RawColumns raw[kSteps];  // zeros in the columns that pad a row

  __device__ __forceinline__ void load(const uint8_t* row, int scalar, int hidden, int first,
                                       int stride, int last) {
    const int begin = first + static_cast<int>(threadIdx.x % kWarp) * kColumns;
    const int end = min(last, hidden);
    const uint8_t* from = row + begin * 2;  // of bf16
#pragma unroll
    for (int u = 0; u < kSteps; ++u) {
      const int col = begin + u * stride;
      raw[u] = {};
      if (col < end && kAligned) raw[u].low = load_chunk(from + u * stride * 2);
      if (col < end && !kAligned) raw[u] = load_columns(row, scalar, col);
    }
  }

  __device__ __forceinline__ uint32_t largest_of(int scalar) const {
    uint32_t amax = 0;
#pragma unroll
    for (int u = 0; u < kSteps; ++u) {
      float v[kColumns];
      if (!kAligned) decode_columns(raw[u], scalar, v);
      amax = max(amax, kAligned ? largest(raw[u].low) : largest(v));
    }
    return amax;
  }

  // To the place of column 0. Uses the columns up: a loop that moves them along is short, and code
  // that runs for the first time takes longer to fetch than to execute.
  template <int kWire>
  __device__ __forceinline__ void quantize(const QuantizeRow& r, int first, int stride, int last,
                                           uint8_t* payload, uint8_t* scales) {
    const int wire = kWire == kAny ? r.wire : kWire;
    int col = first + static_cast<int>(threadIdx.x % kWarp) * kColumns;
    int code = hold(code_bytes(wire, col)), scale = hold(scale_bytes(wire, col));
    const int code_step = code_bytes(wire, stride), scale_step = scale_bytes(wire, stride);
#pragma unroll 1
    for (; first < last; first += stride) {
      float v[kColumns];
      decode_columns(raw[0], kAligned ? kScalarBf16 : r.scalar, v);
      const uint32_t own = kAligned ? largest(raw[0].low) : largest(v);
#pragma unroll
      for (int u = 1; u < kSteps; ++u) raw[u - 1] = raw[u];
      quantize_step<kWire>(r, v, own, col < r.padded, payload + code, scales + scale);
      col += stride;
      code += code_step;
      scale += scale_step;
    }
  }
};

// The largest magnitude of columns [first, last) over a warp.
template <int kInput>
__device__ __forceinline__ uint32_t largest_of_columns(const uint8_t* row, int scalar, int first,
                                                       int last) {
  constexpr int kAhead = 4;
  uint32_t amax = 0;
#pragma unroll 1
  for (int at = first; at < last; at += kAhead * kWarpColumns) {
    Batch<kInput, kAhead> batch;
    batch.load(row, scalar, last, at, kWarpColumns, last);
    amax = max(amax, batch.largest_of(scalar));
  }
  return largest_of_lanes<kWarp>(amax);
}

}  // namespace moe_a2a::cuda
