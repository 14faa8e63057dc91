// Instructions that C++ has no word for, each a named function. The only inline PTX.
#pragma once

#if !defined(__CUDACC__)
#include "ptx_simt.h"  // kernels on the CPU, for tests: tests/simt
#else

#include <cstdint>

namespace moe_a2a::cuda {

// ---- programmatic dependent launch ----------------------------------------------------------

// Returns when every earlier kernel of the stream is complete and what it wrote is visible.
__device__ __forceinline__ void wait_for_earlier_kernels() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next kernel take up the room that this one leaves; it waits as above.
__device__ __forceinline__ void allow_next_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// ---- registers --------------------------------------------------------------------------------

// The same value, but one that the compiler keeps: left alone, it computes an address once more
// where it is used, which takes time where there is none, to save registers where there are plenty.
__device__ __forceinline__ int hold(int v) {
  asm volatile("" : "+r"(v));
  return v;
}
template <class T>
__device__ __forceinline__ T* hold(T* at) {
  asm volatile("" : "+l"(at));
  return at;
}

// The same, of a window: what was loaded as an address may be anything to the compiler.
template <class T>
__device__ __forceinline__ T* global(T* at) {
  __builtin_assume(__isGlobal(at));
  return at;
}

// ---- memory shared with other devices -------------------------------------------------------

// 16 bytes in one access: .b128 is one to the memory model, .v4 and .v2 are several.
struct alignas(16) Chunk {
  uint64_t lo, hi;
};

__device__ __forceinline__ Chunk load_relaxed_sys(const Chunk* at) {
  Chunk c;
  asm volatile("{ .reg .b128 t; ld.relaxed.sys.global.b128 t, [%2]; mov.b128 {%0, %1}, t; }"
               : "=l"(c.lo), "=l"(c.hi)
               : "l"(at)
               : "memory");
  return c;
}

__device__ __forceinline__ Chunk load_acquire_sys(const Chunk* at) {
  Chunk c;
  asm volatile("{ .reg .b128 t; ld.acquire.sys.global.b128 t, [%2]; mov.b128 {%0, %1}, t; }"
               : "=l"(c.lo), "=l"(c.hi)
               : "l"(at)
               : "memory");
  return c;
}

__device__ __forceinline__ void store_relaxed_sys(Chunk* at, const Chunk& c) {
  asm volatile(
      "{ .reg .b128 t; mov.b128 t, {%1, %2}; st.relaxed.sys.global.b128 [%0], t; }" ::"l"(at),
      "l"(c.lo), "l"(c.hi)
      : "memory");
}

__device__ __forceinline__ uint32_t load_acquire_sys(const uint32_t* at) {
  uint32_t v;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(v) : "l"(at) : "memory");
  return v;
}

__device__ __forceinline__ uint32_t load_relaxed_sys(const uint32_t* at) {
  uint32_t v;
  asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(v) : "l"(at) : "memory");
  return v;
}

__device__ __forceinline__ void store_relaxed_sys(uint32_t* at, uint32_t v) {
  asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(at), "r"(v) : "memory");
}

__device__ __forceinline__ void store_release_sys(uint32_t* at, uint32_t v) {
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(at), "r"(v) : "memory");
}

__device__ __forceinline__ void add_release_sys(uint32_t* at, uint32_t v) {
  asm volatile("red.release.sys.global.add.u32 [%0], %1;" ::"l"(at), "r"(v) : "memory");
}

// Adds one to a word of this device's memory, below 2^31, and returns what was there; nothing waits
// for it. An addition the compiler makes one of the warp, whose lanes share the answer at once.
__device__ __forceinline__ uint32_t count_up(uint32_t* at) {
  uint32_t before;
  asm volatile("atom.relaxed.gpu.global.inc.u32 %0, [%1], 0x7FFFFFFF;"
               : "=r"(before)
               : "l"(at)
               : "memory");
  return before;
}

__device__ __forceinline__ void fence_acq_rel_sys() {
  asm volatile("fence.acq_rel.sys;" ::: "memory");
}

// ---- data read once -------------------------------------------------------------------------

__device__ __forceinline__ uint4 load_once(const uint4* at) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(at));
  return v;
}

// Of a sector of which this thread reads the rest next: by way of the L1, which asks for it once.
__device__ __forceinline__ uint4 load_sector_part(const uint4* at) {
  uint4 v;
  asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(at));
  return v;
}

// ---- time -----------------------------------------------------------------------------------

__device__ __forceinline__ uint64_t nanoseconds() {
  uint64_t t;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(t));
  return t;
}

// ---- element conversions --------------------------------------------------------------------

// The product, or NaN with a positive sign: the only one that fp32 instructions make.
__device__ __forceinline__ float product(float a, float b) { return a * b; }

// Of each of two bf16 the larger magnitude, with any sign; the other one where one is NaN.
__device__ __forceinline__ uint32_t larger_magnitudes(uint32_t a, uint32_t b) {
  uint32_t c;
  asm("max.xorsign.abs.bf16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
  return c;
}

// Two e4m3 codes, `lo` in the low byte: nearest even, saturating at 448, NaN gives 0x7F.
__device__ __forceinline__ uint32_t e4m3x2(float lo, float hi) {
  uint16_t codes;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(codes) : "f"(hi), "f"(lo));
  return codes;
}

// Two halves from two e4m3 codes; exact.
__device__ __forceinline__ uint32_t half2_of_e4m3x2(uint16_t codes) {
  uint32_t halves;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(codes));
  return halves;
}

// `low` in the low half, nearest even.
__device__ __forceinline__ uint32_t two_bf16(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

__device__ __forceinline__ uint32_t two_fp16(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

__device__ __forceinline__ float low_fp16(uint32_t pair) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(static_cast<uint16_t>(pair)));
  return value;
}

#if defined(__CUDA_ARCH_SPECIFIC__) && __CUDA_ARCH__ >= 1000
#define MOE_HAS_E2M1 1
// Two e2m1 codes, `lo` in the low nibble: nearest, ties to even, saturating at 6, NaN gives 7.
__device__ __forceinline__ uint32_t e2m1x2(float lo, float hi) {
  uint16_t codes;
  asm("{ .reg .b8 c; cvt.rn.satfinite.e2m1x2.f32 c, %1, %2; cvt.u16.u8 %0, c; }"
      : "=h"(codes)
      : "f"(hi), "f"(lo));
  return codes;
}
#endif

}  // namespace moe_a2a::cuda

#endif
