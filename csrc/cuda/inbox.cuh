// Rows on their way back, in the inboxes of the ranks that they came from. What lies there says by
// itself whether it has come: every word that is looked at is all ones until it has, and again once
// it was read. So there is no flag and no fence, and not a byte on the link but the rows.
//
// Each access is one to the memory model (16 bytes as .b128, a word of scales as .b32), so the word
// that is looked at vouches for all of it. No row may look like none: E4M3 codes and scales have no
// byte 0xFF here, and of plain rows the first word of 16 bytes, if it is all ones, which is NaN,
// travels as another NaN.
//
// A lane has 16 bytes of codes, or of plain elements, in each step of its warp.
#pragma once

#include "quantize.cuh"

namespace moe_a2a::cuda {

constexpr uint32_t kUnwritten = ~0u;

__device__ __forceinline__ uint8_t* inbox_row(const CombineLaunch& p, int owner, int from,
                                              int slot) {
  const uint32_t row = from * p.c.max_tokens + slot;
  return p.c.window[owner] + p.c.combine + uint64_t{row} * static_cast<uint32_t>(p.c.combine_bytes);
}

__device__ __forceinline__ void store_ones(uint8_t* at) {
  store_relaxed_sys(reinterpret_cast<Chunk*>(at), {~uint64_t{0}, ~uint64_t{0}});
}

// The steps of a row that a warp moves in one go; of this lane in each, its first column and where
// its 16 bytes are in the inbox.
template <class Row, int kRun>
class Steps {
 public:
  static constexpr int kColumns = Row::kColumns * kWarp;

  __device__ __forceinline__ explicit Steps(int first)
      : column_(hold((first * kWarp + lane()) * Row::kColumns)),
        chunk_(hold((first * kWarp + lane()) * 16)) {}

  static __device__ __forceinline__ int lane() { return threadIdx.x % kWarp; }
  __device__ __forceinline__ int column(int u) const { return column_ + u * kColumns; }
  __device__ __forceinline__ int chunk(int u) const { return chunk_ + u * kStepBytes; }

 private:
  int column_, chunk_;
};

// ---- elements as they are ---------------------------------------------------------------------

template <int kScalar>
constexpr int kItemBytes = kScalar == kScalarFp32 ? 4 : 2;

template <int kScalar>
struct Plain {
  static constexpr int kScalarOf = kScalar;
  static constexpr int kColumns = 16 / kItemBytes<kScalar>;  // of a lane in a step
  static constexpr int kChunks = 1;                          // that they take in y
  static constexpr bool kQuantizes = false;
  struct Item {
    Chunk data{0, 0};
  };

  static __device__ __forceinline__ Item encode(const Chunk (&y)[kChunks]) { return {y[0]}; }

  template <int kRun>
  static __device__ __forceinline__ void send(const CombineLaunch& p, uint8_t* row,
                                              const Steps<Plain, kRun>& steps,
                                              const Item (&item)[kRun]) {
    constexpr uint32_t kSigns = kScalar == kScalarFp32 ? 0x80000000u : 0x80008000u;
    uint8_t* to = row + steps.chunk(0);
#pragma unroll
    for (int u = 0; u < kRun; ++u) {
      Chunk data = item[u].data;
      if (static_cast<uint32_t>(data.lo) == kUnwritten) data.lo ^= kSigns;
      if (steps.column(u) < p.c.hidden)
        store_relaxed_sys(reinterpret_cast<Chunk*>(to + u * kStepBytes), data);
    }
  }

  // A row in this rank's inbox. `end`: of the columns that are looked at.
  template <int kRun>
  struct Arriving {
    uint8_t* chunks;
    __device__ __forceinline__ Arriving(const CombineLaunch&, uint8_t* row,
                                        const Steps<Plain, kRun>& steps)
        : chunks(hold(row + steps.chunk(0))) {}

    __device__ __forceinline__ void load(const Steps<Plain, kRun>& steps, int end,
                                         Item (&item)[kRun]) const {
#pragma unroll
      for (int u = 0; u < kRun; ++u)
        if (steps.column(u) < end)
          item[u].data = load_relaxed_sys(reinterpret_cast<const Chunk*>(chunks + u * kStepBytes));
    }
    __device__ __forceinline__ void clear(const Steps<Plain, kRun>& steps, int end) const {
#pragma unroll
      for (int u = 0; u < kRun; ++u)
        if (steps.column(u) < end) store_ones(chunks + u * kStepBytes);
    }
  };
  static __device__ __forceinline__ bool written(const Item& item) {
    return static_cast<uint32_t>(item.data.lo) != kUnwritten;
  }

  static __device__ __forceinline__ void add(const Item& item, float (&sum)[kColumns]) {
    const Chunk& c = item.data;
    const uint32_t w[4] = {static_cast<uint32_t>(c.lo), static_cast<uint32_t>(c.lo >> 32),
                           static_cast<uint32_t>(c.hi), static_cast<uint32_t>(c.hi >> 32)};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (kScalar == kScalarFp32) {
        sum[i] += __uint_as_float(w[i]);
      } else if constexpr (kScalar == kScalarBf16) {
        sum[2 * i] += low_bf16(w[i]);
        sum[2 * i + 1] += high_bf16(w[i]);
      } else {
        sum[2 * i] += low_fp16(w[i]);
        sum[2 * i + 1] += low_fp16(w[i] >> 16);
      }
    }
  }
};

// ---- codes, and their scales behind them ------------------------------------------------------

// A word of scales belongs to 128 columns, the codes of eight lanes: four bytes or one fp32.
template <int kWire, int kScalar>
struct Scaled {
  static constexpr int kWireOf = kWire;
  static constexpr int kScalarOf = kScalar;
  static constexpr int kColumns = 16;
  static constexpr int kChunks = kItemBytes<kScalar>;
  static constexpr int kWordLanes = 8;
  static constexpr bool kQuantizes = true;
  struct Item {
    Chunk codes{0, 0};
    uint32_t scales = 0;
  };

  // The whole warp. Columns past the row are zeros, and share no block with others.
  static __device__ __forceinline__ Item encode(const Chunk (&y)[kChunks]) {
    constexpr int kHalf = kChunks / 2;
    float low[kColumns / 2], high[kColumns / 2];
    decode_columns({y[0], y[kHalf - 1]}, kScalar, low);
    decode_columns({y[kHalf], y[kChunks - 1]}, kScalar, high);
    const uint32_t own = kScalar == kScalarBf16 ? max(largest(y[0]), largest(y[1]))
                                                : max(largest(low), largest(high));
    Item item;
    float factor;
    if constexpr (kWire == kMxfp8) {
      const uint32_t e = mxfp8_exponent(largest_of_lanes<2>(own));
      factor = e8m0_inverse(e);
      item.scales = e << (threadIdx.x / 2 % 4 * 8);
      item.scales |= __shfl_xor_sync(kAllLanes, item.scales, 2);
      item.scales |= __shfl_xor_sync(kAllLanes, item.scales, 4);
    } else {
      const Fp8Scale s = fp8_scale(largest_of_lanes<kWordLanes>(own));
      factor = s.inverse;
      item.scales = __float_as_uint(s.scale);
    }
    const uint2 a = encode_e4m3(low, factor), b = encode_e4m3(high, factor);
    item.codes = {a.x | static_cast<uint64_t>(a.y) << 32, b.x | static_cast<uint64_t>(b.y) << 32};
    return item;
  }

  // Words of a run lie side by side: each of the lanes that have one in common stores that of
  // another step.
  template <int kRun>
  static __device__ __forceinline__ void send(const CombineLaunch& p, uint8_t* row,
                                              const Steps<Scaled, kRun>& steps,
                                              const Item (&item)[kRun]) {
    static_assert(kRun <= kWordLanes);
    uint8_t* to = row + steps.chunk(0);
    uint32_t word = 0;
#pragma unroll
    for (int u = 0; u < kRun; ++u) {
      if (steps.column(u) < p.c.hidden)
        store_relaxed_sys(reinterpret_cast<Chunk*>(to + u * kStepBytes), item[u].codes);
      // Held, or the compiler makes memory of the registers to pick one by its index.
      const int own = hold(static_cast<int>(item[u].scales));
      if (steps.lane() % kWordLanes == u) word = static_cast<uint32_t>(own);
    }
    const int at = column_of_word(steps);
    if (at < p.c.hidden) store_relaxed_sys(word_of(row + p.c.hidden, at), word);
  }

  template <int kRun>
  struct Arriving {
    uint8_t *codes, *scales;
    __device__ __forceinline__ Arriving(const CombineLaunch& p, uint8_t* row,
                                        const Steps<Scaled, kRun>& steps)
        : codes(hold(row + steps.chunk(0))), scales(hold(row + p.c.hidden)) {}

    __device__ __forceinline__ void load(const Steps<Scaled, kRun>& steps, int end,
                                         Item (&item)[kRun]) const {
#pragma unroll
      for (int u = 0; u < kRun; ++u) {
        if (steps.column(u) >= end) continue;
        item[u].codes = load_relaxed_sys(reinterpret_cast<const Chunk*>(codes + u * kStepBytes));
        item[u].scales = load_relaxed_sys(word_of(scales, steps.column(u)));
      }
    }
    __device__ __forceinline__ void clear(const Steps<Scaled, kRun>& steps, int end) const {
#pragma unroll
      for (int u = 0; u < kRun; ++u)
        if (steps.column(u) < end) store_ones(codes + u * kStepBytes);
      const int at = column_of_word(steps);
      if (at < end) store_relaxed_sys(word_of(scales, at), kUnwritten);
    }
  };
  static __device__ __forceinline__ bool written(const Item& item) {
    return (static_cast<uint32_t>(item.codes.lo) != kUnwritten) & (item.scales != kUnwritten);
  }

  // code * scale in fp32, then the add, not fused.
  static __device__ __forceinline__ void add(const Item& item, float (&sum)[kColumns]) {
    const float scale = kWire == kMxfp8
                            ? e8m0_decode(item.scales >> (threadIdx.x / 2 % 4 * 8) & 0xFF)
                            : __uint_as_float(item.scales);
#pragma unroll
    for (int i = 0; i < kColumns / 2; ++i) {
      const uint64_t half = i < 4 ? item.codes.lo : item.codes.hi;
      const uint32_t pair = half2_of_e4m3x2(static_cast<uint16_t>(half >> (16 * (i % 4))));
      sum[2 * i] += low_fp16(pair) * scale;
      sum[2 * i + 1] += low_fp16(pair >> 16) * scale;
    }
  }

 private:
  // The columns whose word this lane stores; past every row where it stores none.
  template <int kRun>
  static __device__ __forceinline__ int column_of_word(const Steps<Scaled, kRun>& steps) {
    const int u = steps.lane() % kWordLanes;
    return u < kRun ? steps.column(0) + u * steps.kColumns - u * kColumns : INT32_MAX;
  }
  static __device__ __forceinline__ uint32_t* word_of(uint8_t* scales, int column) {
    return reinterpret_cast<uint32_t*>(scales +
                                       static_cast<uint32_t>(column) / (kWordLanes * kColumns) * 4);
  }
};

// Sums, rounded once, as 16 bytes of an output row.
template <int kScalar>
__device__ __forceinline__ Chunk round_chunk(const float* sum) {
  uint32_t w[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (kScalar == kScalarBf16)
      w[i] = two_bf16(sum[2 * i], sum[2 * i + 1]);
    else if constexpr (kScalar == kScalarFp16)
      w[i] = two_fp16(sum[2 * i], sum[2 * i + 1]);
    else
      w[i] = __float_as_uint(sum[i]);
  }
  return {w[0] | static_cast<uint64_t>(w[1]) << 32, w[2] | static_cast<uint64_t>(w[3]) << 32};
}

}  // namespace moe_a2a::cuda
