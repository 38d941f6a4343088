// Who touched memory before, and whether anything orders that with what a thread does now.
#pragma once

#include "attempt.h"
#include "threads.h"

namespace emulator {

struct Region;

// Of memory that has a history: was it written, and is what others did ordered before this?
void check_history(const Attempt& attempt, Region& region);
// Nobody may still want the shared memory of a block that has ended.
void check_end_of(const Block& block);

}  // namespace emulator
