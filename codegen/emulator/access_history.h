// Who touched each piece of a region last, and when: what races are found by.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

namespace emulator {

// One access. Block and thread share a word: there is one of these for every few bytes.
struct Access {
  static constexpr int THREAD_BITS = 10;  // a block has at most 1024 threads

  uint32_t who = 0;  // 0: nobody
  uint32_t tick : 31;
  uint32_t atomic : 1;  // or volatile: two of these are no race
  const void* code = nullptr;

  static uint32_t name(int64_t block, int64_t thread) {
    return uint32_t((block + 1) << THREAD_BITS | thread);
  }
  bool happened() const { return who != 0; }
  int64_t block() const { return int64_t(who >> THREAD_BITS) - 1; }
  int64_t thread() const { return who & ((1 << THREAD_BITS) - 1); }
};

struct Cell {
  Access write, read;
  std::unique_ptr<std::vector<Access>> reads;  // further ones that nothing orders
  bool is_written = false;
};

// One cell for every `granule` bytes. Starts coarse; an access to fewer bytes makes it finer.
class AccessHistory {
 public:
  void cover(size_t bytes);
  bool is_kept() const { return !cells_.empty(); }
  void refine_for(uintptr_t offset, int bytes);
  size_t granule() const { return granule_; }
  Cell& operator[](size_t offset) { return cells_[offset / granule_]; }
  std::vector<Cell>& cells() { return cells_; }

 private:
  size_t granule_ = 4;
  std::vector<Cell> cells_;
};

}  // namespace emulator
