// Where the threads of a team wait for each other, each of them with something to do in between.
#pragma once

namespace sparsify {

// How often each thread has arrived, in a cache line of its own: saying so takes no time, and arrives
// at others while the thread goes on.
//
// Where others take a thread's core, every step may have to wait until it has one again. When that has
// taken longer than the other threads are worth, the caller goes on alone.
class Arrivals {
 public:
  // `steps` are those that threads meet in.
  Arrivals(Arena& arena, const Team& team, int64_t steps)
      : team_(team), lines_(arena.take<Line>(team.threads)), steps_(steps), began_ns_(now_ns()) {}

  static int64_t bytes(int64_t threads) { return threads * int64_t(sizeof(Line)); }
  static void clear(char* memory, int64_t threads) {
    std::memset(memory, 0, bytes(threads));
    reinterpret_cast<Line*>(memory)->last_step = INT64_MAX;
  }

  // Whose threads work on the next step.
  const Team& team() const { return team_; }

  // Begins a step. True where the one before was the last one of this team: all `part`.
  bool parts() {
    if (++step_ > __atomic_load_n(&lines_->last_step, __ATOMIC_RELAXED)) return true;
    if (team_.thread == 0 && team_.barrier->lost_ns != lost_ns_) consider();
    return false;
  }
  // True for the caller, which from now on is a team of one; the others are done.
  bool part() {
    arrive();
    if (team_.thread > 0) return false;
    await();
    lines_->last_step = INT64_MAX;
    team_.threads = 1;
    return true;
  }

  // What this thread has written before is visible to those whose `await` has returned.
  void arrive() { __atomic_store_n(&lines_[team_.thread].times, ++times_, __ATOMIC_RELEASE); }

  // Returns when all have arrived as often as this thread.
  void await() const {
    for (int other = 0; other < team_.threads; ++other) {
      const auto is_there = [&] {
        return __atomic_load_n(&lines_[other].times, __ATOMIC_ACQUIRE) >= times_;
      };
      wait_until(is_there, team_);
    }
  }
  void meet() {
    arrive();
    await();
  }

 private:
  struct alignas(64) Line {
    int64_t times;
    int64_t last_step;  // of the team; in the caller's line
  };

  // Others see `last_step` when they have awaited the caller in that step, which it has not begun. So
  // all agree at the next one.
  __attribute__((noinline)) void consider() {
    lost_ns_ = team_.barrier->lost_ns;
    const int64_t worked_ns = now_ns() - began_ns_ - lost_ns_;
    const double others_ns = double(worked_ns) / double(step_) * double(team_.threads - 1);
    if (double(lost_ns_) > others_ns * double(steps_ - step_))
      __atomic_store_n(&lines_->last_step, step_, __ATOMIC_RELAXED);
  }

  Team team_;
  Line* lines_;
  const int64_t steps_;
  const int64_t began_ns_;
  int64_t step_ = 0, times_ = 0, lost_ns_ = 0;
};

SPARSIFY_INLINE void fetch_mask(const uint8_t* mask, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(mask + i);
}

}  // namespace sparsify
