// Row quantizers of every wire: one read of the row, one write of payload and scales.
//
// A row goes through in tiles that stay in L1, each in a few flat passes over columns or blocks.
// The passes are functions of their own and free of branches: that is what g++ turns into vector
// code.
#include "quantize.h"

#include <algorithm>
#include <cfloat>
#include <cstring>

#include "../codec.h"
#include "scalar.h"

namespace moe_a2a::cpu {
namespace {

constexpr int kTile = 1024;  // columns; a multiple of every block
constexpr int kMinBlock = 16;

struct Tile {
  alignas(64) float value[kTile];
  alignas(64) uint32_t magnitude[kTile];  // of columns, then in front those of blocks
  alignas(64) float factor[kTile / kMinBlock];
  alignas(64) uint8_t code[kTile];
};

template <class In>
MOE_OWN_LOOP void load(const uint8_t* x, int64_t first, int width, Tile& t) {
  const auto* in = reinterpret_cast<const typename In::Storage*>(x) + first;
  for (int i = 0; i < width; ++i) t.value[i] = In::decode(in[i]);
}

MOE_OWN_LOOP void take_magnitudes(int width, Tile& t) {
  for (int i = 0; i < width; ++i) t.magnitude[i] = magnitude_bits(t.value[i]);
}

// Reduces the first `count` magnitudes to one for every `Block`.
template <int Block>
MOE_OWN_LOOP void block_amax(int count, Tile& t) {
  for (int b = 0; b < count / Block; ++b) {
    uint32_t amax = 0;
    for (int i = 0; i < Block; ++i) amax = std::max(amax, t.magnitude[b * Block + i]);
    t.magnitude[b] = amax;
  }
}

template <int Block>
MOE_OWN_LOOP void apply_factors(int blocks, Tile& t) {
  for (int b = 0; b < blocks; ++b)
    for (int i = 0; i < Block; ++i) t.value[b * Block + i] *= t.factor[b];
}

MOE_OWN_LOOP void encode_e4m3(int width, const Tile& t, uint8_t* payload) {
  for (int i = 0; i < width; ++i) payload[i] = e4m3_encode(t.value[i]);
}

MOE_OWN_LOOP void encode_e2m1(int width, Tile& t, uint8_t* payload) {
  for (int i = 0; i < width; ++i) t.code[i] = e2m1_encode(t.value[i]);
  for (int i = 0; i < width / 2; ++i) payload[i] = t.code[2 * i] | t.code[2 * i + 1] << 4;
}

struct Fp8Scale {
  float scale, inverse;
};

inline Fp8Scale fp8_scale(uint32_t amax) {
  const float m = std::min(std::max(bits_float(amax), 1e-10f), FLT_MAX);
  return {m / 448.0f, 448.0f / m};
}

// A block format turns the magnitudes of blocks into scale bytes and factors, and values into
// codes.
struct Fp8Block128 {
  static constexpr int kBlock = 128, kScaleBytes = 4, kCodesPerByte = 1;
  MOE_OWN_LOOP static void scale(int blocks, Tile& t, uint8_t* scales, float) {
    for (int b = 0; b < blocks; ++b) {
      const Fp8Scale s = fp8_scale(t.magnitude[b]);
      t.factor[b] = s.inverse;
      std::memcpy(scales + b * 4, &s.scale, 4);
    }
  }
};

template <uint32_t (*exponent)(uint32_t), int codes_per_byte>
struct Microscaled {
  static constexpr int kBlock = 32, kScaleBytes = 1, kCodesPerByte = codes_per_byte;
  MOE_OWN_LOOP static void scale(int blocks, Tile& t, uint8_t* scales, float) {
    for (int b = 0; b < blocks; ++b) {
      const uint32_t e = exponent(t.magnitude[b]);
      t.factor[b] = e8m0_inverse(e);
      scales[b] = static_cast<uint8_t>(e);
    }
  }
};
using Mxfp8 = Microscaled<mxfp8_exponent, 1>;
using Mxfp4 = Microscaled<mxfp4_exponent, 2>;

struct Nvfp4 {
  static constexpr int kBlock = 16, kScaleBytes = 1, kCodesPerByte = 2;
  MOE_OWN_LOOP static void scale(int blocks, Tile& t, uint8_t* scales, float global_scale) {
    const float sixth = bits_float(0x3E2AAAABu), decode_scale = 1.0f / global_scale;
    for (int b = 0; b < blocks; ++b) {
      const float amax = bits_float(t.magnitude[b]);
      const uint8_t code = e4m3_encode(std::min((amax * sixth) * global_scale, 448.0f));
      const float sf = e4m3_decode(code);  // 0 where amax is 0, or too small for a scale
      t.factor[b] = sf == 0.0f ? 0.0f : 1.0f / (sf * decode_scale);
      scales[b] = code;
    }
  }
};

template <class In, class Format>
void quantize_blocks(const uint8_t* x, uint8_t* payload, uint8_t* scales, const QuantizeShape& s) {
  Tile t;
  for (int64_t first = 0; first < s.hidden; first += kTile) {
    const int width = static_cast<int>(std::min<int64_t>(kTile, s.hidden - first));
    const int blocks = width / Format::kBlock;
    load<In>(x, first, width, t);
    take_magnitudes(width, t);
    block_amax<Format::kBlock>(width, t);
    Format::scale(blocks, t, scales + first / Format::kBlock * Format::kScaleBytes, s.global_scale);
    apply_factors<Format::kBlock>(blocks, t);
    if (Format::kCodesPerByte == 1)
      encode_e4m3(width, t, payload + first);
    else
      encode_e2m1(width, t, payload + first / 2);
  }
  // Columns that pad an mxfp8 row.
  std::memset(payload + s.hidden / Format::kCodesPerByte, 0, s.padded - s.hidden);
  std::memset(scales + s.hidden / Format::kBlock * Format::kScaleBytes, 0,
              (s.padded - s.hidden) / Format::kBlock);
}

template <class In>
void quantize_fp8(const uint8_t* x, uint8_t* payload, uint8_t* scales, const QuantizeShape& s) {
  Tile t;
  uint32_t amax = 0;
  for (int64_t first = 0; first < s.hidden; first += kTile) {
    const int width = static_cast<int>(std::min<int64_t>(kTile, s.hidden - first));
    load<In>(x, first, width, t);
    take_magnitudes(width, t);
    block_amax<kMinBlock>(width, t);
    amax = std::max(amax, *std::max_element(t.magnitude, t.magnitude + width / kMinBlock));
  }
  const Fp8Scale scale = fp8_scale(amax);
  std::fill(t.factor, t.factor + kTile / kMinBlock, scale.inverse);
  for (int64_t first = 0; first < s.hidden; first += kTile) {  // the row is in L1 by now
    const int width = static_cast<int>(std::min<int64_t>(kTile, s.hidden - first));
    load<In>(x, first, width, t);
    apply_factors<kMinBlock>(width / kMinBlock, t);
    encode_e4m3(width, t, payload + first);
  }
  std::memcpy(scales, &scale.scale, 4);
}

template <class In>
RowQuantizer quantizer_from(int wire) {
  switch (wire) {
    case kFp8:
      return quantize_fp8<In>;
    case kFp8Block128:
      return quantize_blocks<In, Fp8Block128>;
    case kMxfp8:
      return quantize_blocks<In, Mxfp8>;
    case kNvfp4:
      return quantize_blocks<In, Nvfp4>;
    case kMxfp4:
      return quantize_blocks<In, Mxfp4>;
    default:
      return nullptr;
  }
}

}  // namespace

RowQuantizer row_quantizer(int wire, int scalar) {
  switch (scalar) {
    case kScalarBf16:
      return quantizer_from<Bf16>(wire);
    case kScalarFp16:
      return quantizer_from<Fp16>(wire);
    case kScalarFp32:
      return quantizer_from<Fp32>(wire);
    default:
      return nullptr;
  }
}

}  // namespace moe_a2a::cpu
