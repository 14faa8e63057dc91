#include "endpoint.h"

#include <algorithm>
#include <vector>

#include "debug.h"
#include "group.h"
#include "launch.h"

namespace moe_a2a::cuda {
namespace {

constexpr int kMostImage = 64 << 10;  // bytes of shared memory for a row that is quantized
constexpr int kCombineStep = 512;

// Of a combine: up to so many units of a warp it does both in turn, push and sum; warps of a block
// that push in larger rounds: few, since what they store waits for the link, and with it what
// others of their multiprocessor load.
constexpr int kRoundsTogether = 2, kPushers = 2;
// The same of rows grouped by expert: several are read, in two steps, for each that is stored.
constexpr int kGroupedPushers = 4;

int64_t cell_data(const Endpoint& e) { return e.options.lines ? kCellData : 128; }

bool quantized(int wire) { return wire != kBf16 && wire != kFp16 && wire != kFp32; }

int64_t inbox_of_peer(const Endpoint& e) {
  return e.layout.region[kDispatchInbox].nbytes / e.geometry.ep_size / kCell * kCell;
}

// The parts of this round's rows, and the bytes of one on its way.
void lay_out_image(const Endpoint& e, bool deferred, DispatchLaunch& p) {
  const Context& c = e.context;
  const int k_bytes = c.top_k * 4;
  int64_t bytes[kSegments] = {deferred ? e.shape.hidden * 2 : e.shape.payload_row,
                              deferred ? 0 : e.shape.scale_row, k_bytes, k_bytes};
  int64_t region[kSegments] = {c.payload, c.scales, c.ids, c.weights};
  p.segments = 4 + c.num_extras;
  for (int i = 0; i < c.num_extras; ++i) {
    bytes[4 + i] = e.geometry.extra_bytes[i];
    region[4 + i] = c.extra[i];
  }
  int64_t at = 0;
  for (int i = 0; i < p.segments; ++i) {
    p.segment[i] = {static_cast<int32_t>(at), static_cast<int32_t>(bytes[i]), region[i]};
    at += round_up(bytes[i], kChunk);
  }
  p.image_bytes = static_cast<int32_t>(at);
}

struct Grid {
  int blocks, threads, shared;
};

const char* launch(const Endpoint& e, const void* kernel, Grid grid, void* params,
                   cudaStream_t stream) {
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(grid.blocks);
  config.blockDim = dim3(grid.threads);
  config.dynamicSmemBytes = grid.shared;
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs = e.overlap ? 1 : 0;
  void* arguments[] = {params};
  return text_of(cudaLaunchKernelExC(&config, kernel, arguments));
}

// The last block of a grid has the headers, and rows only where it is alone.
int movers(int blocks) { return std::max(blocks - 1, 1); }

// Strips that a warp moves in one go: one, if there is a warp for each.
int run_of(const Endpoint& e, int64_t strips) {
  return !e.options.lines || strips <= 16 * movers(e.blocks) ? 1 : 2;
}

// A warp for each run, as long as there is room, on as many multiprocessors as there are, `most` a
// block; and a block for the headers.
Grid packets_grid(const Endpoint& e, int64_t runs, int most, int threads = 128) {
  while (threads < 32 * most && runs > threads / 32 * movers(e.blocks)) threads *= 2;
  threads = std::min(threads, 32 * most);
  const int64_t wanted = (runs + threads / 32 - 1) / (threads / 32) + 1;
  return {static_cast<int>(std::clamp<int64_t>(wanted, 1, e.blocks)), threads, 0};
}

int64_t strips_of(int64_t pitch) { return (pitch + 2 * kCell - 1) / (2 * kCell); }

bool on_chunks(const Rows& rows) {
  return (reinterpret_cast<uintptr_t>(rows.data) | rows.stride) % kChunk == 0;
}

uint64_t all_ranks(int count) { return count == 64 ? ~uint64_t{0} : (uint64_t{1} << count) - 1; }
// What rows are quantized to; -1 where they travel as they are.
int wire_of(const DispatchLaunch& p) { return p.a.input >= 0 ? p.a.wire : -1; }

// As launch.h has it for `aligned`.
bool rows_aligned(const DispatchLaunch& p) {
  const bool whole = p.segment[kSegmentPayload].bytes % kChunk == 0;
  return on_chunks(p.a.payload) && whole && (p.a.input < 0 || p.a.input == kScalarBf16);
}

// How ids are loaded, as context.h has it.
void lay_out_ids(DispatchLaunch& p) {
  const int words = p.c.top_k * (p.a.wide_ids ? 2 : 1);
  const uint64_t all = reinterpret_cast<uintptr_t>(p.a.ids.data) | p.a.ids.stride | 4 * words;
  p.odd_choices =
      p.a.wide_ids || p.c.top_k % 4 != 0 || !on_chunks(p.a.ids) || !on_chunks(p.a.weights);
  if (p.c.ep_size > 32 || p.c.larger_end != 0 || all % 4 != 0) return;
  p.id_words = words;
  p.id_bytes = all % 16 == 0 ? 16 : all % 8 == 0 ? 8 : 4;
}

// Whether dispatch_small takes its tokens as many: there are, or a warp would have several runs to
// receive, as also happens to a rank that sends few. Sets how long the runs are then.
bool takes_many(const Endpoint& e, int64_t strips, DispatchLaunch& p, int& run) {
  if (p.a.max_rows <= kSmallTokens) return false;
  const int64_t rows = p.a.max_rows * std::max<int64_t>(e.geometry.ep_size - 1, 1);
  const int run_then = run_of(e, rows * strips), warps = 16 * movers(e.blocks);
  const bool divided = e.geometry.ep_size > 1 &&
                       rows * ((strips + run_then - 1) / run_then) > kUndividedRuns * warps;
  if (!divided && p.a.tokens <= kSmallTokens) return false;
  run = run_then;
  p.senders = divided ? kSenders : 0;
  p.nap = divided ? kNap : 0;
  return true;
}

// A block a token as far as there are blocks, or a warp a strip to receive.
const char* dispatch_quantized(Endpoint& e, DispatchLaunch& p, cudaStream_t stream) {
  p.runs = static_cast<int32_t>(strips_of(p.pitch));
  p.by_runs = fast_divisor(p.runs);
  p.by_peers = fast_divisor(e.geometry.ep_size - 1);
  const int64_t wanted = std::max(p.a.tokens, (p.a.max_rows * p.runs + 15) / 16) + 1;
  const int blocks = static_cast<int>(std::clamp<int64_t>(wanted, 1, e.blocks));
  const void* kernel = dispatch_quantized_kernel(wire_of(p), p.a.tokens > kSmallTokens);
  return launch(e, kernel, {blocks, kColumnThreads, static_cast<int>(p.image_bytes)}, &p, stream);
}

const char* dispatch_in_packets(Endpoint& e, DispatchLaunch& p, cudaStream_t stream) {
  const bool staged = p.a.input >= 0;
  const bool few =
      e.options.lines && p.a.tokens <= kManyTokens && e.geometry.ep_size <= kSmallRanks;
  if (few && staged && rows_aligned(p)) return dispatch_quantized(e, p, stream);
  const bool columns = few && !staged;
  const int64_t strips = strips_of(p.pitch), peers = std::max<int64_t>(e.geometry.ep_size - 1, 1);
  int run = columns ? run_of(e, p.a.max_rows * strips) : staged || !e.options.lines ? 1 : 2;
  const bool many = columns && takes_many(e, strips, p, run);
  p.runs = static_cast<int32_t>((strips + run - 1) / run);
  const int64_t runs = p.a.max_rows * p.runs;
  Grid grid = many ? packets_grid(e, runs * peers, 16, 512) : packets_grid(e, runs, 16);
  const int blocks = movers(grid.blocks);
  p.share = static_cast<int32_t>((p.a.tokens * p.runs + blocks - 1) / blocks);
  if (staged) {
    p.share = static_cast<int32_t>(round_up(p.share, p.runs));
    grid.shared = p.image_bytes;
  }
  p.by_runs = fast_divisor(p.runs);
  p.by_peers = fast_divisor(e.geometry.ep_size - 1);
  const void* kernel = columns
                           ? dispatch_small_kernel(many, run)
                           : dispatch_packets_kernel(e.options.lines, wire_of(p), rows_aligned(p));
  return launch(e, kernel, grid, &p, stream);
}

const char* dispatch_in_bulk(Endpoint& e, DispatchLaunch& p, cudaStream_t stream) {
  constexpr int kWarps = kBulkThreads / 32;
  const bool quantizes = p.a.input >= 0;
  // As many blocks as there are tokens, or padding rows to scrub.
  const int64_t work = std::max(p.a.tokens, e.geometry.ep_size * p.a.max_rows / kWarps) + 1;
  const int blocks = static_cast<int>(std::clamp<int64_t>(work, 1, e.blocks));
  p.share = static_cast<int32_t>((p.a.tokens + movers(blocks) - 1) / movers(blocks));
  // Parts whose loads a warp has in flight at once, all about as long; more for few tokens.
  const int64_t width = quantizes ? e.shape.padded : p.segment[kSegmentPayload].bytes;
  const int64_t steps = std::max<int64_t>(1, quantizes ? (width + 255) / 256 : (width + 511) / 512);
  const int64_t most = quantizes ? kQuantizedSteps : kDirectSteps;
  int64_t parts = (steps + most - 1) / most;
  while (parts < steps && p.share * parts < 2 * kWarps) parts *= 2;
  p.steps = static_cast<int32_t>((steps + parts - 1) / parts);
  p.parts = static_cast<int32_t>((steps + p.steps - 1) / p.steps);
  p.by_parts = fast_divisor(p.parts);
  const BulkKernel bulk = dispatch_bulk_kernel(wire_of(p), rows_aligned(p));
  return launch(e, bulk.kernel, {blocks, kBulkThreads, bulk.shared}, &p, stream);
}

// Steps of a warp, 512 bytes of a plain row or columns of a quantized one, are moved in runs: as
// short as gives every warp of the device one; in large rounds as long as registers allow, and some
// warps push while the others sum.
const char* combine(Endpoint& e, GroupedLaunch& p, bool grouped, cudaStream_t stream) {
  const bool scaled = quantized(e.shape.combine_wire);
  const int chunks = !scaled ? 1 : p.a.scalar == kScalarFp32 ? 4 : 2;
  const int64_t targets = std::max<int64_t>(e.geometry.ep_size - 1, 1);
  const int64_t bytes = scaled ? e.shape.hidden : e.geometry.combine_bytes;
  const int64_t steps = (bytes + kCombineStep - 1) / kCombineStep;
  const int64_t rows = std::max(e.max_rows * targets, e.tokens), room = 16 * movers(e.blocks);
  const auto runs_of = [&](int run) { return (steps + run - 1) / run; };
  CombineRuns runs{1, 1};
  // Two short sums of plain rows wait less for them than a long one.
  if (rows * runs_of(1) > (grouped && !scaled ? 2 * room : room))
    runs = grouped ? longest_grouped_runs(chunks) : CombineRuns{2, 2};
  const bool divided = e.blocks > 1 && rows * runs_of(2) > kRoundsTogether * room;
  if (divided) {
    if (!grouped) runs = longest_runs(chunks);
    p.pushers = grouped ? kGroupedPushers : kPushers;
    p.nap = kNap;
  }
  p.push_runs = static_cast<int32_t>(runs_of(runs.push));
  p.runs = static_cast<int32_t>(runs_of(runs.sum));
  p.units = static_cast<int32_t>(e.max_rows * targets * p.push_runs);
  p.targets = static_cast<int32_t>(targets);
  p.by_push_runs = fast_divisor(p.push_runs);
  p.by_runs = fast_divisor(p.runs);
  p.by_targets = fast_divisor(targets);
  const int most = grouped ? grouped_warps(runs, chunks) : combine_warps(runs);
  Grid grid = packets_grid(e, rows * p.runs, most);
  if (divided) grid.blocks = e.blocks;
  const int wire = e.shape.combine_wire;
  const void* kernel = grouped ? grouped_kernel(wire, p.grouped.scalar, runs)
                               : combine_kernel(wire, p.a.scalar, runs);
  return launch(e, kernel, grid, &p, stream);  // the kernel's launch begins p
}

// Where things lie in an endpoint's own memory, the state first.
struct Local {
  int64_t ranks, slots, tallies, end;

  explicit Local(const Geometry& g)
      : ranks(sizeof(State)),
        slots(ranks + round_up(g.max_tokens * 8, kLine)),
        tallies(slots + round_up(g.max_tokens * g.ep_size * 4, kLine)),
        end(tallies + cuda::tallies(static_cast<int>(g.ep_size)) * kMostBlocks * kChunk) {}
};

void place(Context& c, const Endpoint& e) {
  const auto offset = [&](int id) { return e.layout.region[id].offset; };
  c.payload = offset(kPayload);
  c.scales = offset(kScales);
  c.ids = offset(kIds);
  c.weights = offset(kWeights);
  c.combine = offset(kCombine);
  c.dispatch_inbox = offset(kDispatchInbox);
  for (int i = 0; i < e.geometry.num_extras; ++i) c.extra[i] = offset(kExtra + i);
  c.dispatch_peer_bytes = inbox_of_peer(e);
  c.dispatch_outbox = c.dispatch_inbox + c.rank * c.dispatch_peer_bytes;
}

void own_experts(Context& c, const Geometry& g) {
  const int64_t base = g.num_experts / g.ep_size, more = g.num_experts % g.ep_size;
  c.larger_end = static_cast<int32_t>(more * (base + 1));
  c.larger_ranks = static_cast<int32_t>(more);
  c.larger = expert_divisor(base + 1);
  c.smaller = expert_divisor(base);
}

const char* load_kernels() {
  constexpr int kDispatched[] = {-1, kFp8, kFp8Block128, kMxfp8, kNvfp4, kMxfp4};
  std::vector<const void*> kernels, staged;
  const auto has_room = [](const void* kernel, int bytes) {
    return text_of(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  };
  for (int wire : kDispatched) {
    for (bool aligned : {false, true}) {
      const BulkKernel bulk = dispatch_bulk_kernel(wire, aligned);
      kernels.push_back(bulk.kernel);
      if (const char* error = has_room(bulk.kernel, bulk.shared)) return error;
      for (bool lines : {false, true})
        (wire < 0 ? kernels : staged).push_back(dispatch_packets_kernel(lines, wire, aligned));
    }
  }
  for (const void* kernel : {meet_peers_kernel(), note_end_kernel(), note_clock_kernel(),
                             count_kernel(), scan_kernel(), place_kernel(), list_kernel()})
    kernels.push_back(kernel);
  for (int run : {1, 2})
    for (bool many : {false, true}) kernels.push_back(dispatch_small_kernel(many, run));
  for (int wire : kDispatched)
    for (bool many : {false, true})
      if (wire >= 0) staged.push_back(dispatch_quantized_kernel(wire, many));
  for (int wire : {kBf16, kFp16, kFp32, kFp8Block128, kMxfp8}) {
    for (int scalar : {kScalarBf16, kScalarFp16, kScalarFp32}) {
      const int chunks = !quantized(wire) ? 1 : scalar == kScalarFp32 ? 4 : 2;
      for (CombineRuns runs : {CombineRuns{1, 1}, CombineRuns{2, 2}, longest_runs(chunks)})
        kernels.push_back(combine_kernel(wire, scalar, runs));
      for (CombineRuns runs : {CombineRuns{1, 1}, longest_grouped_runs(chunks)})
        kernels.push_back(grouped_kernel(wire, scalar, runs));
    }
  }
  kernels.insert(kernels.end(), staged.begin(), staged.end());
  for (const void* kernel : kernels) {
    cudaFuncAttributes attributes;
    if (const char* error = text_of(cudaFuncGetAttributes(&attributes, kernel))) return error;
  }
  for (const void* kernel : staged)
    if (const char* error = has_room(kernel, kMostImage)) return error;
  return nullptr;
}

}  // namespace

int64_t local_bytes(const Geometry& g) { return Local(g).end; }

const char* open_endpoint(Endpoint& e, int rank, const int64_t* windows, uint8_t* local,
                          Status* status, int64_t timeout_ns) {
  Context& c = e.context;
  c = {};
  for (int r = 0; r < e.geometry.ep_size; ++r) c.window[r] = reinterpret_cast<uint8_t*>(windows[r]);
  // Packets and rows of a combine are stored by 16 bytes.
  for (int r = 0; r < e.geometry.ep_size; ++r)
    if (windows[r] % kChunk != 0) return "a window is not aligned to 16 bytes";
  if (e.geometry.combine_bytes % kChunk != 0) return "combine_bytes is no multiple of 16";
  c.state = reinterpret_cast<State*>(local);
  const Local at(e.geometry);
  c.token_ranks = reinterpret_cast<uint64_t*>(local + at.ranks);
  c.token_slots = reinterpret_cast<int32_t*>(local + at.slots);
  c.tallies = reinterpret_cast<Chunk*>(local + at.tallies);
  c.status = status;
  c.rank = rank;
  place(c, e);
  own_experts(c, e.geometry);
  c.timeout_ns = timeout_ns;
  c.combine_bytes = e.geometry.combine_bytes;
  c.ep_size = static_cast<int32_t>(e.geometry.ep_size);
  c.num_experts = static_cast<int32_t>(e.geometry.num_experts);
  c.top_k = static_cast<int32_t>(e.geometry.top_k);
  c.hidden = static_cast<int32_t>(e.shape.hidden);
  c.padded = static_cast<int32_t>(e.shape.padded);
  c.max_tokens = static_cast<int32_t>(e.geometry.max_tokens);
  c.num_extras = static_cast<int32_t>(e.geometry.num_extras);
  c.invalid_id = e.shape.invalid_id;
  c.scrub_all = e.shape.scrub_all;
  c.debug = e.shape.debug;
  c.strict = !e.options.lines;
  int multiprocessors = 0;
  if (const char* error = text_of(cudaDeviceGetAttribute(
          &multiprocessors, cudaDevAttrMultiProcessorCount, e.options.device)))
    return error;
  // A kernel that spins must not keep out one that it waits for: one block a multiprocessor, the
  // multiprocessors divided by the ranks that share them. With sharers there is no early launch
  // either, since a kernel that waits its turn would take up room.
  e.blocks = std::clamp(multiprocessors / std::max(1, e.options.sharers), 1, kMostBlocks);
  if (e.options.max_blocks > 0) e.blocks = std::min(e.blocks, e.options.max_blocks);
  e.overlap = e.options.sharers <= 1;
  if (const char* error = text_of(cudaStreamCreateWithFlags(&e.aside, cudaStreamNonBlocking)))
    return error;
  return load_kernels();
}

const char* launch_dispatch(Endpoint& e, const DispatchArgs& a, const float* global_scale,
                            uint32_t scale_bits, cudaStream_t stream) {
  DispatchLaunch p{};
  p.c = e.context;
  p.a = a;
  std::copy_n(e.extra, kMaxExtras, p.a.extra);
  p.global_scale = global_scale;
  lay_out_image(e, a.deferred, p);
  p.everyone = a.active == all_ranks(e.context.ep_size);
  p.pitch = static_cast<int32_t>(packet_bytes(p.image_bytes, cell_data(e)));
  e.format = static_cast<uint32_t>(a.wire) | (a.deferred ? kDeferred : 0u);
  e.tokens = a.tokens;
  e.max_rows = a.max_rows;
  e.active = a.active;
  lay_out_ids(p);
  p.facts = {kDispatch, static_cast<uint32_t>(a.max_rows), e.format, scale_bits, a.active};
  if (const char* error = begin_debug(e, p.facts, stream)) return error;
  // From what all ranks know alike.
  const bool packets =
      a.max_rows * p.pitch <= e.context.dispatch_peer_bytes && p.image_bytes <= kMostImage;
  const char* error = packets ? dispatch_in_packets(e, p, stream) : dispatch_in_bulk(e, p, stream);
  return error != nullptr ? error : end_debug(e, p.facts, stream);
}

const char* launch_combine(Endpoint& e, const CombineArgs& a, const Grouped* grouped,
                           cudaStream_t stream) {
  GroupedLaunch p{};
  if (grouped != nullptr) p.grouped = *grouped;
  p.c = e.context;
  p.a = a;
  p.tokens = static_cast<int32_t>(e.tokens);
  p.facts = {kCombineOp, static_cast<uint32_t>(e.max_rows), e.format, 0, e.active};
  p.odd = (reinterpret_cast<uintptr_t>(a.y) | a.source_stride | a.row_stride) % kChunk != 0;
  if (const char* error = begin_debug(e, p.facts, stream)) return error;
  const char* error = combine(e, p, grouped != nullptr, stream);
  return error != nullptr ? error : end_debug(e, p.facts, stream);
}

Endpoint::~Endpoint() {
  if (aside != nullptr) cudaStreamDestroy(aside);
}

}  // namespace moe_a2a::cuda
