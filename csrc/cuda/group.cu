// Received rows listed by local expert: a stable counting sort of the choices of a round. A warp
// has a segment of them, in order. It counts, learns how many of each expert come before its own,
// and gives its choices their places: the same ones in every run, since no two warps race for one.
// Each of the three steps needs all of the one before: in small rounds they are parts of one block,
// in large ones kernels, since many blocks load and store more than one can.
#include "group.h"
#include "packet.cuh"

namespace moe_a2a::cuda {
namespace {

constexpr int kAhead = 4;  // loads of a lane that are in flight together

__device__ __forceinline__ int lane_of_warp() { return threadIdx.x % kWarp; }

// A word for each expert, of this warp alone.
struct Column {
  uint32_t* first;
  int stride;

  __device__ __forceinline__ uint32_t& of(int expert) const {
    return first[int64_t{expert} * stride];
  }
};

__device__ __forceinline__ bool in_shared(const GroupLaunch& p) {
  return p.a.experts <= kSharedExperts;
}

// Of the table, where the warp is a block.
__device__ __forceinline__ Column column_of_block(const GroupLaunch& p) {
  return {p.table + blockIdx.x, p.segments};
}

__device__ __forceinline__ Column counters_of_block(const GroupLaunch& p, uint8_t* shared) {
  if (in_shared(p)) return {reinterpret_cast<uint32_t*>(shared), 1};
  return column_of_block(p);
}

// The local expert of a choice; negative where it is elsewhere, or the row is padding. What padding
// rows hold is loaded all the same, so that both loads are on their way at once.
__device__ __forceinline__ int expert_of(const GroupLaunch& p, int choice) {
  const int row = static_cast<int>(choice / p.by_top_k);
  const int source = static_cast<int>(row / p.by_rows);
  const int slot = row - source * static_cast<int>(p.a.rows);
  const uint32_t expert =
      static_cast<uint32_t>(p.a.ids[choice]) - static_cast<uint32_t>(p.a.first_expert);
  const bool real = slot < p.a.counts[source];
  return real && expert < static_cast<uint32_t>(p.a.experts) ? static_cast<int>(expert) : -1;
}

// Calls f(choice, expert) for the choices of a segment, in order, with all lanes each time. Past
// the last one there is no expert.
template <class F>
__device__ __forceinline__ void for_each_choice(const GroupLaunch& p, int segment, F f) {
  const int64_t begin = int64_t{p.share} * segment;
  const int last = static_cast<int>(min(begin + p.share, p.a.choices()));
#pragma unroll 1
  for (int64_t first = begin; first < last; first += kAhead * kWarp) {
    int expert[kAhead];
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      const int64_t choice = first + u * kWarp + lane_of_warp();
      expert[u] = choice < last ? expert_of(p, static_cast<int>(choice)) : -1;
    }
#pragma unroll
    for (int u = 0; u < kAhead; ++u)
      f(static_cast<int>(first) + u * kWarp + lane_of_warp(), expert[u], last);
  }
}

// Inclusive, over the lanes.
__device__ __forceinline__ uint32_t sum_up(uint32_t own) {
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const uint32_t before = __shfl_up_sync(kAllLanes, own, step);
    if (lane_of_warp() >= step) own += before;
  }
  return own;
}

// Nobody is listed yet. `thread`: of so many.
__device__ __forceinline__ void clear_lists(const GroupLaunch& p, int64_t thread, int threads) {
#pragma unroll 4
  for (int64_t i = thread; i < p.a.size; i += threads) {
    p.a.row_index[i] = -1;
    p.a.row_weights[i] = 0.0f;
  }
}

__device__ __forceinline__ void count_segment(const GroupLaunch& p, int segment,
                                              const Column& counters) {
#pragma unroll 1
  for (int e = lane_of_warp(); e < p.a.experts; e += kWarp) counters.of(e) = 0;
  __syncwarp();
  for_each_choice(p, segment, [&](int, int expert, int) {
    if (expert >= 0) atomicAdd(&counters.of(expert), 1u);
  });
  __syncwarp();
}

// Of one expert: from the rows of each segment to those of all before it. Returns how many it has.
__device__ __forceinline__ uint32_t scan_row(uint32_t* row, int segments) {
  uint32_t sum = 0;
#pragma unroll 4
  for (int first = 0; first < segments; first += kWarp) {
    const int at = first + lane_of_warp();
    const uint32_t own = at < segments ? row[at] : 0;
    const uint32_t up_to = sum_up(own);
    if (at < segments) row[at] = sum + up_to - own;
    sum += __shfl_sync(kAllLanes, up_to, kWarp - 1);
  }
  return sum;
}

// Where the segment's rows of each expert begin, from how many come before them, to `counters`.
// Places past the end count too: they fit 32 bits, with all choices and all gaps.
__device__ __forceinline__ void begin_segment(const GroupLaunch& p, int segment,
                                              const uint32_t* totals, const Column& before,
                                              const Column& counters) {
  const uint32_t align = static_cast<uint32_t>(p.a.align);
  uint32_t sum = 0;
#pragma unroll 1
  for (int first = 0; first < p.a.experts; first += kWarp) {
    const int expert = first + lane_of_warp();
    const bool exists = expert < p.a.experts;
    const uint32_t total = exists ? totals[expert] : 0;
    const uint32_t earlier = exists ? before.of(expert) : 0;
    const uint32_t places = (total + align - 1) / align * align, up_to = sum_up(places);
    const uint32_t begin = sum + up_to - places;
    if (exists) counters.of(expert) = begin + earlier;
    if (exists && segment == 0) p.a.offsets[expert] = static_cast<int32_t>(min(begin, p.end));
    sum += __shfl_sync(kAllLanes, up_to, kWarp - 1);
  }
  if (segment == 0 && lane_of_warp() == 0)
    p.a.offsets[p.a.experts] = static_cast<int32_t>(min(sum, p.end));
  __syncwarp();
}

__device__ __forceinline__ void place_segment(const GroupLaunch& p, int segment,
                                              const Column& counters) {
  for_each_choice(p, segment, [&](int choice, int expert, int last) {
    const unsigned same = __match_any_sync(kAllLanes, expert);
    const unsigned before = same & ((1u << lane_of_warp()) - 1);
    const uint32_t at = expert < 0 ? 0 : counters.of(expert) + __popc(before);
    __syncwarp();
    if (expert >= 0 && before == 0) counters.of(expert) += __popc(same);
    __syncwarp();
    const bool listed = expert >= 0 && at < p.end;
    if (choice < last)
      p.a.positions[choice] = expert < 0 ? kNotHere : listed ? static_cast<int32_t>(at) : kNoPlace;
    if (!listed) return;
    p.a.row_index[at] = static_cast<int32_t>(choice / p.by_top_k);
    p.a.row_weights[at] = p.a.weights[choice];
  });
}

__global__ void __launch_bounds__(kWarp) count(const GroupLaunch __grid_constant__ p) {
  MOE_DYNAMIC_SHARED(shared);
  const Column counters = counters_of_block(p, shared);
  clear_lists(p, blockIdx.x * kWarp + lane_of_warp(), gridDim.x * kWarp);
  count_segment(p, blockIdx.x, counters);
  if (!in_shared(p)) return;
  const Column column = column_of_block(p);
#pragma unroll 1
  for (int e = lane_of_warp(); e < p.a.experts; e += kWarp) column.of(e) = counters.of(e);
}

// A warp for each expert.
__global__ void scan(const GroupLaunch __grid_constant__ p) {
  const int expert = (blockIdx.x * blockDim.x + threadIdx.x) / kWarp;
  if (expert >= p.a.experts) return;
  const uint32_t total = scan_row(p.table + int64_t{expert} * p.segments, p.segments);
  if (lane_of_warp() == 0) p.totals[expert] = total;
}

__global__ void __launch_bounds__(kWarp) place(const GroupLaunch __grid_constant__ p) {
  MOE_DYNAMIC_SHARED(shared);
  const Column counters = counters_of_block(p, shared);
  begin_segment(p, blockIdx.x, p.totals, column_of_block(p), counters);
  place_segment(p, blockIdx.x, counters);
}

// All three in one block, a segment for each warp; `share` is such a segment's.
__global__ void __launch_bounds__(kOneBlockWarps* kWarp)
    list(const GroupLaunch __grid_constant__ p) {
  MOE_DYNAMIC_SHARED(shared);
  auto* const totals = reinterpret_cast<uint32_t*>(shared);
  uint32_t* const table = totals + p.a.experts;
  const int warp = threadIdx.x / kWarp;
  const Column own{table + warp, kOneBlockStride};
  clear_lists(p, threadIdx.x, blockDim.x);
  count_segment(p, warp, own);
  __syncthreads();
  for (int expert = warp; expert < p.a.experts; expert += kOneBlockWarps) {
    const uint32_t total = scan_row(table + expert * kOneBlockStride, kOneBlockWarps);
    if (lane_of_warp() == 0) totals[expert] = total;
  }
  __syncthreads();
  begin_segment(p, warp, totals, own, own);
  place_segment(p, warp, own);
}

}  // namespace

const void* count_kernel() { return reinterpret_cast<const void*>(count); }
const void* scan_kernel() { return reinterpret_cast<const void*>(scan); }
const void* place_kernel() { return reinterpret_cast<const void*>(place); }
const void* list_kernel() { return reinterpret_cast<const void*>(list); }

}  // namespace moe_a2a::cuda
