// SPDX-License-Identifier: Apache-2.0
// CUDA's execution model on one host thread: every CUDA thread of a block is a fiber with a stack of its own, blocks
// run one after the other. A fiber runs until it waits for others, so that nothing depends on time, and every run of a
// launch is the same. Collectives are true rendezvous: a program that on a GPU would wait forever, or go on with
// undefined values, stops here with a message.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned vx = 1, unsigned vy = 1, unsigned vz = 1) : x(vx), y(vy), z(vz) {}
};

namespace emulation {

inline constexpr unsigned kMaxThreads = 1024;                 // a block's
inline constexpr size_t kMaxSharedBytes = size_t{227} << 10;  // a block's, given at the launch

// Where the running thread is. All of it changes with every switch of fibers.
struct Position {
  uint3 thread, block;
  dim3 block_size, grid_size;
};
extern Position position;

// Runs a kernel, whose arguments are bound, for every thread of a grid; returns when all have returned. Launches from
// several host threads take turns.
void run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()> &kernel);

// Prints the message, with where the running thread is, and aborts.
[[noreturn, gnu::format(printf, 1, 2)]] void stop(const char *format, ...);

// The running thread's lane.
unsigned lane();

// The shared memory that the launch asked for; each block finds garbage in it.
void *dynamic_shared();

// __syncthreads: of all threads of the block, none of which may have returned. Gives whether one of them votes.
bool block_barrier(bool vote);

// bar.sync: of `threads` threads, which are whole warps.
void group_barrier(int id, int threads);

// mbarriers and the copies that they count. A copy is made as late as can be: when somebody waits for it and nothing else
// can run. Until then there is garbage where it goes.
void barrier_init(uint64_t *barrier, uint32_t count);
void barrier_init_fence();
void barrier_expect(uint64_t *barrier, uint32_t bytes);
void barrier_arrive(uint64_t *barrier, uint32_t expected_bytes, uint32_t count);
void barrier_wait(uint64_t *barrier, uint32_t parity);
void bulk_copy(void *shared, const void *global, uint32_t bytes, uint64_t *barrier);

// cp.async, or zeros; the arrival after the thread's copies so far, and the wait for them. Made as late as those above.
void async_copy(void *shared, const void *global, bool zeros, uint32_t bytes = 16);
void barrier_arrive_copied(uint64_t *barrier);
void copies_wait();

// Lets every other thread run that can.
void yield();

// What the lanes of a collective brought, by lane; null for those that `mask` does not name.
using Finish = void (*)(void *const *exchanges, unsigned mask);

// Waits until all lanes of `mask`, the running one among them, have come to the same collective; the last one calls
// `finish`, which may read and write what each has brought. Of CUDA's collectives only __syncwarp orders memory.
void rendezvous(const char *name, unsigned mask, void *exchange, size_t bytes, Finish finish, bool orders_memory);

template <class Exchange>
class Exchanges {
 public:
  Exchanges(void *const *exchanges, unsigned mask) : exchanges_(exchanges), mask_(mask) {}
  Exchange &operator[](unsigned i) const { return *static_cast<Exchange *>(exchanges_[i]); }
  bool has(unsigned i) const { return i < 32 && (mask_ >> i & 1) != 0; }
  template <class Body>
  void for_each(Body &&body) const {
    for (unsigned i = 0; i < 32; ++i) {
      if (has(i)) body(i, (*this)[i]);
    }
  }

 private:
  void *const *exchanges_;
  unsigned mask_;
};

// The same with a type; `finish` is a lambda without captures that takes Exchanges<Exchange>.
template <bool kOrdersMemory = false, class Exchange, class Body>
void collective(const char *name, unsigned mask, Exchange &mine, Body) {
  const Finish finish = [](void *const *exchanges, unsigned all) { Body{}(Exchanges<Exchange>(exchanges, all)); };
  rendezvous(name, mask, &mine, sizeof mine, finish, kOrdersMemory);
}

}  // namespace emulation
