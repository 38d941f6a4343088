// Vector clocks: which accesses of other threads happened before what a thread does now.
//
// A thread's own tick counts its releases. What it knows of the others is shared: after a barrier
// all threads of a block hold the same Known, so a barrier costs one vector and not one per thread.
#pragma once

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

namespace emulator {

using Ticks =
    std::vector<uint32_t>;  // of each thread of one block: all before this happened before

// For each block of which anything is known, sorted by the block's index. Never changed once made.
struct Known {
  std::vector<std::pair<int64_t, std::shared_ptr<const Ticks>>> blocks;

  const Ticks* of(int64_t block) const;
};
using KnownBy = std::shared_ptr<const Known>;  // null: nothing is known

// A thread as its clock sees it.
struct Identity {
  int64_t block = 0;
  int64_t thread = 0;   // within the block
  int64_t threads = 0;  // of the block
};

class Clock {
 public:
  uint32_t tick = 1;
  KnownBy released[2];  // what the last fence of each Scope made ready for others to see
  KnownBy seen[2];      // what atomic reads found, in effect from the next fence of that Scope on

  void belong_to(int64_t block) { block_ = block; }
  const KnownBy& known() const { return known_; }
  void learn(KnownBy known) {
    known_ = std::move(known);
    of_own_block_ = known_ ? known_->of(block_) : nullptr;
  }
  bool knows(int64_t block, int64_t thread, uint32_t tick) const;

 private:
  int64_t block_ = 0;
  KnownBy known_;
  const Ticks* of_own_block_ = nullptr;  // by far the most that is asked for
};

KnownBy join(const KnownBy& a, const KnownBy& b);
// What somebody knows to whom `who` has just told everything up to its present tick.
KnownBy with_tick(const KnownBy& known, const Identity& who, uint32_t tick);
// One event of each participant: (who, what it knows, its tick). The union of it all.
struct Participant {
  Identity who;
  const KnownBy* known;
  uint32_t tick;
};
KnownBy join_all(const std::vector<Participant>& participants);
bool knows(const KnownBy& known, int64_t block, int64_t thread, uint32_t tick);

}  // namespace emulator
