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
// Warps of a block at most: long runs take more registers. `chunks`: of 16 bytes, of a lane's
// columns of y in a step.
constexpr int combine_warps(int chunks, int run) { return chunks > 1 ? 16 : run == 4 ? 12 : 16; }
// `scalar`: of y. `run`: steps, at most 2 where the wire is quantized.
const void* combine_kernel(int combine_wire, int scalar, int run);

}  // namespace moe_a2a::cuda
