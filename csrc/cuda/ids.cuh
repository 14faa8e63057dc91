// The ids of a token as words in registers, eight at a time: asked for early and all at once, by
// loads as wide as the alignment of the rows allows, and decoded alike. Where p.id_words is not 0.
#pragma once

#include "packet.cuh"

namespace moe_a2a::cuda {

// The rank that owns an expert, as owner_of_expert() of routing.h has it. kEven: all own as many.
template <bool kEven>
__device__ __forceinline__ uint32_t owner_of(const Context& c, uint32_t expert) {
  if constexpr (kEven) return expert / c.smaller;
  const bool on_larger = expert < static_cast<uint32_t>(c.larger_end);
  return on_larger ? expert / c.larger : c.larger_ranks + (expert - c.larger_end) / c.smaller;
}

// Eight ids of int32, four of int64.
struct IdWords {
  static constexpr int kWords = 8, kBytes = 4 * kWords;
  uint32_t word[kWords];

  // Of the words from `at` on there are `left`; those past them name no expert.
  template <class Unit>
  __device__ __forceinline__ void load(const uint8_t* at, int left) {
    constexpr int kOfUnit = sizeof(Unit) / 4;
#pragma unroll
    for (int i = 0; i < kWords; i += kOfUnit) {
      Unit unit;
      uint32_t* words = reinterpret_cast<uint32_t*>(&unit);
#pragma unroll
      for (int k = 0; k < kOfUnit; ++k) words[k] = ~0u;
      if (i < left) unit = *reinterpret_cast<const Unit*>(at + 4 * i);
#pragma unroll
      for (int k = 0; k < kOfUnit; ++k) word[i + k] = words[k];
    }
  }

  // Mask of their owners.
  template <bool kWide>
  __device__ __forceinline__ uint32_t ranks(const Context& c) const {
    uint32_t mask = 0;
#pragma unroll
    for (int i = 0; i < kWords; i += kWide ? 2 : 1) {
      const bool exists =
          (!kWide || word[i + kWide] == 0) && word[i] < static_cast<uint32_t>(c.num_experts);
      mask |= exists ? 1u << owner_of<true>(c, word[i]) : 0u;
    }
    return mask;
  }
};

// fn(a value of the type that ids are loaded by): one branch around all loads of a batch.
template <class F>
__device__ __forceinline__ void by_unit(const DispatchLaunch& p, F fn) {
  if (p.id_bytes == 16)
    fn(uint4{});
  else if (p.id_bytes == 8)
    fn(uint2{});
  else
    fn(uint32_t{});
}

}  // namespace moe_a2a::cuda
