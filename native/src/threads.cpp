#include "fedlean/threads.h"

#include <chrono>

namespace fedlean {

namespace {

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Spins until `ready`, for about 50 us; on a loaded machine the others need the processor.
template <typename Ready>
bool spin(Ready ready) {
  const auto end = std::chrono::steady_clock::now() + std::chrono::microseconds(50);
  do {
    for (int i = 0; i < 64; ++i) {
      if (ready()) return true;
      relax();
    }
  } while (std::chrono::steady_clock::now() < end);
  return false;
}

}  // namespace

ThreadPool::ThreadPool(int threads) {
  for (int t = 1; t < threads; ++t) workers_.emplace_back([this, t] { work(t); });
}

ThreadPool::~ThreadPool() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stop_ = true;
    ++generation_;
  }
  wake_.notify_all();
  for (auto& worker : workers_) worker.join();
}

void ThreadPool::run(const std::function<void(int)>& f) {
  if (workers_.empty()) return f(0);
  job_ = &f;
  pending_ = int(workers_.size());
  ++generation_;  // sequentially consistent, as sleepers_ is: one of the two sides sees the other
  if (sleepers_ > 0) {
    std::lock_guard<std::mutex> lock(mutex_);
    wake_.notify_all();
  }
  f(0);
  while (!spin([this] { return pending_ == 0; })) std::this_thread::yield();
}

void ThreadPool::work(int thread) {
  unsigned seen = 0;
  for (;;) {
    auto ready = [&] { return generation_ != seen; };
    if (!spin(ready)) {
      std::unique_lock<std::mutex> lock(mutex_);
      ++sleepers_;
      wake_.wait(lock, ready);
      --sleepers_;
    }
    seen = generation_;
    if (stop_) return;
    (*job_)(thread);
    --pending_;
  }
}

}  // namespace fedlean
