// Rows of a dispatch in bulk, a part at a time: loaded, made ready, and sent to the ranks of their
// token, straight to where the experts read them.
#pragma once

#include "quantize.cuh"
#include "row.cuh"
#include "tally.cuh"

namespace moe_a2a::cuda {

constexpr int kBulkWarps = kBulkThreads / kWarp;

// A part of a row: columns or bytes of some steps.
struct Part {
  int t, in_tile, first, last;  // steps

  __device__ __forceinline__ bool follows(const Part& before) const {
    return t == before.t && first == before.last;
  }
};

// The parts of a tile of tokens that a warp takes: one after the other where a source wants them
// together, else in turn with the other warps.
class Parts {
 public:
  __device__ __forceinline__ Parts(const DispatchLaunch& p, int first, int last, bool together)
      : begins_(first), ends_(last), of_row_(p.parts), steps_(p.steps) {
    const int warp = threadIdx.x / kWarp, total = (last - first) * of_row_;
    at_ = together ? warp * total / kBulkWarps : warp;
    end_ = together ? (warp + 1) * total / kBulkWarps : total;
    stride_ = together ? 1 : kBulkWarps;
    in_tile_ = at_ / p.by_parts;
    index_ = at_ - in_tile_ * of_row_;
  }
  __device__ __forceinline__ int begins() const { return begins_; }  // of the tile
  __device__ __forceinline__ int ends() const { return ends_; }
  __device__ __forceinline__ bool more() const { return at_ < end_; }
  __device__ __forceinline__ Part part() const {
    return {begins_ + in_tile_, in_tile_, index_ * steps_, (index_ + 1) * steps_};
  }
  __device__ __forceinline__ void advance() {
    at_ += stride_;
    index_ += stride_;
#pragma unroll 1
    for (; index_ >= of_row_; index_ -= of_row_) ++in_tile_;
  }

 private:
  int begins_, ends_, of_row_, steps_, at_, end_, stride_, in_tile_, index_;
};

// fn(window, slot) for each rank of the token; this one last, which has no way to go.
template <class F>
__device__ __forceinline__ void for_each_rank(const DispatchLaunch& p, const Routes& routes,
                                              int in_tile, F fn) {
  const uint64_t all = routes.ranks[in_tile];
  uint64_t own = all & bit(p.c.rank), left = all ^ own;
#pragma unroll 1
  while ((left | own) != 0) {
    if (left == 0) {
      left = own;
      own = 0;
    }
    const int to = __ffsll(left) - 1;
    left &= left - 1;
    fn(p.c.window[to], routes.slot[in_tile][to]);
  }
}

// fn(where the payload goes) for each of them, in the same order.
template <class F>
__device__ __forceinline__ void for_each_way(const Routes& routes, int in_tile, F fn) {
  uint8_t* const* way = routes.way[in_tile];
  uint8_t* const* end = way + routes.ways[in_tile];
#pragma unroll 1
  for (; way != end; ++way) fn(global(*way));
}

// The caller's bytes as they are. kAligned: in chunks of 16.
template <bool kAligned>
class Direct {
 public:
  static constexpr int kStage = 0;  // bytes of shared memory that a warp needs
  static constexpr bool kTogether = false;

  __device__ __forceinline__ Direct(const DispatchLaunch&, uint8_t*) {}

  // Where the rest of the row's image begins.
  static __device__ __forceinline__ int rest(const DispatchLaunch& p) {
    return p.segment[kSegmentScales].image;
  }
  // Once earlier kernels are over; and before the first part is made ready.
  __device__ __forceinline__ void begin(const DispatchLaunch&) {}
  __device__ __forceinline__ void settle() {}

  __device__ __forceinline__ void load(const DispatchLaunch& p, const Part& part) {
    const uint8_t* row = p.a.payload.row(part.t);
    for_each_chunk(p, part, [&](int u, int at, int bytes) {
      loaded_[u] = kAligned ? load_chunk(row + at) : load_bytes(row + at, min(16, bytes - at));
    });
  }
  // Takes the part that was loaded: what can be done before the slots are known. The next one may
  // be loaded then.
  __device__ __forceinline__ void prepare(const DispatchLaunch&, const Part&) {
#pragma unroll
    for (int u = 0; u < kDirectSteps; ++u) ready_[u] = loaded_[u];
  }
  // `follows`: the next part does, in its row.
  __device__ __forceinline__ void send(const DispatchLaunch& p, const Routes& routes,
                                       const Part& part, bool) {
    for_each_way(routes, part.in_tile, [&](uint8_t* target) {
      for_each_chunk(p, part, [&](int u, int at, int bytes) {
        const Chunk& c = ready_[u];
        if (kAligned)
          *reinterpret_cast<ulonglong2*>(target + at) = make_ulonglong2(c.lo, c.hi);
        else
          store_bytes(target + at, c, min(16, bytes - at));
      });
    });
  }

 private:
  // fn(which step, bytes from the row's begin, bytes of the row) for the chunks of this lane.
  template <class F>
  static __device__ __forceinline__ void for_each_chunk(const DispatchLaunch& p, const Part& part,
                                                        F fn) {
    const int bytes = p.segment[kSegmentPayload].bytes, end = min(part.last * kStepBytes, bytes);
    const int begin = part.first * kStepBytes + static_cast<int>(threadIdx.x % kWarp) * 16;
#pragma unroll
    for (int u = 0; u < kDirectSteps; ++u)
      if (begin + u * kStepBytes < end) fn(u, begin + u * kStepBytes, bytes);
  }

  Chunk loaded_[kDirectSteps], ready_[kDirectSteps];
};

// Codes of a part, on their way out of a warp's stage to several ranks: a lane takes up its share
// once. kBytes: at most.
template <bool kAligned, int kBytes>
class Codes {
 public:
  __device__ __forceinline__ Codes(const uint8_t* from, int count) : from_(from), count_(count) {
    if constexpr (kAligned)
#pragma unroll
      for (int i = 0; i < kChunks; ++i)
        chunk_[i] = *reinterpret_cast<const Chunk*>(from + (i * kWarp + lane()) * 16);
  }
  __device__ __forceinline__ void store(uint8_t* to) const {
    if constexpr (kAligned) {
#pragma unroll
      for (int i = 0; i < kChunks; ++i)
        if ((i * kWarp + lane()) * 16 < count_)
          *reinterpret_cast<ulonglong2*>(to + (i * kWarp + lane()) * 16) =
              make_ulonglong2(chunk_[i].lo, chunk_[i].hi);
    } else {
      copy_bytes(to, from_, count_, lane());
    }
  }

 private:
  static constexpr int kChunks = (kBytes + kStepBytes - 1) / kStepBytes;
  static __device__ __forceinline__ int lane() { return threadIdx.x % kWarp; }

  const uint8_t* from_;
  int count_;
  Chunk chunk_[kChunks];
};

// Quantized in a stage of shared memory, which is then copied to every rank: codes part by part,
// scales of as many parts of a row as a warp has one after the other, since each store of them
// alone would be a packet on the link that is mostly header.
template <int kWire, int kInput>
class Quantized {
  static constexpr int kCodes = kQuantizedSteps * kWarpColumns, kScaleRoom = 512;
  static constexpr int kBits = kWire == kNvfp4 || kWire == kMxfp4 ? 4 : 8;
  static_assert(kCodes / 16 * 2 <= kScaleRoom, "two parts' scales");

 public:
  static constexpr int kStage = kCodes + kScaleRoom;
  static constexpr bool kTogether = true;

  __device__ __forceinline__ Quantized(const DispatchLaunch& p, uint8_t* stage)
      : scale_rows_(own_rows(p, p.segment[kSegmentScales])), codes_(stage) {}

  static __device__ __forceinline__ int rest(const DispatchLaunch& p) {
    return p.segment[kSegmentIds].image;
  }
  __device__ __forceinline__ void begin(const DispatchLaunch& p) {
    if (p.global_scale != nullptr) global_scale_ = *p.global_scale;
  }
  __device__ __forceinline__ void settle() {
    global_scale_ = arrived<kWire>(global_scale_);
    decode_scale_ = 1.0f / global_scale_;
  }
  __device__ __forceinline__ void load(const DispatchLaunch& p, const Part& part) {
    columns_.load(p.a.payload.row(part.t), p.a.input, p.c.hidden, part.first * kWarpColumns,
                  kWarpColumns, part.last * kWarpColumns);
  }
  __device__ __forceinline__ void prepare(const DispatchLaunch& p, const Part& part) {
    const Context& c = p.c;
    const int wire = wire_of(p);
    QuantizeRow r{p.a.payload.row(part.t), p.a.input,     wire, c.hidden, c.padded,
                  global_scale_,           decode_scale_, {}};
    if (wire == kFp8 && scaled_ != part.t) {
      row_scale_ = fp8_scale(largest_of_columns<kInput>(r.data, r.scalar, 0, c.hidden));
      scaled_ = part.t;
    }
    r.row_scale = row_scale_;
    const Extent e(p, part);
    if (scales_ == 0) first_scale_ = e.first_scale;
    uint8_t* scales_to = codes_ + kCodes - first_scale_;
    columns_.template quantize<kWire>(r, e.col, kWarpColumns, e.last, codes_ - e.first_code,
                                      scales_to);
    if (wire == kFp8 && part.first == 0 && threadIdx.x % kWarp == 0)
      *reinterpret_cast<float*>(scales_to) = row_scale_.scale;
    __syncwarp();
  }
  __device__ __forceinline__ void send(const DispatchLaunch& p, const Routes& routes,
                                       const Part& part, bool follows) {
    const Extent e(p, part);
    const Codes<kInput == kAlignedBf16, kCodes * kBits / 8> codes(codes_, e.codes);
    for_each_way(routes, part.in_tile, [&](uint8_t* row) { codes.store(row + e.first_code); });
    scales_ += e.scales;
    if (!follows || scales_ + e.scales > kScaleRoom) {
      const int64_t scales_to = scale_rows_ + first_scale_;
      for_each_rank(p, routes, part.in_tile, [&](uint8_t* window, int slot) {
        copy_bytes(window + scales_to + int64_t{slot} * p.segment[kSegmentScales].bytes,
                   codes_ + kCodes, scales_, threadIdx.x % kWarp);
      });
      scales_ = 0;
    }
    __syncwarp();
  }

 private:
  static __device__ __forceinline__ int wire_of(const DispatchLaunch& p) {
    return kWire == kAny ? p.a.wire : kWire;
  }
  // Of a part: columns, and bytes in its row.
  struct Extent {
    int col, last, first_code, codes, first_scale, scales;
    __device__ __forceinline__ Extent(const DispatchLaunch& p, const Part& part)
        : col(part.first * kWarpColumns),
          last(min(part.last * kWarpColumns, p.c.padded)),
          first_code(code_bytes(wire_of(p), col)),
          codes(code_bytes(wire_of(p), last) - first_code),
          first_scale(scale_bytes(wire_of(p), col)),
          scales(scale_bytes(wire_of(p), last) - first_scale) {}
  };

  const int64_t scale_rows_;
  uint8_t* codes_;  // in the stage, the scales behind them
  Batch<kInput, kQuantizedSteps> columns_;
  float global_scale_ = 1.0f, decode_scale_ = 1.0f;
  int scaled_ = -1;  // the token that row_scale_ is of
  Fp8Scale row_scale_{};
  int first_scale_ = 0, scales_ = 0;  // bytes in the stage, and where in the row they begin
};

}  // namespace moe_a2a::cuda
