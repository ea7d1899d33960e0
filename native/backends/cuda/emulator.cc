#include "backends/cuda/emulator.h"

#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <deque>
#include <map>
#include <memory>
#include <utility>
#include <vector>

#include "backends/cuda/emulator_hopper.h"

namespace emulator {

Place place;
Launches* noted = nullptr;

namespace {

constexpr size_t kStack = 256 << 10;
constexpr size_t kMostShared = 227 << 10;  // of a Hopper block

// A switch of stacks. ucontext is portable but enters the kernel at every switch, which is most of the time
// of a test with tensor-core kernels.
#if defined(__x86_64__) && !defined(__SANITIZE_ADDRESS__)
#define PF_FAST_SWITCH 1
struct Context {
  void* stack = nullptr;
};
extern "C" void pf_emulator_switch(void** save, void* load);
asm(R"(
.text
.globl pf_emulator_switch
.hidden pf_emulator_switch
.type pf_emulator_switch, @function
pf_emulator_switch:
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
.size pf_emulator_switch, .-pf_emulator_switch
)");
void Switch(Context* from, Context* to) { pf_emulator_switch(&from->stack, to->stack); }
void Prepare(Context* context, char* stack, void (*entry)()) {
  void** top = reinterpret_cast<void**>(stack + kStack);
  *--top = nullptr;  // keeps the entry's stack aligned as after a call
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  context->stack = top;
}
#else
struct Context {
  ucontext_t state;
};
void Switch(Context* from, Context* to) { swapcontext(&from->state, &to->state); }
void Prepare(Context* context, char* stack, void (*entry)()) {
  getcontext(&context->state);
  context->state.uc_stack.ss_sp = stack;
  context->state.uc_stack.ss_size = kStack;
  context->state.uc_link = nullptr;
  makecontext(&context->state, entry, 0);
}
#endif

struct Copy {
  void* to;
  const void* from;
  size_t bytes, zeros;
};
struct Fiber {
  Context context;
  std::unique_ptr<char, void (*)(char*)> stack{nullptr, [](char* p) { munmap(p, kStack); }};
  bool alive = false;
  dim3 thread;
  std::deque<std::vector<Copy>> groups;
  std::vector<Copy> open;
};
struct Warp {
  uint64_t round = 0;
  int arrived = 0;
  WarpValues values[2];
};
struct Barrier {
  uint64_t round = 0;
  int arrived = 0;
};

std::vector<Fiber> fibers;
std::vector<Warp> warps;
std::map<int, Barrier> barriers;
Context scheduler;
int current = 0, threads = 0, alive = 0, or_value[2];
uint64_t changes = 0;
size_t shared = 0;
bool stopped = false;
const std::function<void()>* body = nullptr;
alignas(1024) unsigned char dynamic[kMostShared];
char error[256];

void Entry() {
  for (;;) {
    (*body)();
    CopyWait(0);
    fibers[current].alive = false;
    --alive;
    ++changes;
    Switch(&fibers[current].context, &scheduler);
  }
}

int CountBits(uint32_t mask) { return __builtin_popcount(mask); }

bool RunBlock(bool reverse) {
  warps.assign((threads + 31) / 32, Warp{});
  barriers.clear();
  AsyncReset(threads);
  alive = threads;
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = fibers[i];
    fiber.alive = true;
    fiber.groups.clear();
    fiber.open.clear();
    const unsigned bx = place.block_dim.x, by = place.block_dim.y;
    fiber.thread = dim3(i % bx, i / bx % by, i / (bx * by));
    Prepare(&fiber.context, fiber.stack.get(), &Entry);
  }
  while (alive > 0) {
    const uint64_t before = changes;
    for (int k = 0; k < threads; ++k) {
      current = reverse ? threads - 1 - k : k;
      if (!fibers[current].alive) continue;
      place.thread = fibers[current].thread;
      Switch(&scheduler, &fibers[current].context);
      if (stopped) return false;
    }
    if (changes == before) {
      snprintf(error, sizeof(error), "kernel is stuck: %d of %d threads of block (%u, %u, %u) wait for ever",
               alive, threads, place.block.x, place.block.y, place.block.z);
      return false;
    }
  }
  if (const char* left = AsyncLeft()) {
    snprintf(error, sizeof(error), "%s", left);
    return false;
  }
  return true;
}

}  // namespace

int Linear() { return current; }
void* Dynamic() { return dynamic; }
size_t SharedBytes() { return shared; }

size_t MostShared() {
  static const size_t most = [] {
    const char* wish = getenv("PYRAFLOW_EMULATOR_SHARED");
    const size_t bytes = wish ? strtoull(wish, nullptr, 10) : kMostShared;
    return bytes < kMostShared ? bytes : kMostShared;
  }();
  return most;
}
const char* Error() { return error; }
void Progress() { ++changes; }

void Stop(const char* reason) {
  snprintf(error, sizeof(error), "kernel stopped in block (%u, %u, %u): %s", place.block.x, place.block.y,
           place.block.z, reason);
  stopped = true;
  for (;;) Wait();
}

void Wait() {
  const int me = current;
  Switch(&fibers[me].context, &scheduler);
}

void BlockBarrier(int id, int count) {
  Barrier& barrier = barriers[id];
  const uint64_t round = barrier.round;
  ++changes;
  if (++barrier.arrived == (count ? count : threads)) {
    barrier.arrived = 0;
    ++barrier.round;
    return;
  }
  while (barrier.round == round) Wait();
}

void BlockArrive(int id, int count) {
  Barrier& barrier = barriers[id];
  ++changes;
  if (++barrier.arrived < count) return;
  barrier.arrived = 0;
  ++barrier.round;
}

int BlockOr(int value) {
  const int slot = barriers[-1].round & 1;
  if (barriers[-1].arrived == 0) or_value[slot] = 0;
  or_value[slot] |= value != 0;
  BlockBarrier(-1, 0);
  return or_value[slot];
}

const WarpValues& WarpExchange(uint32_t mask, const void* value, size_t bytes) {
  Warp& warp = warps[current / 32];
  const int inside = threads - current / 32 * 32;
  if (inside < 32) mask &= (1u << inside) - 1;
  const uint64_t round = warp.round;
  WarpValues& values = warp.values[round & 1];
  memcpy(values.of[current & 31], value, bytes);
  ++changes;
  if (++warp.arrived == CountBits(mask)) {
    warp.arrived = 0;
    ++warp.round;
  } else {
    while (warp.round == round) Wait();
  }
  return values;
}

void CopyLater(void* to, const void* from, size_t bytes, size_t zeros) {
  fibers[current].open.push_back({to, from, bytes, zeros});
}
void CopyCommit() {
  Fiber& fiber = fibers[current];
  fiber.groups.push_back(std::move(fiber.open));
  fiber.open.clear();
}
void CopyWait(int groups_left) {
  Fiber& fiber = fibers[current];
  if (groups_left == 0 && !fiber.open.empty()) CopyCommit();
  while (fiber.groups.size() > static_cast<size_t>(groups_left)) {
    for (const Copy& copy : fiber.groups.front()) {
      if (copy.bytes) memcpy(copy.to, copy.from, copy.bytes);
      memset(static_cast<char*>(copy.to) + copy.bytes, 0, copy.zeros);
    }
    fiber.groups.pop_front();
  }
}

bool Run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel) {
  threads = static_cast<int>(block.x * block.y * block.z);
  if (threads < 1 || threads > 1024 || shared_bytes > MostShared() || grid.x < 1 || grid.y < 1 ||
      grid.z < 1 || grid.y > 65535 || grid.z > 65535 || grid.x > 0x7fffffffu) {
    snprintf(error, sizeof(error), "invalid launch: grid (%u, %u, %u), block of %d threads, %zu bytes shared",
             grid.x, grid.y, grid.z, threads, shared_bytes);
    return false;
  }
  while (fibers.size() < static_cast<size_t>(threads)) {
    void* stack = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    fibers.emplace_back();
    fibers.back().stack.reset(static_cast<char*>(stack));
  }
  static const char* const order = getenv("PYRAFLOW_EMULATOR_ORDER");
  const bool reverse = order && !strcmp(order, "reverse");
  body = &kernel;
  shared = shared_bytes;
  stopped = false;
  place.block_dim = block;
  place.grid_dim = grid;
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        place.block = dim3(x, y, z);
        memset(dynamic, 0xff, shared_bytes);  // NaN: nobody may count on zeros
        if (!RunBlock(reverse)) return false;
      }
  return true;
}

}  // namespace emulator
