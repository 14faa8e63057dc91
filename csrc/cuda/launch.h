// The kernels, as what cudaLaunchKernelEx takes. Each is one launch of one operation. `run`: strips
// that a warp moves in one go (1, 2 or 4).
constexpr int kSmallTokens = 128;  // of a rank, that dispatch_small takes
constexpr int kSmallRanks = 32;
#pragma once

#include "context.h"

namespace moe_a2a::cuda {

const void* dispatch_small_kernel(int run);
const void* dispatch_packets_kernel(bool lines, bool staged);
const void* dispatch_bulk_kernel(bool quantized);
const void* combine_packets_kernel(bool lines, int combine_wire, int run);
const void* combine_bulk_kernel(int combine_wire, int scalar);  // of y

}  // namespace moe_a2a::cuda
