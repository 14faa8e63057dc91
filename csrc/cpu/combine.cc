// Combine: every expert rank pushes its rows to the ranks they came from, which sum them.
#include <algorithm>
#include <cstring>

#include "../codec.h"
#include "endpoint.h"
#include "scalar.h"

namespace moe_a2a::cpu {
namespace {

// g++ would jam two rows into one loop that it then fails to vectorize, ten times slower.
#define MOE_OWN_LOOP __attribute__((noinline))

// A reader adds `count` columns of one inbox row, from column `first` on, to the fp32 sums.
// Product and add are not fused (-ffp-contract=off).
template <class Scalar>
struct PlainReader {
  MOE_OWN_LOOP static void add(const uint8_t* row, int64_t, int64_t first, int64_t count,
                               float* sum) {
    const auto* in = reinterpret_cast<const typename Scalar::Storage*>(row) + first;
    for (int64_t i = 0; i < count; ++i) sum[i] += Scalar::decode(in[i]);
  }
};

template <int kBlock, class Scale>
struct ScaledReader {
  MOE_OWN_LOOP static void add(const uint8_t* row, int64_t hidden, int64_t first, int64_t count,
                               float* sum) {
    for (int64_t c = 0; c < count; c += kBlock) {
      const float scale = Scale::at(row + hidden, (first + c) / kBlock);
      for (int i = 0; i < kBlock; ++i) sum[c + i] += e4m3_decode(row[first + c + i]) * scale;
    }
  }
};

struct Fp32Scale {
  static float at(const uint8_t* scales, int64_t block) {
    float scale;
    std::memcpy(&scale, scales + block * 4, 4);
    return scale;
  }
};

struct E8m0Scale {
  static float at(const uint8_t* scales, int64_t block) { return e8m0_decode(scales[block]); }
};

using RowReducer = void (*)(const uint8_t* const* rows, int count, int64_t hidden, uint8_t* out);

// The sums of a tile stay in L1 between rows, far enough from their last store that loading them
// again does not wait for it. A multiple of every block.
constexpr int64_t kTile = 512;

template <class Reader, class Out>
void reduce_rows(const uint8_t* const* rows, int count, int64_t hidden, uint8_t* out) {
  auto* result = reinterpret_cast<typename Out::Storage*>(out);
  float sum[kTile];
  for (int64_t first = 0; first < hidden; first += kTile) {
    const int64_t width = std::min(kTile, hidden - first);
    std::fill(sum, sum + width, 0.0f);
    for (int r = 0; r < count; ++r) Reader::add(rows[r], hidden, first, width, sum);
    for (int64_t i = 0; i < width; ++i) result[first + i] = Out::encode(sum[i]);
  }
}

template <class Reader>
RowReducer reducer_to(int scalar) {
  switch (scalar) {
    case kScalarBf16:
      return reduce_rows<Reader, Bf16>;
    case kScalarFp16:
      return reduce_rows<Reader, Fp16>;
    default:
      return reduce_rows<Reader, Fp32>;
  }
}

RowReducer row_reducer(int wire, int scalar) {
  switch (wire) {
    case kBf16:
      return reduce_rows<PlainReader<Bf16>, Bf16>;
    case kFp16:
      return reduce_rows<PlainReader<Fp16>, Fp16>;
    case kFp32:
      return reduce_rows<PlainReader<Fp32>, Fp32>;
    case kFp8Block128:
      return reducer_to<ScaledReader<128, Fp32Scale>>(scalar);
    default:
      return reducer_to<ScaledReader<32, E8m0Scale>>(scalar);
  }
}

// Pushes what rank `source` is owed into its inbox. With a quantized wire the rank's own rows take
// the same way, so that a result does not depend on where an expert lives.
void push(Endpoint& e, const CombineArgs& a, int source) {
  const RowQuantizer quantizer = row_quantizer(e.shape.combine_wire, a.scalar);
  const int64_t rows = e.received[source], row_bytes = e.geometry.combine_bytes;
  const uint8_t* y = a.y + source * a.source_stride;
  uint8_t* inbox = e.inbox_row(source, e.rank, 0);
  if (quantizer == nullptr && a.row_stride == row_bytes) {
    std::memcpy(inbox, y, rows * row_bytes);
    return;
  }
  for (int64_t i = 0; i < rows; ++i, y += a.row_stride, inbox += row_bytes) {
    if (quantizer == nullptr)
      std::memcpy(inbox, y, row_bytes);
    else
      quantizer(y, inbox, inbox + e.shape.hidden, {e.shape.hidden, e.shape.hidden, 1.0f});
  }
}

void reduce(Endpoint& e) {
  const CombineArgs& a = e.combine;
  const bool quantized = row_quantizer(e.shape.combine_wire, a.scalar) != nullptr;
  const RowReducer reducer = row_reducer(e.shape.combine_wire, a.scalar);
  const uint8_t* base[kMaxRanks];
  int64_t stride[kMaxRanks], next[kMaxRanks] = {};
  for (int from = 0; from < e.geometry.ep_size; ++from) {
    const bool own = from == e.rank && !quantized;
    base[from] = own ? a.y + from * a.source_stride : e.inbox_row(e.rank, from, 0);
    stride[from] = own ? a.row_stride : e.geometry.combine_bytes;
  }
  for (int64_t t = 0; t < e.tokens; ++t) {
    const uint8_t* rows[kMaxRanks];
    int count = 0;
    // Ascending ranks, and slots counted as dispatch counted them.
    for_each_rank(e.ranks_of_token[t],
                  [&](int from) { rows[count++] = base[from] + next[from]++ * stride[from]; });
    reducer(rows, count, e.shape.hidden, a.out + t * a.out_stride);
  }
}

}  // namespace

Status combine(Endpoint& e, const CombineArgs& a, int64_t slice_ns) {
  FloatEnvironment environment;
  e.epoch = next_epoch(e.epoch);
  e.facts.phase = kCombineOp;
  e.combine = a;
  const bool quantized = row_quantizer(e.shape.combine_wire, a.scalar) != nullptr;
  for_each_rank(e.facts.active, [&](int source) {
    if (source != e.rank || quantized) push(e, a, source);
  });
  announce(e, kArriveCombine, nullptr);
  return finish_combine(e, slice_ns);
}

Status finish_combine(Endpoint& e, int64_t slice_ns) {
  const Status status = await_arrivals(e, kArriveCombine, slice_ns);
  if (status != kDone) return status;
  FloatEnvironment environment;
  reduce(e);
  return kDone;
}

}  // namespace moe_a2a::cpu
