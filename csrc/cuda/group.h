// Received rows listed by local expert, on the device.
#pragma once

#include <cuda_runtime.h>

#include "context.h"

namespace moe_a2a::cuda {

// Experts that a warp counts in shared memory; more, and it counts in its column of the table.
constexpr int kSharedExperts = 8192;

// Small rounds are listed by one block, whose table is in shared memory, 48 KiB of it.
constexpr int kOneBlockWarps = 32;
constexpr int kOneBlockStride = kOneBlockWarps + 1;  // an expert's words; odd for the banks
constexpr int kOneBlockExperts = (48 << 10) / 4 / (kOneBlockStride + 1);

struct GroupLaunch {
  GroupArgs a;
  uint32_t* totals;  // [experts] rows
  uint32_t* table;   // [experts, segments]: of a segment, then of all before it
  int32_t segments;  // of all choices, a warp each
  int32_t share;     // choices of a segment
  uint32_t end;      // of the places
  FastDivisor by_rows, by_top_k;
};

const void* count_kernel();
const void* scan_kernel();
const void* place_kernel();
const void* list_kernel();

// `scratch`: (segments + 1) * experts words; none with no segments, which is one block for rounds
// of at most kOneBlockExperts experts. Returns a CUDA error's text, or null.
const char* launch_group(const GroupArgs& a, uint32_t* scratch, int64_t segments,
                         cudaStream_t stream);

}  // namespace moe_a2a::cuda
