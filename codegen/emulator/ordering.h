// What orders memory between threads. Does nothing while a launch is not checked.
#pragma once

#include "threads.h"

namespace emulator {

void start_ordering(bool checks);

// Whatever one of them did comes before whatever any of them does next.
void order_all(const std::vector<Thread*>& threads);

// The two halves of a cluster's barrier.
void note_arrival(Thread& thread);
KnownBy join_arrivals(const std::vector<Thread*>& threads);
void order_after(Thread& thread, const KnownBy& known);

// Atomic (or volatile) access to `address`. A fence before a write and a fence after a read that
// finds it order what surrounds them. Fences of a block serve only within its shared memory.
// Memory from this mark of the arena on is given away.
void forget_flags(size_t mark);
void note_atomic_read(Thread& thread, const void* address, Scope needed);
void note_atomic_write(Thread& thread, const void* address, Scope needed, bool also_reads);
// Memory from this mark of the arena on is given to others.
void forget_flags(size_t mark);

}  // namespace emulator
