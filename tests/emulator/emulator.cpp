#include <cuda_runtime.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

// What runs inside a fiber must stay out of ThreadSanitizer's sight: only the kernels' own accesses can race.
#define UNSEEN __attribute__((no_sanitize("thread")))
// Leaves its frame, and comes back with other registers: the compiler must not reason about either.
#define SWITCH __attribute__((noipa, no_sanitize("thread", "address")))

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef __SANITIZE_THREAD__
#include <sanitizer/tsan_interface.h>
#endif

namespace emulator {
namespace {

constexpr size_t kStack = 128 << 10;
constexpr unsigned kWarp = 32, kMaxBlock = 1024, kMaxCluster = 8;
constexpr size_t kMaxCopies = 256;  // in flight per thread
constexpr int kNaN = 0xff;           // every byte of it, in every type of float

struct Barrier {
  const char* name;
  unsigned members;
  unsigned arrived = 0, phase = 0;
  int votes = 0, last_votes = 0;
};

struct Warp {
  Barrier barrier{"a warp's exchange", 0};
  uint64_t values[2][kWarp] = {};  // by phase: a fast lane may write the next while a slow one reads
};

struct Block {
  Barrier barrier{"__syncthreads", 0};
  std::vector<Warp> warps;
  unsigned char* shared = nullptr;
};

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
  unsigned group;
};

typedef void* Jump[5];  // of the compiler's own setjmp, which no sanitizer intercepts and no system call slows

struct Fiber {
  Place place;
  Block* block;
  Warp* warp;
  Block* cluster;
  Barrier* cluster_barrier;
  unsigned cluster_phase = 0;  // in which this thread arrived
  bool has_arrived = false;
  const Barrier* awaited = nullptr;
  unsigned awaited_phase = 0;
  bool done = false;
  Copy* copies;  // [kMaxCopies]
  size_t num_copies = 0;
  unsigned group = 0;  // of the copies issued next
  void* stack;
  Jump jump;
  bool started = false;
#ifdef __SANITIZE_ADDRESS__
  void* fake_stack = nullptr;
#endif
#ifdef __SANITIZE_THREAD__
  void* tsan = nullptr;
#endif
};

struct Running {
  const Launch* launch;
  void (*body)(void*);
  void* argument;
  Fiber* fiber;
  Jump scheduler;
#ifdef __SANITIZE_ADDRESS__
  void* fake_stack = nullptr;
  const void* stack = nullptr;
  size_t stack_size = 0;
#endif
#ifdef __SANITIZE_THREAD__
  void* tsan = nullptr;
#endif
} running;

[[noreturn]] void die(const char* what) {
  std::fprintf(stderr, "emulator: %s: %s\n", running.launch->kernel, what);
  std::abort();
}

UNSEEN void release([[maybe_unused]] void* point) {
#ifdef __SANITIZE_THREAD__
  __tsan_release(point);
#endif
}

UNSEEN void acquire([[maybe_unused]] void* point) {
#ifdef __SANITIZE_THREAD__
  __tsan_acquire(point);
#endif
}

SWITCH void jump(Jump& to) { __builtin_longjmp(to, 1); }

void start();

// The first time on a stack of its own.
SWITCH void enter(Fiber& fiber) {
  if (fiber.started) jump(fiber.jump);
  fiber.started = true;
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = fiber.stack;
  context.uc_stack.ss_size = kStack;
  makecontext(&context, start, 0);
  setcontext(&context);
}

SWITCH void resume(Fiber& fiber) {
  running.fiber = &fiber;
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(&running.fake_stack, fiber.stack, kStack);
#endif
#ifdef __SANITIZE_THREAD__
  __tsan_switch_to_fiber(fiber.tsan, __tsan_switch_to_fiber_no_sync);
#endif
  if (__builtin_setjmp(running.scheduler) == 0) enter(fiber);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(running.fake_stack, nullptr, nullptr);
#endif
}

SWITCH void yield() {
  Fiber& fiber = *running.fiber;
#ifdef __SANITIZE_ADDRESS__
  void** keep = fiber.done ? nullptr : &fiber.fake_stack;
  __sanitizer_start_switch_fiber(keep, running.stack, running.stack_size);
#endif
#ifdef __SANITIZE_THREAD__
  __tsan_switch_to_fiber(running.tsan, __tsan_switch_to_fiber_no_sync);
#endif
  if (__builtin_setjmp(fiber.jump) == 0) jump(running.scheduler);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(running.fiber->fake_stack, &running.stack, &running.stack_size);
#endif
}

SWITCH void start() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &running.stack, &running.stack_size);
#endif
  acquire(&running);
  running.body(running.argument);
  copy_async_wait(0);  // left in flight, they would still land
  release(&running);
  running.fiber->done = true;
  yield();
}

UNSEEN unsigned arrive(Barrier& barrier) {
  const unsigned phase = barrier.phase;
  release(phase % 2 ? &barrier.arrived : &barrier.phase);
  if (++barrier.arrived == barrier.members) {
    barrier.arrived = 0;
    barrier.last_votes = barrier.votes;
    barrier.votes = 0;
    ++barrier.phase;
  }
  return phase;
}

UNSEEN void await(Barrier& barrier, unsigned phase) {
  Fiber& fiber = *running.fiber;
  fiber.awaited_phase = phase;
  if (barrier.phase == phase) {
    fiber.awaited = &barrier;
    yield();
    fiber.awaited = nullptr;
  }
  acquire(phase % 2 ? &barrier.arrived : &barrier.phase);
}

[[noreturn]] void deadlock(const std::vector<Fiber>& fibers) {
  size_t done = 0;
  const Fiber* waiting = nullptr;
  for (const Fiber& fiber : fibers) {
    done += fiber.done;
    if (!fiber.done) waiting = &fiber;
  }
  char text[200];
  std::snprintf(text, sizeof text, "block %u waits at %s for %u of %u threads (%zu of the cluster's %zu have ended)",
                waiting->place.block.x, waiting->awaited->name, waiting->awaited->members - waiting->awaited->arrived,
                waiting->awaited->members, done, fibers.size());
  die(text);
}

void run_to_end(std::vector<Fiber>& fibers) {
  for (bool alive = true; alive;) {
    bool moved = false;
    alive = false;
    for (Fiber& fiber : fibers) {
      if (fiber.done) continue;
      alive = true;
      if (fiber.awaited != nullptr && fiber.awaited->phase == fiber.awaited_phase) continue;
      resume(fiber);
      moved = true;
    }
    if (alive && !moved) deadlock(fibers);
  }
}

// Stacks are kept for the next launch.
void* stack(size_t index) {
  static std::vector<void*> stacks;
  while (stacks.size() <= index) {
    void* memory = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) die("no memory for stacks");
    stacks.push_back(memory);
  }
  return stacks[index];
}

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};
using Memory = std::unique_ptr<unsigned char, Free>;

Memory poisoned(size_t bytes) {
  void* memory = nullptr;
  if (posix_memalign(&memory, 128, bytes) != 0) return nullptr;
  std::memset(memory, kNaN, bytes);
  return Memory(static_cast<unsigned char*>(memory));
}

void run_cluster(const Launch& shape, unsigned first, std::vector<Memory>& shared) {
  Barrier cluster_barrier{"the cluster's barrier", shape.cluster * shape.block};
  std::vector<Block> blocks(shape.cluster);
  std::vector<Fiber> fibers(shape.cluster * shape.block);
  const std::unique_ptr<Copy[]> copies(new Copy[fibers.size() * kMaxCopies]);
  for (unsigned rank = 0; rank < shape.cluster; ++rank) {
    Block& block = blocks[rank];
    shared.push_back(poisoned(shape.shared));
    block.shared = shared.back().get();
    block.barrier.members = shape.block;
    block.warps.resize((shape.block + kWarp - 1) / kWarp);
    for (unsigned thread = 0; thread < shape.block; ++thread) {
      const unsigned index = rank * shape.block + thread;
      Fiber& fiber = fibers[index];
      fiber.place = {{thread}, {first + rank}, {shape.block}, {shape.grid}, rank, shape.cluster, block.shared};
      fiber.block = &block;
      fiber.warp = &block.warps[thread / kWarp];
      ++fiber.warp->barrier.members;
      fiber.cluster = blocks.data();
      fiber.cluster_barrier = &cluster_barrier;
      fiber.copies = &copies[index * kMaxCopies];
      fiber.stack = stack(index);
#ifdef __SANITIZE_THREAD__
      fiber.tsan = __tsan_create_fiber(0);
#endif
    }
  }
  run_to_end(fibers);
#ifdef __SANITIZE_THREAD__
  for (Fiber& fiber : fibers) __tsan_destroy_fiber(fiber.tsan);
#endif
}

int environment(const char* name, int otherwise) {
  const char* value = std::getenv(name);
  return value == nullptr ? otherwise : std::atoi(value);
}

int attribute(cudaDeviceAttr which) {
  const int sm = environment("LEEWAY_EMULATED_SM", 90);
  switch (which) {
    case cudaDevAttrMultiProcessorCount: return 4;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: return (sm == 90 ? 228 : 164) << 10;
    case cudaDevAttrComputeCapabilityMajor: return sm / 10;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      return environment("LEEWAY_EMULATED_SHARED", (sm == 90 ? 227 : 163) << 10);
  }
  return 0;
}

}  // namespace

UNSEEN Place place() { return running.fiber->place; }

UNSEEN void sync_block() {
  Barrier& barrier = running.fiber->block->barrier;
  await(barrier, arrive(barrier));
}

UNSEEN int vote_block(int predicate) {
  Barrier& barrier = running.fiber->block->barrier;
  barrier.votes += predicate != 0;
  sync_block();
  return barrier.last_votes;
}

UNSEEN const uint64_t* gather(unsigned mask, uint64_t value) {
  Warp& warp = *running.fiber->warp;
  if (mask != 0xffffffffu) die("warp functions take the full mask");
  const unsigned phase = warp.barrier.phase;
  warp.values[phase % 2][running.fiber->place.thread.x % kWarp] = value;
  await(warp.barrier, arrive(warp.barrier));
  return warp.values[phase % 2];
}

UNSEEN unsigned vote_warp(unsigned mask, int predicate) {
  const uint64_t* values = gather(mask, predicate != 0);
  unsigned votes = 0;
  for (unsigned i = 0; i < kWarp; ++i) votes |= static_cast<unsigned>(values[i]) << i;
  return votes;
}

UNSEEN uint64_t exchange(unsigned mask, uint64_t value, unsigned lane) { return gather(mask, value)[lane]; }

UNSEEN void cluster_arrive() {
  Fiber& fiber = *running.fiber;
  if (fiber.has_arrived) die("a thread arrives twice at the cluster's barrier without waiting");
  fiber.has_arrived = true;
  fiber.cluster_phase = arrive(*fiber.cluster_barrier);
}

UNSEEN void cluster_wait() {
  Fiber& fiber = *running.fiber;
  if (!fiber.has_arrived) die("a thread waits at the cluster's barrier without arriving");
  fiber.has_arrived = false;
  await(*fiber.cluster_barrier, fiber.cluster_phase);
}

UNSEEN void* cluster_map(const void* mine, unsigned rank) {
  const Fiber& fiber = *running.fiber;
  if (rank >= fiber.place.cluster_size) die("no such rank in the cluster");
  return fiber.cluster[rank].shared + (static_cast<const unsigned char*>(mine) - fiber.place.shared);
}

UNSEEN void copy_async(void* to, const void* from, size_t bytes) {
  Fiber& fiber = *running.fiber;
  if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % bytes != 0) die("unaligned copy");
  if (fiber.num_copies == kMaxCopies) die("too many copies in flight");
  fiber.copies[fiber.num_copies++] = {to, from, bytes, fiber.group};
}

UNSEEN void copy_async_commit() { ++running.fiber->group; }

UNSEEN void copy_async_wait(unsigned groups_left) {
  Fiber& fiber = *running.fiber;
  size_t kept = 0;
  for (size_t i = 0; i < fiber.num_copies; ++i) {
    const Copy copy = fiber.copies[i];
    if (copy.group + groups_left < fiber.group || groups_left == 0) {
      std::memcpy(copy.to, copy.from, copy.bytes);
    } else {
      fiber.copies[kept++] = copy;
    }
  }
  fiber.num_copies = kept;
}

cudaError_t run(const Launch& shape, void (*body)(void*), void* argument) {
  const bool clusters = attribute(cudaDevAttrComputeCapabilityMajor) >= 9;
  const unsigned max_cluster = clusters ? kMaxCluster : 1;
  if (shape.grid == 0 || shape.block == 0 || shape.block > kMaxBlock) return cudaErrorInvalidConfiguration;
  if (shape.cluster == 0 || shape.cluster > max_cluster || shape.grid % shape.cluster != 0) {
    return cudaErrorInvalidConfiguration;
  }
  if (shape.shared > size_t(attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin))) return cudaErrorInvalidValue;
  running.launch = &shape;
  running.body = body;
  running.argument = argument;
#ifdef __SANITIZE_THREAD__
  running.tsan = __tsan_get_current_fiber();
#endif
  release(&running);
  std::vector<Memory> shared;  // freed last: only then is it known that nobody raced with it
  for (unsigned first = 0; first < shape.grid; first += shape.cluster) run_cluster(shape, first, shared);
  acquire(&running);
  return cudaSuccess;
}

}  // namespace emulator

cudaError_t cudaMalloc(void** to, size_t bytes) {
  *to = emulator::poisoned(bytes).release();
  return *to == nullptr ? cudaErrorMemoryAllocation : cudaSuccess;
}

cudaError_t cudaFree(void* memory) {
  std::free(memory);
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  if (bytes > 0) std::memcpy(to, from, bytes);
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  if (bytes > 0) std::memset(to, value, bytes);
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  *value = emulator::attribute(which);
  return cudaSuccess;
}

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
  }
  return "unknown error";
}
