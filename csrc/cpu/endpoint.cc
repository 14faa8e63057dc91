// The life of an endpoint between its operations.
#include "endpoint.h"

#include <algorithm>
#include <utility>

#include "../routing.h"

namespace moe_a2a::cpu {

void open_endpoint(Endpoint& e, const Geometry& geometry, const Shape& shape, int rank,
                   std::vector<uint8_t*> windows) {
  e.geometry = geometry;
  e.layout = make_layout(geometry);
  e.shape = shape;
  e.rank = rank;
  e.window = std::move(windows);
  e.owner.resize(geometry.num_experts);
  for (int64_t x = 0; x < geometry.num_experts; ++x)
    e.owner[x] = static_cast<uint8_t>(owner_of_expert(x, geometry.num_experts, geometry.ep_size));
  e.ranks_of_token.resize(geometry.max_tokens);
  e.scratch.resize(round_up(geometry.payload_bytes, kLine) + round_up(geometry.scale_bytes, kLine));
}

void restart_endpoint(Endpoint& e, std::vector<uint8_t*> windows, uint32_t epoch,
                      uint32_t generation) {
  e.window = std::move(windows);
  e.tokens = e.max_rows = 0;  // rows of another generation are not to be combined
  std::fill_n(e.received, kMaxRanks, 0);
  e.epoch = epoch;
  e.generation = generation;
  e.failure = {};
  e.facts = {};
}

}  // namespace moe_a2a::cpu
