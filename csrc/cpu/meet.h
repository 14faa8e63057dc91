// The line on which a rank tells a peer, outside any round, what it wants to restart with (a
// reset).
#pragma once

#include <atomic>
#include <cstdint>

#include "../epoch.h"

namespace moe_a2a::cpu {

constexpr int kMeetWords = 10;

// A sequence lock: odd while being written. One writer (the source rank), one reader (the owner).
struct alignas(kLine) MeetLine {
  std::atomic<uint64_t> sequence;
  std::atomic<int64_t> words[kMeetWords];
};
static_assert(sizeof(MeetLine) == kLine, "one line each");

inline MeetLine& meet_line(int64_t window, int64_t ep_size, int64_t source) {
  return *reinterpret_cast<MeetLine*>(window + (1 + kMeet * ep_size + source) * kLine);
}

inline void post_words(MeetLine& line, const int64_t* words) {
  const uint64_t at = line.sequence.load(std::memory_order_relaxed);
  line.sequence.store(at | 1, std::memory_order_relaxed);
  std::atomic_thread_fence(std::memory_order_release);  // the odd number before any word
  for (int i = 0; i < kMeetWords; ++i) line.words[i].store(words[i], std::memory_order_relaxed);
  line.sequence.store((at | 1) + 1, std::memory_order_release);
}

// All zeros where the writer is in the middle of it (or died there): the reader looks again later.
inline void read_words(const MeetLine& line, int64_t* words) {
  const uint64_t before = line.sequence.load(std::memory_order_acquire);
  for (int i = 0; i < kMeetWords; ++i) words[i] = line.words[i].load(std::memory_order_relaxed);
  std::atomic_thread_fence(std::memory_order_acquire);
  const uint64_t after = line.sequence.load(std::memory_order_relaxed);
  if ((before & 1) != 0 || before != after)
    for (int i = 0; i < kMeetWords; ++i) words[i] = 0;
}

}  // namespace moe_a2a::cpu
