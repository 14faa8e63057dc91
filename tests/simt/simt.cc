// Runs the blocks of a kernel: all of them at once, since they may wait for each other, a warp
// after the other, and of a warp the last lane first.
//
// Stores to windows get there late. Relaxed ones, each by itself, when the warp has had this turn
// or a later one, as a draw decides: so in any order, but before a fence of their warp is over.
// Plain ones of 16 bytes when the memory model says that they must: once a barrier of the block has
// put them before a fence or a release for the system. All of them when the kernel ends.
//
// Where lines are relied on, one is as good as one access: it is drawn as a whole, and it is stored
// from the first lane on, but loaded from the last one on, which has the tag.
#include "simt.h"

#undef threadIdx
#undef blockIdx
#undef blockDim
#undef gridDim
#undef __noinline__

#include <emmintrin.h>
#include <sched.h>
#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <vector>

#include "cuda/context.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_UNPOISON_MEMORY_REGION(at, bytes)
#endif

namespace simt {

Index thread_index, block_index, block_size, grid_size;

namespace {

constexpr size_t kStack = 64 << 10;
constexpr unsigned kLanes = 32;

struct Store {
  void* at;
  uint64_t lo, hi;
  bool wide;  // 16 bytes, else 4
};

struct Warp {
  uint64_t value[2][kLanes];
  Kind kind = kShuffle;
  unsigned arrived = 0, alive = kLanes, generation = 0;
  std::vector<Store> relaxed[kLanes];  // in this turn
  std::vector<Store> late;             // relaxed, on their way
  std::vector<Store> plain;            // before no barrier yet
};

struct Block {
  Index index;
  std::vector<Warp> warps;
  unsigned arrived = 0, alive = 0, generation = 0;
  bool votes[2] = {};  // at this barrier, and at the next one
  std::map<const void*, std::unique_ptr<uint8_t[]>> shared;
  std::vector<uint8_t> dynamic;
  std::vector<Store> plain;  // before a barrier
};

struct Fiber {
  void* stack_pointer;
  Block* block;
  Warp* warp;
  unsigned thread;
  bool done = false;
};

using Kernel = void (*)(const void*);
Kernel kernel;
const void* params;
Fiber* running;
void* scheduler;

extern "C" void simt_switch(void** save, void* load);
asm(R"(
.text
.globl simt_switch
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

[[noreturn]] void die(const char* what) {
  std::fprintf(stderr, "simt: block %u, thread %u: %s\n", block_index.x, thread_index.x, what);
  std::abort();
}

void complete(Warp& w) {
  w.arrived = 0;
  ++w.generation;
}

void complete(Block& b) {
  b.arrived = 0;
  ++b.generation;
  b.votes[b.generation % 2] = false;
}

void body() {
  kernel(params);
  Fiber& f = *running;
  f.done = true;
  Warp& w = *f.warp;
  if (--w.alive != 0 && w.arrived == w.alive) complete(w);
  Block& b = *f.block;
  if (--b.alive != 0 && b.arrived == b.alive) complete(b);
  yield();
  die("a thread went on after its end");
}

void prepare(Fiber& f, uint8_t* stack) {
  // A thread ends without returning, so what AddressSanitizer knows of its frames is still there.
  ASAN_UNPOISON_MEMORY_REGION(stack, kStack);
  auto* top = reinterpret_cast<void**>(stack + kStack);
  *--top = nullptr;  // keeps the stack aligned as a call leaves it
  *--top = reinterpret_cast<void*>(body);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  f.stack_pointer = top;
}

void resume(Fiber& f) {
  running = &f;
  thread_index.x = f.thread;
  block_index = f.block->index;
  simt_switch(&scheduler, f.stack_pointer);
}

// Kept from launch to launch.
uint8_t* stacks_of(unsigned threads) {
  static uint8_t* kept = nullptr;
  static unsigned room = 0;
  if (threads > room) {
    if (kept != nullptr) munmap(kept, room * kStack);
    void* fresh = mmap(nullptr, threads * kStack, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    kept = fresh == MAP_FAILED ? nullptr : static_cast<uint8_t*>(fresh);
    room = kept == nullptr ? 0 : threads;
  }
  return kept;
}

// ---- stores on their way ----------------------------------------------------------------------

uint64_t draw() {
  static uint64_t state = 1;
  state = state * 6364136223846793005 + 1442695040888963407;
  return state >> 32;
}

// Where in whose window; negative where in none.
int64_t window_offset(const void* at) {
  const auto& c = *static_cast<const moe_a2a::cuda::Context*>(params);  // first in either launch
  const int64_t bytes = c.dispatch_inbox + c.ep_size * c.dispatch_peer_bytes;
  for (int r = 0; r < c.ep_size; ++r) {
    const int64_t offset = static_cast<const uint8_t*>(at) - c.window[r];
    if (offset >= 0 && offset < bytes) return offset;
  }
  return -1;
}

// Stores of the same unit get to a window together.
uint64_t unit_of(const Store& s) {
  const auto& c = *static_cast<const moe_a2a::cuda::Context*>(params);
  const bool line = !c.strict && window_offset(s.at) >= c.dispatch_inbox;
  return reinterpret_cast<uintptr_t>(s.at) / (line ? moe_a2a::kLine : 4);
}

void show(const Store& s) {
  std::atomic_thread_fence(std::memory_order_release);
  if (s.wide)
    _mm_store_si128(static_cast<__m128i*>(s.at),
                    _mm_set_epi64x(static_cast<long long>(s.hi), static_cast<long long>(s.lo)));
  else
    __atomic_store_n(static_cast<uint32_t*>(s.at), static_cast<uint32_t>(s.lo), __ATOMIC_RELAXED);
}

void show_all(std::vector<Store>& stores) {
  for (const Store& s : stores) show(s);
  stores.clear();
}

// About half of the units, then perhaps the others.
void show_some(Warp& w, bool all) {
  for (auto& lane : w.relaxed) {
    w.late.insert(w.late.end(), lane.begin(), lane.end());
    lane.clear();
  }
  if (w.late.empty()) return;
  const uint64_t salt = draw();
  size_t kept = 0;
  for (const Store& s : w.late) {
    if ((unit_of(s) + salt) * 0x9E3779B97F4A7C15 >> 63 != 0)
      show(s);
    else
      w.late[kept++] = s;
  }
  w.late.resize(kept);
  if (all || draw() % 2 == 0) show_all(w.late);
}

// A thread's plain stores come before the barrier that it is at.
void pass_on(Warp& w, Block& b) {
  b.plain.insert(b.plain.end(), w.plain.begin(), w.plain.end());
  w.plain.clear();
}

}  // namespace

void yield() { simt_switch(&running->stack_pointer, scheduler); }

const uint64_t* exchange(Kind kind, uint64_t value) {
  Warp& w = *running->warp;
  const unsigned mine = w.generation;
  if (w.arrived != 0 && w.kind != kind) die("the lanes of a warp wait for different things");
  w.kind = kind;
  w.value[mine % 2][lane()] = value;
  if (++w.arrived == w.alive) complete(w);
  // The one that completes it waits for its turn too: lanes go on in the order that packets rest
  // on.
  do yield();
  while (w.generation == mine);
  return w.value[mine % 2];
}

bool block_barrier(bool vote) {
  Block& b = *running->block;
  pass_on(*running->warp, b);
  const unsigned mine = b.generation;
  b.votes[mine % 2] |= vote;
  if (++b.arrived == b.alive) complete(b);
  do yield();
  while (b.generation == mine);
  return b.votes[mine % 2];
}

void* shared(const void* key, size_t bytes) {
  auto& slot = running->block->shared[key];
  if (!slot) {
    slot.reset(new uint8_t[bytes]);
    std::memset(slot.get(), 0xCD, bytes);  // nobody may rely on zeros
  }
  return slot.get();
}

void* dynamic_shared() { return running->block->dynamic.data(); }

void store_relaxed(void* at, uint64_t lo, uint64_t hi, bool wide) {
  running->warp->relaxed[lane()].push_back({at, lo, hi, wide});
}

void store_plain(void* at, uint64_t lo, uint64_t hi) {
  const Store s{at, lo, hi, true};
  if (reinterpret_cast<uintptr_t>(at) % 16 != 0) die("a store is not aligned");
  if (window_offset(at) < 0)
    show(s);
  else
    running->warp->plain.push_back(s);
}

void fence() {
  Warp& w = *running->warp;
  show_all(w.late);
  show_all(w.relaxed[lane()]);
  pass_on(w, *running->block);
  show_all(running->block->plain);
}

}  // namespace simt

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel, void** args) {
  using namespace simt;
  simt::kernel = reinterpret_cast<Kernel>(const_cast<void*>(kernel));
  params = args[0];
  grid_size.x = config->gridDim.x;
  block_size.x = config->blockDim.x;
  const unsigned threads = grid_size.x * block_size.x;
  uint8_t* stacks = stacks_of(threads);
  if (stacks == nullptr) return 2;
  std::vector<Block> blocks(grid_size.x);
  std::vector<Fiber> fibers(threads);
  for (unsigned i = 0; i < threads; ++i) {
    const unsigned block = i / block_size.x, thread = i % block_size.x;
    Block& b = blocks[block];
    if (thread == 0) {
      b.index.x = block;
      b.warps.resize(block_size.x / kLanes);
      b.alive = block_size.x;
      b.dynamic.assign(config->dynamicSmemBytes + 16, 0xCD);
    }
    fibers[i] = {nullptr, &b, &b.warps[thread / kLanes], thread, false};
    prepare(fibers[i], stacks + i * kStack);
  }
  // Of the grid, from the end if negative: another kernel's failure is seen from this warp on.
  const char* fails = std::getenv("MOE_SIMT_FAILS_BEFORE_WARP");
  const int warps = static_cast<int>(threads / kLanes), wanted = fails ? std::atoi(fails) : warps;
  const int failing = wanted < 0 ? wanted + warps : wanted;
  bool first = true;
  for (unsigned left = threads; left != 0; first = false) {
    for (unsigned warp = 0; warp < threads; warp += kLanes) {
      if (first && static_cast<int>(warp / kLanes) == failing)
        static_cast<const moe_a2a::cuda::Context*>(params)->state->failed = 1;
      for (unsigned lane = kLanes; lane-- > 0;) {
        Fiber& f = fibers[warp + lane];
        if (f.done) continue;
        resume(f);
        left -= f.done;
      }
      show_some(*fibers[warp].warp, false);
    }
    if (left != 0) sched_yield();
  }
  for (Block& b : blocks) {
    show_all(b.plain);
    for (Warp& w : b.warps) {
      show_all(w.plain);
      show_some(w, true);
    }
  }
  return 0;
}

// The benchmark's kernels are not run here.
#include "cuda/link.h"

namespace moe_a2a::cuda {
void launch_link_store(uint8_t*, const uint8_t*, int64_t, int, int, cudaStream_t) {}
void launch_link_exchange(uint8_t*, const uint8_t*, const uint8_t*, uint8_t*, int64_t, int64_t,
                          uint64_t*, int, int, cudaStream_t) {}
}  // namespace moe_a2a::cuda
