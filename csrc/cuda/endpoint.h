// One rank's end on a CUDA device: what its kernels share, and how many blocks they may have.
#pragma once

#include <cuda_runtime.h>

#include "context.h"

namespace moe_a2a::cuda {

struct NoteBook;

// Null where all went well.
inline const char* text_of(cudaError_t error) {
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

struct Options {
  int device, sharers;  // ranks that share the device
  int max_blocks;       // 0: as many as the device holds
  bool lines;           // 128-byte lines, else 16-byte packets
};

struct Endpoint {
  Geometry geometry;
  Layout layout;
  Shape shape;
  Options options;
  Context context;
  int blocks = 0;  // that all may be resident at once
  bool overlap;    // programmatic dependent launch
  // Of the round under way.
  int64_t tokens = 0, max_rows = 0;
  uint64_t active = 0;
  uint32_t format = 0;
  Rows extra[kMaxExtras] = {};
  NoteBook* book = nullptr;      // with debug=True
  cudaStream_t aside = nullptr;  // for what must not queue behind a spinning kernel

  Endpoint() = default;
  Endpoint(const Endpoint&) = delete;
  Endpoint& operator=(const Endpoint&) = delete;
  ~Endpoint();
};

// Bytes of device memory that an endpoint needs besides its window, zeroed.
int64_t local_bytes(const Geometry& g);

// Fills in the context and loads every kernel, so that none is loaded behind a spinning one.
// Returns a CUDA error's text, or null.
const char* open_endpoint(Endpoint& e, int rank, const int64_t* windows, uint8_t* local,
                          Status* status, int64_t timeout_ns);

const char* launch_dispatch(Endpoint& e, const DispatchArgs& a, const float* global_scale,
                            uint32_t scale_bits, cudaStream_t stream);
// `grouped`: of what the rows of a.y, [size, H] then, are sums; null where they are [W, R, H].
const char* launch_combine(Endpoint& e, const CombineArgs& a, const Grouped* grouped,
                           cudaStream_t stream);

// A new generation: nothing of an old one counts. Control and the inbox of dispatch are cleared,
// that of combine is all ones. Returns when done.
const char* restart(Endpoint& e, uint32_t epoch, uint32_t generation, uint32_t round,
                    cudaStream_t stream);

// Makes waits that are under way end, without waiting for them.
const char* abandon(Endpoint& e);

// Tells ranks that a reset leaves out that it did: should one resume, it finds the generation
// changed.
const char* exclude(Endpoint& e, uint64_t ranks, uint32_t generation, cudaStream_t stream);

}  // namespace moe_a2a::cuda
