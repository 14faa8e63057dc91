#include "group.h"

#include <algorithm>
#include <vector>

namespace moe_a2a::cpu {
namespace {

// Calls f(choice, row, local expert) in the order that rows have inside an expert.
template <class F>
void for_each_local(const GroupArgs& a, F f) {
  for (int64_t source = 0; source < a.sources; ++source) {
    const int64_t count = std::clamp<int64_t>(a.counts[source], 0, a.rows);
    for (int64_t row = source * a.rows; row < source * a.rows + count; ++row) {
      for (int64_t choice = row * a.top_k; choice < (row + 1) * a.top_k; ++choice) {
        const int64_t expert = int64_t{a.ids[choice]} - a.first_expert;
        if (expert >= 0 && expert < a.experts) f(choice, row, expert);
      }
    }
  }
}

}  // namespace

bool group(const GroupArgs& a) {
  std::vector<int64_t> next(a.experts + 1);  // place of each expert
  for_each_local(a, [&](int64_t, int64_t, int64_t expert) { ++next[expert]; });
  int64_t at = 0;
  for (int64_t& count : next) {
    const int64_t places = (count + a.align - 1) / a.align * a.align;
    count = at;
    at += places;
  }
  if (at > a.end()) return false;
  for (int32_t e = 0; e <= a.experts; ++e) a.offsets[e] = static_cast<int32_t>(next[e]);
  std::fill_n(a.row_index, a.size, -1);
  std::fill_n(a.row_weights, a.size, 0.0f);
  std::fill_n(a.positions, a.choices(), kNotHere);
  for_each_local(a, [&](int64_t choice, int64_t row, int64_t expert) {
    const int64_t place = next[expert]++;
    a.row_index[place] = static_cast<int32_t>(row);
    a.row_weights[place] = a.weights[choice];
    a.positions[choice] = static_cast<int32_t>(place);
  });
  return true;
}

}  // namespace moe_a2a::cpu
