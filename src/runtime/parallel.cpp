// SPDX-License-Identifier: Apache-2.0
#include "runtime/parallel.hpp"

#include <sched.h>

#include <algorithm>

namespace tqkv {
namespace {

int usable_processors() {
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return std::max(1, CPU_COUNT(&set));
  return std::max(1, int(std::thread::hardware_concurrency()));
}

}  // namespace

Parallel::Parallel(int threads) {
  const int workers = (threads > 0 ? threads : usable_processors()) - 1;
  try {
    for (int i = 0; i < workers; ++i) workers_.emplace_back([this] { wait_for_jobs(); });
  } catch (...) {
    {
      const std::lock_guard lock(mutex_);
      stop_ = true;
    }
    wake_.notify_all();
    for (std::thread &worker : workers_) worker.join();
    throw;
  }
}

Parallel::~Parallel() {
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
  }
  wake_.notify_all();
  for (std::thread &worker : workers_) worker.join();
}

void Parallel::work() const {
  for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < count_;) body_(body_context_, i);
}

void Parallel::wait_for_jobs() const {
  uint64_t seen = 0;
  for (;;) {
    {
      std::unique_lock lock(mutex_);
      wake_.wait(lock, [&] { return stop_ || generation_ != seen; });
      if (stop_) return;
      seen = generation_;
    }
    work();
    const std::lock_guard lock(mutex_);
    if (--running_ == 0) done_.notify_one();
  }
}

void Parallel::start(int64_t count, Function body, void *body_context) const {
  if (function_ != nullptr) {
    if (count > 0) function_(context_, count, body, body_context);
    return;
  }
  std::unique_lock pool(busy_, std::defer_lock);
  if (count <= 1 || workers_.empty() || !pool.try_lock()) {
    for (int64_t i = 0; i < count; ++i) body(body_context, i);
    return;
  }
  {
    const std::lock_guard lock(mutex_);
    body_ = body;
    body_context_ = body_context;
    count_ = count;
    next_.store(0, std::memory_order_relaxed);
    running_ = int(workers_.size());
    ++generation_;
  }
  wake_.notify_all();
  work();
  std::unique_lock lock(mutex_);
  done_.wait(lock, [&] { return running_ == 0; });
}

}  // namespace tqkv
