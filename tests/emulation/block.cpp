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
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(TQKV_EMULATION_RACES)
#include <sanitizer/tsan_interface.h>
extern "C" void __tsan_read_range(void *at, unsigned long bytes);
extern "C" void __tsan_write_range(void *at, unsigned long bytes);
extern "C" void AnnotateIgnoreReadsBegin(const char *file, int line);
extern "C" void AnnotateIgnoreReadsEnd(const char *file, int line);
extern "C" void AnnotateIgnoreWritesBegin(const char *file, int line);
extern "C" void AnnotateIgnoreWritesEnd(const char *file, int line);
#endif

// The program's own data, by the linker: static variables are there.
extern "C" const char __data_start[], _end[];

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
constexpr int kMaxBarriers = 256;
constexpr uint32_t kMaxCount = (1u << 20) - 1;  // an mbarrier's, of arrivals and of bytes

// A stack and what is on it, while it does not run. The host's is that of the thread that calls run().
struct Context {
  void *stack_pointer = nullptr;
  const void *stack = nullptr;
  size_t stack_bytes = 0;
  void *fake_stack = nullptr;  // AddressSanitizer's
  void *fiber = nullptr;       // ThreadSanitizer's
};

struct Copy {
  void *to;
  const void *from;  // null: zeros
  uint32_t bytes;
};

struct Thread : Context {
  uint3 index;
  std::vector<Copy> copies;  // that no barrier counts yet
  void *exchange = nullptr;  // what it brought to the collective it waits at
  int waits_for = -1;        // index of an mbarrier
};

// An mbarrier. The word in shared memory only says which one it is.
struct Barrier {
  uint64_t *word;
  unsigned initialiser;  // thread
  bool fenced;
  unsigned count, pending;    // arrivals
  uint32_t expected, issued;  // bytes, in this phase
  unsigned phase;
  unsigned num_passing;  // threads that waited for the phase before and have not run since
  std::vector<Copy> copies;
  char order[2];  // by the phase's parity
};

// bar.sync's, but for number 0.
struct GroupBarrier {
  unsigned threads, arrived, count;  // count: how often all have come
  unsigned lanes[kMaxThreads / kLanes];
  char order[2];
};

// Lanes on their way to, or at, one collective.
struct Meeting {
  const char *name;
  size_t bytes;
  unsigned mask, arrived, number;
};

struct Warp {
  unsigned exist = 0, ready = 0, returned = 0, at_barrier = 0, at_group_barrier = 0;  // bits of lanes
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
  size_t shared_bytes = 0;
  Warp warps[kMaxThreads / kLanes];
  Thread thread[kMaxThreads];
  int num_mbarriers = 0;
  Barrier mbarriers[kMaxBarriers];
  GroupBarrier group_barriers[16];
  char begin, end, order[2];
  bool votes[2];  // of barriers by turns
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

// Reads and writes by what is not the running thread's own code.
void reads([[maybe_unused]] const void *at, [[maybe_unused]] size_t bytes) {
#if defined(TQKV_EMULATION_RACES)
  __tsan_read_range(const_cast<void *>(at), bytes);
#elif defined(__SANITIZE_ADDRESS__)
  if (const void *bad = __asan_region_is_poisoned(const_cast<void *>(at), bytes)) stop("reads %p, but may not", bad);
#endif
}
void writes([[maybe_unused]] void *at, [[maybe_unused]] size_t bytes) {
#if defined(TQKV_EMULATION_RACES)
  __tsan_write_range(at, bytes);
#elif defined(__SANITIZE_ADDRESS__)
  if (const void *bad = __asan_region_is_poisoned(at, bytes)) stop("writes %p, but may not", bad);
#endif
}

// While it lives, what the running thread does is this file's own.
struct Unwatched {
#if defined(TQKV_EMULATION_RACES)
  Unwatched() {
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  ~Unwatched() {
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
#else
  Unwatched() {}
#endif
};

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
    for (int i = 0; i < 16; ++i) {
      const GroupBarrier &g = block.group_barriers[i];
      if (g.lanes[w] == 0) continue;
      std::fprintf(stderr, ", %08x at group_barrier(%d, %u), which %u threads came to", g.lanes[w], i, g.threads,
                   g.arrived);
    }
    for (int i = 0; i < block.num_mbarriers; ++i) {
      const Barrier &b = block.mbarriers[i];
      unsigned lanes = 0;
      for (unsigned l = 0; l < kLanes; ++l) lanes |= unsigned(block.thread[w * kLanes + l].waits_for == i) << l;
      if (lanes == 0) continue;
      std::fprintf(stderr, ", %08x for phase %u of barrier %d (%p; %u of %u arrivals, %u of %u bytes)", lanes, b.phase,
                   i, static_cast<void *>(b.word), b.count - b.pending, b.count, b.issued, b.expected);
    }
    for (int i = 0; i < warp.num_meetings; ++i) {
      const Meeting &m = warp.meetings[i];
      std::fprintf(stderr, ", %08x of %08x at %s", m.arrived, m.mask, m.name);
    }
    std::fprintf(stderr, "\n");
  }
  stop("every thread waits");
}

void make(const Copy &copy) {
  if (copy.from != nullptr) {
    std::memcpy(copy.to, copy.from, copy.bytes);
  } else {
    std::memset(copy.to, 0, copy.bytes);
  }
}

// Ends a phase of an mbarrier, for which nothing is missing but that its copies are made.
void complete(int index) {
  Barrier &b = block.mbarriers[index];
  if (b.num_passing != 0)
    stop("barrier %d: a phase ends, but %u threads wait for the one before", index, b.num_passing);
#if defined(TQKV_EMULATION_RACES)
  AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
  AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
#endif
  for (const Copy &copy : b.copies) make(copy);
#if defined(TQKV_EMULATION_RACES)
  AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
  AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
#endif
  b.copies.clear();
  b.pending = b.count;
  b.expected = b.issued = 0;
  ++b.phase;
  for (unsigned t = 0; t < block.threads; ++t) {
    if (block.thread[t].waits_for != index) continue;
    warp_of(t).ready |= 1u << t % kLanes;
    ++b.num_passing;
  }
}

// Makes the copies that somebody waits for; of one mbarrier, so that nobody finds what it has not waited for.
bool complete_any() {
  for (int i = 0; i < block.num_mbarriers; ++i) {
    const Barrier &b = block.mbarriers[i];
    if (b.pending != 0 || b.issued != b.expected) continue;
    for (unsigned t = 0; t < block.threads; ++t) {
      if (block.thread[t].waits_for != i) continue;
      complete(i);
      return true;
    }
  }
  return false;
}

// A block ends.
void check_copies() {
  for (unsigned t = 0; t < block.threads; ++t) {
    if (!block.thread[t].copies.empty()) stop("returns, but no barrier counts copies of thread %u", t);
  }
  for (int i = 0; i < block.num_mbarriers; ++i) {
    const Barrier &b = block.mbarriers[i];
    if (!b.copies.empty()) stop("returns, but nobody has waited for %u bytes copied to barrier %d", b.issued, i);
  }
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
  if (thread == here) return;
  if (thread != kMaxThreads) {
    switch_to(from, thread);
  } else if (block.num_returned == block.threads) {
    check_copies();
    switch_contexts(from, block.host);
  } else if (complete_any()) {
    return give_way();
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
  block.votes[0] = block.votes[1] = false;
  block.num_mbarriers = 0;
  for (unsigned w = 0; w < block.num_warps; ++w) {
    Warp &warp = block.warps[w];
    const unsigned lanes = block.threads - w * kLanes;
    warp.exist = lanes >= kLanes ? ~0u : (1u << lanes) - 1;
    warp.ready = warp.exist;
    warp.returned = warp.at_barrier = warp.at_group_barrier = 0;
    warp.num_meetings = 0;
  }
  std::memset(shared_bytes_of_block, 0xff, shared_bytes);
  const dim3 &size = position.block_size;
  for (unsigned t = 0; t < block.threads; ++t) {
    Thread &thread = block.thread[t];
    if (thread.stack == nullptr) create(thread);
    thread.waits_for = -1;
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

bool block_barrier(bool vote) {
  const unsigned bit = 1u << lane();
  Warp &warp = warp_of(block.running);
  check_not_expected(warp, bit, "comes to __syncthreads");
  if (block.num_returned != 0) stop("comes to __syncthreads, but %u threads have returned", block.num_returned);
  warp.ready &= ~bit;
  warp.at_barrier |= bit;
  const unsigned turn = block.num_barriers % 2;  // nobody comes to the one after the next before all have left this one
  char &order = block.order[turn];
  happens_before(order);
  block.votes[turn] |= vote;
  if (++block.num_ready_to_pass < block.threads) {
    give_way();
  } else {
    block.num_ready_to_pass = 0;
    ++block.num_barriers;
    block.votes[1 - turn] = false;
    for (unsigned w = 0; w < block.num_warps; ++w) {
      block.warps[w].ready = block.warps[w].exist;
      block.warps[w].at_barrier = 0;
    }
  }
  happens_after(order);
  return block.votes[turn];
}

void group_barrier(int id, int threads) {
  if (id < 1 || id > 15 || threads < 1 || threads % int(kLanes) != 0 || unsigned(threads) > block.threads) {
    stop("group_barrier(%d, %d)", id, threads);
  }
  const unsigned bit = 1u << lane();
  Warp &warp = warp_of(block.running);
  check_not_expected(warp, bit, "comes to group_barrier");
  GroupBarrier &g = block.group_barriers[id];
  if (g.arrived == 0) g.threads = unsigned(threads);
  if (g.threads != unsigned(threads)) stop("group_barrier(%d, %d), but others say %u", id, threads, g.threads);
  warp.ready &= ~bit;
  warp.at_group_barrier |= bit;
  g.lanes[block.running / kLanes] |= bit;
  char &order = g.order[g.count % 2];
  happens_before(order);
  if (++g.arrived < g.threads) {
    give_way();
  } else {
    for (unsigned w = 0; w < block.num_warps; ++w) {
      const unsigned lanes = std::exchange(g.lanes[w], 0);
      if (lanes != 0 && lanes != ~0u) stop("group_barrier(%d, %d) of lanes %08x of warp %u", id, threads, lanes, w);
      block.warps[w].ready |= lanes;
      block.warps[w].at_group_barrier &= ~lanes;
    }
    g.arrived = 0;
    ++g.count;
  }
  happens_after(order);
}

void yield() {
  const unsigned here = block.running;
  for (unsigned i = 1; i < block.threads; ++i) {
    const unsigned thread = (here + i) % block.threads;
    if ((warp_of(thread).ready >> thread % kLanes & 1) == 0) continue;
    switch_to(block.thread[here], thread);
    return switched();
  }
}

namespace {

void check_shared(const char *name, const void *pointer, size_t bytes) {
  const auto inside = [at = reinterpret_cast<uintptr_t>(pointer), bytes](const void *first, const void *end) {
    return at >= reinterpret_cast<uintptr_t>(first) && at + bytes <= reinterpret_cast<uintptr_t>(end);
  };
  const bool given = inside(shared_bytes_of_block, shared_bytes_of_block + block.shared_bytes),
             other = inside(shared_bytes_of_block, shared_bytes_of_block + kMaxSharedBytes);
  if (!given && (other || !inside(__data_start, _end))) {
    stop("%s: %zu bytes at %p are not in shared memory", name, bytes, pointer);
  }
}

constexpr uint64_t kBarrierMark = 0x6d62617272696572;

Barrier *find_barrier(const uint64_t *word) {
  reads(word, sizeof *word);
  const uint64_t index = *word ^ kBarrierMark;
  if (index >= uint64_t(block.num_mbarriers) || block.mbarriers[index].word != word) return nullptr;
  return &block.mbarriers[index];
}

int index_of(const Barrier &b) {
  return int(&b - block.mbarriers);
}

Barrier &barrier_at(const char *name, const uint64_t *word) {
  check_shared(name, word, sizeof *word);
  Barrier *b = find_barrier(word);
  if (b == nullptr) stop("%s: %p is no barrier", name, static_cast<const void *>(word));
  return *b;
}

void add_bytes(const char *name, const Barrier &b, uint32_t &sum, uint32_t bytes) {
  if (bytes > kMaxCount - sum) stop("%s: barrier %d counts %u + %u bytes", name, index_of(b), sum, bytes);
  sum += bytes;
}

// Copies that were not expected never become any, once nobody is to arrive.
void check_issued(const char *name, const Barrier &b) {
  if (b.pending == 0 && b.issued > b.expected) {
    stop("%s: barrier %d counts %u bytes where %u are expected", name, index_of(b), b.issued, b.expected);
  }
}

}  // namespace

void barrier_init(uint64_t *word, uint32_t count) {
  check_shared("barrier_init", word, sizeof *word);
  if (reinterpret_cast<uintptr_t>(word) % sizeof *word != 0) stop("barrier_init: %p", static_cast<void *>(word));
  if (count == 0 || count > kMaxCount) stop("barrier_init: a count of %u", count);
  writes(word, sizeof *word);
  if (const Barrier *b = find_barrier(word)) stop("barrier_init: barrier %d again", index_of(*b));
  if (block.num_mbarriers == kMaxBarriers) stop("barrier_init: more than %d barriers", kMaxBarriers);
  Barrier &b = block.mbarriers[block.num_mbarriers];
  b.word = word;
  b.initialiser = block.running;
  b.fenced = false;
  b.count = b.pending = count;
  b.expected = b.issued = 0;
  b.phase = b.num_passing = 0;
  b.copies.clear();
  *word = kBarrierMark ^ uint64_t(block.num_mbarriers++);
}

void barrier_init_fence() {
  for (int i = 0; i < block.num_mbarriers; ++i) {
    if (block.mbarriers[i].initialiser == block.running) block.mbarriers[i].fenced = true;
  }
}

void barrier_expect(uint64_t *word, uint32_t bytes) {
  Barrier &b = barrier_at("barrier_expect", word);
  if (b.pending == 0) stop("barrier_expect: barrier %d, for which all %u threads have arrived", index_of(b), b.count);
  add_bytes("barrier_expect", b, b.expected, bytes);
}

void barrier_arrive(uint64_t *word, uint32_t expected_bytes, uint32_t count) {
  Barrier &b = barrier_at("barrier_arrive", word);
  if (b.pending == 0) {
    stop("barrier_arrive: barrier %d, for which all %u threads have arrived", index_of(b), b.count);
  }
  if (count > b.pending) stop("barrier_arrive: barrier %d, %u of %u threads", index_of(b), count, b.pending);
  add_bytes("barrier_arrive", b, b.expected, expected_bytes);
  happens_before(b.order[b.phase % 2]);
  b.pending -= count;
  check_issued("barrier_arrive", b);
  if (b.pending == 0 && b.expected == 0) complete(index_of(b));
}

void barrier_wait(uint64_t *word, uint32_t parity) {
  Barrier &b = barrier_at("barrier_wait", word);
  if (parity > 1) stop("barrier_wait: a parity of %u", parity);
  if (b.phase % 2 == parity) {
    Thread &thread = block.thread[block.running];
    warp_of(block.running).ready &= ~(1u << lane());
    thread.waits_for = index_of(b);
    give_way();
    thread.waits_for = -1;
    --b.num_passing;
  }
  happens_after(b.order[parity]);
}

void bulk_copy(void *shared, const void *global, uint32_t bytes, uint64_t *word) {
  Barrier &b = barrier_at("bulk_copy", word);
  if (!b.fenced) stop("bulk_copy: barrier %d without barrier_init_fence", index_of(b));
  if ((reinterpret_cast<uintptr_t>(shared) | reinterpret_cast<uintptr_t>(global) | bytes) % 16 != 0 || bytes == 0) {
    stop("bulk_copy: %u bytes from %p to %p are not aligned", bytes, global, shared);
  }
  check_shared("bulk_copy", shared, bytes);
  reads(global, bytes);
  writes(shared, bytes);
  add_bytes("bulk_copy", b, b.issued, bytes);
  check_issued("bulk_copy", b);
  std::memset(shared, 0xff, bytes);
  happens_before(b.order[b.phase % 2]);
  const Unwatched unwatched;
  b.copies.push_back({shared, global, bytes});
}

void async_copy(void *shared, const void *global, bool zeros, uint32_t bytes) {
  if ((reinterpret_cast<uintptr_t>(shared) | reinterpret_cast<uintptr_t>(global)) % bytes != 0) {
    stop("async_copy: from %p to %p are not aligned", global, shared);
  }
  check_shared("async_copy", shared, bytes);
  if (!zeros) reads(global, bytes);
  writes(shared, bytes);
  std::memset(shared, 0xff, bytes);
  const Unwatched unwatched;
  block.thread[block.running].copies.push_back({shared, zeros ? nullptr : global, bytes});
}

void copies_wait() {
  const Unwatched unwatched;
  std::vector<Copy> &copies = block.thread[block.running].copies;
  for (const Copy &copy : copies) make(copy);
  copies.clear();
}

void barrier_arrive_copied(uint64_t *word) {
  Barrier &b = barrier_at("barrier_arrive_copied", word);
  if (b.pending == 0) {
    stop("barrier_arrive_copied: barrier %d, for which all %u threads have arrived", index_of(b), b.count);
  }
  {
    const Unwatched unwatched;
    std::vector<Copy> &copies = block.thread[block.running].copies;
    b.copies.insert(b.copies.end(), copies.begin(), copies.end());
    copies.clear();
  }
  happens_before(b.order[b.phase % 2]);
  --b.pending;
  check_issued("barrier_arrive_copied", b);
  if (b.pending == 0 && b.expected == 0) complete(index_of(b));
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
  if (const unsigned away = mask & warp.at_group_barrier) {
    stop("%s(%08x): lanes %08x wait at group_barrier", name, mask, away);
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
  block.shared_bytes = shared_bytes;
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
