#include "material.h"

#include <cmath>
#include <cstring>

#include "draw.h"

namespace sanitize {
namespace {

using namespace moe_a2a;

double e4m3(uint8_t code) {
  const int exponent = code >> 3 & 15, fraction = code & 7;
  const double magnitude =
      exponent == 0 ? std::ldexp(fraction, -9) : std::ldexp(8 + fraction, exponent - 10);
  return (code & 0x80) != 0 ? -magnitude : magnitude;
}

double e2m1(uint8_t code) {
  constexpr double kMagnitudes[] = {0, 0.5, 1, 1.5, 2, 3, 4, 6};
  return (code & 8) != 0 ? -kMagnitudes[code & 7] : kMagnitudes[code & 7];
}

bool four_bits(int wire) { return wire == kNvfp4 || wire == kMxfp4; }

int64_t block_of(int wire, int64_t hidden) {
  switch (wire) {
    case kFp8:
      return hidden;
    case kFp8Block128:
      return 128;
    case kNvfp4:
      return 16;
    default:
      return 32;
  }
}

void append_float(Bytes& out, float value) {
  const auto* bytes = reinterpret_cast<const uint8_t*>(&value);
  out.insert(out.end(), bytes, bytes + 4);
}

// Appends the scale of a block, and returns what an element of code 1.0 stands for.
double draw_scale(int wire, double global_scale, uint64_t drawn, Bytes& scales) {
  const int exponent = static_cast<int>(drawn % 3) - 1;
  if (wire == kFp8 || wire == kFp8Block128)
    append_float(scales, static_cast<float>(std::ldexp(1.0, exponent)));
  else if (wire == kNvfp4)
    scales.push_back(static_cast<uint8_t>(0x28 + drawn % 0x20));  // 0.25 to 3.75
  else
    scales.push_back(static_cast<uint8_t>(127 + exponent));
  return wire == kNvfp4 ? e4m3(scales.back()) / global_scale : std::ldexp(1.0, exponent);
}

uint16_t half_bits(double value) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  if (value == 0) return sign;
  int exponent;
  const double fraction = std::frexp(std::fabs(value), &exponent);  // in [0.5, 1)
  const auto mantissa = static_cast<uint16_t>(std::ldexp(fraction, 11));
  return static_cast<uint16_t>(sign | (exponent + 14) << 10 | (mantissa & 0x3FF));
}

void append_scalar(Bytes& out, double value, int scalar) {
  const auto single = static_cast<float>(value);
  if (scalar == kScalarFp32) return append_float(out, single);
  uint32_t word;
  std::memcpy(&word, &single, 4);
  const auto bits = scalar == kScalarBf16 ? static_cast<uint16_t>(word >> 16) : half_bits(value);
  out.push_back(static_cast<uint8_t>(bits));
  out.push_back(static_cast<uint8_t>(bits >> 8));
}

double rounded_to(double value, int bits) {
  if (value == 0) return 0;
  int exponent;
  const double fraction = std::frexp(value, &exponent);
  return std::ldexp(std::nearbyint(std::ldexp(fraction, bits)), exponent - bits);
}

}  // namespace

bool quantized(int wire) { return wire != kBf16 && wire != kFp16 && wire != kFp32; }

int64_t bytes_of(int scalar) { return scalar == kScalarFp32 ? 4 : 2; }

Widths widths_of(int wire, int64_t hidden, int64_t alignment) {
  switch (wire) {
    case kFp8:
      return {hidden, 4, hidden};
    case kFp8Block128:
      return {hidden, hidden / 128 * 4, hidden};
    case kMxfp8: {
      const int64_t padded = (hidden + alignment - 1) / alignment * alignment;
      return {padded, padded / 32, padded};
    }
    case kNvfp4:
      return {hidden / 2, hidden / 16, hidden};
    case kMxfp4:
      return {hidden / 2, hidden / 32, hidden};
    default:
      return {hidden * 2, 0, hidden};
  }
}

int64_t combine_bytes_of(int wire, int64_t hidden) {
  if (!quantized(wire)) return hidden * (wire == kFp32 ? 4 : 2);
  const int64_t nbytes = hidden + (wire == kMxfp8 ? hidden / 32 : hidden / 128 * 4);
  return (nbytes + 15) / 16 * 16;
}

WireRow known_row(int wire, const Widths& widths, int64_t hidden, double global_scale,
                  int64_t seed) {
  WireRow row;
  const int64_t block = block_of(wire, hidden);
  const uint8_t largest = four_bits(wire) ? 7 : 0x7E, sign = four_bits(wire) ? 8 : 0x80;
  Bytes codes;
  for (int64_t first = 0; first < hidden; first += block) {
    const double one = draw_scale(wire, global_scale, draw({seed, first, 1}), row.scales);
    const int64_t peak = first + static_cast<int64_t>(draw({seed, first, 2}) % block);
    for (int64_t i = first; i < first + block; ++i) {
      const uint64_t drawn = draw({seed, i, 3});
      uint8_t code = i == peak ? largest : static_cast<uint8_t>(drawn % (largest + 1));
      if ((drawn >> 32 & 1) != 0) code |= sign;
      codes.push_back(code);
      row.values.push_back((four_bits(wire) ? e2m1(code) : e4m3(code)) * one);
    }
  }
  if (four_bits(wire))
    for (int64_t i = 0; i < hidden; i += 2)
      row.payload.push_back(static_cast<uint8_t>(codes[i] | codes[i + 1] << 4));
  else
    row.payload = codes;
  row.payload.resize(widths.payload);  // zeros pad an mxfp8 row
  row.scales.resize(widths.scales);
  return row;
}

std::vector<double> plain_values(int64_t hidden, int64_t seed) {
  std::vector<double> out;
  for (int64_t i = 0; i < hidden; ++i)
    out.push_back((static_cast<double>(draw({seed, i, 4}) % 129) - 64) / 8);
  return out;
}

Bytes random_bytes(int64_t count, int64_t seed) {
  Bytes out;
  for (int64_t i = 0; i < count; ++i) out.push_back(static_cast<uint8_t>(draw({seed, i, 5})));
  return out;
}

Bytes exactly(const std::vector<double>& values, int scalar) {
  Bytes out;
  for (double value : values) append_scalar(out, value, scalar);
  return out;
}

Bytes rounded(const std::vector<double>& values, int scalar) {
  const int bits = scalar == kScalarBf16 ? 8 : scalar == kScalarFp16 ? 11 : 24;
  Bytes out;
  for (double value : values) append_scalar(out, rounded_to(value, bits), scalar);
  return out;
}

}  // namespace sanitize
