// What every access of a checked kernel is asked: is it inside, aligned, initialised, without a race?
#pragma once

#include "threads.h"

namespace emulator {

enum class AccessKind { read, write, atomic, volatile_read, volatile_write, read_only };

void start_checks(bool enabled, const void* kernel);
void check_access(const void* address, int bytes, AccessKind kind, const void* code, bool may_be_unaligned = false);
// Nobody may still want the shared memory of a block that has ended.
void check_shared_memory_of(const Block& block);

}  // namespace emulator
