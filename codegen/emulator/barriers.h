// Barriers of blocks, warps and clusters: what happens when a thread ends while others wait.
#pragma once

#include "threads.h"

namespace emulator {

// Called when `thread` has ended, after it was taken off the counts of its block and cluster.
void leave_barriers(Thread& thread);

}  // namespace emulator
