// A run: the strips of one row that a warp moves in one go, from memory into packets and back.
//
// Runs that lie inside a row of aligned memory, nearly all of them, take the short way: a handful
// of instructions a strip, all addresses a constant apart. What is left at the end of a row, or
// lies at odd addresses, goes byte by byte if need be.
#pragma once

#include "packet.cuh"

namespace moe_a2a::cuda {

template <class Packet, int kRun>
struct Run {
  static constexpr int kStripData = 2 * Packet::kData;

  int strip;  // the first

  static __device__ __forceinline__ int lane() { return threadIdx.x % kWarp; }
  // Of this lane in strip u of the run: in the row, and in its packets.
  __device__ __forceinline__ int offset(int u) const {
    return (strip + u) * kStripData + Packet::offset(lane());
  }
  __device__ __forceinline__ int at(int u) const {
    return (strip + u) * static_cast<int>(kStrip) + lane() * 16;
  }
  __device__ __forceinline__ bool inside(int bytes) const {
    return (strip + kRun) * kStripData <= bytes;
  }

  // From a row of `bytes` bytes; zeros past them.
  __device__ __forceinline__ void load(const uint8_t* row, int bytes, Chunk (&data)[kRun]) const {
    if (inside(bytes) && aligned(row, 16)) {
      const uint8_t* from = row + strip * kStripData + Packet::load_offset(lane());
#pragma unroll
      for (int u = 0; u < kRun; ++u) data[u] = Packet::load(from + u * kStripData, lane());
      return;
    }
#pragma unroll
    for (int u = 0; u < kRun; ++u) {
      const int count = min(Packet::bytes(lane()), bytes - offset(u));
      data[u] = count > 0 ? load_bytes(row + offset(u), count) : Chunk{0, 0};
    }
  }

  __device__ __forceinline__ void store(uint8_t* row, int bytes, const Chunk (&data)[kRun]) const {
    if (inside(bytes) && aligned(row, 16)) {
      uint8_t* to = row + offset(0);
#pragma unroll
      for (int u = 0; u < kRun; ++u) Packet::store(to + u * kStripData, data[u], lane());
      return;
    }
#pragma unroll
    for (int u = 0; u < kRun; ++u) {
      const int count = min(Packet::bytes(lane()), bytes - offset(u));
      if (count > 0) store_bytes(row + offset(u), data[u], count);
    }
  }

  // Into the packets of a row, `pitch` bytes of them.
  __device__ __forceinline__ void send(uint8_t* packets, int pitch, uint64_t tag,
                                       const Chunk (&data)[kRun]) const {
    uint8_t* to = packets + at(0);
#pragma unroll
    for (int u = 0; u < kRun; ++u)
      if (at(u) < pitch)
        store_relaxed_sys(reinterpret_cast<Chunk*>(to + u * kStrip),
                          Packet::seal(data[u], tag, lane()));
  }

  // False where a packet of this lane has not come yet.
  __device__ __forceinline__ bool receive(const uint8_t* packets, int pitch, uint64_t tag,
                                          Chunk (&data)[kRun]) const {
    const uint8_t* from = packets + at(0);
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
};

}  // namespace moe_a2a::cuda
