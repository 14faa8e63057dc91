#include "weigh.h"

#include <algorithm>
#include <limits>

#include "scalar.h"

namespace moe_a2a::cpu {
namespace {

constexpr int kRowsAtOnce = 4;  // that one pass over the columns sums in registers

// sum += weight * value of the N rows, in order; product and add are not fused.
template <class Scalar, int N>
MOE_OWN_LOOP void add_weighted(const uint8_t* const* rows, const float* weights, int64_t hidden,
                               float* __restrict sum) {
  const typename Scalar::Storage* in[N];
  for (int r = 0; r < N; ++r) in[r] = reinterpret_cast<const typename Scalar::Storage*>(rows[r]);
  for (int64_t i = 0; i < hidden; ++i) {
    float s = sum[i];
    for (int r = 0; r < N; ++r) s += Scalar::decode(in[r][i]) * weights[r];
    sum[i] = s;
  }
}

template <class Scalar>
void add_all(const uint8_t* const* rows, const float* weights, int count, int64_t hidden,
             float* sum) {
  for (; count >= kRowsAtOnce; count -= kRowsAtOnce) {
    add_weighted<Scalar, kRowsAtOnce>(rows, weights, hidden, sum);
    rows += kRowsAtOnce;
    weights += kRowsAtOnce;
  }
  if (count == 3) add_weighted<Scalar, 3>(rows, weights, hidden, sum);
  if (count == 2) add_weighted<Scalar, 2>(rows, weights, hidden, sum);
  if (count == 1) add_weighted<Scalar, 1>(rows, weights, hidden, sum);
}

template <class Out>
MOE_OWN_LOOP void store_row(const float* sum, int64_t hidden, uint8_t* out) {
  auto* __restrict result = reinterpret_cast<typename Out::Storage*>(out);
  for (int64_t i = 0; i < hidden; ++i) result[i] = Out::encode(sum[i]);
}

}  // namespace

void weigh_row(const CombineArgs& a, const Grouped& g, int64_t top_k, int64_t hidden, int64_t row,
               float* sum) {
  int32_t place[kMaxTopK];
  int count = 0;
  for (const int32_t* p = g.positions + row * top_k; p < g.positions + (row + 1) * top_k; ++p) {
    if (*p == kNotHere) continue;
    if (*p < 0 || *p >= g.size) {
      std::fill_n(sum, hidden, std::numeric_limits<float>::quiet_NaN());
      return;
    }
    place[count++] = *p;
  }
  std::sort(place, place + count);
  const uint8_t* rows[kMaxTopK];
  float weights[kMaxTopK];
  for (int i = 0; i < count; ++i) {
    rows[i] = a.y + place[i] * a.row_stride;
    weights[i] = g.weights[place[i]];
  }
  std::fill_n(sum, hidden, 0.0f);
  switch (g.scalar) {
    case kScalarBf16:
      return add_all<Bf16>(rows, weights, count, hidden, sum);
    case kScalarFp16:
      return add_all<Fp16>(rows, weights, count, hidden, sum);
    default:
      return add_all<Fp32>(rows, weights, count, hidden, sum);
  }
}

void round_row(int wire, const float* sum, int64_t hidden, uint8_t* out) {
  switch (wire) {
    case kBf16:
      return store_row<Bf16>(sum, hidden, out);
    case kFp16:
      return store_row<Fp16>(sum, hidden, out);
    default:
      return store_row<Fp32>(sum, hidden, out);
  }
}

}  // namespace moe_a2a::cpu
