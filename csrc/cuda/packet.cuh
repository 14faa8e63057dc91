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
constexpr int kStepBytes = kWarp * 16;  // that a warp moves by one instruction, at most
constexpr unsigned kAllLanes = 0xFFFFFFFFu;
constexpr int64_t kStrip = 2 * kCell;  // bytes of a warp's step through an inbox

// ---- bytes of any alignment -----------------------------------------------------------------

__device__ __forceinline__ bool aligned(const void* at, int to) {
  return (reinterpret_cast<uintptr_t>(at) & (to - 1)) == 0;
}

// What follows keeps the common case in line and short: a kernel of many instructions spends more
// time fetching them than a small round takes.

__device__ __forceinline__ bool are_words(const void* at, int count) {
  return (count & 3) == 0 && aligned(at, 4);
}

// Up to four words, all in flight at once.
__device__ __forceinline__ Chunk load_words(const uint8_t* from, int count) {
  uint32_t w[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) w[i] = 4 * i < count ? reinterpret_cast<const uint32_t*>(from)[i] : 0;
  return {w[0] | static_cast<uint64_t>(w[1]) << 32, w[2] | static_cast<uint64_t>(w[3]) << 32};
}

static __device__ __noinline__ Chunk load_odd_bytes(const uint8_t* from, int count) {
  if (are_words(from, count)) return load_words(from, count);
  Chunk c{0, 0};
#pragma unroll 1
  for (int i = count - 1; i >= 0; --i) {
    c.hi = c.hi << 8 | c.lo >> 56;
    c.lo = c.lo << 8 | from[i];
  }
  return c;
}

static __device__ __noinline__ void store_odd_bytes(uint8_t* to, Chunk c, int count) {
  if (are_words(to, count)) {
    const uint32_t w[4] = {static_cast<uint32_t>(c.lo), static_cast<uint32_t>(c.lo >> 32),
                           static_cast<uint32_t>(c.hi), static_cast<uint32_t>(c.hi >> 32)};
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (4 * i < count) reinterpret_cast<uint32_t*>(to)[i] = w[i];
    return;
  }
#pragma unroll 1
  for (int i = 0; i < count; ++i) {
    to[i] = static_cast<uint8_t>(c.lo);
    c.lo = c.lo >> 8 | c.hi << 56;
    c.hi >>= 8;
  }
}

__device__ __forceinline__ Chunk chunk_of(const uint4& v) {
  return {v.x | static_cast<uint64_t>(v.y) << 32, v.z | static_cast<uint64_t>(v.w) << 32};
}

// 16 bytes of aligned memory that nobody writes while the kernel runs.
__device__ __forceinline__ Chunk load_chunk(const uint8_t* from) {
  return chunk_of(load_once(reinterpret_cast<const uint4*>(from)));
}

// The same where this lane, not its neighbour, loads the next 16 bytes.
__device__ __forceinline__ Chunk load_neighbour(const uint8_t* from) {
  return chunk_of(load_sector_part(reinterpret_cast<const uint4*>(from)));
}

// `count` bytes, at most 16; zeros after them.
__device__ __forceinline__ Chunk load_bytes(const uint8_t* from, int count) {
  if (count == 16 && aligned(from, 16)) return load_chunk(from);
  if (count == 8 && aligned(from, 8)) return {*reinterpret_cast<const uint64_t*>(from), 0};
  return load_odd_bytes(from, count);
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
// the memory model; where the link is another one, Packet16 is used.
//
// Two lines make a cell of 15 chunks of 16 bytes. The two lanes with tags share the last one: the
// first line has its first half with the tag behind, the second line its second half with the tag
// in front. So every lane loads an aligned chunk, and what it sends stays where it was loaded: no
// instruction stands between a load and the next one.
struct Line128 {
  static constexpr int kData = kCellData;  // bytes of a row that a cell carries
  static constexpr int kLoad = 16;         // that a lane loads

  static __device__ __forceinline__ bool has_tag(int lane) { return (lane & 7) == 7; }
  static __device__ __forceinline__ bool tag_in_front(int lane) { return (lane & 15) == 15; }

  // Where in the strip's data the chunk is that this lane loads.
  static __device__ __forceinline__ int chunk(int lane) {
    const int l = lane & 15, index = has_tag(l) ? 14 : l - (l >> 3);
    return (lane >> 4) * kData + 16 * index;
  }
  // What of it is the lane's own, to be stored where the row is put together again.
  static __device__ __forceinline__ int offset_in_chunk(int lane) {
    return tag_in_front(lane) ? 8 : 0;
  }
  static __device__ __forceinline__ int bytes(int lane) { return has_tag(lane) ? 8 : 16; }
  static __device__ __forceinline__ Chunk own(const Chunk& c, int lane) {
    return {tag_in_front(lane) ? c.hi : c.lo, c.hi};
  }

  static __device__ __forceinline__ Chunk seal(Chunk data, uint64_t tag, int lane) {
    if (tag_in_front(lane))
      data.lo = tag;
    else if (has_tag(lane))
      data.hi = tag;
    return data;
  }
  static __device__ __forceinline__ bool fresh(const Chunk& c, uint64_t tag, int lane) {
    return !has_tag(lane) || (tag_in_front(lane) ? c.lo : c.hi) == tag;
  }
};

// 16-byte packets: 8 bytes of data and 8 of tag, one access each, as the memory model promises.
struct Packet16 {
  static constexpr int kData = 128;
  static constexpr int kLoad = 8;

  static __device__ __forceinline__ int chunk(int lane) { return 8 * lane; }
  static __device__ __forceinline__ int offset_in_chunk(int) { return 0; }
  static __device__ __forceinline__ int bytes(int) { return 8; }
  static __device__ __forceinline__ Chunk own(const Chunk& c, int) { return c; }
  static __device__ __forceinline__ Chunk seal(Chunk data, uint64_t tag, int) {
    data.hi = tag;
    return data;
  }
  static __device__ __forceinline__ bool fresh(const Chunk& c, uint64_t tag, int) {
    return c.hi == tag;
  }
};

}  // namespace moe_a2a::cuda
