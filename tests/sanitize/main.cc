// Plays rounds of every kind, for a sanitizer to watch: main [ROUNDS of each setup].
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "failures.h"
#include "rounds.h"

namespace {

using namespace moe_a2a;
using namespace sanitize;

constexpr int kWires[] = {kBf16, kFp16, kFp8, kFp8Block128, kMxfp8, kNvfp4, kMxfp4};
constexpr int kCombineWires[] = {kBf16, kFp16, kFp32, kFp8Block128, kMxfp8};

// Every wire with 1, 2, 3 and 4 ranks; whatever else may differ goes round with coprime periods.
std::vector<Setup> setups() {
  std::vector<Setup> out;
  int64_t n = 0;
  for (int64_t ranks : {1, 2, 3, 4})
    for (int wire : kWires) {
      const int combine = kCombineWires[n % 5];
      const bool wide_block = wire == kFp8Block128 || combine == kFp8Block128;
      Setup s{"rounds",  ranks, 2 + n % 9, 1 + n % 3, wide_block ? 128 : 96,
              4 + n % 9, wire,  combine};
      s.top_k = std::min(s.top_k, s.experts);
      if (n % 3 != 0) s.extras = {8, 1 + n % 11};
      s.scrub_all = n % 2 == 0;
      s.debug = n % 3 == 0;
      s.streaming = n % 4 < 2;
      s.allow_defer = quantized(wire) && n % 3 != 1;
      s.alignment = n % 2 == 0 ? 64 : 32;
      s.invalid_id = n % 4 == 3 ? 1000 : -1;
      s.leave_after = ranks > 2 && n % 3 == 2 ? 5 : -1;
      if (n % 2 == 1) s.epoch = 0xFFFFFFF8;  // goes past 0
      out.push_back(s);
      ++n;
    }
  // More than four rows in a sum, and rows of several tiles.
  out.push_back({"7 ranks", 7, 16, 8, 128, 3, kBf16, kFp32});
  out.push_back({"long rows", 2, 4, 2, 1280, 2, kMxfp8, kFp8Block128});
  out.push_back({"long rows", 2, 4, 2, 1280, 2, kFp8, kMxfp8});
  // Ranks without experts.
  out.push_back({"1 expert", 3, 1, 1, 128, 4, kNvfp4, kBf16});
  return out;
}

void play(Rank& rank, int64_t rounds) {
  const Setup& s = rank.setup;
  for (int64_t n = 0; n < rounds; ++n) {
    const Round round = round_of(s, n);
    if ((round.active >> rank.endpoint.rank & 1) == 0) return;
    play_round(rank, round);
  }
}

}  // namespace

int main(int argc, char** argv) {
  const int64_t rounds = argc > 1 ? std::atoll(argv[1]) : 24;
  for (const Setup& s : setups()) run_ranks(s, [&](Rank& rank) { play(rank, rounds); });
  play_absences();
  play_disagreements();
  if (tally.rounds == 0 || tally.rows == 0 || tally.sums == 0 || tally.failures == 0) {
    std::printf("nothing was looked at\n");
    return 1;
  }
  std::printf("ok: %lld rounds of a rank, %lld rows and %lld sums compared, %lld failures\n",
              static_cast<long long>(tally.rounds), static_cast<long long>(tally.rows),
              static_cast<long long>(tally.sums), static_cast<long long>(tally.failures));
  return 0;
}
