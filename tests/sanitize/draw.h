// Numbers that every rank finds by itself: a function of what they are for, no stream.
#pragma once

#include <cstdint>
#include <initializer_list>

namespace sanitize {

inline uint64_t draw(std::initializer_list<int64_t> what) {
  uint64_t state = 0x9E3779B97F4A7C15;
  for (int64_t part : what) {
    state = (state ^ static_cast<uint64_t>(part)) * 0xBF58476D1CE4E5B9;
    state ^= state >> 31;
  }
  state *= 0x94D049BB133111EB;
  return state ^ state >> 29;
}

}  // namespace sanitize
