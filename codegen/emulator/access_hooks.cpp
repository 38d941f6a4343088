// The functions that gcc's -fsanitize=thread calls before every access to memory. Their names and
// arguments are gcc's; libtsan, which usually has them, is not linked.
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "checks.h"
#include "memory.h"

using emulator::AccessKind;
using emulator::check_access;

#define CODE __builtin_return_address(0)
#define HOOKS(BYTES)                                                                       \
  void __tsan_read##BYTES(void* at) { check_access(at, BYTES, AccessKind::read, CODE); }   \
  void __tsan_write##BYTES(void* at) { check_access(at, BYTES, AccessKind::write, CODE); } \
  void __tsan_unaligned_read##BYTES(void* at) {                                            \
    check_access(at, BYTES, AccessKind::read, CODE, true);                                 \
  }                                                                                        \
  void __tsan_unaligned_write##BYTES(void* at) {                                           \
    check_access(at, BYTES, AccessKind::write, CODE, true);                                \
  }                                                                                        \
  void __tsan_volatile_read##BYTES(void* at) {                                             \
    check_access(at, BYTES, AccessKind::volatile_read, CODE);                              \
  }                                                                                        \
  void __tsan_volatile_write##BYTES(void* at) {                                            \
    check_access(at, BYTES, AccessKind::volatile_write, CODE);                             \
  }                                                                                        \
  void __tsan_unaligned_volatile_read##BYTES(void* at) {                                   \
    check_access(at, BYTES, AccessKind::volatile_read, CODE, true);                        \
  }                                                                                        \
  void __tsan_unaligned_volatile_write##BYTES(void* at) {                                  \
    check_access(at, BYTES, AccessKind::volatile_write, CODE, true);                       \
  }

namespace {
// Of structs and copies, which need not be aligned as a whole.
void check_range(const void* begin, size_t bytes, AccessKind kind, const void* code) {
  const char* at = static_cast<const char*>(begin);
  const int step = (uintptr_t(at) | bytes) % 4 ? 1 : 4;
  for (size_t i = 0; i < bytes; i += step) check_access(at + i, step, kind, code, true);
}

// Without checks of what the emulator itself copies: the parameter of the kernel.
void check_copied(const void* begin, size_t bytes, AccessKind kind, const void* code) {
  if (emulator::is_in_arena(begin)) check_range(begin, bytes, kind, code);
}

}  // namespace

extern "C" {
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)
void __tsan_read_range(void* at, size_t bytes) { check_range(at, bytes, AccessKind::read, CODE); }
void __tsan_write_range(void* at, size_t bytes) { check_range(at, bytes, AccessKind::write, CODE); }
void* emulator_memcpy(void* to, const void* from, size_t bytes) {
  check_copied(from, bytes, AccessKind::read, CODE);
  check_copied(to, bytes, AccessKind::write, CODE);
  return memcpy(to, from, bytes);
}
void* emulator_memset(void* to, int byte, size_t bytes) {
  check_copied(to, bytes, AccessKind::write, CODE);
  return memset(to, byte, bytes);
}
void __tsan_vptr_update(void*, void*) {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}
}
