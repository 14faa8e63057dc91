// Divides by products, as the kernels do, and says where the quotient is wrong: for
// test_divisors.py.
#include <cstdio>

#include "cuda/context.h"

namespace {

using namespace moe_a2a::cuda;

constexpr uint32_t kEnd = uint32_t{1} << 31;

bool right(uint32_t n, uint32_t d) {
  if (n / fast_divisor(d) == n / d) return true;
  std::printf("%u / %u\n", n, d);
  return false;
}

// Around multiples, where a quotient that is off by little is wrong.
bool right_around(uint64_t multiple, uint32_t d) {
  bool all = true;
  for (int64_t off = -1; off <= 1; ++off) {
    const int64_t n = static_cast<int64_t>(multiple) + off;
    if (n >= 0 && n < kEnd) all = right(static_cast<uint32_t>(n), d) && all;
  }
  return all;
}

bool divides(uint32_t d) {
  bool all = right(kEnd - 1, d);
  for (uint64_t multiple = 0; multiple < kEnd; multiple += d * (1 + (kEnd / d) / 64))
    all = right_around(multiple, d) && all;
  return right_around(kEnd / d * uint64_t{d}, d) && all;
}

}  // namespace

int main() {
  bool all = true;
  for (uint32_t d = 1; d < 5000; ++d) all = divides(d) && all;
  for (int shift = 12; shift < 31; ++shift)
    for (int off = -2; off <= 2; ++off) all = divides((uint32_t{1} << shift) + off) && all;
  for (uint32_t d = 5001; d < kEnd - 1'000'003; d += 1'000'003) all = divides(d) && all;
  for (uint32_t d = 1; d <= 1u << 15; ++d)  // experts
    for (uint64_t n = 0; n * d < kEnd && n < 1u << 15; n += 1 + n / 16)
      all = all && static_cast<uint32_t>(n) / expert_divisor(d) == n / d;
  return all ? 0 : 1;
}
