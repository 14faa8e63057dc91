// Element codecs: e2m1, e4m3, e8m0, bf16, fp16. Host and device code, branchless so that g++ turns
// the loops around them into vector code. Bit-exact definitions: docs/formats.md.
//
// Built with -ffp-contract=off (g++) and --fmad=false (nvcc): every product and sum rounds once.
#pragma once

#include <cstdint>
#include <cstring>

#include "layout.h"

namespace moe_a2a {

MOE_HD uint32_t float_bits(float x) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(x);
#else
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return u;
#endif
}

MOE_HD float bits_float(uint32_t u) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(u);
#else
  float x;
  std::memcpy(&x, &u, 4);
  return x;
#endif
}

constexpr uint32_t kAbsMask = 0x7FFFFFFFu;
constexpr uint32_t kInfBits = 0x7F800000u;

// Bits of |x|, NaN counted as 0: they order like the magnitudes, so amax is an integer maximum.
MOE_HD uint32_t magnitude_bits(float x) {
  const uint32_t u = float_bits(x) & kAbsMask;
  return u > kInfBits ? 0u : u;
}

// ---- bf16 and fp16 -------------------------------------------------------------------------

MOE_HD float bf16_decode(uint16_t h) { return bits_float(uint32_t{h} << 16); }

MOE_HD uint16_t bf16_encode(float x) {
  const uint32_t u = float_bits(x);
  const uint32_t rounded = (u + 0x7FFFu + ((u >> 16) & 1u)) >> 16;
  const uint32_t nan = (u >> 16) | 0x40u;  // the carry must not turn a NaN into infinity
  return static_cast<uint16_t>((u & kAbsMask) > kInfBits ? nan : rounded);
}

MOE_HD float fp16_decode(uint16_t h) {
  const uint32_t sign = (h & 0x8000u) << 16, em = (h & 0x7FFFu) << 13;
  // The exponent is rebiased by an exact product, which normalizes subnormals on the way.
  const uint32_t finite = float_bits(bits_float(em) * bits_float((127u + 112u) << 23));
  return bits_float(sign | (em >= 0x0F800000u ? em | kInfBits : finite));
}

MOE_HD uint16_t fp16_encode(float x) {
  const uint32_t u = float_bits(x), a = u & kAbsMask, sign = (u >> 16) & 0x8000u;
  const uint32_t normal = (a - (112u << 23) + 0xFFFu + ((a >> 13) & 1u)) >> 13;
  // Adding 0.5 leaves a multiple of 2^-24 in the low bits, rounded to nearest even by the adder.
  const uint32_t subnormal = float_bits(bits_float(a) + 0.5f) - float_bits(0.5f);
  uint32_t r = a < (113u << 23) ? subnormal : normal;
  r = a >= 0x477FF000u ? 0x7C00u : r;  // 65520 and above round to infinity
  r = a > kInfBits ? 0x7E00u : r;
  return static_cast<uint16_t>(sign | r);
}

// ---- e4m3 ----------------------------------------------------------------------------------

// Nearest even, saturating at 448; NaN of either sign gives 0x7F.
MOE_HD uint8_t e4m3_encode(float x) {
  const uint32_t u = float_bits(x), sign = (u >> 24) & 0x80u;
  uint32_t a = u & kAbsMask;
  const bool nan = a > kInfBits;
  a = a > 0x43E00000u ? 0x43E00000u : a;  // 448
  const uint32_t normal = (a - (120u << 23) + 0x7FFFFu + ((a >> 20) & 1u)) >> 20;
  // Adding 2^14 leaves a multiple of 2^-9, the subnormal step, in the low bits.
  const uint32_t subnormal = float_bits(bits_float(a) + 16384.0f) - float_bits(16384.0f);
  const uint32_t r = sign | (a < (121u << 23) ? subnormal : normal);
  return static_cast<uint8_t>(nan ? 0x7Fu : r);
}

MOE_HD float e4m3_decode(uint8_t code) {
  const uint32_t sign = (code & 0x80u) << 24, em = code & 0x7Fu;
  const float finite = bits_float(em << 20) * bits_float((127u + 120u) << 23);
  return bits_float(sign | (em == 0x7Fu ? 0x7FC00000u : float_bits(finite)));
}

// ---- e2m1 ----------------------------------------------------------------------------------

// Nearest, ties to the even code, saturating at 6. The count of thresholds passed is the code; a
// tie goes up (>=) where the upper code is even. NaN of either sign gives code 7.
MOE_HD uint8_t e2m1_encode(float x) {
  const uint32_t u = float_bits(x), a = u & kAbsMask;
  uint32_t code = 0;
  code += a > 0x3E800000u;   // .25
  code += a >= 0x3F400000u;  // .75
  code += a > 0x3FA00000u;   // 1.25
  code += a >= 0x3FE00000u;  // 1.75
  code += a > 0x40200000u;   // 2.5
  code += a >= 0x40600000u;  // 3.5
  code += a > 0x40A00000u;   // 5
  return static_cast<uint8_t>(a > kInfBits ? 7u : code | ((u >> 28) & 8u));
}

// ---- e8m0 ----------------------------------------------------------------------------------

// 2^(e - 127) for e in [0, 254]; e = 0 is an fp32 subnormal.
MOE_HD float e8m0_decode(uint32_t e) { return bits_float(e == 0 ? 0x00400000u : e << 23); }

// 2^(127 - e): what the elements are multiplied with, exactly.
MOE_HD float e8m0_inverse(uint32_t e) { return e8m0_decode(254u - e); }

// Smallest e with amax <= limit * 2^(e - 127), where limit = (1 + limit_fraction / 2^23) *
// 2^limit_exponent. `amax` is given by its bits; infinity takes the largest scale.
MOE_HD uint32_t e8m0_ceil(uint32_t amax, int limit_exponent, uint32_t limit_fraction) {
  if (amax >= kInfBits) return 254;
  // A subnormal's exponent is at most 0 once normalized; minus the limit's, plus 1, that is < 0.
  const int e = static_cast<int>(amax >> 23) - limit_exponent +
                static_cast<int>((amax & 0x7FFFFFu) > limit_fraction);
  return static_cast<uint32_t>(e < 0 ? 0 : e);
}

MOE_HD uint32_t mxfp8_exponent(uint32_t amax) { return e8m0_ceil(amax, 8, 0x600000u); }  // 448
MOE_HD uint32_t mxfp4_exponent(uint32_t amax) { return e8m0_ceil(amax, 2, 0x400000u); }  // 6

}  // namespace moe_a2a
