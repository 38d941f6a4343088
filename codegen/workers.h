// Threads of our own, for processes that cannot use torch's; see thread_pool.h.
#pragma once

#include <atomic>
#include <cfenv>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#include "runtime.h"

namespace sparsify {
namespace {  // internal: two versions of this library in a process must not share variables

// About the time that Python needs between two kernels of one model: a worker that is still
// spinning starts in under a microsecond, one that sleeps needs tens.
constexpr std::chrono::microseconds kSpinBeforeSleep{100};
constexpr int kPausesPerClockRead = 32;

struct Job {
  Body body;
  void* context;
  int threads;
  Barrier* barrier;
  // The caller's: whether denormals are flushed must not depend on who computes a row.
  std::fenv_t environment;
};

thread_local bool inside_team = false;

inline void run_member(const Job& job, int thread, int threads) {
  std::fenv_t own;
  std::fegetenv(&own);
  std::fesetenv(&job.environment);
  inside_team = true;
  job.body(job.context, Team{thread, threads, job.barrier});
  inside_team = false;
  std::fesetenv(&own);
}

class Worker {
 public:
  // The job must stay valid until this worker has counted itself off `unfinished`.
  void start(const Job* job, std::atomic<int>* unfinished) {
    job_ = job;
    unfinished_ = unfinished;
    started_.fetch_add(1);  // sequentially consistent, like the three below: see sleep()
    if (!asleep_.load()) return;
    { std::lock_guard<std::mutex> lock(mutex_); }
    wake_.notify_one();
  }

  [[noreturn]] void run(int thread) {
    for (unsigned done = 0;; ++done) {
      await_start(done);
      spin_ = job_->barrier->spins > 0;
      run_member(*job_, thread, job_->threads);
      unfinished_->fetch_sub(1, std::memory_order_release);
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
  std::atomic<int>* unfinished_ = nullptr;
  alignas(64) std::atomic<bool> asleep_{false};
  bool spin_ = false;
  std::mutex mutex_;
  std::condition_variable wake_;
};

class Workers {
 public:
  // Runs the job on this thread and job.threads - 1 workers, or as many as can be started.
  void run(Job& job) {
    job.threads = 1 + grow(job.threads - 1);
    unfinished_.store(job.threads - 1, std::memory_order_relaxed);
    for (int i = 0; i < job.threads - 1; ++i) workers_[i]->start(&job, &unfinished_);
    run_member(job, 0, job.threads);
    for (int spun = 0; unfinished_.load(std::memory_order_acquire) != 0; ++spun) {
      if (spun < job.barrier->spins) {
        pause_thread();
      } else {
        sched_yield();
      }
    }
  }

 private:
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

  std::vector<Worker*> workers_;  // never freed: their threads live as long as the process
  alignas(64) std::atomic<int> unfinished_{0};
};

}  // namespace
}  // namespace sparsify
