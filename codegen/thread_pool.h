// The one thread pool of the process. Not OpenMP: torch brings its own libgomp, and a second one in
// a process costs a second set of spinning threads and deadlocks after fork.
#pragma once

#include <pthread.h>

#include <atomic>
#include <cfenv>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#include "runtime.h"

namespace sparsify {

// About the time that Python needs between two kernels of one model: a worker that is still
// spinning starts in under a microsecond, one that sleeps needs tens.
constexpr std::chrono::microseconds kSpinBeforeSleep{100};
constexpr int kPausesPerClockRead = 32;
constexpr int kPausesBeforeYield = 1000;

inline int usable_cores() {
#if defined(__linux__)
  cpu_set_t cores;
  if (sched_getaffinity(0, sizeof cores, &cores) == 0) return CPU_COUNT(&cores);
#endif
  return static_cast<int>(std::thread::hardware_concurrency());
}

struct Job {
  Body body;
  void* context;
  int threads;
  bool spin;
  Barrier* barrier;
  std::fenv_t rounding;  // the caller's: flush-to-zero must not depend on who computes a row
  std::atomic<int>* unfinished;
};

inline thread_local bool inside_team = false;

class Worker {
 public:
  // The job must stay valid until this worker has counted itself off `unfinished`.
  void start(const Job* job) {
    job_ = job;
    started_.fetch_add(1);  // sequentially consistent, like the three below: see sleep()
    if (!asleep_.load()) return;
    { std::lock_guard<std::mutex> lock(mutex_); }
    wake_.notify_one();
  }

  [[noreturn]] void run(int thread) {
    inside_team = true;
    for (unsigned done = 0;; ++done) {
      await_start(done);
      const Job& job = *job_;
      std::fesetenv(&job.rounding);
      spin_ = job.spin;
      job.body(job.context, Team{thread, job.threads, job.barrier});
      job.unfinished->fetch_sub(1, std::memory_order_release);
    }
  }

 private:
  void await_start(unsigned done) {
    if (!spin_) return sleep(done);
    const auto deadline = std::chrono::steady_clock::now() + kSpinBeforeSleep;
    do {
      for (int i = 0; i < kPausesPerClockRead; ++i) {
        if (started_.load(std::memory_order_acquire) != done) return;
        pause_thread();
      }
    } while (std::chrono::steady_clock::now() < deadline);
    sleep(done);
  }

  // Either start() sees `asleep_`, and its notification cannot come before the wait because it
  // takes the mutex first, or this thread sees the new value of `started_`.
  void sleep(unsigned done) {
    std::unique_lock<std::mutex> lock(mutex_);
    asleep_.store(true);
    while (started_.load() == done) wake_.wait(lock);
    asleep_.store(false);
  }

  alignas(64) std::atomic<unsigned> started_{0};
  const Job* job_ = nullptr;
  alignas(64) std::atomic<bool> asleep_{false};
  bool spin_ = false;
  std::mutex mutex_;
  std::condition_variable wake_;
};

class ThreadPool {
 public:
  void parallel(Body body, void* context, int threads) {
    if (threads <= 1 || inside_team || busy_.exchange(true, std::memory_order_acquire)) {
      Barrier nobody_waits{};
      body(context, Team{0, 1, &nobody_waits});
      return;
    }
    run_team(body, context, 1 + grow(threads - 1));
    busy_.store(false, std::memory_order_release);
  }

 private:
  void run_team(Body body, void* context, int threads) {
    const bool spin = threads <= usable_cores();
    barrier_.threads = threads;
    barrier_.spins = spin ? kPausesBeforeYield : 0;
    unfinished_.store(threads - 1, std::memory_order_relaxed);
    job_ = Job{body, context, threads, spin, &barrier_, {}, &unfinished_};
    std::fegetenv(&job_.rounding);
    for (int i = 0; i < threads - 1; ++i) workers_[i]->start(&job_);
    inside_team = true;
    body(context, Team{0, threads, &barrier_});
    inside_team = false;
    for (int spun = 0; unfinished_.load(std::memory_order_acquire) != 0; ++spun) {
      if (spun < barrier_.spins) {
        pause_thread();
      } else {
        sched_yield();
      }
    }
  }

  // How many of `wanted` workers there are after trying to start the missing ones.
  int grow(int wanted) {
    while (static_cast<int>(workers_.size()) < wanted) {
      Worker* worker = new Worker;
      const int thread = static_cast<int>(workers_.size()) + 1;
      try {
        std::thread([worker, thread] { worker->run(thread); }).detach();
      } catch (const std::system_error&) {  // a limit on threads: run with those there are
        delete worker;
        return static_cast<int>(workers_.size());
      }
      workers_.push_back(worker);
    }
    return wanted;
  }

  std::atomic<bool> busy_{false};
  std::vector<Worker*> workers_;  // never freed: their threads live as long as the process
  Job job_{};
  Barrier barrier_{};
  alignas(64) std::atomic<int> unfinished_{0};
};

// Raw storage: no destructor may run at exit while a worker still waits, and a forked child, which
// has none of the workers and locks in an unknown state, starts with a new pool in the same place.
alignas(ThreadPool) inline unsigned char pool_storage[sizeof(ThreadPool)];
inline ThreadPool* pool = new (pool_storage) ThreadPool;
inline const int fork_handler =
    pthread_atfork(nullptr, nullptr, [] { pool = new (pool_storage) ThreadPool; });

}  // namespace sparsify
