// CUDA's language on the CPU, so that the kernels of csrc/cuda run, and are tested, without a GPU.
//
// A thread of a kernel is a fiber. What a warp does together (shuffles, votes) waits until all its
// threads have come to it, and says so if they come to different ones. Nothing is said about speed.
// Of memory order, that what other ranks see comes late and in any order (simt.cc); the rest is for
// a GPU.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#include "cuda_runtime.h"

#define __device__
#define __host__
#define __global__
#define __grid_constant__ &
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)

namespace simt {

struct Index {
  unsigned x;
};
extern Index thread_index, block_index, block_size, grid_size;

enum Kind : int { kShuffle, kVote, kReduce, kMatch, kWarpBarrier };

void yield();
// Every thread of a warp brings a value and gets all of them.
const uint64_t* exchange(Kind kind, uint64_t value);
bool block_barrier(bool vote);
void* shared(const void* key, size_t bytes);
void* dynamic_shared();
// What is stored in these ways is seen late: simt.cc.
void store_relaxed(void* at, uint64_t lo, uint64_t hi, bool wide);
void store_plain(void* at, uint64_t lo, uint64_t hi);
// At system scope.
void fence();

template <class T>
uint64_t bits(T value) {
  uint64_t out = 0;
  std::memcpy(&out, &value, sizeof(T));
  return out;
}
template <class T>
T value(uint64_t bits) {
  T out;
  std::memcpy(&out, &bits, sizeof(T));
  return out;
}
inline unsigned lane() { return thread_index.x % 32; }

template <class T>
T shuffle(T own, unsigned from) {
  const uint64_t* all = exchange(kShuffle, bits(own));
  return value<T>(all[from % 32]);
}
inline unsigned vote(bool own) {
  const uint64_t* all = exchange(kVote, own);
  unsigned mask = 0;
  for (unsigned i = 0; i < 32; ++i) mask |= static_cast<unsigned>(all[i] != 0) << i;
  return mask;
}

}  // namespace simt

#define threadIdx simt::thread_index
#define blockIdx simt::block_index
#define blockDim simt::block_size
#define gridDim simt::grid_size

#define MOE_SHARED(T, name)       \
  static const char name##_key{}; \
  T& name = *static_cast<T*>(simt::shared(&name##_key, sizeof(T)))
#define MOE_DYNAMIC_SHARED(name) auto* name = static_cast<uint8_t*>(simt::dynamic_shared())

struct uint2 {
  uint32_t x, y;
};
struct uint4 {
  uint32_t x, y, z, w;
};
// What kernels store 16 bytes by.
struct ulonglong2 {
  unsigned long long x, y;
  void operator=(const ulonglong2& v) { simt::store_plain(this, v.x, v.y); }
};
inline ulonglong2 make_ulonglong2(unsigned long long x, unsigned long long y) { return {x, y}; }

template <class T>
T __shfl_sync(unsigned, T v, int from) {
  return simt::shuffle(v, from);
}
template <class T>
T __shfl_xor_sync(unsigned, T v, int step) {
  return simt::shuffle(v, simt::lane() ^ step);
}
template <class T>
T __shfl_up_sync(unsigned, T v, int step) {
  const unsigned from = simt::lane() - step;
  return simt::shuffle(v, from < 32 ? from : simt::lane());
}
inline unsigned __ballot_sync(unsigned, bool v) { return simt::vote(v); }
inline bool __any_sync(unsigned, bool v) { return simt::vote(v) != 0; }
inline bool __all_sync(unsigned, bool v) { return simt::vote(v) == ~0u; }
inline uint32_t __reduce_max_sync(unsigned, uint32_t v) {
  const uint64_t* all = simt::exchange(simt::kReduce, v);
  return static_cast<uint32_t>(*std::max_element(all, all + 32));
}
inline uint32_t __reduce_add_sync(unsigned, uint32_t v) {
  const uint64_t* all = simt::exchange(simt::kReduce, v);
  uint32_t sum = 0;
  for (int i = 0; i < 32; ++i) sum += static_cast<uint32_t>(all[i]);
  return sum;
}
inline uint32_t __reduce_min_sync(unsigned, uint32_t v) {
  const uint64_t* all = simt::exchange(simt::kReduce, v);
  return static_cast<uint32_t>(*std::min_element(all, all + 32));
}
template <class T>
unsigned __match_any_sync(unsigned, T v) {
  const uint64_t own = simt::bits(v), *all = simt::exchange(simt::kMatch, own);
  unsigned mask = 0;
  for (unsigned i = 0; i < 32; ++i) mask |= static_cast<unsigned>(all[i] == own) << i;
  return mask;
}
inline void __syncwarp() { simt::exchange(simt::kWarpBarrier, 0); }
inline void __syncthreads() { simt::block_barrier(false); }
inline int __syncthreads_or(int vote) { return simt::block_barrier(vote != 0); }
inline void __nanosleep(unsigned) { simt::yield(); }
inline void __threadfence_system() { std::atomic_thread_fence(std::memory_order_seq_cst); }
inline void __threadfence() { std::atomic_thread_fence(std::memory_order_seq_cst); }

inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __popcll(uint64_t v) { return __builtin_popcountll(v); }
inline int __ffs(unsigned v) { return __builtin_ffs(static_cast<int>(v)); }
inline int __ffsll(uint64_t v) { return __builtin_ffsll(static_cast<long long>(v)); }
inline uint32_t __float_as_uint(float v) { return static_cast<uint32_t>(simt::bits(v)); }
inline float __uint_as_float(uint32_t v) { return simt::value<float>(v); }
inline uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t selector) {
  const uint64_t both = low | uint64_t{high} << 32;
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i)
    out |= static_cast<uint32_t>(both >> (8 * (selector >> (4 * i) & 7)) & 0xFF) << (8 * i);
  return out;
}
inline float __frcp_rn(float v) { return 1.0f / v; }

// The threads of a process take turns, so these need no atomic instruction.
inline uint32_t atomicExch(uint32_t* at, uint32_t v) { return std::exchange(*at, v); }
inline uint32_t atomicAdd(uint32_t* at, uint32_t v) { return std::exchange(*at, *at + v); }
inline void atomicMax(uint32_t* at, uint32_t v) { *at = std::max(*at, v); }

template <class T>
T min(T a, T b) {
  return std::min(a, b);
}
template <class T>
T max(T a, T b) {
  return std::max(a, b);
}
