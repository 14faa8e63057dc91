#include "ranks.h"

#include <sanitizer/asan_interface.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>

#include "cpu/meet.h"

namespace sanitize {
namespace {

using namespace moe_a2a;

Geometry geometry_of(const Setup& s) {
  const Widths widths = s.widths();
  const int64_t payload = s.allow_defer ? std::max(widths.payload, 2 * s.hidden) : widths.payload;
  Geometry g{s.ranks,
             s.experts,
             s.top_k,
             s.capacity,
             payload,
             widths.scales,
             combine_bytes_of(s.combine_wire, s.hidden),
             static_cast<int64_t>(s.extras.size()),
             {}};
  for (size_t i = 0; i < s.extras.size(); ++i) g.extra_bytes[i] = s.extras[i];
  return g;
}

// A line between regions that belongs to none. Kernels take every offset from the layout, so it is
// all the same to them, and whoever leaves a region is found there.
Layout spread(Layout layout, const Geometry& g) {
  int64_t more = 0;
  const auto move = [&](int id) { layout.region[id].offset += more += kLine; };
  for (int id : {kPayload, kScales, kIds, kWeights}) move(id);
  for (int i = 0; i < g.num_extras; ++i) move(kExtra + i);
  move(kCombine);
  layout.committed += more + kLine;
  return layout;
}

struct Part {
  int region;
  int64_t nbytes;
};

std::vector<Part> parts_of(const Geometry& g) {
  const int64_t rows = g.ep_size * g.max_tokens;
  std::vector<Part> parts{{kControl, control_bytes(g.ep_size)}, {kPayload, rows * g.payload_bytes},
                          {kScales, rows * g.scale_bytes},      {kIds, rows * g.top_k * 4},
                          {kWeights, rows * g.top_k * 4},       {kCombine, rows * g.combine_bytes}};
  for (int i = 0; i < g.num_extras; ++i) parts.push_back({kExtra + i, rows * g.extra_bytes[i]});
  return parts;
}

Layout layout_of(const Geometry& g) { return spread(make_layout(g), g); }

}  // namespace

Tally tally;

Window::Window(const Geometry& geometry, const Layout& layout)
    : data_(static_cast<uint8_t*>(std::aligned_alloc(kLine, layout.committed))),
      nbytes_(layout.committed) {
  std::memset(data_, 0, nbytes_);
  ASAN_POISON_MEMORY_REGION(data_, nbytes_);
  for (const Part& part : parts_of(geometry)) {
    [[maybe_unused]] uint8_t* at = data_ + layout.region[part.region].offset;
    ASAN_UNPOISON_MEMORY_REGION(at, part.nbytes);
  }
}

Window::~Window() {
  ASAN_UNPOISON_MEMORY_REGION(data_, nbytes_);
  std::free(data_);
}

Rank::Rank(const Setup& s, int rank, const std::vector<uint8_t*>& windows)
    : setup(s), lobby_(windows), seen_(windows.size()) {
  const Widths widths = s.widths();
  const Geometry g = geometry_of(s);
  const Shape shape{s.hidden,       widths.padded, widths.payload, widths.scales, s.wire,
                    s.combine_wire, s.invalid_id,  s.scrub_all,    s.debug};
  cpu::open_endpoint(endpoint, g, shape, rank, windows);
  endpoint.layout = layout_of(g);
  endpoint.epoch = s.epoch;
  endpoint.timeout_ns = kPatience;
  // Some ranks mostly poll and others mostly sleep: a doorbell orders more than an epoch does.
  endpoint.spin_ns = rank % 2 == 0 ? 1'000'000 : 0;
  endpoint.cached = s.streaming ? 0 : int64_t{1} << 40;
}

void Rank::reset(uint64_t members) {
  ++attempt_;
  const int self = endpoint.rank;
  fresh_.push_back(std::make_unique<Window>(endpoint.geometry, endpoint.layout));
  uint8_t* own = fresh_.back()->data();
  const auto address = [](const uint8_t* at) {
    return static_cast<int64_t>(reinterpret_cast<intptr_t>(at));
  };
  const int64_t brought[cpu::kMeetWords] = {attempt_, endpoint.epoch, endpoint.generation,
                                            address(own)};
  std::vector<uint8_t*> windows(setup.ranks, nullptr);
  windows[self] = own;
  uint32_t epoch = endpoint.epoch, generation = endpoint.generation;
  const uint64_t others = members & ~(uint64_t{1} << self);
  cpu::for_each_rank(others, [&](int peer) {
    cpu::post_words(cpu::meet_line(address(lobby_[peer]), setup.ranks, self), brought);
  });
  cpu::for_each_rank(others, [&](int peer) {
    int64_t words[cpu::kMeetWords] = {};
    while (cpu::read_words(cpu::meet_line(address(lobby_[self]), setup.ranks, peer), words),
           words[0] <= seen_[peer])
      std::this_thread::sleep_for(std::chrono::microseconds(200));
    seen_[peer] = words[0];
    epoch = std::max(epoch, static_cast<uint32_t>(words[1]));
    generation = std::max(generation, static_cast<uint32_t>(words[2]));
    windows[peer] = reinterpret_cast<uint8_t*>(words[3]);
  });
  epoch += 2;
  cpu::restart_endpoint(endpoint, windows, epoch == 0 ? 1 : epoch, generation + 1);
}

void die(const Rank& rank, const std::string& what) {
  std::printf("%s: rank %d, round %lld: %s\n", rank.setup.name.c_str(), rank.endpoint.rank,
              static_cast<long long>(rank.endpoint.round), what.c_str());
  std::fflush(stdout);
  std::_Exit(1);
}

void run_ranks(const Setup& setup, const std::function<void(Rank&)>& play) {
  const Geometry g = geometry_of(setup);
  std::vector<std::unique_ptr<Window>> windows;
  std::vector<uint8_t*> addresses;
  for (int64_t r = 0; r < setup.ranks; ++r) {
    windows.push_back(std::make_unique<Window>(g, layout_of(g)));
    addresses.push_back(windows.back()->data());
  }
  std::vector<std::unique_ptr<Rank>> ranks;
  for (int r = 0; r < setup.ranks; ++r)
    ranks.push_back(std::make_unique<Rank>(setup, r, addresses));
  std::vector<std::thread> threads;
  for (auto& rank : ranks) threads.emplace_back([&play, &rank] { play(*rank); });
  for (auto& thread : threads) thread.join();
}

}  // namespace sanitize
