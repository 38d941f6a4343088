// The one thread pool of the process: torch's, where it can be used.
//
// After a parallel operation, the threads of torch's OpenMP spin for milliseconds in case of
// another one. Threads of our own would have to share the cores with them: a kernel of 0.2 ms took
// 3 ms behind a torch.mm. So teams are asked from the OpenMP library that torch has loaded.
#pragma once

#include <pthread.h>
#include <sched.h>
#include <unistd.h>

#include <atomic>
#include <new>

#include "lateness.h"
#include "runtime.h"
#include "workers.h"

namespace sparsify {
namespace {

constexpr int kPausesBeforeYield = 1000;
constexpr int kMostUneven = 3;

inline int usable_cores() {
#if defined(__linux__)
  cpu_set_t cores;
  if (sched_getaffinity(0, sizeof cores, &cores) == 0) return CPU_COUNT(&cores);
#endif
  return static_cast<int>(sysconf(_SC_NPROCESSORS_ONLN));
}

// Functions of the OpenMP library that torch uses; null if they are not to be used.
struct OpenMP {
  void (*parallel)(void (*body)(void*), void* context, unsigned threads, unsigned flags);
  int (*thread_num)();
  int (*num_threads)();
  int (*max_threads)();
};

class ThreadPool {
 public:
  void use(const OpenMP& openmp) { openmp_ = openmp; }
  bool uses_openmp() const { return openmp_.parallel != nullptr; }

  // Never inlined: the body would be compiled twice, once for a team of one.
  __attribute__((noinline)) void parallel(Body body, void* context, int threads,
                                          const Aside* aside = nullptr) {
    const int64_t began_ns = threads > 1 ? now_ns() : 0;
    // Busy may also mean that this is a member of the running team.
    if (threads <= 1 || !lateness_.allows(body, began_ns) ||
        busy_.exchange(true, std::memory_order_acquire)) {
      Barrier nobody_waits{};
      body(context, Team{0, 1, &nobody_waits});
      if (aside != nullptr) aside->run(aside->context);
      return;
    }
    barrier_.spins = threads <= usable_cores() ? kPausesBeforeYield : 0;
    barrier_.lost_ns = 0;
    Job job{body, context, threads, &barrier_, {}, aside, 0};
    std::fegetenv(&job.environment);
    if (openmp_.parallel != nullptr) {
      run_openmp(job);
    } else {
      workers_.run(job);
    }
    const int64_t now = now_ns(), own_ns = job.caller_done_ns - began_ns;
    // Shares differ, but hardly so much that others work for longer than a few times that.
    const int64_t late_ns = now - job.caller_done_ns - kMostUneven * own_ns;
    const int64_t lost_ns = barrier_.lost_ns + (late_ns > 0 ? late_ns : 0);
    lateness_.note(body, threads, now, now - began_ns, lost_ns);
    busy_.store(false, std::memory_order_release);
  }

 private:
  // Always asks for as many threads as torch does: a smaller team would end the surplus threads,
  // and torch's next operation would have to start them again.
  void run_openmp(const Job& job) {
    struct Context {
      const OpenMP& openmp;
      const Job& job;
    } context{openmp_, job};
    const int most = openmp_.max_threads();
    auto member = [](void* pointer) {
      const auto& [openmp, job] = *static_cast<Context*>(pointer);
      const int given = openmp.num_threads(), thread = openmp.thread_num();
      const int threads = given < job.threads ? given : job.threads;
      if (thread < threads) run_member(job, thread, threads);
    };
    openmp_.parallel(member, &context, job.threads < most ? most : job.threads, 0);
  }

  std::atomic<bool> busy_{false};
  OpenMP openmp_{};
  Lateness lateness_;
  Workers workers_;
  Barrier barrier_{};
};

// Raw storage: no destructor may run at exit while a worker still waits. A forked child has none of
// the threads, and locks in an unknown state. OpenMP would wait for its lost threads forever. So the
// child starts with a new pool in the same place, without OpenMP.
alignas(ThreadPool) unsigned char pool_storage[sizeof(ThreadPool)];
ThreadPool* pool = new (pool_storage) ThreadPool;
[[maybe_unused]] const int fork_handler =
    pthread_atfork(nullptr, nullptr, [] { pool = new (pool_storage) ThreadPool; });

}  // namespace
}  // namespace sparsify
