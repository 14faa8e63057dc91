// The image of a row that is quantized on its way in packets: made by a block in shared memory,
// from which its warps send strips.
#pragma once

#include "quantize.cuh"
#include "row.cuh"
#include "run.cuh"

namespace moe_a2a::cuda {

template <int kWire, int kInput>
struct RowImage {
  static constexpr int kSteps = 4;
  using Data = Batch<kInput, kSteps>;

  // A warp's columns of a row: every so many, from `first` on; a batch of them at a time. The last
  // warps take the first ones and so the odd step more: the first warps have ids to look at.
  static __device__ __forceinline__ int first() {
    return static_cast<int>(blockDim.x - 1 - threadIdx.x) / kWarp * kWarpColumns;
  }
  static __device__ __forceinline__ int stride() { return blockDim.x / kWarp * kWarpColumns; }

  // This warp's first columns of token t.
  static __device__ __forceinline__ void load(const DispatchLaunch& p, int t, Data& data) {
    load(p, t, first(), data);
  }

  // Payload and scales of token t to `image`; `data`: as load() leaves it.
  static __device__ __forceinline__ void quantize(const DispatchLaunch& p, int t,
                                                  float global_scale, Data& data, uint8_t* image) {
    const Context& c = p.c;
    const int wire = kWire == kAny ? p.a.wire : kWire;
    const float scale = arrived<kWire>(global_scale);
    QuantizeRow r{p.a.payload.row(t), p.a.input, wire, c.hidden, c.padded, scale, 1.0f / scale, {}};
    uint8_t* scales = image + p.segment[kSegmentScales].image;
    if (wire == kFp8) {
      r.row_scale = row_scale(p, r.data);
      if (threadIdx.x == 0) *reinterpret_cast<float*>(scales) = r.row_scale.scale;
    }
#pragma unroll 1
    for (int col = first(); col < c.padded; col += kSteps * stride()) {
      if (col != first()) load(p, t, col, data);
      data.template quantize<kWire>(r, col, stride(), min(col + kSteps * stride(), c.padded), image,
                                    scales);
    }
  }

  // Ids, weights, extras: by the last warps, which have no tokens to look at in small rounds.
  static __device__ __forceinline__ void take_rest(const DispatchLaunch& p, int t, uint8_t* image) {
    const int thread = blockDim.x - 1 - threadIdx.x;
#pragma unroll 1
    for (int at = p.segment[kSegmentIds].image + thread * 16; at < p.image_bytes;
         at += blockDim.x * 16)
      *reinterpret_cast<Chunk*>(image + at) = load_image(p, t, at, 16);
  }

 private:
  static __device__ __forceinline__ void load(const DispatchLaunch& p, int t, int from,
                                              Data& data) {
    data.load(p.a.payload.row(t), p.a.input, p.c.hidden, from, stride(), p.c.padded);
  }

  static __device__ __forceinline__ Fp8Scale row_scale(const DispatchLaunch& p,
                                                       const uint8_t* row) {
    MOE_SHARED(uint32_t, amax);
    const int warps = blockDim.x / kWarp, warp = threadIdx.x / kWarp;
    const int share = (p.c.hidden / warps + kWarpColumns) / kWarpColumns * kWarpColumns;
    if (threadIdx.x == 0) amax = 0;
    __syncthreads();
    const int from = min(warp * share, p.c.hidden);
    const uint32_t own =
        largest_of_columns<kInput>(row, p.a.input, from, min(from + share, p.c.hidden));
    if (threadIdx.x % kWarp == 0) atomicMax(&amax, own);
    __syncthreads();
    return fp8_scale(amax);
  }
};

// A run of the row whose image that is.
template <class Packet, int kRun>
__device__ __forceinline__ void load_image_run(const DispatchLaunch& p, const uint8_t* image,
                                               const Run<Packet, kRun>& run, Chunk (&data)[kRun]) {
#pragma unroll
  for (int u = 0; u < kRun; ++u) {
    const bool inside = run.chunk(u) < p.image_bytes;
    const auto* words = reinterpret_cast<const uint64_t*>(image + run.chunk(u));
    data[u].lo = inside ? words[0] : 0;
    data[u].hi = inside && Packet::kLoad == 16 ? words[1] : 0;
  }
}

}  // namespace moe_a2a::cuda
