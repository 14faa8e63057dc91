#include "link.h"
#include "ptx.cuh"

namespace moe_a2a::cuda {
namespace {

constexpr int kLanes = 8;                    // that make a line
constexpr int kWords = 15;                   // of 8 bytes: a line's payload; the 16th is the epoch
constexpr int kAhead = 4;                    // loads a thread has in flight
constexpr uint64_t kGiveUp = 2'000'000'000;  // nanoseconds

__global__ void __launch_bounds__(1024) store_kernel(uint4* peer, const uint4* own, int64_t words) {
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  int64_t at = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  for (; at + (kAhead - 1) * step < words; at += kAhead * step) {
    uint4 held[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) held[i] = own[at + i * step];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) peer[at + i * step] = held[i];
  }
  for (; at < words; at += step) peer[at] = own[at];
}

// What a lane carries of a line: 16 bytes of payload, the last lane 8 and the epoch. A line's
// payload starts at a multiple of 120, so words of 8 bytes are what is aligned.
__device__ Chunk gather(const uint64_t* source, int64_t word, int64_t words, bool last,
                        uint64_t epoch) {
  Chunk chunk;
  chunk.lo = word < words ? source[word] : 0;
  chunk.hi = last ? epoch : word + 1 < words ? source[word + 1] : 0;
  return chunk;
}

// A line is one store of eight neighbouring lanes and is polled by one load of eight: NVLink
// delivers it whole (as NCCL's LL128 relies on), so the epoch in its last word vouches for the
// rest. The memory model does not promise that; for a bound it will do, and the benchmark compares
// the payloads. A warp polls four lines at once; `expected` is false in lanes past the last line.
__device__ bool receive(const Chunk* at, bool expected, bool last, uint64_t epoch,
                        const volatile uint64_t* gave_up, Chunk* found) {
  const uint64_t start = nanoseconds();
  for (unsigned tries = 0;; ++tries) {
    if (expected) *found = load_relaxed_sys(at);
    if (__all_sync(~0u, !expected || !last || found->hi == epoch)) return true;
    const bool late = tries % 256 == 255 && (nanoseconds() - start > kGiveUp || *gave_up != 0);
    if (__any_sync(~0u, late)) return false;
  }
}

__global__ void __launch_bounds__(1024)
    exchange_kernel(uint8_t* peer_lines, const uint8_t* own_lines, const uint64_t* source,
                    uint64_t* sink, int64_t words, int64_t capacity, uint64_t* state) {
  // No block counts itself done before it has read the epoch, so the last one may advance it.
  const uint64_t epoch = *static_cast<volatile uint64_t*>(state) + 1;
  const int lane = threadIdx.x % kLanes;
  const bool last = lane == kLanes - 1;
  const int64_t lines = (words + kWords - 1) / kWords;
  const int64_t first = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) / kLanes;
  const int64_t step = int64_t{gridDim.x} * blockDim.x / kLanes;

  // Two halves in turn: the peer writes epoch n+2 after it received all of n+1, which was sent by a
  // kernel that began after this rank's kernel n had read all its lines. One half would not do: a
  // peer done with n may write n+1 over lines that this rank, slower, has not read.
  const int64_t half = epoch % 2 * capacity;
  auto* to = reinterpret_cast<Chunk*>(peer_lines + half);
  auto* from = reinterpret_cast<const Chunk*>(own_lines + half);

  int64_t line = first;
  for (; line + (kAhead - 1) * step < lines; line += kAhead * step) {
    Chunk held[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int64_t word = (line + i * step) * kWords + lane * 2;
      held[i] = gather(source, word, words, last, epoch);
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i)
      store_relaxed_sys(to + (line + i * step) * kLanes + lane, held[i]);
  }
  for (; line < lines; line += step) {
    const int64_t word = line * kWords + lane * 2;
    store_relaxed_sys(to + line * kLanes + lane, gather(source, word, words, last, epoch));
  }

  // The warp goes round together, so its first line decides.
  const int64_t within = threadIdx.x % 32 / kLanes;
  for (line = first; line - within < lines; line += step) {
    Chunk chunk{};
    const bool expected = line < lines;
    if (!receive(from + line * kLanes + lane, expected, last, epoch, state + 2, &chunk)) {
      state[2] = 1;
      break;
    }
    const int64_t word = line * kWords + lane * 2;
    if (expected && word < words) sink[word] = chunk.lo;
    if (expected && !last && word + 1 < words) sink[word + 1] = chunk.hi;
  }

  __syncthreads();
  if (threadIdx.x == 0 &&
      atomicAdd(reinterpret_cast<unsigned long long*>(state + 1), 1ull) + 1 == gridDim.x) {
    state[1] = 0;
    state[0] = epoch;  // the next kernel of the stream reads it
  }
}

}  // namespace

void launch_link_store(uint8_t* peer, const uint8_t* own, int64_t bytes, int blocks, int threads,
                       cudaStream_t stream) {
  store_kernel<<<blocks, threads, 0, stream>>>(reinterpret_cast<uint4*>(peer),
                                               reinterpret_cast<const uint4*>(own), bytes / 16);
}

void launch_link_exchange(uint8_t* peer_lines, const uint8_t* own_lines, const uint8_t* source,
                          uint8_t* sink, int64_t bytes, int64_t capacity, uint64_t* state,
                          int blocks, int threads, cudaStream_t stream) {
  exchange_kernel<<<blocks, threads, 0, stream>>>(
      peer_lines, own_lines, reinterpret_cast<const uint64_t*>(source),
      reinterpret_cast<uint64_t*>(sink), bytes / 8, capacity, state);
}

}  // namespace moe_a2a::cuda
