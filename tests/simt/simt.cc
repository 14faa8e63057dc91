// Runs the blocks of a kernel: all of them at once, since they may wait for each other, a warp
// after the other, and of a warp the last lane first.
//
// Packets are stored when all lanes of the warp have had their turn, from the first lane on, while
// they are loaded from the last lane on. A line's tag is in its last lane: it is stored after the
// line's data and loaded before them, as if a line were one access.
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

namespace simt {

Index thread_index, block_index, block_size, grid_size;

namespace {

constexpr size_t kStack = 64 << 10;
constexpr unsigned kLanes = 32;

struct Packet {
  __m128i* at;
  uint64_t lo, hi;
};

struct Weak {
  void* at;
  size_t bytes;
  uint8_t data[16];
};

struct Warp {
  uint64_t value[2][kLanes];
  Kind kind = kShuffle;
  unsigned arrived = 0, alive = kLanes, generation = 0;
  std::vector<Packet> packets[kLanes];
  std::vector<Weak> stored;
};

struct Block {
  Index index;
  std::vector<Warp> warps;
  unsigned arrived = 0, alive = 0, generation = 0;
  std::map<const void*, std::unique_ptr<uint8_t[]>> shared;
  std::vector<uint8_t> dynamic;
  std::vector<Weak> released;
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
}

void body() {
  kernel(params);
  Fiber& f = *running;
  release_stores();
  if (f.block->alive == 1) show_stores();
  f.done = true;
  Warp& w = *f.warp;
  if (--w.alive != 0 && w.arrived == w.alive) complete(w);
  Block& b = *f.block;
  if (--b.alive != 0 && b.arrived == b.alive) complete(b);
  yield();
  die("a thread went on after its end");
}

void prepare(Fiber& f, uint8_t* stack) {
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

void flush(Warp& w) {
  for (auto& lane : w.packets) {
    for (const Packet& p : lane) {
      std::atomic_thread_fence(std::memory_order_release);
      _mm_store_si128(p.at,
                      _mm_set_epi64x(static_cast<long long>(p.hi), static_cast<long long>(p.lo)));
    }
    lane.clear();
  }
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

void block_barrier() {
  Block& b = *running->block;
  const unsigned mine = b.generation;
  if (++b.arrived == b.alive) complete(b);
  do yield();
  while (b.generation == mine);
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

void store_weak(void* at, const void* from, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(at) % bytes != 0) die("a store is not aligned");
  Weak weak{at, bytes, {}};
  std::memcpy(weak.data, from, bytes);
  running->warp->stored.push_back(weak);
}

void release_stores() {
  std::vector<Weak>&from = running->warp->stored, &to = running->block->released;
  to.insert(to.end(), from.begin(), from.end());
  from.clear();
}

void show_stores() {
  release_stores();
  for (const Weak& w : running->block->released) std::memcpy(w.at, w.data, w.bytes);
  running->block->released.clear();
}

void store_packet(void* at, uint64_t lo, uint64_t hi) {
  running->warp->packets[lane()].push_back({static_cast<__m128i*>(at), lo, hi});
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
  for (unsigned left = threads; left != 0;) {
    for (unsigned warp = 0; warp < threads; warp += kLanes) {
      for (unsigned lane = kLanes; lane-- > 0;) {
        Fiber& f = fibers[warp + lane];
        if (f.done) continue;
        resume(f);
        left -= f.done;
      }
      flush(*fibers[warp].warp);
    }
    if (left != 0) sched_yield();
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
