// The host's half of debug=True.
#include "debug.h"

#include <initializer_list>

#include "endpoint.h"

namespace moe_a2a::cuda {
namespace {

const char* launch(const Endpoint& e, const void* kernel, const RoundFacts& facts,
                   cudaStream_t stream) {
  DebugLaunch p{e.context, facts, e.book};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(1);
  config.blockDim = dim3(32);
  config.stream = stream;
  void* arguments[] = {&p};
  return text_of(cudaLaunchKernelExC(&config, kernel, arguments));
}

// NaN in every format that has one; no expert has such an id. The inbox of combine is all ones
// where no row has come.
constexpr int kPoison = 0xFF, kNoExpert = 0x7F;

// Peers write into the inbox of a combine when they have heard of the dispatch that begins here,
// and all rows of the combine before have been read. They write rows and packets of a dispatch when
// they are through with the combine that begins here, for which they have to hear of it.
const char* poison(const Endpoint& e, uint32_t phase, cudaStream_t stream) {
  const auto fill = [&](int id, int byte) {
    const Region& region = e.layout.region[id];
    if (region.nbytes == 0) return static_cast<const char*>(nullptr);  // no node of a graph
    uint8_t* own = e.context.window[e.context.rank] + region.offset;
    return text_of(cudaMemsetAsync(own, byte, region.nbytes, stream));
  };
  if (phase == kDispatch) return fill(kCombine, kPoison);
  for (int id : {kPayload, kScales, kWeights})
    if (const char* error = fill(id, kPoison)) return error;
  for (int i = 0; i < e.geometry.num_extras; ++i)
    if (const char* error = fill(kExtra + i, kPoison)) return error;
  if (const char* error = fill(kIds, kNoExpert)) return error;
  return fill(kDispatchInbox, 0);  // no operation has epoch 0
}

const char* copy_out(const Endpoint& e, void* to, const void* from, size_t bytes) {
  if (const char* error =
          text_of(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, e.aside)))
    return error;
  return text_of(cudaStreamSynchronize(e.aside));
}

}  // namespace

const char* begin_debug(const Endpoint& e, const RoundFacts& facts, cudaStream_t stream) {
  if (e.book == nullptr) return nullptr;
  RoundFacts meeting = facts;
  meeting.phase |= kMeeting;
  if (const char* error = launch(e, meet_peers_kernel(), meeting, stream)) return error;
  return poison(e, facts.phase, stream);
}

const char* end_debug(const Endpoint& e, const RoundFacts& facts, cudaStream_t stream) {
  return e.book == nullptr ? nullptr : launch(e, note_end_kernel(), facts, stream);
}

const char* read_clock(const Endpoint& e, cudaStream_t stream, int64_t& now) {
  if (const char* error = launch(e, note_clock_kernel(), {}, stream)) return error;
  if (const char* error = text_of(cudaStreamSynchronize(stream))) return error;
  return copy_out(e, &now, &e.book->clock, sizeof(now));
}

const char* count_notes(const Endpoint& e, uint64_t& count) {
  return copy_out(e, &count, &e.book->count, sizeof(count));
}

const char* read_note(const Endpoint& e, uint64_t n, OperationNote& note) {
  return copy_out(e, &note, &e.book->notes[n % kNotes], sizeof(note));
}

}  // namespace moe_a2a::cuda
