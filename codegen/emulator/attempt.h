// An access to memory that a thread is about to make.
#pragma once

#include <string>

namespace emulator {

enum class AccessKind { read, write, atomic, volatile_read, volatile_write, read_only };

constexpr bool is_atomic(AccessKind kind) {
  return kind == AccessKind::atomic || kind == AccessKind::volatile_read ||
         kind == AccessKind::volatile_write;
}
constexpr bool reads(AccessKind kind) {
  return kind != AccessKind::write && kind != AccessKind::volatile_write;
}
constexpr bool writes(AccessKind kind) {
  return kind == AccessKind::write || kind == AccessKind::volatile_write ||
         kind == AccessKind::atomic;
}

struct Attempt {
  const void* address;
  int bytes;
  AccessKind kind;
  const void* code;

  std::string describe() const;              // "read of 4 bytes by block 0 thread 3 at <+0x11f0>"
  std::string key(const char* fault) const;  // one report for each place in the code
};

}  // namespace emulator
