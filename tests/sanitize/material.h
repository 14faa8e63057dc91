// Rows of which it is known beforehand what a wire makes of them.
//
// Elements are drawn as codes and scales and multiplied out, with the largest code in every block:
// whoever quantizes them by the definition of the format has to find the same codes and scales
// again. So nothing here quantizes, and nothing is shared with the kernels but the names of wires.
#pragma once

#include <cstdint>
#include <vector>

#include "args.h"

namespace sanitize {

using Bytes = std::vector<uint8_t>;

struct Widths {
  int64_t payload, scales;  // bytes of a row
  int64_t padded;           // Kp of mxfp8, else H
};

Widths widths_of(int wire, int64_t hidden, int64_t alignment);
int64_t combine_bytes_of(int wire, int64_t hidden);
bool quantized(int wire);
int64_t bytes_of(int scalar);

struct WireRow {
  Bytes payload, scales;
  std::vector<double> values;  // [H]
};

// A row of a quantized wire. `global_scale` is a power of two, and of nvfp4 only.
WireRow known_row(int wire, const Widths& widths, int64_t hidden, double global_scale,
                  int64_t seed);
// [H] small multiples of 1/8: exact in every scalar, and so are sums of a few in fp32.
std::vector<double> plain_values(int64_t hidden, int64_t seed);
Bytes random_bytes(int64_t count, int64_t seed);

// Of values that need no more than 24 bits, rounded once to the scalar, ties to even; zero is +0.
Bytes rounded(const std::vector<double>& values, int scalar);
// The same, and -0 stays what it is: for rows on their way in.
Bytes exactly(const std::vector<double>& values, int scalar);

}  // namespace sanitize
