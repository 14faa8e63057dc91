// Bytes of any alignment, and low-latency packets: data that carries the tag of its operation, so
// that the receiver needs no flag and the sender no fence. A warp moves strips of two cells, 16
// bytes a lane.
#pragma once

#include "context.h"
#include "ptx.cuh"

namespace moe_a2a::cuda {

#if defined(__CUDACC__)
#define MOE_SHARED(T, name) __shared__ T name
#define MOE_DYNAMIC_SHARED(name) extern __shared__ __align__(16) uint8_t name[]
#endif

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xFFFFFFFFu;
constexpr int64_t kStrip = 2 * kCell;  // bytes of a warp's step through an inbox

// ---- bytes of any alignment -----------------------------------------------------------------

__device__ __forceinline__ bool aligned(const void* at, int to) {
  return (reinterpret_cast<uintptr_t>(at) & (to - 1)) == 0;
}

// What follows keeps the common case in line and short: a kernel of many instructions spends more
// time fetching them than a small round takes.

static __device__ __noinline__ Chunk load_odd_bytes(const uint8_t* from, int count) {
  Chunk c{0, 0};
#pragma unroll 1
  for (int i = count - 1; i >= 0; --i) {
    c.hi = c.hi << 8 | c.lo >> 56;
    c.lo = c.lo << 8 | from[i];
  }
  return c;
}

static __device__ __noinline__ void store_odd_bytes(uint8_t* to, Chunk c, int count) {
  const int step = (count & 3) == 0 && aligned(to, 4) ? 4 : 1;
#pragma unroll 1
  for (int i = 0; i < count; i += step) {
    if (step == 4) {
      *reinterpret_cast<uint32_t*>(to + i) = static_cast<uint32_t>(c.lo);
      c.lo = c.lo >> 32 | c.hi << 32;
      c.hi >>= 32;
    } else {
      to[i] = static_cast<uint8_t>(c.lo);
      c.lo = c.lo >> 8 | c.hi << 56;
      c.hi >>= 8;
    }
  }
}

// 16 bytes of aligned memory that nobody writes while the kernel runs.
__device__ __forceinline__ Chunk load_chunk(const uint8_t* from) {
  const uint4 v = load_once(reinterpret_cast<const uint4*>(from));
  return {v.x | static_cast<uint64_t>(v.y) << 32, v.z | static_cast<uint64_t>(v.w) << 32};
}

// `count` bytes, at most 16; zeros after them.
__device__ __forceinline__ Chunk load_bytes(const uint8_t* from, int count) {
  if (count == 16 && aligned(from, 16)) return load_chunk(from);
  if (count == 8 && aligned(from, 8)) return {*reinterpret_cast<const uint64_t*>(from), 0};
  return load_odd_bytes(from, count);
}

// 16 bytes that a peer may have written since this kernel began: not by way of a read-only cache.
__device__ __forceinline__ Chunk load_arrived(const uint8_t* from) {
  if (!aligned(from, 16)) return load_odd_bytes(from, 16);
  return *reinterpret_cast<const Chunk*>(from);
}

__device__ __forceinline__ void store_bytes(uint8_t* to, const Chunk& c, int count) {
  if (count == 16 && aligned(to, 16))
    *reinterpret_cast<ulonglong2*>(to) = make_ulonglong2(c.lo, c.hi);
  else if (count == 8 && aligned(to, 8))
    *reinterpret_cast<uint64_t*>(to) = c.lo;
  else
    store_odd_bytes(to, c, count);
}

// A warp copies bytes of any alignment; from shared memory, mostly.
__device__ __forceinline__ void copy_bytes(uint8_t* to, const uint8_t* from, int count, int lane) {
  if (aligned(to, 16) && aligned(from, 16)) {
#pragma unroll 2
    for (int i = lane * 16; i + 16 <= count; i += kWarp * 16)
      *reinterpret_cast<uint4*>(to + i) = *reinterpret_cast<const uint4*>(from + i);
    from += count & ~15;
    to += count & ~15;
    count &= 15;
  }
#pragma unroll 1
  for (int i = lane; i < count; i += kWarp) to[i] = from[i];
}

// ---- packets ----------------------------------------------------------------------------------

// 128-byte lines: 120 bytes of data, 8 of tag, written and read by eight lanes at once. That a
// line arrives whole is a property of NVLink and of the L2 (NCCL's LL128 rests on it too), not of
// the memory model; where the link is another one, Packet16 is used. Two lines make a cell of 15
// chunks of 16 bytes, so that all lanes but the two with tags move an aligned chunk each.
struct Line128 {
  static constexpr int kData = kCellData;  // bytes of a row that a cell carries

  static __device__ __forceinline__ bool has_tag(int lane) { return (lane & 7) == 7; }

  // Which bytes of the strip's data are this lane's.
  static __device__ __forceinline__ int offset(int lane) {
    const int l = lane & 15, cell = (lane >> 4) * kData;
    return cell + (l < 7 ? 16 * l : l == 7 ? 224 : l < 15 ? 16 * (l - 1) : 232);
  }
  static __device__ __forceinline__ int bytes(int lane) { return has_tag(lane) ? 8 : 16; }

  // In aligned memory all lanes load a whole chunk: the two with tags share the cell's last one.
  static __device__ __forceinline__ int load_offset(int lane) { return offset(lane) & ~15; }
  static __device__ __forceinline__ Chunk load(const uint8_t* from, int lane) {
    Chunk c = load_chunk(from);
    if ((lane & 15) == 15) c.lo = c.hi;
    return c;
  }
  static __device__ __forceinline__ void store(uint8_t* to, const Chunk& c, int lane) {
    if (has_tag(lane))
      *reinterpret_cast<uint64_t*>(to) = c.lo;
    else
      *reinterpret_cast<ulonglong2*>(to) = make_ulonglong2(c.lo, c.hi);
  }

  static __device__ __forceinline__ Chunk seal(Chunk data, uint64_t tag, int lane) {
    if (has_tag(lane)) data.hi = tag;
    return data;
  }
  static __device__ __forceinline__ bool fresh(const Chunk& c, uint64_t tag, int lane) {
    return !has_tag(lane) || c.hi == tag;
  }
};

// 16-byte packets: 8 bytes of data and 8 of tag, one access each, as the memory model promises.
struct Packet16 {
  static constexpr int kData = 128;

  static __device__ __forceinline__ int offset(int lane) { return 8 * lane; }
  static __device__ __forceinline__ int bytes(int) { return 8; }
  static __device__ __forceinline__ int load_offset(int lane) { return offset(lane); }
  static __device__ __forceinline__ Chunk load(const uint8_t* from, int) {
    return {*reinterpret_cast<const uint64_t*>(from), 0};
  }
  static __device__ __forceinline__ void store(uint8_t* to, const Chunk& c, int) {
    *reinterpret_cast<uint64_t*>(to) = c.lo;
  }
  static __device__ __forceinline__ Chunk seal(Chunk data, uint64_t tag, int) {
    data.hi = tag;
    return data;
  }
  static __device__ __forceinline__ bool fresh(const Chunk& c, uint64_t tag, int) {
    return c.hi == tag;
  }
};

}  // namespace moe_a2a::cuda
