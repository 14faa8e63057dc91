// Who owns an expert. Host and device code.
#pragma once

#include <cstdint>

#include "layout.h"

namespace moe_a2a {

// With b = E / W and r = E % W the first r ranks own b + 1 experts, the others b (which may be 0).
MOE_HD int64_t first_expert(int64_t rank, int64_t num_experts, int64_t ep_size) {
  const int64_t base = num_experts / ep_size, extra = num_experts % ep_size;
  return rank * base + (rank < extra ? rank : extra);
}

MOE_HD int owner_of_expert(int64_t expert, int64_t num_experts, int64_t ep_size) {
  const int64_t base = num_experts / ep_size, extra = num_experts % ep_size;
  const int64_t in_larger = extra * (base + 1);
  return static_cast<int>(expert < in_larger ? expert / (base + 1)
                                             : extra + (expert - in_larger) / base);
}

}  // namespace moe_a2a
