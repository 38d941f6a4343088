// A call of a kernel as prepared_call.py prepares it, which asks whether weights are what they were
// while the kernel runs.
//
// Packed weights are read, never the weights themselves. So a weight that was written to before the
// call spoils its results alone, and whoever asks for them makes them anew.
#pragma once

#include <atomic>
#include <cstdint>

#include "runtime.h"
#include "workers.h"
#include "write_watch.h"

namespace sparsify {
namespace {

// The entry of a kernel, see write_entry in frame_text.py, and what stays from call to call.
struct Prepared {
  int (*entry)(const Runtime* runtime, void* const* pointers, const int64_t* strides, int64_t steps,
               int64_t batch, int threads, int64_t* active);
  const int64_t* strides;
  int64_t steps, batch, threads;
  int64_t gathers;
  int64_t* active;  // per gather, and behind them the rows of all steps that were run
};

enum Outcome : int { kDone = 0, kNoMemory = 1, kWritten = 2 };

// Questions that the threads of a kernel's team take one by one when their parts are done, so that none
// waits for another one's. Each takes as long as a few steps of a small layer.
class Asked {
 public:
  Asked(const Question* questions, int64_t count) : questions_(questions), count_(count) {}

  // Called when no thread is asking any more.
  bool are_unwritten() {
    ask();  // where no team was formed
    return are_unwritten_;
  }
  Aside aside() {
    return {[](void* asked) { static_cast<Asked*>(asked)->ask(); }, this};
  }

 private:
  void ask() {
    for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < count_;)
      if (!questions_[i].is_unwritten()) are_unwritten_.store(false, std::memory_order_relaxed);
  }

  const Question* questions_;
  const int64_t count_;
  std::atomic<int64_t> next_{0};
  std::atomic<bool> are_unwritten_{true};
};

// What the next team that this thread forms does aside.
thread_local const Aside* next_aside = nullptr;

inline const Aside* take_aside() {
  const Aside* const aside = next_aside;
  next_aside = nullptr;
  return aside;
}

inline Outcome call(const Runtime* runtime, const Prepared& prepared, void* const* pointers,
                    const Question* questions, int64_t count) {
  const int64_t gathers = prepared.gathers;
  int64_t* const active = static_cast<int64_t*>(__builtin_alloca((gathers + 1) * sizeof(int64_t)));
  for (int64_t k = 0; k < gathers; ++k) active[k] = 0;
  Asked asked(questions, count);
  const Aside aside = asked.aside();
  next_aside = count > 0 ? &aside : nullptr;
  const int failed = prepared.entry(runtime, pointers, prepared.strides, prepared.steps, prepared.batch,
                                    static_cast<int>(prepared.threads), active);
  next_aside = nullptr;
  if (failed) return kNoMemory;
  if (!asked.are_unwritten()) return kWritten;
  active[gathers] = prepared.steps * prepared.batch;
  for (int64_t k = 0; k <= gathers; ++k) {
    __atomic_fetch_add(prepared.active + k, active[k], __ATOMIC_RELAXED);
  }
  return kDone;
}

}  // namespace
}  // namespace sparsify
