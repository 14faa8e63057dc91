// Rows of the caller's dtype to rows of a wire, and back into an fp32 sum.
#pragma once

#include <cstdint>

#include "../args.h"

namespace moe_a2a::cpu {

struct QuantizeShape {
  int64_t hidden;      // H
  int64_t padded;      // Kp: columns of an mxfp8 row, H elsewhere
  float global_scale;  // nvfp4
};

// Reads `hidden` elements at `x`, writes one wire row. No two of them overlap.
using RowQuantizer = void (*)(const uint8_t* x, uint8_t* payload, uint8_t* scales,
                              const QuantizeShape& shape);

// Null for a wire that does not quantize.
RowQuantizer row_quantizer(int wire, int scalar);

}  // namespace moe_a2a::cpu
