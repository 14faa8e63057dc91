// The edge of the CPU library: checks tensors, fills the argument structs, calls the launchers.
// The only file of it that knows tvm-ffi.
#include <tvm/ffi/tvm_ffi.h>

#include <cstring>

#include "../routing.h"
#include "endpoint.h"
#include "meet.h"

namespace moe_a2a::cpu {
namespace {

namespace ffi = tvm::ffi;
using Numbers = ffi::Array<int64_t>;

class EndpointObj : public ffi::Object {
 public:
  Endpoint endpoint;
  static constexpr bool _type_mutable = true;
  TVM_FFI_DECLARE_OBJECT_INFO_FINAL("moe_a2a.cpu.Endpoint", EndpointObj, ffi::Object);
};

Endpoint& endpoint_of(const ffi::ObjectRef& handle) {
  const auto* object = handle.as<EndpointObj>();
  if (object == nullptr) TVM_FFI_THROW(TypeError) << "expected an endpoint";
  return const_cast<EndpointObj*>(object)->endpoint;
}

void require(bool holds, const char* what) {
  if (!holds) TVM_FFI_THROW(ValueError) << "moe_a2a binding: " << what;
}

// [W, E, K, Tmax, payload bytes, scale bytes, combine bytes, extra bytes ...]
Geometry geometry_from(const Numbers& n) {
  require(n.size() >= 7 && n.size() <= 7 + kMaxExtras, "geometry has 7 numbers and the extras");
  for (int64_t value : n) require(value >= 0, "geometry is not negative");
  Geometry g{n[0], n[1], n[2], n[3], n[4], n[5], n[6], static_cast<int64_t>(n.size()) - 7, {}};
  require(g.ep_size >= 1, "ep_size");
  require(g.num_experts >= 1 && g.top_k >= 1 && g.top_k <= kMaxTopK, "experts and top_k");
  for (int64_t i = 0; i < g.num_extras; ++i) g.extra_bytes[i] = n[7 + i];
  return g;
}

using NamedRegion = ffi::Tuple<ffi::String, int64_t, int64_t>;

ffi::Array<NamedRegion> workspace_regions(Numbers numbers) {
  const Geometry g = geometry_from(numbers);
  const Layout layout = make_layout(g);
  ffi::Array<NamedRegion> table;
  const auto add = [&](const std::string& name, int id) {
    const Region& r = layout.region[id];
    table.push_back(NamedRegion(ffi::String(name), r.offset, r.nbytes));
  };
  add("control", kControl);
  add("payload", kPayload);
  add("scales", kScales);
  add("topk_ids", kIds);
  add("topk_weights", kWeights);
  for (int i = 0; i < g.num_extras; ++i) add("extra", kExtra + i);
  add("combine", kCombine);
  add("dispatch_inbox", kDispatchInbox);
  add("combine_inbox", kCombineInbox);
  return table;
}

// shape: [H, Kp, wire, combine wire, wire's payload bytes, wire's scale bytes, invalid id,
// scrub all, debug]
ffi::ObjectRef endpoint_open(Numbers geometry, Numbers shape, int64_t rank, Numbers windows,
                             int64_t timeout_ns, int64_t spin_ns, int64_t cached) {
  auto object = ffi::make_object<EndpointObj>();
  Endpoint& e = object->endpoint;
  e.geometry = geometry_from(geometry);
  require(e.geometry.ep_size <= kMaxRanks, "ep_size in 1..64");
  e.layout = make_layout(e.geometry);
  require(shape.size() == 9, "shape has 9 numbers");
  e.shape = {shape[0],
             shape[1],
             shape[4],
             shape[5],
             static_cast<int>(shape[2]),
             static_cast<int>(shape[3]),
             static_cast<int32_t>(shape[6]),
             shape[7] != 0,
             shape[8] != 0};
  require(static_cast<int64_t>(windows.size()) == e.geometry.ep_size, "one window per rank");
  require(rank >= 0 && rank < e.geometry.ep_size, "rank in 0..ep_size-1");
  require(e.shape.payload_row <= e.geometry.payload_bytes, "a row fits its region");
  e.rank = static_cast<int>(rank);
  e.timeout_ns = timeout_ns;
  e.spin_ns = spin_ns;
  e.cached = cached;
  for (int64_t address : windows) e.window.push_back(reinterpret_cast<uint8_t*>(address));
  e.owner.resize(e.geometry.num_experts);
  for (int64_t x = 0; x < e.geometry.num_experts; ++x)
    e.owner[x] =
        static_cast<uint8_t>(owner_of_expert(x, e.geometry.num_experts, e.geometry.ep_size));
  e.ranks_of_token.resize(e.geometry.max_tokens);
  e.scratch.resize(round_up(e.geometry.payload_bytes, kLine) +
                   round_up(e.geometry.scale_bytes, kLine));
  return ffi::ObjectRef(object);
}

// A 2-D tensor on the CPU with contiguous rows of `width` bytes each.
Rows rows_of(const ffi::TensorView& t, int64_t rows, int64_t width, const char* name) {
  const int64_t item = t.dtype().bits / 8 * t.dtype().lanes;
  require(t.device().device_type == kDLCPU && t.ndim() == 2 && t.size(0) == rows &&
              t.size(1) * item == width && (t.stride(1) == 1 || t.size(1) <= 1 || rows == 0),
          name);
  return {static_cast<const uint8_t*>(t.data_ptr()), t.stride(0) * item};
}

int scalar_of(const ffi::TensorView& t) {
  const DLDataType d = t.dtype();
  if (d.code == kDLBfloat && d.bits == 16) return kScalarBf16;
  if (d.code == kDLFloat && d.bits == 16) return kScalarFp16;
  if (d.code == kDLFloat && d.bits == 32) return kScalarFp32;
  return -1;
}

int64_t scalar_bytes(int scalar) { return scalar == kScalarFp32 ? 4 : 2; }

void stage_extra(ffi::ObjectRef handle, int64_t index, ffi::TensorView tensor) {
  Endpoint& e = endpoint_of(handle);
  require(index >= 0 && index < e.geometry.num_extras, "index of an extra");
  e.extra[index] = rows_of(tensor, tensor.size(0), e.geometry.extra_bytes[index], "extra [T, n]");
}

int64_t run_dispatch(ffi::ObjectRef handle, ffi::TensorView x,
                     ffi::Optional<ffi::TensorView> scales, ffi::TensorView ids,
                     ffi::TensorView weights, ffi::TensorView counts, int64_t max_rows,
                     bool deferred, double global_scale, int64_t active, int64_t slice_ns) {
  Endpoint& e = endpoint_of(handle);
  DispatchArgs a{};
  require(x.ndim() == 2, "x [T, row]");
  a.tokens = x.size(0);
  a.max_rows = max_rows;
  require(a.tokens <= max_rows && max_rows <= e.geometry.max_tokens, "T <= R <= capacity");
  const int scalar = scalar_of(x);
  const bool quantizes =
      !deferred && !scales.has_value() && row_quantizer(e.shape.wire, scalar) != nullptr;
  a.wire = e.shape.wire;
  a.input = quantizes ? scalar : -1;
  a.deferred = deferred;
  const int64_t width = quantizes  ? e.shape.hidden * scalar_bytes(scalar)
                        : deferred ? e.shape.hidden * 2
                                   : e.shape.payload_row;
  a.payload = rows_of(x, a.tokens, width, "x [T, row]");
  if (scales.has_value())
    a.scales = rows_of(scales.value(), a.tokens, e.shape.scale_row, "scales [T, n]");
  require(deferred || quantizes || e.shape.scale_row == 0 || scales.has_value(),
          "scales are missing");
  a.wide_ids = ids.dtype().bits == 64;
  require(ids.dtype().code == kDLInt, "topk_ids int32 or int64");
  a.ids = rows_of(ids, a.tokens, e.geometry.top_k * (a.wide_ids ? 8 : 4), "topk_ids [T, K]");
  require(scalar_of(weights) == kScalarFp32, "topk_weights float32");
  a.weights = rows_of(weights, a.tokens, e.geometry.top_k * 4, "topk_weights [T, K]");
  require(counts.ndim() == 1 && counts.size(0) == e.geometry.ep_size && counts.dtype().bits == 32,
          "counts int32 [W]");
  a.counts = static_cast<int32_t*>(counts.data_ptr());
  std::memcpy(a.extra, e.extra, sizeof(a.extra));
  a.global_scale = static_cast<float>(global_scale);
  a.active = static_cast<uint64_t>(active);
  require(a.active >> e.rank & 1, "this rank is active");
  return dispatch(e, a, slice_ns);
}

int64_t run_combine(ffi::ObjectRef handle, ffi::TensorView y, ffi::TensorView out,
                    int64_t slice_ns) {
  Endpoint& e = endpoint_of(handle);
  CombineArgs a{};
  a.scalar = scalar_of(y);
  require(a.scalar >= 0 && a.scalar == scalar_of(out), "y and out have one floating dtype");
  const int64_t item = scalar_bytes(a.scalar);
  require(y.device().device_type == kDLCPU && y.ndim() == 3 && y.size(0) == e.geometry.ep_size &&
              y.size(1) == e.max_rows && y.size(2) == e.shape.hidden &&
              (y.stride(2) == 1 || e.max_rows == 0),
          "y [W, R, H]");
  require(row_quantizer(e.shape.combine_wire, a.scalar) != nullptr ||
              e.shape.hidden * item == e.geometry.combine_bytes,
          "y has the dtype of the combine wire");
  a.y = static_cast<const uint8_t*>(y.data_ptr());
  a.source_stride = y.stride(0) * item;
  a.row_stride = y.stride(1) * item;
  const Rows rows = rows_of(out, e.tokens, e.shape.hidden * item, "out [T, H]");
  a.out = const_cast<uint8_t*>(rows.data);
  a.out_stride = rows.stride;
  return combine(e, a, slice_ns);
}

// The rest of an operation that answered kPending.
int64_t resume(ffi::ObjectRef handle, int64_t slice_ns) {
  Endpoint& e = endpoint_of(handle);
  return e.facts.phase == kDispatch ? finish_dispatch(e, slice_ns) : finish_combine(e, slice_ns);
}

void push_facts(Numbers& out, const RoundFacts& f) {
  for (int64_t value : {int64_t{f.phase}, int64_t{f.rows}, int64_t{f.format},
                        int64_t{f.global_scale_bits}, static_cast<int64_t>(f.active)})
    out.push_back(value);
}

// [kind, phase, round, waited ns, missing, accusers, peer, 5 facts here, 5 facts there, then for
// each rank how many operations ago it was last seen, or -1]
Numbers failure_record(ffi::ObjectRef handle) {
  const Endpoint& e = endpoint_of(handle);
  const Failure& f = e.failure;
  Numbers out{f.kind,
              e.facts.phase,
              e.round,
              f.waited_ns,
              static_cast<int64_t>(f.missing),
              static_cast<int64_t>(f.accusers),
              f.peer};
  push_facts(out, f.mine);
  push_facts(out, f.theirs);
  for (int peer = 0; peer < e.geometry.ep_size; ++peer) {
    int64_t ago = -1;
    for (ControlRow row : {kArriveDispatch, kArriveCombine}) {
      const uint32_t seen = e.line<Arrival>(e.rank, row, peer).epoch;
      const int64_t behind = static_cast<int32_t>(e.epoch - seen);
      if (seen != 0 && (ago < 0 || behind < ago)) ago = behind;
    }
    out.push_back(ago);
  }
  return out;
}

// A new generation over fresh, zeroed windows.
void restart(ffi::ObjectRef handle, Numbers windows, int64_t epoch, int64_t generation) {
  Endpoint& e = endpoint_of(handle);
  for (size_t i = 0; i < windows.size(); ++i) e.window[i] = reinterpret_cast<uint8_t*>(windows[i]);
  e.epoch = static_cast<uint32_t>(epoch);
  e.generation = static_cast<uint32_t>(generation);
  e.failure = {};
  e.facts = {};
}

Numbers position(ffi::ObjectRef handle) {
  const Endpoint& e = endpoint_of(handle);
  return Numbers{e.epoch, e.generation, e.round};
}

void post_meeting(int64_t window, int64_t ep_size, int64_t source, Numbers words) {
  require(words.size() == kMeetWords, "words of a meeting");
  int64_t plain[kMeetWords];
  for (int i = 0; i < kMeetWords; ++i) plain[i] = words[i];
  post_words(meet_line(window, ep_size, source), plain);
}

Numbers read_meeting(int64_t window, int64_t ep_size, int64_t source) {
  int64_t plain[kMeetWords];
  read_words(meet_line(window, ep_size, source), plain);
  Numbers out;
  for (int64_t word : plain) out.push_back(word);
  return out;
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(workspace_regions, workspace_regions);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(endpoint_open, endpoint_open);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(stage_extra, stage_extra);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(dispatch, run_dispatch);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(combine, run_combine);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(resume, resume);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(failure_record, failure_record);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(restart, restart);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(position, position);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(post_meeting, post_meeting);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(read_meeting, read_meeting);

}  // namespace moe_a2a::cpu
