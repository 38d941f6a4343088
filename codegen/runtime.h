// What a generated kernel may ask of the process that runs it.
//
// A kernel receives a `const sparsify::Runtime*` as an argument, so it links against nothing. This
// header is compiled into every kernel and stays free of library headers: they cost more time than
// the kernel itself.
#pragma once

#include <sched.h>

namespace sparsify {

inline void pause_thread() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__) || defined(__arm__)
  __asm__ __volatile__("yield");
#endif
}

// Returns when `is_done()`. After `spins` pauses the core is offered to others.
template <class Done>
inline void wait_until(const Done& is_done, int spins) {
  for (int spun = 0; !is_done();) {
    if (spun < spins) {
      ++spun;
      pause_thread();
    } else {
      sched_yield();
    }
  }
}

// Where the threads of one team meet. Each field that is written has its own cache line.
struct Barrier {
  alignas(64) int arrived;
  alignas(64) unsigned round;
  alignas(64) int spins;  // pauses before the core is offered to others; 0 if there are more threads than cores
};

// One thread of a team. Every thread of a team really runs at the same time as the others.
struct Team {
  int thread;   // 0 <= thread < threads; 0 is the caller's own thread
  int threads;  // what the work must be divided by: may be fewer than were asked for, down to 1
  Barrier* barrier;

  // Returns when all threads of the team have called it; what they wrote before is then visible.
  void wait() const {
    if (threads == 1) return;
    // Read before arriving: the round cannot end before this thread has arrived.
    const unsigned round = __atomic_load_n(&barrier->round, __ATOMIC_RELAXED);
    if (__atomic_add_fetch(&barrier->arrived, 1, __ATOMIC_ACQ_REL) == threads) {
      __atomic_store_n(&barrier->arrived, 0, __ATOMIC_RELAXED);
      __atomic_store_n(&barrier->round, round + 1, __ATOMIC_RELEASE);
      return;
    }
    wait_until([&] { return __atomic_load_n(&barrier->round, __ATOMIC_ACQUIRE) != round; },
               barrier->spins);
  }
};

using Body = void (*)(void* context, const Team& team);

struct Runtime {
  // Calls body(context, team) once on each thread of a team of at most `threads` and returns when
  // all have returned. The body must not throw. A call from inside a body, or one that comes while
  // another thread's team is running, gets a team of one.
  void (*parallel)(Body body, void* context, int threads);
};

}  // namespace sparsify
