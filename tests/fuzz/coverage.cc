// Between g++ and libFuzzer: g++ calls a function at every branch (-fsanitize-coverage=trace-pc),
// libFuzzer, inside atheris, wants arrays of counters. Comparisons are handed on as they are, so
// that it learns the numbers that the code compares with.
#include <cstddef>
#include <cstdint>

namespace {

constexpr size_t kCounters = 1 << 14;  // more than there are branches: two seldom share one
alignas(4096) uint8_t counters[kCounters];

struct Place {
  uintptr_t pc, flags;
};
Place places[kCounters];

uintptr_t spread(uintptr_t pc) { return (pc * 0x9E3779B97F4A7C15u) >> (64 - 14); }

template <class T>
using Compare = void (*)(T, T);

}  // namespace

#define EXPORTED extern "C" __attribute__((visibility("default")))

// A tail call each, so that libFuzzer sees the place of the comparison as its caller.
#define HAND_ON(name, T)                                   \
  static Compare<T> to_##name;                             \
  extern "C" void __sanitizer_cov_trace_##name(T a, T b) { \
    if (to_##name != nullptr) to_##name(a, b);             \
  }

HAND_ON(cmp1, uint8_t)
HAND_ON(cmp2, uint16_t)
HAND_ON(cmp4, uint32_t)
HAND_ON(cmp8, uint64_t)
HAND_ON(const_cmp1, uint8_t)
HAND_ON(const_cmp2, uint16_t)
HAND_ON(const_cmp4, uint32_t)
HAND_ON(const_cmp8, uint64_t)

extern "C" void __sanitizer_cov_trace_cmpf(float, float) {}
extern "C" void __sanitizer_cov_trace_cmpd(double, double) {}
extern "C" void __sanitizer_cov_trace_switch(uint64_t, void*) {}

extern "C" void __sanitizer_cov_trace_pc() {
  const auto pc = reinterpret_cast<uintptr_t>(__builtin_return_address(0));
  ++counters[spread(pc)];
}

// The functions of libFuzzer, in the order of fuzz/atheris_binding.py.
EXPORTED void moe_a2a_connect(void** functions) {
  for (size_t i = 0; i < kCounters; ++i) places[i] = {reinterpret_cast<uintptr_t>(counters + i), 0};
  to_cmp1 = reinterpret_cast<Compare<uint8_t>>(functions[2]);
  to_cmp2 = reinterpret_cast<Compare<uint16_t>>(functions[3]);
  to_cmp4 = reinterpret_cast<Compare<uint32_t>>(functions[4]);
  to_cmp8 = reinterpret_cast<Compare<uint64_t>>(functions[5]);
  to_const_cmp1 = reinterpret_cast<Compare<uint8_t>>(functions[6]);
  to_const_cmp2 = reinterpret_cast<Compare<uint16_t>>(functions[7]);
  to_const_cmp4 = reinterpret_cast<Compare<uint32_t>>(functions[8]);
  to_const_cmp8 = reinterpret_cast<Compare<uint64_t>>(functions[9]);
  reinterpret_cast<void (*)(uint8_t*, uint8_t*)>(functions[0])(counters, counters + kCounters);
  reinterpret_cast<void (*)(Place*, Place*)>(functions[1])(places, places + kCounters);
}
