// Where the threads of a team wait for each other, each of them with something to do in between.
#pragma once

namespace sparsify {

// How often each thread has arrived, in a cache line of its own: saying so takes no time, and arrives
// at others while the thread goes on.
class Arrivals {
 public:
  Arrivals(Arena& arena, const Team& team) : team_(team), lines_(arena.take<Line>(team.threads)) {}

  static int64_t bytes(int64_t threads) { return threads * int64_t(sizeof(Line)); }
  static void clear(char* memory, int64_t threads) { std::memset(memory, 0, bytes(threads)); }

  // What this thread has written before is visible to those whose `await` has returned.
  void arrive() { __atomic_store_n(&lines_[team_.thread].times, ++times_, __ATOMIC_RELEASE); }

  // Returns when all have arrived as often as this thread.
  void await() const {
    for (int other = 0; other < team_.threads; ++other) {
      const auto is_there = [&] {
        return __atomic_load_n(&lines_[other].times, __ATOMIC_ACQUIRE) >= times_;
      };
      wait_until(is_there, team_.barrier->spins);
    }
  }
  void meet() {
    arrive();
    await();
  }

 private:
  struct alignas(64) Line {
    int64_t times;
  };

  const Team& team_;
  Line* lines_;
  int64_t times_ = 0;
};

SPARSIFY_INLINE void fetch_mask(const uint8_t* mask, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(mask + i);
}

}  // namespace sparsify
