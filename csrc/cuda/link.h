// What the link between two GPUs can do, measured without any of the library's protocol. The
// benchmark's bound. Bound (bind.cc) as functions of integers; `stream` is a cudaStream_t:
//
//   link_store(peer, own, bytes, blocks, threads, stream)
//   link_exchange(peer_lines, own_lines, source, sink, bytes, capacity, state, blocks, threads,
//                 stream)
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace moe_a2a::cuda {

// Copies `bytes` (a multiple of 16) from own memory to the peer's, 16 bytes a store.
void launch_link_store(uint8_t* peer, const uint8_t* own, int64_t bytes, int blocks, int threads,
                       cudaStream_t stream);

// Bytes of lines that carry a payload; what `peer_lines` and `own_lines` hold is twice that of the
// largest payload.
constexpr int64_t link_line_bytes(int64_t payload) { return (payload + 119) / 120 * 128; }

// The smallest exchange: `bytes` (a multiple of 8) of `source` go to the peer, and what the peer
// sent lands in `sink`. Both ranks make the same calls in the same order.
//
// `peer_lines` is the peer's `own_lines`: memory of 2 * capacity bytes, zeroed before the first
// call, with capacity >= link_line_bytes(bytes) a multiple of 128 that stays the same. `state` is
// local: three words, zeroed before the first call: the epoch, blocks that are done, and whether a
// wait ever gave up (after two seconds; the kernel then ends without its payload).
void launch_link_exchange(uint8_t* peer_lines, const uint8_t* own_lines, const uint8_t* source,
                          uint8_t* sink, int64_t bytes, int64_t capacity, uint64_t* state,
                          int blocks, int threads, cudaStream_t stream);

}  // namespace moe_a2a::cuda
