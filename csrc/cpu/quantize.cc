// Row quantizers of every wire: one read of the row, one write of payload and scales.
//
// Loops run over fixed-size blocks of floats without branches, so that g++ vectorizes them.
#include "quantize.h"

#include <algorithm>
#include <cfloat>

#include "../codec.h"
#include "scalar.h"

namespace moe_a2a::cpu {
namespace {

template <int N, class In>
inline uint32_t load_block(const uint8_t* x, int64_t first, float* v) {
  const auto* in = reinterpret_cast<const typename In::Storage*>(x) + first;
  uint32_t amax = 0;

  for (int i = 0; i < N; ++i) {
    v[i] = In::decode(in[i]);
    amax = std::max(amax, magnitude_bits(v[i]));
  }
  return amax;
}

template <int N>
inline void encode_e4m3(const float* v, float factor, uint8_t* codes) {
  for (int i = 0; i < N; ++i) codes[i] = e4m3_encode(v[i] * factor);
}

template <int N, class Bounded>
inline void encode_e2m1(const float* v, Bounded bounded, uint8_t* bytes) {
  uint8_t codes[N];

  for (int i = 0; i < N; ++i) codes[i] = e2m1_encode(bounded(v[i]));

  for (int i = 0; i < N / 2; ++i) bytes[i] = codes[2 * i] | codes[2 * i + 1] << 4;
}

struct Fp8Scale {
  float scale, inverse;
  explicit Fp8Scale(uint32_t amax_bits) {
    const float m = std::min(std::max(bits_float(amax_bits), 1e-10f), FLT_MAX);
    scale = m / 448.0f;
    inverse = 448.0f / m;
  }
};

template <class In>
void quantize_fp8(const uint8_t* x, uint8_t* payload, uint8_t* scales, const QuantizeShape& s) {
  constexpr int kBlock = 16;  // divides every hidden size
  uint32_t amax = 0;
  float v[kBlock];
  for (int64_t c = 0; c < s.hidden; c += kBlock)
    amax = std::max(amax, load_block<kBlock, In>(x, c, v));
  const Fp8Scale scale(amax);
  for (int64_t c = 0; c < s.hidden; c += kBlock) {  // the row is in L1 by now
    load_block<kBlock, In>(x, c, v);
    encode_e4m3<kBlock>(v, scale.inverse, payload + c);
  }
  std::memcpy(scales, &scale.scale, 4);
}

template <class In>
void quantize_fp8_block128(const uint8_t* x, uint8_t* payload, uint8_t* scales,
                           const QuantizeShape& s) {
  constexpr int kBlock = 128;
  for (int64_t c = 0; c < s.hidden; c += kBlock) {
    float v[kBlock];
    const Fp8Scale scale(load_block<kBlock, In>(x, c, v));
    encode_e4m3<kBlock>(v, scale.inverse, payload + c);
    std::memcpy(scales + c / kBlock * 4, &scale.scale, 4);
  }
}

template <class In>
void quantize_mxfp8(const uint8_t* x, uint8_t* payload, uint8_t* scales, const QuantizeShape& s) {
  constexpr int kBlock = 32;
  for (int64_t c = 0; c < s.hidden; c += kBlock) {
    float v[kBlock];
    const uint32_t e = mxfp8_exponent(load_block<kBlock, In>(x, c, v));
    encode_e4m3<kBlock>(v, e8m0_inverse(e), payload + c);
    scales[c / kBlock] = static_cast<uint8_t>(e);
  }
  std::memset(payload + s.hidden, 0, s.padded - s.hidden);
  std::memset(scales + s.hidden / kBlock, 0, (s.padded - s.hidden) / kBlock);
}

template <class In>
void quantize_nvfp4(const uint8_t* x, uint8_t* payload, uint8_t* scales, const QuantizeShape& s) {
  constexpr int kBlock = 16;
  const float sixth = bits_float(0x3E2AAAABu), decode_scale = 1.0f / s.global_scale;
  for (int64_t c = 0; c < s.hidden; c += kBlock) {
    float v[kBlock];
    const float amax = bits_float(load_block<kBlock, In>(x, c, v));
    const float wanted = (amax * sixth) * s.global_scale;
    const uint8_t code = e4m3_encode(std::min(wanted, 448.0f));
    const float sf = e4m3_decode(code);
    const float out = amax == 0.0f || sf == 0.0f ? 0.0f : 1.0f / (sf * decode_scale);
    encode_e2m1<kBlock>(v, [out](float a) { return a * out; }, payload + c / 2);
    scales[c / kBlock] = code;
  }
}

template <class In>
void quantize_mxfp4(const uint8_t* x, uint8_t* payload, uint8_t* scales, const QuantizeShape& s) {
  constexpr int kBlock = 32;
  for (int64_t c = 0; c < s.hidden; c += kBlock) {
    float v[kBlock];
    const uint32_t e = mxfp4_exponent(load_block<kBlock, In>(x, c, v));
    const float factor = e8m0_inverse(e);
    encode_e2m1<kBlock>(v, [factor](float a) { return a * factor; }, payload + c / 2);
    scales[c / kBlock] = static_cast<uint8_t>(e);
  }
}

template <class In>
RowQuantizer quantizer_from(int wire) {
  switch (wire) {
    case kFp8:
      return quantize_fp8<In>;
    case kFp8Block128:
      return quantize_fp8_block128<In>;
    case kMxfp8:
      return quantize_mxfp8<In>;
    case kNvfp4:
      return quantize_nvfp4<In>;
    case kMxfp4:
      return quantize_mxfp4<In>;
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
