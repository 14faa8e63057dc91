// The one argument of each kernel launcher: raw pointers and strides, checked by bind.cc.
#pragma once

#include <cstdint>

#include "layout.h"

namespace moe_a2a {

// Order of moe_a2a.formats.FORMATS; a test compares the two.
enum Wire : int { kBf16, kFp16, kFp8, kFp8Block128, kMxfp8, kNvfp4, kMxfp4, kFp32 };

enum Scalar : int { kScalarBf16, kScalarFp16, kScalarFp32 };

// What rows are made of, for as long as an endpoint lives.
struct Shape {
  int64_t hidden, padded;  // H, and Kp of an mxfp8 row
  int64_t payload_row, scale_row;
  int wire, combine_wire;
  int32_t invalid_id;
  bool scrub_all, debug;
};

// Rows whose elements are contiguous; `stride` in bytes from row to row.
struct Rows {
  const uint8_t* data;
  int64_t stride;
  MOE_HD const uint8_t* row(int64_t i) const { return data + i * stride; }
};

struct DispatchArgs {
  int64_t tokens;    // T
  int64_t max_rows;  // R
  Rows payload;
  Rows scales;  // data is null unless the caller quantized
  Rows ids;
  Rows weights;
  Rows extra[kMaxExtras];
  int32_t* counts;  // [W], written when the dispatch is complete
  int wire;         // what travels
  int input;        // Scalar to quantize from, or -1: the bytes move as they are
  bool wide_ids;    // int64, else int32
  bool deferred;
  float global_scale;  // encode scale of nvfp4
  uint64_t active;
};

struct CombineArgs {
  const uint8_t* y;
  int64_t source_stride, row_stride;  // bytes
  uint8_t* out;
  int64_t out_stride;  // bytes
  int scalar;          // dtype of y and out
};

// The received rows of one rank, listed by local expert.
struct GroupArgs {
  const int32_t* ids;     // [W, R, K]
  const float* weights;   // [W, R, K]
  const int32_t* counts;  // [W]
  int64_t sources, rows, top_k;
  int32_t first_expert, experts;  // this rank's
  int64_t align, size;            // places of a list
  int32_t* offsets;               // [experts + 1]
  int32_t* row_index;             // [size]
  float* row_weights;             // [size]
  int32_t* positions;             // [W, R, K]
  // The places that experts have: only a row that names one twice can need more.
  MOE_HD int64_t end() const { return size / align * align; }
  MOE_HD int64_t choices() const { return sources * rows * top_k; }
};

// What `positions` says of a choice: of an expert that is not here, or in no place.
constexpr int32_t kNotHere = -1, kNoPlace = -2;

// Which rows of a combine's `y`, here [size, H], make up a received row.
struct Grouped {
  const int32_t* positions;  // [W, R, K]
  const float* weights;      // [size]
  int64_t size;
  int scalar;  // dtype of the rows; the combine's is that of out
};

}  // namespace moe_a2a
