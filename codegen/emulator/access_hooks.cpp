// The functions that gcc's -fsanitize=thread calls before every access to memory. Their names and
// arguments are gcc's; libtsan, which usually has them, is not linked.
#include <cstddef>

#include "checks.h"

using emulator::AccessKind;
using emulator::check_access;

#define CODE __builtin_return_address(0)
#define HOOKS(BYTES)                                                                        \
  void __tsan_read##BYTES(void* at) { check_access(at, BYTES, AccessKind::read, CODE); }    \
  void __tsan_write##BYTES(void* at) { check_access(at, BYTES, AccessKind::write, CODE); }  \
  void __tsan_unaligned_read##BYTES(void* at) { check_access(at, BYTES, AccessKind::read, CODE, true); } \
  void __tsan_unaligned_write##BYTES(void* at) { check_access(at, BYTES, AccessKind::write, CODE, true); } \
  void __tsan_volatile_read##BYTES(void* at) { check_access(at, BYTES, AccessKind::volatile_read, CODE); } \
  void __tsan_volatile_write##BYTES(void* at) { check_access(at, BYTES, AccessKind::volatile_write, CODE); } \
  void __tsan_unaligned_volatile_read##BYTES(void* at) { check_access(at, BYTES, AccessKind::volatile_read, CODE, true); } \
  void __tsan_unaligned_volatile_write##BYTES(void* at) { check_access(at, BYTES, AccessKind::volatile_write, CODE, true); }

namespace {
// Of structs, which need not be aligned as a whole.
void check_range(void* at, size_t bytes, AccessKind kind, const void* code) {
  for (size_t i = 0; i < bytes; ++i) check_access(static_cast<char*>(at) + i, 1, kind, code, true);
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
void __tsan_vptr_update(void*, void*) {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}
}
