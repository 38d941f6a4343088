// What the text of a kernel asks of the emulator while it runs. Both sides include this file.
#pragma once

#include "cuda_vectors.h"

namespace emulator {

// Where in the text a barrier or collective stands: two of them are the same one if this is equal.
struct Place {
  const char* file = nullptr;
  int line = 0;
};

enum class Vote { none, count, any, all };  // what __syncthreads_* asks of the predicates

enum class Collective {
  sync,
  ballot,
  any,
  all,
  shuffle,
  match,
  add,
  min,
  max,
  bit_and,
  bit_or,
  bit_xor
};

enum class Scope { block, device };

extern "C" {
// A thread's coordinates never change, so the compiler may keep what these return.
__attribute__((const)) uint3 emulator_thread_index();
__attribute__((const)) uint3 emulator_block_index();
__attribute__((const)) uint3 emulator_block_size();
__attribute__((const)) uint3 emulator_grid_size();
__attribute__((const)) unsigned emulator_cluster_rank();
__attribute__((const)) unsigned emulator_cluster_size();

int emulator_block_barrier(Vote vote, int predicate, Place place);
void emulator_named_barrier(unsigned barrier, unsigned threads, Place place);
unsigned long long emulator_collective(Collective what, unsigned mask, unsigned long long value,
                                       int argument, Place place);
void emulator_fence(Scope scope);
void emulator_sleep(Place place);
long long emulator_clock();
[[noreturn]] void emulator_fail(const char* message, Place place);

// Atomics are ordinary code of the one processor; these tell the checks and the scheduler.
void emulator_before_atomic(void* address, int bytes, const void* code);
void emulator_memory_changed();
void emulator_before_read_only(const void* address, int bytes, const void* code);

void* emulator_static_shared(const void* variable, unsigned long bytes, unsigned long alignment,
                             const char* name);
void* emulator_dynamic_shared();

void emulator_cluster_arrive(bool releases, Place place);
void emulator_cluster_wait(Place place);
void* emulator_map_shared(const void* address, unsigned rank, Place place);
unsigned emulator_shared_rank(const void* address);
}

}  // namespace emulator
