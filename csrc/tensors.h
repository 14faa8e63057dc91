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

inline void require(bool holds, const char* what) {
  if (!holds) TVM_FFI_THROW(ValueError) << "moe_a2a binding: " << what;
}

// [W, E, K, Tmax, payload bytes, scale bytes, combine bytes, extra bytes ...]
inline Geometry geometry_from(const Numbers& n) {
  require(n.size() >= 7 && n.size() <= 7 + kMaxExtras, "geometry has 7 numbers and the extras");
  for (int64_t value : n) require(value >= 0, "geometry is not negative");
  Geometry g{n[0], n[1], n[2], n[3], n[4], n[5], n[6], static_cast<int64_t>(n.size()) - 7, {}};
  require(g.ep_size >= 1, "ep_size");
  require(g.num_experts >= 1 && g.top_k >= 1 && g.top_k <= kMaxTopK, "experts and top_k");
  for (int64_t i = 0; i < g.num_extras; ++i) g.extra_bytes[i] = n[7 + i];
  return g;
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
  require(s.payload_row <= geometry.payload_bytes, "a row fits its region");
  return s;
}

// Rows of `width` bytes each on a kind of device, their elements contiguous.
inline Rows rows_of(const ffi::TensorView& t, DLDeviceType device, int64_t rows, int64_t width,
                    const char* name) {
  const int64_t item = t.dtype().bits / 8 * t.dtype().lanes;
  require(t.device().device_type == device && t.ndim() == 2 && t.size(0) == rows &&
              t.size(1) * item == width && (t.stride(1) == 1 || t.size(1) <= 1 || rows == 0),
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
  require(deferred || quantizes || s.scale_row == 0 || scales.has_value(), "scales are missing");
  a.wide_ids = ids.dtype().bits == 64;
  require(ids.dtype().code == kDLInt, "topk_ids int32 or int64");
  a.ids = rows_of(ids, device, a.tokens, g.top_k * (a.wide_ids ? 8 : 4), "topk_ids [T, K]");
  require(scalar_of(weights) == kScalarFp32, "topk_weights float32");
  a.weights = rows_of(weights, device, a.tokens, g.top_k * 4, "topk_weights [T, K]");
  require(counts.ndim() == 1 && counts.size(0) == g.ep_size && counts.dtype().bits == 32,
          "counts int32 [W]");
  a.counts = static_cast<int32_t*>(counts.data_ptr());
  a.active = static_cast<uint64_t>(active);
  require(a.active >> rank & 1, "this rank is active");
  return a;
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
              y.size(1) == max_rows && y.size(2) == s.hidden && (y.stride(2) == 1 || max_rows == 0),
          "y [W, R, H]");
  require(quantized_wire(s.combine_wire) || s.hidden * item == g.combine_bytes,
          "y has the dtype of the combine wire");
  a.y = static_cast<const uint8_t*>(y.data_ptr());
  a.source_stride = y.stride(0) * item;
  a.row_stride = y.stride(1) * item;
  const Rows rows = rows_of(out, device, tokens, s.hidden * item, "out [T, H]");
  a.out = const_cast<uint8_t*>(rows.data);
  a.out_stride = rows.stride;
  return a;
}

inline void push_facts(Numbers& out, const RoundFacts& f) {
  for (int64_t value : {int64_t{f.phase}, int64_t{f.rows}, int64_t{f.format},
                        int64_t{f.global_scale_bits}, static_cast<int64_t>(f.active)})
    out.push_back(value);
}

}  // namespace moe_a2a
