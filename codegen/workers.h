// Threads of our own, for processes that cannot use torch's; see thread_pool.h.
//
// Written with pthreads: the C++ headers for threads take longer to compile than all of this.
#pragma once

#include <pthread.h>
#include <sched.h>

#include <atomic>
#include <cfenv>
#include <cstdint>

#include "runtime.h"

namespace sparsify {
namespace {  // internal: two versions of this library in a process must not share variables

// About the time that Python needs between two kernels of one model: a worker that is still
// spinning starts in under a microsecond, one that sleeps needs tens.
constexpr int64_t kSpinBeforeSleepNs = 100'000;
constexpr int kPausesPerClockRead = 32;
constexpr int kMostWorkers = 1023;

// What the threads of a team share out when their parts of the body are done.
struct Aside {
  void (*run)(void* context);
  void* context;
};

struct Job {
  Body body;
  void* context;
  int threads;
  Barrier* barrier;
  // The caller's: whether denormals are flushed must not depend on who computes a row.
  std::fenv_t environment;
  const Aside* aside;  // or null
  mutable int64_t caller_done_ns;
};

inline void run_member(const Job& job, int thread, int threads) {
  std::fenv_t own;
  std::fegetenv(&own);
  std::fesetenv(&job.environment);
  job.body(job.context, Team{thread, threads, job.barrier});
  std::fesetenv(&own);
  if (job.aside != nullptr) job.aside->run(job.aside->context);
  if (thread == 0) job.caller_done_ns = now_ns();
}

class Worker {
 public:
  explicit Worker(int thread) : thread_(thread) {}

  // Whether its thread could be started.
  bool launch() {
    pthread_attr_t attributes;
    if (pthread_attr_init(&attributes) != 0) return false;
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    auto body = [](void* worker) -> void* { static_cast<Worker*>(worker)->run(); };
    pthread_t id;
    const int failure = pthread_create(&id, &attributes, body, this);
    pthread_attr_destroy(&attributes);
    return failure == 0;
  }

  // The job must stay valid until this worker has counted itself off `unfinished`.
  void start(const Job* job, std::atomic<int>* unfinished) {
    job_ = job;
    unfinished_ = unfinished;
    started_.fetch_add(1);  // sequentially consistent, like the three below: see sleep()
    if (!asleep_.load()) return;
    pthread_mutex_lock(&mutex_);
    pthread_mutex_unlock(&mutex_);
    pthread_cond_signal(&wake_);
  }

 private:
  [[noreturn]] void run() {
    for (unsigned done = 0;; ++done) {
      await_start(done);
      spin_ = job_->barrier->spins > 0;
      run_member(*job_, thread_, job_->threads);
      unfinished_->fetch_sub(1, std::memory_order_release);
    }
  }

  void await_start(unsigned done) {
    if (!spin_) return sleep(done);
    const int64_t deadline = now_ns() + kSpinBeforeSleepNs;
    do {
      for (int i = 0; i < kPausesPerClockRead; ++i) {
        if (started_.load(std::memory_order_acquire) != done) return;
        pause_thread();
      }
    } while (now_ns() < deadline);
    sleep(done);
  }

  // Either start() sees `asleep_`, and its signal cannot come before the wait because it takes the
  // mutex first, or this thread sees the new value of `started_`.
  void sleep(unsigned done) {
    pthread_mutex_lock(&mutex_);
    asleep_.store(true);
    while (started_.load() == done) pthread_cond_wait(&wake_, &mutex_);
    asleep_.store(false);
    pthread_mutex_unlock(&mutex_);
  }

  alignas(64) std::atomic<unsigned> started_{0};
  const Job* job_ = nullptr;
  std::atomic<int>* unfinished_ = nullptr;
  alignas(64) std::atomic<bool> asleep_{false};
  const int thread_;
  bool spin_ = false;
  pthread_mutex_t mutex_ = PTHREAD_MUTEX_INITIALIZER;
  pthread_cond_t wake_ = PTHREAD_COND_INITIALIZER;
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
    while (count_ < wanted && count_ < kMostWorkers) {
      Worker* worker = new Worker(count_ + 1);
      if (!worker->launch()) {  // a limit on threads: run with those there are
        delete worker;
        break;
      }
      workers_[count_++] = worker;
    }
    return wanted < count_ ? wanted : count_;
  }

  Worker* workers_[kMostWorkers];  // never freed: their threads live as long as the process
  int count_ = 0;
  alignas(64) std::atomic<int> unfinished_{0};
};

}  // namespace
}  // namespace sparsify
