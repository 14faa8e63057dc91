// Whether an access of 16 bytes is one: a thread stores pairs of equal halves, another one loads.
#include <cstdint>
#include <cstdio>
#include <thread>

#include "ptx_simt.h"

int main() {
  using moe_a2a::cuda::Chunk;
  static Chunk shared{0, 0};
  std::thread writer([] {
    for (uint64_t n = 0; n < 200'000'000; ++n) {
      const __m128i v = _mm_set1_epi64x(static_cast<long long>(n));
      asm volatile("movdqa %1, %0" : "=m"(shared) : "x"(v) : "memory");
    }
  });
  uint64_t torn = 0;
  for (uint64_t last = 0; last + 1 < 200'000'000;) {
    const Chunk c = moe_a2a::cuda::load_relaxed_sys(&shared);
    torn += c.lo != c.hi;
    last = c.lo;
  }
  writer.join();
  std::printf("%llu torn\n", static_cast<unsigned long long>(torn));
  return torn != 0;
}
