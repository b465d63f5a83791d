// A small thread pool: run(f) calls f(thread) once on every thread and returns when all are done.
//
// Workers spin for a bounded time between calls, then sleep: a step's layers follow one another
// within microseconds, but between steps the processor belongs to others.
#pragma once

#include <memory>
#include <type_traits>

namespace fedlean {

class ThreadPool {
public:
  explicit ThreadPool(int threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int threads() const { return threads_; }
  // `f` must not throw.  One call at a time, from any thread.  After a fork, the child's first call
  // starts new workers: threads do not survive a fork.
  template <typename F>
  void run(F&& f) {
    run({[](void* data, int thread) { (*static_cast<std::remove_reference_t<F>*>(data))(thread); },
         const_cast<void*>(static_cast<const void*>(&f))});
  }

private:
  // A call without std::function's allocation: a step makes dozens.
  struct Job {
    void (*call)(void* data, int thread);
    void* data;
  };
  void run(Job job);
  struct Workers;
  const int threads_;
  std::unique_ptr<Workers> workers_;
};

}  // namespace fedlean
