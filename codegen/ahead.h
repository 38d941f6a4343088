// Steps that helpers compute before another thread reads them.
#pragma once

namespace sparsify {

constexpr int64_t RING = 16;  // steps that helpers may be ahead

// Hands the results of steps on, in a ring of RING slots. Numbers of steps count from 0 through all
// rows of a thread; number n lies in slot n % RING.
struct Ring {
  struct alignas(64) Line {  // of its own, because others wait for it
    int64_t number;
  };
  Line* ready;  // [RING], one more than the step that a slot holds
  Line* read;   // how many steps were read

  explicit Ring(Arena& arena) : ready(arena.take<Line>(RING)), read(arena.take<Line>(1)) {}

  void clear() const {
    for (int64_t slot = 0; slot < RING; ++slot) ready[slot].number = 0;
    read->number = 0;
  }

  // For helpers: returns when the slot of a step may be written.
  void await_slot(int64_t number, int spins) const {
    wait_until([&] { return __atomic_load_n(&read->number, __ATOMIC_ACQUIRE) + RING > number; }, spins);
  }
  void publish(int64_t number) const {
    __atomic_store_n(&ready[number % RING].number, number + 1, __ATOMIC_RELEASE);
  }

  // For the one thread that reads: returns when a step is there.
  void await_step(int64_t number, int spins) const {
    const int64_t* const slot = &ready[number % RING].number;
    wait_until([&] { return __atomic_load_n(slot, __ATOMIC_ACQUIRE) == number + 1; }, spins);
  }
  void release(int64_t number) const {
    __atomic_store_n(&read->number, number + 1, __ATOMIC_RELEASE);
  }
};

}  // namespace sparsify
