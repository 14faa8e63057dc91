// One round as every rank plays it, and as every rank knows beforehand that it must come out.
#pragma once

#include <memory>

#include "ranks.h"

namespace sanitize {

enum class Input {
  kQuantize,  // known rows, by the kernel
  kAnyBits,   // NaN, infinities and all, by the kernel: what comes of them is for other tests
  kMove,      // bytes, and the caller's scales where the wire has some
  kDefer,     // bf16 instead of a quantized wire
};

enum Routing : int { kAnywhere, kNowhere, kHot, kInRange, kRoutings };

struct Round {
  int64_t seed;
  int64_t rows;  // R
  std::vector<int64_t> tokens;
  uint64_t active;
  Input input;
  int scalar;          // of x where it is quantized
  int combine_scalar;  // of y and out
  Routing routing;
  bool wide_ids, strided;
  double global_scale;
  int64_t slice_ns;
};

// The n-th round of a setup: the same on every rank.
Round round_of(const Setup& setup, int64_t n);

// Rows of `width` bytes in an allocation that ends with the last byte of the last one; null where
// there are none, as in torch. Strided ones lie apart, and no better aligned than their elements.
class Matrix {
 public:
  Matrix(int64_t rows, int64_t width, int64_t item, bool strided);
  uint8_t* row(int64_t i) const { return data_ + i * stride_; }
  moe_a2a::Rows rows() const { return {data_, stride_}; }

 private:
  int64_t stride_;
  std::unique_ptr<uint8_t[]> memory_;
  uint8_t* data_;
};

// Which tokens of each source are here: [W] lists, in the order of their slots.
using Arrived = std::vector<std::vector<int64_t>>;

// The operations, from their start to kDone or kFailed; what is done is checked.
moe_a2a::cpu::Status dispatch_round(Rank& rank, const Round& round);
moe_a2a::cpu::Status combine_round(Rank& rank, const Round& round);

void play_round(Rank& rank, const Round& round);

}  // namespace sanitize
