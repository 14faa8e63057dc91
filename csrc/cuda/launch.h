// The kernels, as what cudaLaunchKernelEx takes. Each is one launch of one operation. `run`: strips
// that a warp moves in one go (1, 2 or 4).
#pragma once

#include "context.h"

namespace moe_a2a::cuda {

constexpr int kSmallTokens = 128;  // of a rank, that dispatch_small takes
constexpr int kSmallRanks = 32;
constexpr int kDirectSteps = 7;  // of a warp, that are in flight in dispatch_bulk at most
constexpr int kQuantizedSteps = 4;

const void* dispatch_small_kernel(int run);
// `wire`: what rows are quantized to, -1 where they travel as they are. `aligned`: rows begin on 16
// bytes and travel in whole chunks; those that are quantized are bf16.
const void* dispatch_packets_kernel(bool lines, int wire, bool aligned);
const void* dispatch_bulk_kernel(int wire, bool aligned);
const void* combine_packets_kernel(bool lines, int combine_wire, int run);
const void* combine_bulk_kernel(int combine_wire, int scalar);  // of y

}  // namespace moe_a2a::cuda
