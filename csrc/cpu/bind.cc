// The edge of the CPU library: checks tensors, fills the argument structs, calls the launchers.
#include "../tensors.h"
#include "endpoint.h"
#include "group.h"
#include "meet.h"

namespace moe_a2a::cpu {
namespace {

class EndpointObj : public ffi::Object {
 public:
  Endpoint endpoint;
  int64_t extra_rows[kMaxExtras] = {};  // of the tensors staged for the next dispatch
  bool pending = false;                 // an operation answered kPending
  static constexpr bool _type_mutable = true;
  TVM_FFI_DECLARE_OBJECT_INFO_FINAL("moe_a2a.cpu.Endpoint", EndpointObj, ffi::Object);
};

EndpointObj& object_of(const ffi::ObjectRef& handle) {
  const auto* object = handle.as<EndpointObj>();
  if (object == nullptr) TVM_FFI_THROW(TypeError) << "expected an endpoint";
  return *const_cast<EndpointObj*>(object);
}

Endpoint& endpoint_of(const ffi::ObjectRef& handle) { return object_of(handle).endpoint; }

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
  return table;
}

// By rank; 0 for one that takes no part, never this one.
std::vector<uint8_t*> addresses(const Numbers& windows, int64_t ep_size, int64_t rank) {
  require(static_cast<int64_t>(windows.size()) == ep_size, "one window per rank");
  require(windows[rank] != 0, "a window of this rank's own");
  std::vector<uint8_t*> out;
  for (int64_t address : windows) {
    require(address % kLine == 0, "windows begin with a line");
    out.push_back(reinterpret_cast<uint8_t*>(address));
  }
  return out;
}

ffi::ObjectRef endpoint_open(Numbers geometry, Numbers shape, int64_t rank, Numbers windows,
                             int64_t timeout_ns, int64_t spin_ns, int64_t cached) {
  const Geometry g = geometry_from(geometry);
  require(g.ep_size <= kMaxRanks, "ep_size in 1..64");
  require(rank >= 0 && rank < g.ep_size, "rank in 0..ep_size-1");
  auto object = ffi::make_object<EndpointObj>();
  Endpoint& e = object->endpoint;
  open_endpoint(e, g, shape_from(shape, g), static_cast<int>(rank),
                addresses(windows, g.ep_size, rank));
  e.timeout_ns = timeout_ns;
  e.spin_ns = spin_ns;
  e.cached = cached;
  return ffi::ObjectRef(object);
}

void stage_extra(ffi::ObjectRef handle, int64_t index, ffi::TensorView tensor) {
  EndpointObj& object = object_of(handle);
  Endpoint& e = object.endpoint;
  require(index >= 0 && index < e.geometry.num_extras, "index of an extra");
  require(tensor.ndim() == 2, "extra [T, n]");
  e.extra[index] =
      rows_of(tensor, kDLCPU, tensor.size(0), e.geometry.extra_bytes[index], "extra [T, n]");
  object.extra_rows[index] = tensor.size(0);
}

int64_t noted(EndpointObj& object, Status status) {
  object.pending = status == kPending;
  if (object.endpoint.shape.debug && status != kPending) end_debug(object.endpoint);
  return status;
}

int64_t run_dispatch(ffi::ObjectRef handle, ffi::TensorView x,
                     ffi::Optional<ffi::TensorView> scales, ffi::TensorView ids,
                     ffi::TensorView weights, ffi::TensorView counts, int64_t max_rows,
                     bool deferred, double global_scale, int64_t active, int64_t slice_ns) {
  EndpointObj& object = object_of(handle);
  Endpoint& e = object.endpoint;
  require(slice_ns >= 0, "slice_ns");
  DispatchArgs a = dispatch_args(e.geometry, e.shape, kDLCPU, e.rank, x, scales, ids, weights,
                                 counts, max_rows, deferred, active);
  for_each_rank(a.active,
                [&](int peer) { require(e.window[peer] != nullptr, "active ranks have windows"); });
  for (int64_t i = 0; i < e.geometry.num_extras; ++i) {
    require(object.extra_rows[i] == a.tokens, "extras of this dispatch [T, n]");
    a.extra[i] = e.extra[i];
    object.extra_rows[i] = 0;  // nobody keeps the tensor any longer than the call
  }
  a.global_scale = static_cast<float>(global_scale);
  return noted(object, dispatch(e, a, slice_ns));
}

int64_t run_combine(ffi::ObjectRef handle, ffi::TensorView y, ffi::TensorView out,
                    int64_t slice_ns) {
  EndpointObj& object = object_of(handle);
  Endpoint& e = object.endpoint;
  const CombineArgs a = combine_args(e.geometry, e.shape, kDLCPU, y, out, e.tokens, e.max_rows);
  require(slice_ns >= 0, "slice_ns");
  require(!object.pending, "no dispatch is under way");
  return noted(object, combine(e, a, slice_ns));
}

int64_t run_combine_grouped(ffi::ObjectRef handle, ffi::TensorView rows, ffi::TensorView positions,
                            ffi::TensorView weights, ffi::TensorView out, int64_t slice_ns) {
  EndpointObj& object = object_of(handle);
  Endpoint& e = object.endpoint;
  Grouped grouped{};
  const CombineArgs a = grouped_args(e.geometry, e.shape, kDLCPU, rows, positions, weights, out,
                                     e.tokens, e.max_rows, &grouped);
  require(slice_ns >= 0, "slice_ns");
  require(!object.pending, "no dispatch is under way");
  return noted(object, combine(e, a, slice_ns, &grouped));
}

// False where a row names an expert twice, and the list has no place for that.
bool run_group(ffi::TensorView ids, ffi::TensorView weights, ffi::TensorView counts,
               int64_t first_expert, int64_t align, ffi::TensorView offsets,
               ffi::TensorView row_index, ffi::TensorView row_weights, ffi::TensorView positions) {
  return group(group_args(kDLCPU, ids, weights, counts, first_expert, align, offsets, row_index,
                          row_weights, positions));
}

// The rest of an operation that answered kPending.
int64_t resume(ffi::ObjectRef handle, int64_t slice_ns) {
  EndpointObj& object = object_of(handle);
  Endpoint& e = object.endpoint;
  // An operation that is over has let go of its tensors.
  require(slice_ns >= 0, "slice_ns");
  require(object.pending, "an operation that answered that it is pending");
  return noted(object, e.facts.phase == kDispatch ? finish_dispatch(e, slice_ns)
                                                  : finish_combine(e, slice_ns));
}

// Of the last operation, with debug: [phase, round, begin, sent, arrived, end, wait for each rank]
Numbers operation_times(ffi::ObjectRef handle) {
  const Endpoint& e = endpoint_of(handle);
  const OperationTimes& t = e.times;
  Numbers out{e.facts.phase, e.round, t.begin, t.sent, t.arrived, t.end};
  for (int peer = 0; peer < e.geometry.ep_size; ++peer) out.push_back(t.waits[peer]);
  return out;
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
  for (int peer = 0; peer < e.geometry.ep_size; ++peer) out.push_back(last_seen(e, peer));
  return out;
}

void restart(ffi::ObjectRef handle, Numbers windows, int64_t epoch, int64_t generation) {
  EndpointObj& object = object_of(handle);
  Endpoint& e = object.endpoint;
  object.pending = false;
  restart_endpoint(e, addresses(windows, e.geometry.ep_size, e.rank), static_cast<uint32_t>(epoch),
                   static_cast<uint32_t>(generation));
}

Numbers position(ffi::ObjectRef handle) {
  const Endpoint& e = endpoint_of(handle);
  return Numbers{e.epoch, e.generation, e.round};
}

void post_meeting(int64_t window, int64_t ep_size, int64_t source, Numbers words) {
  require(window != 0 && source >= 0 && source < ep_size && ep_size <= kMaxRanks, "a line");
  require(words.size() == kMeetWords, "words of a meeting");
  int64_t plain[kMeetWords];
  for (int i = 0; i < kMeetWords; ++i) plain[i] = words[i];
  post_words(meet_line(window, ep_size, source), plain);
}

Numbers read_meeting(int64_t window, int64_t ep_size, int64_t source) {
  require(window != 0 && source >= 0 && source < ep_size && ep_size <= kMaxRanks, "a line");
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
TVM_FFI_DLL_EXPORT_TYPED_FUNC(combine_grouped, run_combine_grouped);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(group, run_group);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(resume, resume);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(operation_times, operation_times);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(failure_record, failure_record);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(restart, restart);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(position, position);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(post_meeting, post_meeting);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(read_meeting, read_meeting);

}  // namespace moe_a2a::cpu
