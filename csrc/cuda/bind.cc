// The edge of the CUDA library: checks tensors, fills the argument structs, calls the launchers.
#include "../tensors.h"
#include "debug.h"
#include "endpoint.h"
#include "group.h"
#include "link.h"

namespace moe_a2a::cuda {
namespace {

#if defined(MOE_SIMT)
constexpr DLDeviceType kDevice = kDLCPU;  // kernels on the CPU, for tests: tests/simt
#else
constexpr DLDeviceType kDevice = kDLCUDA;
#endif

class EndpointObj : public ffi::Object {
 public:
  Endpoint endpoint;
  static constexpr bool _type_mutable = true;
  TVM_FFI_DECLARE_OBJECT_INFO_FINAL("moe_a2a.cuda.Endpoint", EndpointObj, ffi::Object);
};

Endpoint& endpoint_of(const ffi::ObjectRef& handle) {
  const auto* object = handle.as<EndpointObj>();
  if (object == nullptr) TVM_FFI_THROW(TypeError) << "expected an endpoint";
  return const_cast<EndpointObj*>(object)->endpoint;
}

void check(const char* error) {
  if (error != nullptr) TVM_FFI_THROW(RuntimeError) << "CUDA: " << error;
}

// Launches go to the endpoint's device, whatever the caller's current one is.
class OnDevice {
 public:
  explicit OnDevice(const Endpoint& e) : wanted_(e.options.device) {
    cudaGetDevice(&before_);
    if (before_ != wanted_) cudaSetDevice(wanted_);
  }
  ~OnDevice() {
    if (before_ != wanted_) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int wanted_, before_ = 0;
};

cudaStream_t stream_of(int64_t stream) { return reinterpret_cast<cudaStream_t>(stream); }

int64_t endpoint_local_bytes(Numbers geometry) { return local_bytes(geometry_from(geometry)); }

int64_t notebook_bytes() { return sizeof(NoteBook); }

// options: [device, ranks that share it, max blocks or 0, 128-byte lines or not, address of a
// notebook, zeroed, or 0]
ffi::ObjectRef endpoint_open(Numbers geometry, Numbers shape, int64_t rank, Numbers windows,
                             int64_t local, int64_t status, Numbers options, int64_t timeout_ns) {
  auto object = ffi::make_object<EndpointObj>();
  Endpoint& e = object->endpoint;
  e.geometry = geometry_from(geometry);
  require(e.geometry.ep_size <= kMaxRanks, "ep_size in 1..64");
  e.layout = make_layout(e.geometry);
  e.shape = shape_from(shape, e.geometry);
  require(static_cast<int64_t>(windows.size()) == e.geometry.ep_size, "one window per rank");
  require(rank >= 0 && rank < e.geometry.ep_size, "rank in 0..ep_size-1");
  require(options.size() == 5, "5 options");
  e.options = {static_cast<int>(options[0]), static_cast<int>(options[1]),
               static_cast<int>(options[2]), options[3] != 0};
  e.book = reinterpret_cast<NoteBook*>(options[4]);
  const OnDevice device(e);
  int64_t addresses[kMaxRanks];
  for (size_t i = 0; i < windows.size(); ++i) addresses[i] = windows[i];
  check(open_endpoint(e, static_cast<int>(rank), addresses, reinterpret_cast<uint8_t*>(local),
                      reinterpret_cast<Status*>(status), timeout_ns));
  return ffi::ObjectRef(object);
}

void stage_extra(ffi::ObjectRef handle, int64_t index, ffi::TensorView tensor) {
  Endpoint& e = endpoint_of(handle);
  require(index >= 0 && index < e.geometry.num_extras, "index of an extra");
  e.extra[index] =
      rows_of(tensor, kDevice, tensor.size(0), e.geometry.extra_bytes[index], "extra [T, n]");
}

// What a kernel recorded meanwhile; read from the host's own memory, at no cost.
int64_t failure_kind(ffi::ObjectRef handle) {
  return *const_cast<volatile uint32_t*>(&endpoint_of(handle).context.status->kind);
}

// Non-zero, and nothing launched, once a kernel has given up. `scale_bits`: of the global scale,
// where the ranks are to compare it.
int64_t run_dispatch(ffi::ObjectRef handle, ffi::TensorView x,
                     ffi::Optional<ffi::TensorView> scales, ffi::TensorView ids,
                     ffi::TensorView weights, ffi::TensorView counts, int64_t max_rows,
                     bool deferred, ffi::Optional<ffi::TensorView> global_scale, int64_t scale_bits,
                     int64_t active, int64_t stream) {
  Endpoint& e = endpoint_of(handle);
  if (const int64_t kind = failure_kind(handle)) return kind;
  const DispatchArgs a = dispatch_args(e.geometry, e.shape, kDevice, e.context.rank, x, scales, ids,
                                       weights, counts, max_rows, deferred, active);
  const float* scale = nullptr;
  if (global_scale.has_value()) {
    require(scalar_of(global_scale.value()) == kScalarFp32, "global_scale float32");
    scale = static_cast<const float*>(global_scale.value().data_ptr());
  }
  const OnDevice device(e);
  check(launch_dispatch(e, a, scale, static_cast<uint32_t>(scale_bits), stream_of(stream)));
  return 0;
}

int64_t run_combine(ffi::ObjectRef handle, ffi::TensorView y, ffi::TensorView out, int64_t stream) {
  Endpoint& e = endpoint_of(handle);
  if (const int64_t kind = failure_kind(handle)) return kind;
  const CombineArgs a = combine_args(e.geometry, e.shape, kDevice, y, out, e.tokens, e.max_rows);
  const OnDevice device(e);
  check(launch_combine(e, a, nullptr, stream_of(stream)));
  return 0;
}

int64_t run_combine_grouped(ffi::ObjectRef handle, ffi::TensorView rows, ffi::TensorView positions,
                            ffi::TensorView weights, ffi::TensorView out, int64_t stream) {
  Endpoint& e = endpoint_of(handle);
  if (const int64_t kind = failure_kind(handle)) return kind;
  Grouped grouped{};
  const CombineArgs a = grouped_args(e.geometry, e.shape, kDevice, rows, positions, weights, out,
                                     e.tokens, e.max_rows, &grouped);
  const OnDevice device(e);
  check(launch_combine(e, a, &grouped, stream_of(stream)));
  return 0;
}

// On the current device; `scratch`: (segments + 1) * experts words, or none without segments.
void run_group(ffi::TensorView ids, ffi::TensorView weights, ffi::TensorView counts,
               int64_t first_expert, int64_t align, ffi::TensorView offsets,
               ffi::TensorView row_index, ffi::TensorView row_weights, ffi::TensorView positions,
               ffi::TensorView scratch, int64_t segments, int64_t stream) {
  const GroupArgs a = group_args(kDevice, ids, weights, counts, first_expert, align, offsets,
                                 row_index, row_weights, positions);
  require(segments >= 0 && segments <= 1 << 20, "segments");
  require(segments > 0 || a.experts <= kOneBlockExperts, "as many experts as one block can count");
  const int64_t needed = segments == 0 ? 0 : (segments + 1) * a.experts;
  void* words = words_of(scratch, kDevice, true, needed, "scratch");
  check(launch_group(a, static_cast<uint32_t*>(words), segments, stream_of(stream)));
}

// As the CPU library's.
Numbers failure_record(ffi::ObjectRef handle) {
  const Endpoint& e = endpoint_of(handle);
  const Status& s = *e.context.status;
  Numbers out{s.kind,
              s.phase,
              s.round,
              s.waited_ns,
              static_cast<int64_t>(s.missing),
              static_cast<int64_t>(s.accusers),
              s.peer};
  push_facts(out, s.mine);
  push_facts(out, s.theirs);
  for (int peer = 0; peer < e.geometry.ep_size; ++peer) out.push_back(s.operations_ago[peer]);
  return out;
}

// The device's clock now, in nanoseconds.
int64_t run_read_clock(ffi::ObjectRef handle, int64_t stream) {
  Endpoint& e = endpoint_of(handle);
  const OnDevice device(e);
  int64_t now = 0;
  check(read_clock(e, stream_of(stream), now));
  return now;
}

// With debug: how many operations have ended.
int64_t run_count_notes(ffi::ObjectRef handle) {
  Endpoint& e = endpoint_of(handle);
  const OnDevice device(e);
  uint64_t count = 0;
  check(count_notes(e, count));
  return static_cast<int64_t>(count);
}

// Of the n-th operation, as the CPU library's; `sent` is when it began.
Numbers run_read_note(ffi::ObjectRef handle, int64_t n) {
  Endpoint& e = endpoint_of(handle);
  const OnDevice device(e);
  OperationNote note;
  check(read_note(e, static_cast<uint64_t>(n), note));
  Numbers out{note.phase, note.round, note.begin, note.begin, note.met, note.end};
  for (int peer = 0; peer < e.geometry.ep_size; ++peer) out.push_back(note.waits[peer]);
  return out;
}

// Ends waits that are under way: kernels return at once.
void abandon_rounds(ffi::ObjectRef handle) {
  Endpoint& e = endpoint_of(handle);
  const OnDevice device(e);
  check(abandon(e));
}

void run_restart(ffi::ObjectRef handle, int64_t epoch, int64_t generation, int64_t round,
                 int64_t stream) {
  Endpoint& e = endpoint_of(handle);
  const OnDevice device(e);
  check(restart(e, static_cast<uint32_t>(epoch), static_cast<uint32_t>(generation),
                static_cast<uint32_t>(round), stream_of(stream)));
}

void run_exclude(ffi::ObjectRef handle, int64_t ranks, int64_t generation, int64_t stream) {
  Endpoint& e = endpoint_of(handle);
  const OnDevice device(e);
  check(exclude(e, static_cast<uint64_t>(ranks), static_cast<uint32_t>(generation),
                stream_of(stream)));
}

// [epoch, generation, round] of the operation that comes next; waits for the device.
Numbers position(ffi::ObjectRef handle) {
  const Endpoint& e = endpoint_of(handle);
  const OnDevice device(e);
  State s;
  const cudaError_t error = cudaMemcpy(&s, e.context.state, sizeof(s), cudaMemcpyDeviceToHost);
  check(error == cudaSuccess ? nullptr : cudaGetErrorString(error));
  const uint64_t tag = s.dispatch_tag > s.combine_tag ? s.dispatch_tag : s.combine_tag;
  return Numbers{epoch_of(tag), generation_of(tag), s.dispatch_round};
}

uint8_t* address(int64_t value) { return reinterpret_cast<uint8_t*>(value); }

void link_store(int64_t peer, int64_t own, int64_t bytes, int64_t blocks, int64_t threads,
                int64_t stream) {
  launch_link_store(address(peer), address(own), bytes, static_cast<int>(blocks),
                    static_cast<int>(threads), stream_of(stream));
}

void link_exchange(int64_t peer_lines, int64_t own_lines, int64_t source, int64_t sink,
                   int64_t bytes, int64_t capacity, int64_t state, int64_t blocks, int64_t threads,
                   int64_t stream) {
  launch_link_exchange(address(peer_lines), address(own_lines), address(source), address(sink),
                       bytes, capacity, reinterpret_cast<uint64_t*>(state),
                       static_cast<int>(blocks), static_cast<int>(threads), stream_of(stream));
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(link_store, link_store);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(link_exchange, link_exchange);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(local_bytes, endpoint_local_bytes);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(endpoint_open, endpoint_open);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(stage_extra, stage_extra);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(dispatch, run_dispatch);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(combine, run_combine);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(combine_grouped, run_combine_grouped);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(group, run_group);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(failure_kind, failure_kind);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(failure_record, failure_record);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(notebook_bytes, notebook_bytes);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(read_clock, run_read_clock);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(count_notes, run_count_notes);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(read_note, run_read_note);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(abandon, abandon_rounds);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(restart, run_restart);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(exclude, run_exclude);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(position, position);

}  // namespace moe_a2a::cuda
