// The kernels, as what cudaLaunchKernelEx takes. Each is one launch of one operation. `run`: strips
// that a warp moves in one go, 1 or 2.
#pragma once

#include "context.h"

namespace moe_a2a::cuda {

// Tokens of a rank that dispatch_small takes as few, and those that it takes at all.
constexpr int kSmallTokens = 128, kManyTokens = 1024;
constexpr int kSmallRanks = 32;
constexpr int kColumnThreads = 512;  // of a block, at most
// Where a warp would have more runs to receive than kUndividedRuns, kSenders of a block's 16 send
// and the others receive. kNap: nanoseconds between polls of warps that only wait.
constexpr int kUndividedRuns = 2, kSenders = 8, kNap = 50;
constexpr int kBulkThreads = 512;  // of a block of dispatch_bulk
constexpr int kDirectSteps = 4;    // of a warp, that are in flight in dispatch_bulk at most
constexpr int kQuantizedSteps = 2;

// `many`: more than kSmallTokens, or rows to receive for which warps divide the work; 512 threads.
const void* dispatch_small_kernel(bool many, int run);
// As many tokens, of aligned bf16 rows that are quantized to `wire`; 512 threads.
const void* dispatch_quantized_kernel(int wire, bool many);
// `wire`: what rows are quantized to, -1 where they travel as they are. `aligned`: rows begin on 16
// bytes and travel in whole chunks; those that are quantized are bf16.
const void* dispatch_packets_kernel(bool lines, int wire, bool aligned);
struct BulkKernel {
  const void* kernel;
  int shared;  // bytes
};
BulkKernel dispatch_bulk_kernel(int wire, bool aligned);
// Steps that a warp pushes, and sums, in one go.
struct CombineRuns {
  int push, sum;
};
// In large rounds, as many as registers allow. `chunks`: of 16 bytes, of a lane's columns of y in a
// step; more than one where rows are quantized.
constexpr CombineRuns longest_runs(int chunks) {
  return chunks == 1 ? CombineRuns{4, 4} : chunks == 2 ? CombineRuns{4, 2} : CombineRuns{2, 2};
}
// Warps of a block, at most: as many as registers allow.
constexpr int combine_warps(CombineRuns runs) { return runs.push == 4 ? 12 : 16; }
// `scalar`: of y. `runs`: both 1 or both 2, or the longest.
const void* combine_kernel(int combine_wire, int scalar, CombineRuns runs);
// The same for rows grouped by expert, several of which are in registers at once: runs are shorter,
// warps fewer. `scalar`: of those rows. `runs`: both 1, or the longest.
constexpr CombineRuns longest_grouped_runs(int chunks) {
  return chunks == 1 ? CombineRuns{2, 2} : chunks == 2 ? CombineRuns{2, 1} : CombineRuns{1, 1};
}
constexpr int grouped_warps(CombineRuns runs, int chunks) {
  return chunks == 1 && runs.push == 1 ? 16 : 12;
}
const void* grouped_kernel(int combine_wire, int scalar, CombineRuns runs);

}  // namespace moe_a2a::cuda
