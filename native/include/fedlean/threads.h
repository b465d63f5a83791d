// A small thread pool: run(f) calls f(thread) once on every thread and returns when all are done.
//
// Workers spin for a bounded time between calls, then sleep: a step's layers follow one another
// within microseconds, but between steps the processor belongs to others.
#pragma once

#include <atomic>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace fedlean {

class ThreadPool {
 public:
  explicit ThreadPool(int threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int threads() const { return int(workers_.size()) + 1; }
  // `f` must not throw.  Not reentrant.
  void run(const std::function<void(int)>& f);

 private:
  void work(int thread);

  std::vector<std::thread> workers_;
  const std::function<void(int)>* job_ = nullptr;
  std::atomic<unsigned> generation_{0};
  std::atomic<int> pending_{0};
  std::atomic<bool> stop_{false};
  std::atomic<int> sleepers_{0};
  std::mutex mutex_;
  std::condition_variable wake_;
};

}  // namespace fedlean
