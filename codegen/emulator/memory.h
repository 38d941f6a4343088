// The arena: all memory of a launch, with zones around each region that nobody can touch.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "access_history.h"
#include "launch_request.h"

namespace emulator {

struct Block;

struct Region {
  char* base = nullptr;
  size_t bytes = 0;
  std::string name;
  bool written = true;                   // the kernel may write here
  bool fresh = true;                     // what it reads here it must have written
  const unsigned char* holes = nullptr;  // a byte each: 1 if it belongs to somebody else
  const Block* owner = nullptr;          // of shared memory
  const void* tag = nullptr;             // of a shared variable: the same in all blocks
  bool was_remote = false;               // another block of the cluster touched it
  AccessHistory history;

  bool holds(const void* address, size_t size) const;
  std::string describe(const void* address) const;  // "shared sums, byte 12 of 64"
};

// Reserves the arena at the first call. False if the system has no room for it.
bool open_arena();
Region* add_global(const MemoryRequest& request, bool checks);
void copy_back(const MemoryRequest& request, const Region& region);
Region* add_shared(const Block& owner, const void* tag, size_t bytes, size_t alignment,
                   const char* name, bool checks);

bool is_in_arena(const void* address);
Region* region_at(const void* address);       // the one whose pages hold the address, or null
Region* nearest_region(const void* address);  // null if there is none
const std::vector<Region*>& all_regions();

size_t arena_mark();
bool is_after_mark(const void* address, size_t mark);
void remove_regions(size_t mark);  // all that were added since
void close_arena();                // nothing of it can be touched any more

}  // namespace emulator
