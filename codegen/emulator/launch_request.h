// What Python hands over for one launch; launch_request.py has the same structs for ctypes.
#pragma once

#include <cstdint>

namespace emulator {

// Memory of the caller. The kernel gets a copy in the arena, which is copied back if it is written.
struct MemoryRequest {
  char* host;
  int64_t bytes;
  int64_t alignment_offset;  // the copy starts this far behind a multiple of 512 bytes
  const char* name;
  const unsigned char* holes;  // a byte each: 1 where no element of the view lies; or null
  int64_t written;
  int64_t fresh;  // nobody has written it before
};

// A word of the kernel's parameter: an integer, or a pointer `value` bytes into `memory`.
struct WordRequest {
  int64_t memory;  // -1: the word is `value` itself
  int64_t value;
};

struct LaunchRequest {
  void (*enter)(const void* words);
  const WordRequest* words;
  int64_t word_count;
  const MemoryRequest* memories;
  int64_t memory_count;
  int64_t blocks, threads, shared_bytes, cluster;
  int64_t shared_limit;  // static and dynamic shared memory of a block, at most
  int64_t cooperative;
  int64_t schedule;  // 0 forward, 1 reverse, 2 random
  int64_t seed;
  int64_t checks;
};

extern "C" {
// Null if nothing is wrong, else reports, one a line; to be handed to emulator_free_reports.
char* emulator_launch(const LaunchRequest* request);
void emulator_free_reports(char* reports);
}

}  // namespace emulator
