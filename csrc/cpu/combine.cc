// Combine: every expert rank pushes its rows to the ranks they came from, which sum them.
#include <algorithm>
#include <cstring>
#include <numeric>
#include <vector>

#include "../codec.h"
#include "endpoint.h"
#include "scalar.h"
#include "weigh.h"

namespace moe_a2a::cpu {
namespace {

// Rows that one pass over the columns sums in registers; more take several passes over a tile.
constexpr int kRowsAtOnce = 4;
// Columns whose sums stay in L1 between passes. A multiple of every block.
constexpr int64_t kTile = 512;

using RowReducer = void (*)(const uint8_t* const* rows, int count, int64_t hidden, uint8_t* out);

// sum (+)= the N rows, in order, from column `first` on.
template <class Scalar, int N>
MOE_OWN_LOOP void add_rows(const uint8_t* const* rows, int64_t first, int64_t width,
                           float* __restrict sum) {
  const typename Scalar::Storage* in[N];
  for (int r = 0; r < N; ++r)
    in[r] = reinterpret_cast<const typename Scalar::Storage*>(rows[r]) + first;
  for (int64_t i = 0; i < width; ++i) {
    float s = sum[i];
    for (int r = 0; r < N; ++r) s += Scalar::decode(in[r][i]);
    sum[i] = s;
  }
}

// The whole row in one pass: no sum leaves the registers.
template <class Scalar, int N>
MOE_OWN_LOOP void sum_rows(const uint8_t* const* rows, int64_t hidden, uint8_t* out) {
  const typename Scalar::Storage* in[N];
  for (int r = 0; r < N; ++r) in[r] = reinterpret_cast<const typename Scalar::Storage*>(rows[r]);
  auto* __restrict result = reinterpret_cast<typename Scalar::Storage*>(out);
  for (int64_t i = 0; i < hidden; ++i) {
    float s = 0.0f;
    for (int r = 0; r < N; ++r) s += Scalar::decode(in[r][i]);
    result[i] = Scalar::encode(s);
  }
}

template <class Out>
MOE_OWN_LOOP void store_sums(const float* sum, int64_t width, uint8_t* out, int64_t first) {
  auto* __restrict result = reinterpret_cast<typename Out::Storage*>(out) + first;
  for (int64_t i = 0; i < width; ++i) result[i] = Out::encode(sum[i]);
}

template <class Scalar>
void reduce_plain(const uint8_t* const* rows, int count, int64_t hidden, uint8_t* out) {
  switch (count) {
    case 0:
      std::memset(out, 0, hidden * sizeof(typename Scalar::Storage));
      return;
    case 1:
      sum_rows<Scalar, 1>(rows, hidden, out);
      return;
    case 2:
      sum_rows<Scalar, 2>(rows, hidden, out);
      return;
    case 3:
      sum_rows<Scalar, 3>(rows, hidden, out);
      return;
    case 4:
      sum_rows<Scalar, 4>(rows, hidden, out);
      return;
  }
  float sum[kTile];
  for (int64_t first = 0; first < hidden; first += kTile) {
    const int64_t width = std::min(kTile, hidden - first);
    std::fill(sum, sum + width, 0.0f);
    int r = 0;
    for (; r + kRowsAtOnce <= count; r += kRowsAtOnce)
      add_rows<Scalar, kRowsAtOnce>(rows + r, first, width, sum);
    for (; r < count; ++r) add_rows<Scalar, 1>(rows + r, first, width, sum);
    store_sums<Scalar>(sum, width, out, first);
  }
}

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

// One row of e4m3 codes with a scale per block; product and add are not fused.
template <int kBlock, class Scale>
MOE_OWN_LOOP void add_scaled(const uint8_t* row, int64_t hidden, int64_t first, int64_t width,
                             float* __restrict sum) {
  for (int64_t c = 0; c < width; c += kBlock) {
    const float scale = Scale::at(row + hidden, (first + c) / kBlock);
    for (int i = 0; i < kBlock; ++i) sum[c + i] += e4m3_decode(row[first + c + i]) * scale;
  }
}

template <int kBlock, class Scale, class Out>
void reduce_scaled(const uint8_t* const* rows, int count, int64_t hidden, uint8_t* out) {
  float sum[kTile];
  for (int64_t first = 0; first < hidden; first += kTile) {
    const int64_t width = std::min(kTile, hidden - first);
    std::fill(sum, sum + width, 0.0f);
    for (int r = 0; r < count; ++r) add_scaled<kBlock, Scale>(rows[r], hidden, first, width, sum);
    store_sums<Out>(sum, width, out, first);
  }
}

template <int kBlock, class Scale>
RowReducer scaled_reducer(int scalar) {
  switch (scalar) {
    case kScalarBf16:
      return reduce_scaled<kBlock, Scale, Bf16>;
    case kScalarFp16:
      return reduce_scaled<kBlock, Scale, Fp16>;
    default:
      return reduce_scaled<kBlock, Scale, Fp32>;
  }
}

RowReducer row_reducer(int wire, int scalar) {
  switch (wire) {
    case kBf16:
      return reduce_plain<Bf16>;
    case kFp16:
      return reduce_plain<Fp16>;
    case kFp32:
      return reduce_plain<Fp32>;
    case kFp8Block128:
      return scaled_reducer<128, Fp32Scale>(scalar);
    default:
      return scaled_reducer<32, E8m0Scale>(scalar);
  }
}

// Pushes what rank `source` is owed into its inbox. With a quantized wire the rank's own rows take
// the same way, so that a result does not depend on where an expert lives.
void push(Endpoint& e, const CombineArgs& a, int source, Copy copy) {
  const RowQuantizer quantizer = row_quantizer(e.shape.combine_wire, a.scalar);
  const int64_t rows = e.received[source], row_bytes = e.geometry.combine_bytes;
  if (rows == 0) return;  // an empty y has no address that anything could be added to
  const uint8_t* y = a.y + source * a.source_stride;
  uint8_t* inbox = e.inbox_row(source, e.rank, 0);
  if (quantizer == nullptr && a.row_stride == row_bytes) {
    copy(inbox, y, rows * row_bytes);
    return;
  }
  for (int64_t i = 0; i < rows; ++i, y += a.row_stride, inbox += row_bytes) {
    if (quantizer == nullptr)
      copy(inbox, y, row_bytes);
    else
      quantizer(y, inbox, inbox + e.shape.hidden, {e.shape.hidden, e.shape.hidden, 1.0f});
  }
}

// The same of rows that are grouped by expert: what is pushed is their weighted sum. The rank's own
// go through its inbox too, whatever the wire, so that each is summed once, here.
void push_sums(Endpoint& e, const CombineArgs& a, const Grouped& grouped, int source, Copy copy) {
  const RowQuantizer quantizer = row_quantizer(e.shape.combine_wire, kScalarFp32);
  const int64_t hidden = e.shape.hidden, row_bytes = e.geometry.combine_bytes;
  std::vector<float> sum(hidden);
  std::vector<uint8_t> rounded(row_bytes);
  const auto* values = reinterpret_cast<const uint8_t*>(sum.data());
  uint8_t* inbox = e.inbox_row(source, e.rank, 0);
  for (int64_t i = 0; i < e.received[source]; ++i, inbox += row_bytes) {
    weigh_row(a, grouped, e.geometry.top_k, hidden, source * e.max_rows + i, sum.data());
    if (quantizer != nullptr) {
      quantizer(values, inbox, inbox + hidden, {hidden, hidden, 1.0f});
      continue;
    }
    round_row(e.shape.combine_wire, sum.data(), hidden, rounded.data());
    copy(inbox, rounded.data(), row_bytes);
  }
}

void reduce(Endpoint& e) {
  if (e.tokens == 0) return;  // y may be empty, see push()
  const CombineArgs& a = e.combine;
  const bool quantized = row_quantizer(e.shape.combine_wire, a.scalar) != nullptr;
  const RowReducer reducer = row_reducer(e.shape.combine_wire, a.scalar);
  const uint8_t* base[kMaxRanks];
  int64_t stride[kMaxRanks], next[kMaxRanks] = {};
  for (int from = 0; from < e.geometry.ep_size; ++from) {
    const bool own = from == e.rank && !quantized && !e.sums;
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

Status combine(Endpoint& e, const CombineArgs& a, int64_t slice_ns, const Grouped* grouped) {
  FloatEnvironment environment;
  e.epoch = next_epoch(e.epoch);
  e.facts.phase = kCombineOp;
  e.combine = a;
  e.sums = grouped != nullptr;
  if (e.shape.debug) begin_debug(e);
  const bool quantized = row_quantizer(e.shape.combine_wire, a.scalar) != nullptr;
  const int64_t rows = std::accumulate(e.received, e.received + e.geometry.ep_size, int64_t{0});
  const Copy copy = e.copy_of(rows * e.geometry.combine_bytes);
  for_each_rank(e.facts.active, [&](int source) {
    if (grouped != nullptr)
      push_sums(e, a, *grouped, source, copy);
    else if (source != e.rank || quantized)
      push(e, a, source, copy);
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
