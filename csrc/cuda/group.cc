#include "group.h"

namespace moe_a2a::cuda {
namespace {

constexpr int kScanThreads = 256;

// One after the other on the stream: each needs all that the one before wrote.
const char* launch(const void* kernel, int64_t blocks, int threads, int shared, GroupLaunch& p,
                   cudaStream_t stream) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  void* arguments[] = {&p};
  const cudaError_t error = cudaLaunchKernelExC(&config, kernel, arguments);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

const char* launch_group(const GroupArgs& a, uint32_t* scratch, int64_t segments,
                         cudaStream_t stream) {
  GroupLaunch p{};
  p.a = a;
  const bool one_block = segments == 0;
  if (one_block) segments = kOneBlockWarps;
  p.segments = static_cast<int32_t>(segments);
  p.share = static_cast<int32_t>((a.choices() + segments - 1) / segments);
  p.end = static_cast<uint32_t>(a.end());
  p.by_rows = fast_divisor(a.rows);
  p.by_top_k = fast_divisor(a.top_k);
  if (one_block) {
    const int bytes = a.experts * (kOneBlockStride + 1) * 4;
    return launch(list_kernel(), 1, kOneBlockWarps * 32, bytes, p, stream);
  }
  p.totals = scratch;
  p.table = scratch + a.experts;
  const int shared = a.experts <= kSharedExperts ? a.experts * 4 : 0;
  const int64_t scans = (int64_t{a.experts} * 32 + kScanThreads - 1) / kScanThreads;
  if (const char* error = launch(count_kernel(), segments, 32, shared, p, stream)) return error;
  if (scans != 0)
    if (const char* error = launch(scan_kernel(), scans, kScanThreads, 0, p, stream)) return error;
  return launch(place_kernel(), segments, 32, shared, p, stream);
}

}  // namespace moe_a2a::cuda
