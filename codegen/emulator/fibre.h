// Fibres: stacks that one thread of the processor switches between.
#pragma once

#include <cstddef>

namespace emulator {

struct Fibre {
  void* stack_pointer = nullptr;  // where the fibre goes on, while it does not run
  char* stack = nullptr;
  bool is_guarded = false;  // the lowest page of the stack cannot be touched
};

constexpr size_t PAGE_BYTES = 4096;
constexpr size_t STACK_BYTES = 33 * PAGE_BYTES;  // for a kernel's local variables

// The system limits how often mapped memory may change its protection; the stacks of a launch with
// more threads lie side by side.
constexpr size_t MOST_GUARDED = 16384;

// Give `fibre` a stack on which it will start with `entry`, which must never return.
// Throws std::bad_alloc.
void prepare_fibre(Fibre& fibre, void (*entry)());
void release_stack(Fibre& fibre);
// Go on with `to`; returns when somebody switches back to `from`.
void switch_fibre(Fibre& from, Fibre& to);
bool is_on_stack(const Fibre& fibre, const void* address);
bool is_stack_overflow(const Fibre& fibre, const void* address);

}  // namespace emulator
