// SPDX-License-Identifier: Apache-2.0
// Parallel loops of CPU codecs: over a pool of threads, or through the caller's own function. Starting a loop allocates
// nothing.
#pragma once

#include <tqkv/tqkv.h>

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace tqkv {

class Parallel {
 public:
  // `threads` in all, the calling one included; 0: as many as the process may use.
  explicit Parallel(int threads);
  Parallel(tq_parallel_for function, void *context) : function_(function), context_(context) {}
  ~Parallel();
  Parallel(const Parallel &) = delete;
  Parallel &operator=(const Parallel &) = delete;

  int threads() const { return int(workers_.size()) + 1; }

  // body(i) once for each i in [0, count), in any order; returns when all are done. From several threads at once the
  // pool serves one loop, the others run on their own thread. `body` must not throw.
  template <class Body>
  void run(int64_t count, const Body &body) const {
    start(
        count, [](void *context, int64_t i) { (*static_cast<const Body *>(context))(i); }, const_cast<Body *>(&body));
  }

 private:
  using Function = void (*)(void *, int64_t);
  void start(int64_t count, Function body, void *body_context) const;
  void work() const;
  void wait_for_jobs() const;

  tq_parallel_for function_ = nullptr;
  void *context_ = nullptr;

  // One loop at a time: `busy_` is held by the thread that started it; workers see a new generation, take indices from
  // `next_` and count themselves out of `running_`.
  mutable std::mutex busy_;
  mutable std::mutex mutex_;
  mutable std::condition_variable wake_, done_;
  mutable uint64_t generation_ = 0;
  mutable bool stop_ = false;
  mutable int running_ = 0;
  mutable Function body_ = nullptr;
  mutable void *body_context_ = nullptr;
  mutable int64_t count_ = 0;
  mutable std::atomic<int64_t> next_{0};
  std::vector<std::thread> workers_;
};

}  // namespace tqkv
