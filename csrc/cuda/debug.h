// debug=True: before each operation the ranks meet, and it is noted how long each kept this one
// waiting; poison goes where no peer can be writing. All of it is done by kernels and copies of its
// own, so that those which move rows carry nothing of it.
#pragma once

#include <cuda_runtime.h>

#include "context.h"

namespace moe_a2a::cuda {

struct Endpoint;

// Nanoseconds of the device's clock.
struct OperationNote {
  uint32_t phase, round;
  int64_t begin, met, end;
  int64_t waits[kMaxRanks];  // since `begin`; -1 where nobody waited
};

constexpr int kNotes = 1024;

struct alignas(kLine) NoteBook {
  uint64_t count;  // operations that have ended, whose notes are the last kNotes of them
  int64_t clock;   // see read_clock()
  alignas(kLine) OperationNote notes[kNotes];
};

// In the phase of a RoundFacts: not the operation itself, but the ranks' meeting before it.
constexpr uint32_t kMeeting = 0x100;

struct DebugLaunch {
  Context c;
  RoundFacts facts;
  NoteBook* book;
};

// What cudaLaunchKernelEx takes. One warp each.
const void* meet_peers_kernel();
const void* note_end_kernel();
const void* note_clock_kernel();

// Around an operation; nothing without debug=True. Return a CUDA error's text, or null.
const char* begin_debug(const Endpoint& e, const RoundFacts& facts, cudaStream_t stream);
const char* end_debug(const Endpoint& e, const RoundFacts& facts, cudaStream_t stream);

// The device's clock now, in nanoseconds; waits for the stream.
const char* read_clock(const Endpoint& e, cudaStream_t stream, int64_t& now);

// How many operations have ended, and the note of the n-th of them, if it is still there. Without
// waiting for the streams of the operations.
const char* count_notes(const Endpoint& e, uint64_t& count);
const char* read_note(const Endpoint& e, uint64_t n, OperationNote& note);

}  // namespace moe_a2a::cuda
