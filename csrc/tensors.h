// What both bindings check of the tensors and numbers that Python hands over. Only bind.cc includes
// it: nothing else knows tvm-ffi.
#pragma once

#include <tvm/ffi/tvm_ffi.h>

#include <cstring>

#include "args.h"
#include "epoch.h"
#include "layout.h"

namespace moe_a2a {

namespace ffi = tvm::ffi;
using Numbers = ffi::Array<int64_t>;

constexpr int64_t kMaxExperts = int64_t{1} << 20;  // as Spec says
constexpr int64_t kMostBytes = int64_t{1} << 48;

inline void require(bool holds, const char* what) {
  if (!holds) TVM_FFI_THROW(ValueError) << "moe_a2a binding: " << what;
}

// [W, E, K, Tmax, payload bytes, scale bytes, combine bytes, extra bytes ...]
inline Geometry geometry_from(const Numbers& n) {
  require(n.size() >= 7 && n.size() <= 7 + kMaxExtras, "geometry has 7 numbers and the extras");
  for (int64_t value : n) require(value >= 0 && value <= kMostBytes, "geometry in 0..2^48");
  Geometry g{n[0], n[1], n[2], n[3], n[4], n[5], n[6], static_cast<int64_t>(n.size()) - 7, {}};
  require(g.ep_size >= 1, "ep_size");
  require(g.num_experts >= 1 && g.num_experts <= kMaxExperts, "num_experts");
  require(g.top_k >= 1 && g.top_k <= kMaxTopK, "top_k");
  int64_t row = g.payload_bytes + g.scale_bytes + g.combine_bytes + 8 * g.top_k;
  for (int64_t i = 0; i < g.num_extras; ++i) row += g.extra_bytes[i] = n[7 + i];
  // In floating point, which does not wrap: the layout multiplies in 64 bits.
  const double rows = static_cast<double>(g.ep_size) * static_cast<double>(g.max_tokens);
  require(rows < 0x1p48 && rows * static_cast<double>(row) < 0x1p54, "a window fits an address");
  return g;
}

// What rows of `hidden` values are on a wire, in bytes; {-1, -1} where the wire has no such rows.
struct WireRow {
  int64_t payload, scales;
};

inline WireRow wire_row(int wire, int64_t hidden, int64_t padded) {
  switch (wire) {
    case kBf16:
    case kFp16:
      return {hidden * 2, 0};
    case kFp32:
      return {hidden * 4, 0};
    case kFp8:
      return {hidden, 4};
    case kFp8Block128:
      return hidden % 128 ? WireRow{-1, -1} : WireRow{hidden, hidden / 128 * 4};
    case kMxfp8:
      return hidden % 32 || padded % 32 ? WireRow{-1, -1} : WireRow{padded, padded / 32};
    case kNvfp4:
      return {hidden / 2, hidden / 16};
    case kMxfp4:
      return hidden % 32 ? WireRow{-1, -1} : WireRow{hidden / 2, hidden / 32};
    default:
      return {-1, -1};
  }
}

// [H, Kp, wire, combine wire, wire's payload bytes, wire's scale bytes, invalid id, scrub all,
// debug]
inline Shape shape_from(const Numbers& n, const Geometry& geometry) {
  require(n.size() == 9, "shape has 9 numbers");
  const Shape s{n[0],
                n[1],
                n[4],
                n[5],
                static_cast<int>(n[2]),
                static_cast<int>(n[3]),
                static_cast<int32_t>(n[6]),
                n[7] != 0,
                n[8] != 0};
  require(n[0] >= 16 && n[0] % 16 == 0 && n[0] <= kMostBytes, "hidden_size a multiple of 16");
  require(n[1] >= n[0] && n[1] <= kMostBytes, "padded hidden_size");
  // The quantizers write what their wire says, wherever that ends.
  require(n[2] >= kBf16 && n[2] <= kMxfp4, "wire");
  require(s.wire == kMxfp8 || s.padded == s.hidden, "only an mxfp8 row is padded");
  const WireRow row = wire_row(s.wire, s.hidden, s.padded);
  require(row.payload == s.payload_row && row.scales == s.scale_row, "bytes of a row on the wire");
  require(s.payload_row <= geometry.payload_bytes && s.scale_row <= geometry.scale_bytes,
          "a row fits its region");
  require((n[3] >= kBf16 && n[3] <= kMxfp8 && n[3] != kFp8) || n[3] == kFp32, "combine wire");
  const WireRow back = wire_row(s.combine_wire, s.hidden, s.hidden);
  require(back.payload >= 0 && back.payload + back.scales <= geometry.combine_bytes,
          "a row of combine fits its region");
  require(n[6] == s.invalid_id, "invalid id is an int32");
  return s;
}

// Rows of `width` bytes each on a kind of device, their elements contiguous.
inline Rows rows_of(const ffi::TensorView& t, DLDeviceType device, int64_t rows, int64_t width,
                    const char* name) {
  const int64_t item = t.dtype().bits / 8 * t.dtype().lanes;
  require(t.device().device_type == device && t.ndim() == 2 && t.size(0) == rows &&
              t.size(1) * item == width && (t.stride(1) == 1 || t.size(1) <= 1 || rows == 0) &&
              (t.data_ptr() != nullptr || rows == 0),
          name);
  return {static_cast<const uint8_t*>(t.data_ptr()), t.stride(0) * item};
}

inline int scalar_of(const ffi::TensorView& t) {
  const DLDataType d = t.dtype();
  if (d.code == kDLBfloat && d.bits == 16) return kScalarBf16;
  if (d.code == kDLFloat && d.bits == 16) return kScalarFp16;
  if (d.code == kDLFloat && d.bits == 32) return kScalarFp32;
  return -1;
}

// A contiguous tensor of `count` words of 32 bits, int32 or fp32.
inline void* words_of(const ffi::TensorView& t, DLDeviceType device, bool integer, int64_t count,
                      const char* name) {
  const DLDataType d = t.dtype();
  require(t.device().device_type == device && d.bits == 32 && d.lanes == 1 &&
              d.code == (integer ? kDLInt : kDLFloat) && t.numel() == count && t.IsContiguous() &&
              (t.data_ptr() != nullptr || count == 0),
          name);
  return t.data_ptr();
}

inline int64_t scalar_bytes(int scalar) { return scalar == kScalarFp32 ? 4 : 2; }

inline bool quantized_wire(int wire) { return wire != kBf16 && wire != kFp16 && wire != kFp32; }

// One dispatch, extras and global scale left out.
inline DispatchArgs dispatch_args(const Geometry& g, const Shape& s, DLDeviceType device, int rank,
                                  const ffi::TensorView& x,
                                  const ffi::Optional<ffi::TensorView>& scales,
                                  const ffi::TensorView& ids, const ffi::TensorView& weights,
                                  const ffi::TensorView& counts, int64_t max_rows, bool deferred,
                                  int64_t active) {
  DispatchArgs a{};
  require(x.ndim() == 2, "x [T, row]");
  a.tokens = x.size(0);
  a.max_rows = max_rows;
  require(a.tokens <= max_rows && max_rows <= g.max_tokens, "T <= R <= capacity");
  require(!deferred || (!scales.has_value() && s.hidden * 2 <= g.payload_bytes),
          "deferred rows have no scales and fit their region");
  const int scalar = scalar_of(x);
  const bool quantizes = !deferred && !scales.has_value() && quantized_wire(s.wire) && scalar >= 0;
  a.wire = s.wire;
  a.input = quantizes ? scalar : -1;
  a.deferred = deferred;
  const int64_t width = quantizes  ? s.hidden * scalar_bytes(scalar)
                        : deferred ? s.hidden * 2
                                   : s.payload_row;
  a.payload = rows_of(x, device, a.tokens, width, "x [T, row]");
  if (scales.has_value())
    a.scales = rows_of(scales.value(), device, a.tokens, s.scale_row, "scales [T, n]");
  require(deferred || quantizes || (s.scale_row == 0) != scales.has_value(),
          "scales where the wire has them");
  a.wide_ids = ids.dtype().bits == 64;
  require(ids.dtype().code == kDLInt && (a.wide_ids || ids.dtype().bits == 32),
          "topk_ids int32 or int64");
  a.ids = rows_of(ids, device, a.tokens, g.top_k * (a.wide_ids ? 8 : 4), "topk_ids [T, K]");
  require(scalar_of(weights) == kScalarFp32, "topk_weights float32");
  a.weights = rows_of(weights, device, a.tokens, g.top_k * 4, "topk_weights [T, K]");
  require(counts.device().device_type == device && counts.ndim() == 1 &&
              counts.size(0) == g.ep_size && counts.dtype().code == kDLInt &&
              counts.dtype().bits == 32 && (counts.stride(0) == 1 || g.ep_size == 1) &&
              counts.data_ptr() != nullptr,
          "counts int32 [W]");
  a.counts = static_cast<int32_t*>(counts.data_ptr());
  a.active = static_cast<uint64_t>(active);
  require(a.active >> rank & 1, "this rank is active");
  require(g.ep_size == kMaxRanks || a.active >> g.ep_size == 0, "active ranks are ranks");
  return a;
}

inline int plain_scalar(int combine_wire) {
  return combine_wire == kBf16 ? kScalarBf16 : combine_wire == kFp16 ? kScalarFp16 : kScalarFp32;
}

// One combine of a round with `tokens` tokens here and R = `max_rows`.
inline CombineArgs combine_args(const Geometry& g, const Shape& s, DLDeviceType device,
                                const ffi::TensorView& y, const ffi::TensorView& out,
                                int64_t tokens, int64_t max_rows) {
  CombineArgs a{};
  a.scalar = scalar_of(y);
  require(a.scalar >= 0 && a.scalar == scalar_of(out), "y and out have one floating dtype");
  const int64_t item = scalar_bytes(a.scalar);
  require(y.device().device_type == device && y.ndim() == 3 && y.size(0) == g.ep_size &&
              y.size(1) == max_rows && y.size(2) == s.hidden &&
              ((y.stride(2) == 1 && y.data_ptr() != nullptr) || max_rows == 0),
          "y [W, R, H]");
  require(quantized_wire(s.combine_wire) || a.scalar == plain_scalar(s.combine_wire),
          "y has the dtype of the combine wire");
  a.y = static_cast<const uint8_t*>(y.data_ptr());
  a.source_stride = y.stride(0) * item;
  a.row_stride = y.stride(1) * item;
  const Rows rows = rows_of(out, device, tokens, s.hidden * item, "out [T, H]");
  a.out = const_cast<uint8_t*>(rows.data);
  a.out_stride = rows.stride;
  return a;
}

// The same of rows grouped by expert; sets what `grouped` points to.
inline CombineArgs grouped_args(const Geometry& g, const Shape& s, DLDeviceType device,
                                const ffi::TensorView& rows, const ffi::TensorView& positions,
                                const ffi::TensorView& weights, const ffi::TensorView& out,
                                int64_t tokens, int64_t max_rows, Grouped* grouped) {
  CombineArgs a{};
  require(rows.ndim() == 2, "rows [N, H]");
  grouped->size = rows.size(0);
  grouped->scalar = scalar_of(rows);
  a.scalar = scalar_of(out);
  require(grouped->scalar >= 0 && a.scalar >= 0, "rows and out have floating dtypes");
  require(
      a.scalar == (quantized_wire(s.combine_wire) ? grouped->scalar : plain_scalar(s.combine_wire)),
      "out has the dtype of the combine wire, or of rows where that is quantized");
  require(grouped->size <= INT32_MAX, "places fit int32");
  const Rows from =
      rows_of(rows, device, grouped->size, s.hidden * scalar_bytes(grouped->scalar), "rows [N, H]");
  a.y = from.data;
  a.row_stride = from.stride;
  const Rows to = rows_of(out, device, tokens, s.hidden * scalar_bytes(a.scalar), "out [T, H]");
  a.out = const_cast<uint8_t*>(to.data);
  a.out_stride = to.stride;
  const int64_t choices = g.ep_size * max_rows * g.top_k;
  grouped->positions =
      static_cast<int32_t*>(words_of(positions, device, true, choices, "positions int32 [W*R, K]"));
  grouped->weights =
      static_cast<float*>(words_of(weights, device, false, grouped->size, "row_weights fp32 [N]"));
  return a;
}

// Rows of a round by local expert: ids and weights [W, R, K].
inline GroupArgs group_args(DLDeviceType device, const ffi::TensorView& ids,
                            const ffi::TensorView& weights, const ffi::TensorView& counts,
                            int64_t first_expert, int64_t align, const ffi::TensorView& offsets,
                            const ffi::TensorView& row_index, const ffi::TensorView& row_weights,
                            const ffi::TensorView& positions) {
  GroupArgs a{};
  require(ids.ndim() == 3 && offsets.ndim() == 1 && offsets.size(0) >= 1 && row_index.ndim() == 1,
          "ids [W, R, K], offsets [E + 1], row_index [N]");
  a.sources = ids.size(0);
  a.rows = ids.size(1);
  a.top_k = ids.size(2);
  a.size = row_index.size(0);
  a.align = align;
  const int64_t choices = a.choices(), experts = offsets.size(0) - 1;
  require(a.top_k >= 1 && align >= 1 && align <= INT32_MAX, "top_k and align are at least 1");
  // A warp may count a little past the last choice.
  require(choices <= INT32_MAX - (1 << 16) && a.size <= INT32_MAX, "places fit int32");
  require(first_expert >= 0 && first_expert + experts <= kMaxExperts, "local experts");
  a.first_expert = static_cast<int32_t>(first_expert);
  a.experts = static_cast<int32_t>(experts);
  a.ids = static_cast<int32_t*>(words_of(ids, device, true, choices, "topk_ids int32"));
  a.weights = static_cast<float*>(words_of(weights, device, false, choices, "topk_weights fp32"));
  a.counts = static_cast<int32_t*>(words_of(counts, device, true, a.sources, "counts int32 [W]"));
  a.offsets = static_cast<int32_t*>(words_of(offsets, device, true, experts + 1, "offsets int32"));
  a.row_index = static_cast<int32_t*>(words_of(row_index, device, true, a.size, "row_index int32"));
  a.row_weights =
      static_cast<float*>(words_of(row_weights, device, false, a.size, "row_weights fp32 [N]"));
  a.positions =
      static_cast<int32_t*>(words_of(positions, device, true, choices, "positions int32 [W*R, K]"));
  return a;
}

inline void push_facts(Numbers& out, const RoundFacts& f) {
  for (int64_t value : {int64_t{f.phase}, int64_t{f.rows}, int64_t{f.format},
                        int64_t{f.global_scale_bits}, static_cast<int64_t>(f.active)})
    out.push_back(value);
}

}  // namespace moe_a2a
