// What every access of a checked kernel is asked: is it inside, aligned, initialised, without a
// race?
#pragma once

#include "attempt.h"
#include "threads.h"

namespace emulator {

void start_checks(bool enabled, const void* kernel);
bool is_kernel_code(const void* code);
void check_access(const void* address, int bytes, AccessKind kind, const void* code,
                  bool may_be_unaligned = false);
void check_block_may_end(const Block& block);

}  // namespace emulator
