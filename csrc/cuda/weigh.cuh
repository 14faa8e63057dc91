// A run of the row that local experts' rows make up: each times its router weight, summed in fp32
// from +0.0 by ascending place, product and add not fused.
//
// Places, rows and sums are asked for in three steps, so that what a warp does between them hides
// their latency. Of the choices of a row a lane has one, and the warp finds the least that is left.
#pragma once

#include "inbox.cuh"

namespace moe_a2a::cuda {

constexpr uint32_t kNoChoice = static_cast<uint32_t>(kNotHere);  // past every place

// sum += weight * value, of a lane's columns.
template <int kScalar, int kColumns, int kPieces>
__device__ __forceinline__ void add_weighted(const Chunk (&raw)[kPieces], float weight,
                                             float (&sum)[kColumns]) {
  constexpr int kEach = 16 / kItemBytes<kScalar>;  // columns of a piece
#pragma unroll
  for (int i = 0; i < kColumns; ++i) {
    const Chunk& c = raw[i / kEach];
    const int word = i % kEach * kItemBytes<kScalar> / 4;
    const auto w = static_cast<uint32_t>((word < 2 ? c.lo : c.hi) >> word % 2 * 32);
    float value;
    if constexpr (kScalar == kScalarFp32)
      value = __uint_as_float(w);
    else if constexpr (kScalar == kScalarBf16)
      value = i % 2 == 0 ? low_bf16(w) : high_bf16(w);
    else
      value = low_fp16(i % 2 == 0 ? w : w >> 16);
    sum[i] += value * weight;
  }
}

// Sums of a lane's columns as what travels. The whole warp.
template <class Row>
__device__ __forceinline__ typename Row::Item item_of(const float (&sum)[Row::kColumns]) {
  if constexpr (Row::kQuantizes) {
    using Exact = Scaled<Row::kWireOf, kScalarFp32>;
    Chunk y[Exact::kChunks];
#pragma unroll
    for (int i = 0; i < Exact::kChunks; ++i) y[i] = round_chunk<kScalarFp32>(sum + 4 * i);
    const typename Exact::Item item = Exact::encode(y);
    return {item.codes, item.scales};
  } else {
    return {round_chunk<Row::kScalarOf>(sum)};
  }
}

template <class Row, int kScalar, int kRun>
class Weighed {
  static constexpr int kItem = kItemBytes<kScalar>;
  static constexpr int kBytes = Row::kColumns * kItem;  // of a lane in a step: 8, 16, 32 or 64
  static constexpr int kPieces = kBytes < 16 ? 1 : kBytes / 16;
  static constexpr int kPiece = kBytes < 16 ? kBytes : 16;
  // Choices whose rows are in flight together: four, or as many as fit 32 registers, but two.
  static constexpr int kFit = 8 / (kRun * kPieces);
  static constexpr int kAhead = kFit < 2 ? 2 : kFit > 4 ? 4 : kFit;

 public:
  // `places`: of the row's choices.
  __device__ __forceinline__ void ask(const GroupedLaunch& p, const int32_t* places) {
    const int lane = threadIdx.x % kWarp;
    left_ = kNoChoice;
    if (lane < p.c.top_k) left_ = static_cast<uint32_t>(places[lane]);
  }

  __device__ __forceinline__ void load(const GroupedLaunch& p, const Steps<Row, kRun>& steps) {
    const bool nowhere = left_ != kNoChoice && left_ >= static_cast<uint32_t>(p.grouped.size);
    lost_ = __any_sync(kAllLanes, nowhere);
    if (nowhere) left_ = kNoChoice;
    load_next(p, steps);
  }

  __device__ __forceinline__ void finish(const GroupedLaunch& p, const Steps<Row, kRun>& steps,
                                         typename Row::Item (&item)[kRun]) {
    float sum[kRun][Row::kColumns] = {};
    for (;;) {
#pragma unroll
      for (int r = 0; r < kAhead; ++r) {
        if (place_[r] == kNoChoice) break;
#pragma unroll
        for (int u = 0; u < kRun; ++u) add_weighted<kScalar>(raw_[r][u], weight_[r], sum[u]);
      }
      if (place_[kAhead - 1] == kNoChoice) break;
      load_next(p, steps);
    }
#pragma unroll
    for (int u = 0; u < kRun; ++u) {
#pragma unroll
      for (int i = 0; i < Row::kColumns; ++i)
        if (lost_) sum[u][i] = __uint_as_float(0x7FC00000);
      item[u] = item_of<Row>(sum[u]);
    }
  }

 private:
  __device__ __forceinline__ void load_next(const GroupedLaunch& p, const Steps<Row, kRun>& steps) {
#pragma unroll
    for (int r = 0; r < kAhead; ++r) {
      place_[r] = __reduce_min_sync(kAllLanes, left_);
      if (left_ == place_[r]) left_ = kNoChoice;
    }
    const auto load_all = [&](bool wanted, auto load_piece) {
#pragma unroll
      for (int r = 0; r < kAhead; ++r) {
        const bool there = wanted && place_[r] != kNoChoice;
        const uint8_t* from = p.a.y + place_[r] * p.a.row_stride + steps.column(0) * kItem;
#pragma unroll
        for (int u = 0; u < kRun; ++u)
#pragma unroll
          for (int i = 0; i < kPieces; ++i)
            if (there && steps.column(u) < p.c.hidden)
              raw_[r][u][i] = load_piece(from + u * steps.kColumns * kItem + i * 16);
      }
    };
#pragma unroll
    for (int r = 0; r < kAhead; ++r) {
      weight_[r] = place_[r] != kNoChoice ? p.grouped.weights[place_[r]] : 0.0f;
#pragma unroll
      for (int u = 0; u < kRun; ++u)
#pragma unroll
        for (int i = 0; i < kPieces; ++i) raw_[r][u][i] = {0, 0};
    }
    load_all(!p.odd, [](const uint8_t* at) {
      if constexpr (kPiece < 16) return Chunk{*reinterpret_cast<const uint64_t*>(at), 0};
      return kPieces == 1 ? load_chunk(at) : load_neighbour(at);
    });
    if (p.odd) load_all(true, [](const uint8_t* at) { return load_odd_bytes(at, kPiece); });
  }

  uint32_t left_;           // this lane's choice, if it is not in yet
  bool lost_;               // a choice has no place
  uint32_t place_[kAhead];  // of those that are on their way
  float weight_[kAhead];
  Chunk raw_[kAhead][kRun][kPieces];
};

}  // namespace moe_a2a::cuda
