// The dtypes that rows come in, as types for templates.
#pragma once

#include <cstdint>

#include "../codec.h"

// Loops over columns are functions of their own: inlined into a loop over rows or blocks, g++ jams
// or unrolls them together and then fails to vectorize, up to ten times slower.
#define MOE_OWN_LOOP __attribute__((noinline))

namespace moe_a2a::cpu {

struct Bf16 {
  using Storage = uint16_t;
  static float decode(Storage h) { return bf16_decode(h); }
  static Storage encode(float x) { return bf16_encode(x); }
};

struct Fp16 {
  using Storage = uint16_t;
  static float decode(Storage h) { return fp16_decode(h); }
  static Storage encode(float x) { return fp16_encode(x); }
};

struct Fp32 {
  using Storage = float;
  static float decode(Storage x) { return x; }
  static Storage encode(float x) { return x; }
};

}  // namespace moe_a2a::cpu
