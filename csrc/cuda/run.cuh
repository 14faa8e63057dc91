// A run: the strips of one row that a warp moves in one go, from memory into packets and back.
//
// Rows of aligned memory, nearly all, take the short way: a handful of instructions a strip, all
// addresses a constant apart. Odd addresses go byte by byte.
#pragma once

#include "packet.cuh"

namespace moe_a2a::cuda {

template <class Packet, int kRun>
class Run {
 public:
  static constexpr int kStripData = 2 * Packet::kData;

  Run() = default;
  __device__ __forceinline__ explicit Run(int strip)
      : strip_(hold(strip)),
        chunk_(hold(strip * kStripData + Packet::chunk(lane()))),
        at_(hold(strip * static_cast<int>(kStrip) + lane() * 16)) {}

  static __device__ __forceinline__ int lane() { return threadIdx.x % kWarp; }
  __device__ __forceinline__ int strip() const { return strip_; }
  // Of this lane in strip u of the run: the chunk that it loads, what it stores, and its packet.
  __device__ __forceinline__ int chunk(int u) const { return chunk_ + u * kStripData; }
  __device__ __forceinline__ int offset(int u) const {
    return chunk(u) + Packet::offset_in_chunk(lane());
  }
  __device__ __forceinline__ int at(int u) const { return at_ + u * static_cast<int>(kStrip); }
  __device__ __forceinline__ bool inside(int bytes) const {
    return (strip_ + kRun) * kStripData <= bytes;
  }

  // From a row of `bytes` bytes, whole chunks; zeros past them.
  __device__ __forceinline__ void load(const uint8_t* row, int bytes, Chunk (&data)[kRun]) const {
    const bool short_way = aligned(row, 16);
#pragma unroll
    for (int u = 0; u < kRun; ++u) {
      data[u] = {0, 0};
      if (chunk(u) < bytes && short_way) data[u] = load_aligned(row + chunk(u));
    }
    if (short_way) return;
#pragma unroll
    for (int u = 0; u < kRun; ++u)
      if (chunk(u) < bytes) data[u] = load_odd_bytes(row + chunk(u), Packet::kLoad);
  }
  // The same where the run is inside and its chunks aligned; `from`: the first one's.
  __device__ __forceinline__ void load_inside(const uint8_t* from, Chunk (&data)[kRun]) const {
#pragma unroll
    for (int u = 0; u < kRun; ++u) data[u] = load_aligned(from + u * kStripData);
  }

  __device__ __forceinline__ void store(uint8_t* row, int bytes, const Chunk (&data)[kRun]) const {
    uint8_t* to = row + offset(0);
    const bool short_way = aligned(row, 16);
#pragma unroll
    for (int u = 0; u < kRun; ++u) {
      if (offset(u) >= bytes) continue;
      const Chunk own = Packet::own(data[u], lane());
      if (short_way)
        store_aligned(to + u * kStripData, own);
      else
        store_odd_bytes(to + u * kStripData, own, Packet::bytes(lane()));
    }
  }
  // The same where the run is inside and its chunks aligned; `to`: of this lane's first piece.
  __device__ __forceinline__ void store_inside(uint8_t* to, const Chunk (&data)[kRun]) const {
#pragma unroll
    for (int u = 0; u < kRun; ++u) store_aligned(to + u * kStripData, Packet::own(data[u], lane()));
  }

  // Into the packets of a row, `pitch` bytes of them.
  __device__ __forceinline__ void send(uint8_t* packets, int pitch, uint64_t tag,
                                       const Chunk (&data)[kRun]) const {
    uint8_t* to = packets + at_;
#pragma unroll
    for (int u = 0; u < kRun; ++u)
      if (at(u) < pitch)
        store_relaxed_sys(reinterpret_cast<Chunk*>(to + u * kStrip),
                          Packet::seal(data[u], tag, lane()));
  }

  // False where a packet of this lane has not come yet; `from`: its first one.
  __device__ __forceinline__ bool receive(const uint8_t* from, int pitch, uint64_t tag,
                                          Chunk (&data)[kRun]) const {
    bool fresh = true;
#pragma unroll
    for (int u = 0; u < kRun; ++u)
      if (at(u) < pitch)
        data[u] = load_relaxed_sys(reinterpret_cast<const Chunk*>(from + u * kStrip));
#pragma unroll
    for (int u = 0; u < kRun; ++u)
      if (at(u) < pitch) fresh = fresh && Packet::fresh(data[u], tag, lane());
    return fresh;
  }

 private:
  static __device__ __forceinline__ Chunk load_aligned(const uint8_t* from) {
    if constexpr (Packet::kLoad == 16) return load_chunk(from);
    return {*reinterpret_cast<const uint64_t*>(from), 0};
  }
  static __device__ __forceinline__ void store_aligned(uint8_t* to, const Chunk& c) {
    if (Packet::bytes(lane()) == 8)
      *reinterpret_cast<uint64_t*>(to) = c.lo;
    else
      *reinterpret_cast<ulonglong2*>(to) = make_ulonglong2(c.lo, c.hi);
  }

  int strip_, chunk_, at_;
};

}  // namespace moe_a2a::cuda
