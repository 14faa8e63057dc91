// Rows of local experts to the row that goes back: weighted, summed, in the combine wire's dtype.
#pragma once

#include "../args.h"

namespace moe_a2a::cpu {

// fp32 [hidden] of the received row `row`: weight * value for each of its choices that is here, by
// ascending place, from +0.0; NaN where one of them has no place.
void weigh_row(const CombineArgs& args, const Grouped& grouped, int64_t top_k, int64_t hidden,
               int64_t row, float* sum);

// Rounds to the dtype of a wire that does not quantize.
void round_row(int wire, const float* sum, int64_t hidden, uint8_t* out);

}  // namespace moe_a2a::cpu
