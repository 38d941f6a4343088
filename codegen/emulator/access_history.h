// Who touched each piece of a region last, and when: what races are found by.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

namespace emulator {

struct Access {
  uint32_t thread = 0;  // in the grid, plus one; 0: nobody
  uint32_t tick = 0;
  const void* code = nullptr;
};

struct Cell {
  Access write, read;
  std::unique_ptr<std::vector<Access>> reads;  // further ones that nothing orders
  bool is_written = false, atomic_write = false, atomic_read = false;
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
