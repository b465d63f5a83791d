#include "fedlean/threads.h"

#include <pthread.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

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

// How often this process came out of a fork as the child.
int forks = 0;
void count_fork() { ++forks; }
const int registered = pthread_atfork(nullptr, nullptr, count_fork);

}  // namespace

struct ThreadPool::Workers {
  explicit Workers(int count) : born(forks) {
    try {
      for (int t = 1; t <= count; ++t) threads.emplace_back([this, t] { work(t); });
    } catch (...) {  // the system has no more threads
      end();
      throw;
    }
  }
  ~Workers() { end(); }

  void end() {
    {
      std::lock_guard<std::mutex> lock(mutex);
      stop = true;
      ++generation;
    }
    wake.notify_all();
    for (auto& thread : threads) thread.join();
  }

  void run(Job todo) {
    job = todo;
    pending = int(threads.size());
    ++generation;  // sequentially consistent, as `sleepers` is: one of the two sides sees the other
    if (sleepers > 0) {
      std::lock_guard<std::mutex> lock(mutex);
      wake.notify_all();
    }
    todo.call(todo.data, 0);
    while (!spin([this] { return pending == 0; })) std::this_thread::yield();
  }

  void work(int thread) {
    unsigned seen = 0;
    for (;;) {
      auto ready = [&] { return generation != seen; };
      if (!spin(ready)) {
        std::unique_lock<std::mutex> lock(mutex);
        ++sleepers;
        wake.wait(lock, ready);
        --sleepers;
      }
      seen = generation;
      if (stop) return;
      job.call(job.data, thread);
      --pending;
    }
  }

  const int born;  // in which process, counted by forks
  Job job = {};
  std::atomic<unsigned> generation{0};
  std::atomic<int> pending{0}, sleepers{0};
  std::atomic<bool> stop{false};
  std::mutex mutex;
  std::condition_variable wake;
  std::vector<std::thread> threads;  // last: they use the rest
};

ThreadPool::ThreadPool(int threads) : threads_(threads) {
  (void)registered;
  if (threads > 1) workers_ = std::make_unique<Workers>(threads - 1);
}

ThreadPool::~ThreadPool() {
  if (workers_ && workers_->born != forks) workers_.release();  // its threads are not here
}

void ThreadPool::run(Job job) {
  if (!workers_) return job.call(job.data, 0);
  if (workers_->born != forks) {
    workers_.release();
    workers_ = std::make_unique<Workers>(threads_ - 1);
  }
  workers_->run(job);
}

}  // namespace fedlean
