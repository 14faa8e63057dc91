// The life of an endpoint between its operations: a new generation, and an end to waits.
#include <initializer_list>

#include "endpoint.h"

namespace moe_a2a::cuda {
const char* restart(Endpoint& e, uint32_t epoch, uint32_t generation, uint32_t round,
                    cudaStream_t stream) {
  uint8_t* own = e.context.window[e.context.rank];
  // Rows of a combine are there once they are no longer all ones: inbox.cuh.
  const auto fill = [&](int id, int byte) {
    const Region& region = e.layout.region[id];
    return text_of(cudaMemsetAsync(own + region.offset, byte, region.nbytes, stream));
  };
  for (int id : {kControl, kDispatchInbox})
    if (const char* error = fill(id, 0)) return error;
  if (const char* error = fill(kCombine, 0xFF)) return error;
  State state{};
  state.dispatch_tag = static_cast<uint64_t>(generation) << kGenerationShift | epoch;
  state.dispatch_round = round;
  if (const char* error = text_of(
          cudaMemcpyAsync(e.context.state, &state, sizeof(state), cudaMemcpyHostToDevice, stream)))
    return error;
  if (const char* error = text_of(cudaStreamSynchronize(stream))) return error;
  *e.context.status = {};
  return nullptr;
}

const char* abandon(Endpoint& e) {
  return text_of(cudaMemsetAsync(&e.context.state->failing, 1, sizeof(uint32_t), e.aside));
}

const char* exclude(Endpoint& e, uint64_t ranks, uint32_t generation, cudaStream_t stream) {
  Post post{};
  post.generation = generation;
  for (int r = 0; r < e.context.ep_size; ++r) {
    if ((ranks >> r & 1) == 0 || r == e.context.rank) continue;
    if (const char* error =
            text_of(cudaMemcpyAsync(e.context.control(r, kPost, e.context.rank), &post,
                                    sizeof(post), cudaMemcpyHostToDevice, stream)))
      return error;
  }
  return text_of(cudaStreamSynchronize(stream));
}

}  // namespace moe_a2a::cuda
