// SPDX-License-Identifier: Apache-2.0
#include "block.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <bit>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(TQKV_EMULATION_RACES)
#include <sanitizer/tsan_interface.h>
extern "C" void AnnotateIgnoreReadsBegin(const char *file, int line);
extern "C" void AnnotateIgnoreReadsEnd(const char *file, int line);
extern "C" void AnnotateIgnoreWritesBegin(const char *file, int line);
extern "C" void AnnotateIgnoreWritesEnd(const char *file, int line);
#endif

// Saves what a function must preserve on the stack, stores the stack pointer and continues where the other left off.
extern "C" void tqkv_emulation_switch(void **save, void *load);
#if defined(__x86_64__)
asm(R"(
.text
.p2align 4
.type tqkv_emulation_switch, @function
tqkv_emulation_switch:
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
.size tqkv_emulation_switch, . - tqkv_emulation_switch
)");
#elif defined(__aarch64__)
asm(R"(
.text
.p2align 4
.type tqkv_emulation_switch, @function
tqkv_emulation_switch:
  sub sp, sp, #160
  stp x19, x20, [sp]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size tqkv_emulation_switch, . - tqkv_emulation_switch
)");
#else
#error "fibers are written for x86-64 and 64-bit Arm"
#endif

namespace emulation {

Position position;

namespace {

constexpr unsigned kLanes = 32;
constexpr size_t kStackBytes = size_t{256} << 10;

// A stack and what is on it, while it does not run. The host's is that of the thread that calls run().
struct Context {
  void *stack_pointer = nullptr;
  const void *stack = nullptr;
  size_t stack_bytes = 0;
  void *fake_stack = nullptr;  // AddressSanitizer's
  void *fiber = nullptr;       // ThreadSanitizer's
};

struct Thread : Context {
  uint3 index;
  void *exchange = nullptr;  // what it brought to the collective it waits at
};

// Lanes on their way to, or at, one collective.
struct Meeting {
  const char *name;
  size_t bytes;
  unsigned mask, arrived, number;
};

struct Warp {
  unsigned exist = 0, ready = 0, returned = 0, at_barrier = 0;  // bits of lanes
  int num_meetings = 0;
  unsigned count = 0;  // of meetings so far
  Meeting meetings[kLanes];
  char order[64];  // what orders memory at a meeting, by its number: see happens_before()
};

// The one block that runs.
struct Block {
  std::mutex busy;
  Context host;
  Context *previous = nullptr;  // of the last switch
  unsigned running = 0;         // thread
  unsigned threads = 0, num_warps = 0, num_ready_to_pass = 0, num_returned = 0, num_barriers = 0;
  bool descending = false;
  const std::function<void()> *kernel = nullptr;
  Warp warps[kMaxThreads / kLanes];
  Thread thread[kMaxThreads];
  char begin, end, order[2];
};
Block block;

// With ThreadSanitizer every CUDA thread is a thread to it, and only what CUDA says orders memory: what the running
// thread has done until happens_before(x) comes before what another does after happens_after(x). The rest of this file
// is not instrumented.
void happens_before([[maybe_unused]] char &order) {
#if defined(TQKV_EMULATION_RACES)
  __tsan_release(&order);
#endif
}
void happens_after([[maybe_unused]] char &order) {
#if defined(TQKV_EMULATION_RACES)
  __tsan_acquire(&order);
#endif
}

alignas(1024) uint8_t shared_bytes_of_block[kMaxSharedBytes];

Warp &warp_of(unsigned thread) {
  return block.warps[thread / kLanes];
}

void switched() {
#if defined(__SANITIZE_ADDRESS__)
  // Also where the stack is that this one was entered from, which nobody else knows of the host's.
  Context &here = block.thread[block.running];
  __sanitizer_finish_switch_fiber(here.fake_stack, &block.previous->stack, &block.previous->stack_bytes);
#endif
}

void switch_contexts(Context &from, Context &to) {
  block.previous = &from;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&from.fake_stack, to.stack, to.stack_bytes);
#endif
#if defined(TQKV_EMULATION_RACES)
  __tsan_switch_to_fiber(to.fiber, __tsan_switch_to_fiber_no_sync);
#endif
  tqkv_emulation_switch(&from.stack_pointer, to.stack_pointer);
}

void switch_to(Context &from, unsigned thread) {
  block.running = thread;
  position.thread = block.thread[thread].index;
  switch_contexts(from, block.thread[thread]);
}

// The next lane of `ready` after `lane`, in the order of this launch; `lane` itself comes last.
unsigned next_lane(unsigned ready, unsigned lane) {
  if (block.descending) return (lane - 1 - unsigned(std::countl_zero(std::rotr(ready, int(lane))))) % kLanes;
  return (lane + 1 + unsigned(std::countr_zero(std::rotr(ready, int(lane + 1))))) % kLanes;
}

// Why nothing can run any more.
[[noreturn]] void report_deadlock() {
  for (unsigned w = 0; w < block.num_warps; ++w) {
    const Warp &warp = block.warps[w];
    std::fprintf(stderr, "warp %u: lanes %08x returned, %08x wait at __syncthreads", w, warp.returned, warp.at_barrier);
    for (int i = 0; i < warp.num_meetings; ++i) {
      const Meeting &m = warp.meetings[i];
      std::fprintf(stderr, ", %08x of %08x at %s", m.arrived, m.mask, m.name);
    }
    std::fprintf(stderr, "\n");
  }
  stop("every thread waits");
}

// Gives way to a thread that can run, of the same warp if there is one.
void give_way() {
  const unsigned here = block.running, w = here / kLanes;
  unsigned thread = kMaxThreads;
  for (unsigned i = 0; i < block.num_warps && thread == kMaxThreads; ++i) {
    const unsigned candidate = (w + (block.descending ? block.num_warps - i : i)) % block.num_warps;
    const unsigned ready = block.warps[candidate].ready;
    if (ready != 0)
      thread = candidate * kLanes + next_lane(ready, i == 0 ? here % kLanes : block.descending ? 0 : kLanes - 1);
  }
  Thread &from = block.thread[here];
  if (thread != kMaxThreads) {
    switch_to(from, thread);
  } else if (block.num_returned == block.threads) {
    switch_contexts(from, block.host);
  } else {
    report_deadlock();
  }
  switched();
}

// A lane that will not come to a collective that names it.
void check_not_expected(const Warp &warp, unsigned bit, const char *does) {
  for (int i = 0; i < warp.num_meetings; ++i) {
    const Meeting &m = warp.meetings[i];
    if (m.mask & bit) stop("%s, but lanes %08x wait for it at %s(%08x)", does, m.arrived, m.name, m.mask);
  }
}

void returned() {
  const unsigned bit = 1u << lane();
  Warp &warp = warp_of(block.running);
  check_not_expected(warp, bit, "returns");
  if (block.num_ready_to_pass != 0) stop("returns, but %u threads wait at __syncthreads", block.num_ready_to_pass);
  warp.ready &= ~bit;
  warp.returned |= bit;
  ++block.num_returned;
}

// A fiber lives as long as the program and runs one thread of a block after the other.
[[noreturn]] void live() {
  switched();
  for (;;) {
    happens_after(block.begin);
    (*block.kernel)();
    returned();
    happens_before(block.end);
    give_way();
  }
}

// A fiber that will begin with live().
void create(Thread &thread) {
  const size_t guard = size_t(sysconf(_SC_PAGESIZE));
  void *memory = mmap(nullptr, guard + kStackBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, guard, PROT_NONE) != 0) stop("no memory for stacks");
  uint8_t *stack = static_cast<uint8_t *>(memory) + guard;
  thread.stack = stack;
  thread.stack_bytes = kStackBytes;
#if defined(TQKV_EMULATION_RACES)
  thread.fiber = __tsan_create_fiber(0);
#endif
  void **top = reinterpret_cast<void **>(stack + kStackBytes);
  void *const entry = reinterpret_cast<void *>(&live);
#if defined(__x86_64__)
  top[-2] = entry;  // and a null return address above it, so that the stack is aligned as after a call
  thread.stack_pointer = top - 8;
#else
  top[-9] = entry;  // x30
  thread.stack_pointer = top - 20;
#endif
}

void begin_block(const uint3 &index, size_t shared_bytes) {
  position.block = index;
  block.num_ready_to_pass = block.num_returned = 0;
  for (unsigned w = 0; w < block.num_warps; ++w) {
    Warp &warp = block.warps[w];
    const unsigned lanes = block.threads - w * kLanes;
    warp.exist = lanes >= kLanes ? ~0u : (1u << lanes) - 1;
    warp.ready = warp.exist;
    warp.returned = warp.at_barrier = 0;
    warp.num_meetings = 0;
  }
  std::memset(shared_bytes_of_block, 0xff, shared_bytes);
  const dim3 &size = position.block_size;
  for (unsigned t = 0; t < block.threads; ++t) {
    Thread &thread = block.thread[t];
    if (thread.stack == nullptr) create(thread);
    thread.index = {t % size.x, t / size.x % size.y, t / size.x / size.y};
  }
}

}  // namespace

void stop(const char *format, ...) {
  const uint3 &t = position.thread, &b = position.block;
  std::fprintf(stderr, "CUDA emulation: thread (%u, %u, %u) of block (%u, %u, %u): ", t.x, t.y, t.z, b.x, b.y, b.z);
  va_list arguments;
  va_start(arguments, format);
  std::vfprintf(stderr, format, arguments);
  va_end(arguments);
  std::fprintf(stderr, "\n");
  std::abort();
}

unsigned lane() {
  return block.running % kLanes;
}

void *dynamic_shared() {
  return shared_bytes_of_block;
}

void block_barrier() {
  const unsigned bit = 1u << lane();
  Warp &warp = warp_of(block.running);
  check_not_expected(warp, bit, "comes to __syncthreads");
  if (block.num_returned != 0) stop("comes to __syncthreads, but %u threads have returned", block.num_returned);
  warp.ready &= ~bit;
  warp.at_barrier |= bit;
  char &order = block.order[block.num_barriers % 2];
  happens_before(order);
  if (++block.num_ready_to_pass < block.threads) {
    give_way();
  } else {
    block.num_ready_to_pass = 0;
    ++block.num_barriers;
    for (unsigned w = 0; w < block.num_warps; ++w) {
      block.warps[w].ready = block.warps[w].exist;
      block.warps[w].at_barrier = 0;
    }
  }
  happens_after(order);
}

void rendezvous(const char *name, unsigned mask, void *exchange, size_t bytes, Finish finish, bool orders_memory) {
  const unsigned bit = 1u << lane();
  Warp &warp = warp_of(block.running);
  if ((mask & bit) == 0) stop("%s(%08x) does not name its own lane", name, mask);
  if (const unsigned missing = mask & ~warp.exist) stop("%s(%08x): there are no lanes %08x", name, mask, missing);
  if (const unsigned gone = mask & warp.returned) stop("%s(%08x): lanes %08x have returned", name, mask, gone);
  if (const unsigned away = mask & warp.at_barrier) {
    stop("%s(%08x): lanes %08x wait at __syncthreads", name, mask, away);
  }
  Meeting *meeting = nullptr;
  for (int i = 0; i < warp.num_meetings; ++i) {
    Meeting &m = warp.meetings[i];
    if (m.mask == mask && m.bytes == bytes && (m.name == name || std::strcmp(m.name, name) == 0)) {
      meeting = &m;
    } else if ((m.mask & bit) != 0 && (mask & m.arrived) != 0) {  // each would wait for the other
      stop("%s(%08x) of %zu bytes, but lanes %08x are at %s(%08x) of %zu bytes", name, mask, bytes, m.arrived, m.name,
           m.mask, m.bytes);
    }
  }
  if (meeting == nullptr) {
    meeting = &warp.meetings[warp.num_meetings++];
    *meeting = {name, bytes, mask, 0, warp.count++};
  }
  char &order = warp.order[meeting->number % sizeof warp.order];
  if (orders_memory) happens_before(order);
  block.thread[block.running].exchange = exchange;
  meeting->arrived |= bit;
  if (meeting->arrived != mask) {
    warp.ready &= ~bit;
    give_way();
    if (orders_memory) happens_after(order);
    return;
  }
  *meeting = warp.meetings[--warp.num_meetings];
  void *exchanges[kLanes] = {};
  for (unsigned i = 0; i < kLanes; ++i) {
    if (mask >> i & 1) exchanges[i] = block.thread[block.running / kLanes * kLanes + i].exchange;
  }
#if defined(TQKV_EMULATION_RACES)
  AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
  AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
#endif
  finish(exchanges, mask);
#if defined(TQKV_EMULATION_RACES)
  AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
  AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
#endif
  warp.ready |= mask;
  if (orders_memory) happens_after(order);
}

void run(dim3 grid, dim3 size, size_t shared_bytes, const std::function<void()> &kernel) {
  const std::lock_guard lock(block.busy);
  block.kernel = &kernel;
  block.threads = size.x * size.y * size.z;
  block.num_warps = (block.threads + kLanes - 1) / kLanes;
  block.descending = !block.descending;  // what relies on the order of lanes fails in one of two launches
  position.grid_size = grid;
  position.block_size = size;
#if defined(TQKV_EMULATION_RACES)
  block.host.fiber = __tsan_get_current_fiber();
#endif
#if defined(__SANITIZE_ADDRESS__)
  ASAN_POISON_MEMORY_REGION(shared_bytes_of_block + shared_bytes, kMaxSharedBytes - shared_bytes);
#endif
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        begin_block({x, y, z}, shared_bytes);
        happens_before(block.begin);
        switch_to(block.host, block.descending ? block.threads - 1 : 0);
#if defined(__SANITIZE_ADDRESS__)
        __sanitizer_finish_switch_fiber(block.host.fake_stack, nullptr, nullptr);
#endif
        happens_after(block.end);
      }
    }
  }
#if defined(__SANITIZE_ADDRESS__)
  ASAN_UNPOISON_MEMORY_REGION(shared_bytes_of_block, kMaxSharedBytes);
#endif
}

}  // namespace emulation
