// The functions of csrc/cuda/ptx.cuh, on the CPU.
#pragma once

#include <emmintrin.h>

#include <ctime>

#include "codec.h"

namespace moe_a2a::cuda {

// As the instructions have it: any NaN is passed over, also a signalling one, of which glibc's
// functions make a NaN.
inline float fmaxf(float a, float b) { return a != a ? b : b != b ? a : a > b ? a : b; }
inline float fminf(float a, float b) { return a != a ? b : b != b ? a : a < b ? a : b; }

inline void wait_for_earlier_kernels() {}
inline void allow_next_kernel() {}
template <class T>
inline T hold(T v) {
  return v;
}

template <class T>
inline T* global(T* at) {
  return at;
}

struct alignas(16) Chunk {
  uint64_t lo, hi;
};

// An aligned access of 16 bytes is one on every x86 processor with AVX; in assembly, since g++
// makes two of an intrinsic whose halves are used apart.
inline Chunk load_relaxed_sys(const Chunk* at) {
  __m128i v;
  asm volatile("movdqa %1, %0" : "=x"(v) : "m"(*at) : "memory");
  Chunk c;
  _mm_store_si128(reinterpret_cast<__m128i*>(&c), v);
  return c;
}
inline Chunk load_acquire_sys(const Chunk* at) { return load_relaxed_sys(at); }
inline void store_relaxed_sys(Chunk* at, const Chunk& c) {
  simt::store_relaxed(at, c.lo, c.hi, true);
}
inline uint32_t load_acquire_sys(const uint32_t* at) {
  return __atomic_load_n(at, __ATOMIC_ACQUIRE);
}
inline void store_release_sys(uint32_t* at, uint32_t v) {
  simt::fence();
  __atomic_store_n(at, v, __ATOMIC_RELEASE);
}
inline uint32_t load_relaxed_sys(const uint32_t* at) { return load_acquire_sys(at); }
inline void store_relaxed_sys(uint32_t* at, uint32_t v) { simt::store_relaxed(at, v, 0, false); }
inline void add_release_sys(uint32_t* at, uint32_t v) {
  simt::fence();
  __atomic_fetch_add(at, v, __ATOMIC_RELEASE);
}
inline uint32_t count_up(uint32_t* at) { return atomicAdd(at, 1u); }
inline void fence_acq_rel_sys() {
  simt::fence();
  std::atomic_thread_fence(std::memory_order_acq_rel);
}

inline uint4 load_once(const uint4* at) { return *at; }
inline uint4 load_sector_part(const uint4* at) { return *at; }

// Up to 2 ms ahead, each time by as much as it likes: lanes that ask one after the other must not
// come to different conclusions.
inline uint64_t nanoseconds() {
  static uint32_t ahead = 1;
  ahead = ahead * 1664525 + 1013904223;
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return static_cast<uint64_t>(t.tv_sec) * 1'000'000'000 + t.tv_nsec + (ahead >> 8) % 2'000'000;
}

inline float product(float a, float b) {
  const float c = a * b;
  return c == c ? c : bits_float(0x7FFFFFFF);
}
inline uint32_t larger_magnitudes(uint32_t a, uint32_t b) {
  uint32_t larger = 0;
  for (int shift : {0, 16}) {
    const uint32_t x = a >> shift & 0x7FFF, y = b >> shift & 0x7FFF, nan = 0x7F80;
    larger |= (x > nan ? y : y > nan ? x : x > y ? x : y) << shift;
  }
  return larger | 0x80000000;  // with any sign
}
inline uint32_t e4m3x2(float lo, float hi) { return e4m3_encode(lo) | e4m3_encode(hi) << 8; }
inline uint32_t half2_of_e4m3x2(uint16_t codes) {
  const uint32_t lo = fp16_encode(e4m3_decode(codes & 0xFF));
  return lo | static_cast<uint32_t>(fp16_encode(e4m3_decode(codes >> 8))) << 16;
}
inline uint32_t two_bf16(float low, float high) {
  return bf16_encode(low) | static_cast<uint32_t>(bf16_encode(high)) << 16;
}
inline uint32_t two_fp16(float low, float high) {
  return fp16_encode(low) | static_cast<uint32_t>(fp16_encode(high)) << 16;
}
inline float low_fp16(uint32_t pair) { return fp16_decode(static_cast<uint16_t>(pair)); }

}  // namespace moe_a2a::cuda
