// What a generated kernel may ask of the process that runs it.
//
// A kernel receives a `const sparsify::Runtime*` as an argument, so it links against nothing. This
// header is compiled into every kernel and stays free of library headers: they cost more time than
// the kernel itself.
#pragma once

#include <sched.h>
#include <stdint.h>
#include <time.h>

namespace sparsify {

inline int64_t now_ns() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec * INT64_C(1'000'000'000) + now.tv_nsec;
}

inline void pause_thread() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__) || defined(__arm__)
  __asm__ __volatile__("yield");
#endif
}

// Where the threads of one team meet. Each field that is written has its own cache line.
struct Barrier {
  alignas(64) int arrived;
  alignas(64) unsigned round;
  alignas(64) int spins;  // pauses before the core is offered to others; 0 if there are more threads than cores
  int64_t lost_ns;        // by thread 0, which alone writes it, in waits that were longer than that
};

// One thread of a team. Every thread of a team really runs at the same time as the others.
struct Team {
  int thread;   // 0 <= thread < threads; 0 is the caller's own thread
  int threads;  // what the work must be divided by: may be fewer than were asked for, down to 1
  Barrier* barrier;

  // Returns when all threads of the team have called it; what they wrote before is then visible.
  void wait() const;
};

// One wait of a thread: pauses, and when it is long yields.
class Wait {
 public:
  explicit Wait(const Team& team) : team_(team) {}
  ~Wait() {
    if (since_ns_ != 0) end();
  }
  void pause() {
    if (spun_ < team_.barrier->spins) {
      ++spun_;
      pause_thread();
    } else {
      pause_longer();
    }
  }

 private:
  __attribute__((noinline)) void pause_longer() {
    if (since_ns_ == 0) since_ns_ = now_ns();
    sched_yield();
  }
  __attribute__((noinline)) void end() const {
    if (team_.thread == 0) team_.barrier->lost_ns += now_ns() - since_ns_;
  }

  const Team& team_;
  int spun_ = 0;
  int64_t since_ns_ = 0;  // when the spins were over
};

// Returns when `is_done()`.
template <class Done>
inline void wait_until(const Done& is_done, const Team& team) {
  Wait wait(team);
  while (!is_done()) wait.pause();
}

inline void Team::wait() const {
  if (threads == 1) return;
  // Read before arriving: the round cannot end before this thread has arrived.
  const unsigned round = __atomic_load_n(&barrier->round, __ATOMIC_RELAXED);
  if (__atomic_add_fetch(&barrier->arrived, 1, __ATOMIC_ACQ_REL) == threads) {
    __atomic_store_n(&barrier->arrived, 0, __ATOMIC_RELAXED);
    __atomic_store_n(&barrier->round, round + 1, __ATOMIC_RELEASE);
    return;
  }
  wait_until([&] { return __atomic_load_n(&barrier->round, __ATOMIC_ACQUIRE) != round; }, *this);
}

using Body = void (*)(void* context, const Team& team);

struct Runtime {
  // Calls body(context, team) once on each thread of a team of at most `threads` and returns when
  // all have returned. The body must not throw. A call from inside a body, or one that comes while
  // another thread's team is running, gets a team of one.
  void (*parallel)(Body body, void* context, int threads);
};

}  // namespace sparsify
