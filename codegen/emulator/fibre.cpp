#include "fibre.h"

#include <sys/mman.h>

#include <new>
#include <vector>

#if !defined(__x86_64__)
#error "the switch between fibres is written for x86-64"
#endif

// The calling convention says that a function keeps rbp, rbx and r12 to r15; all else is the
// caller's to save. So a switch stores these, exchanges the stacks and loads them again.
asm(R"(
.text
.globl emulator_exchange_stacks
.hidden emulator_exchange_stacks
.type emulator_exchange_stacks, @function
emulator_exchange_stacks:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");
extern "C" void emulator_exchange_stacks(void** save, void* load);

namespace emulator {
namespace {

constexpr int SAVED_REGISTERS = 6;

// Stacks that all began at the same place of a page, and at multiples of 128 KiB, would share the
// same few lines of the caches.
constexpr size_t COLOURS = 32, COLOUR_BYTES = 128;
size_t colour_of_next;

// Kept from launch to launch: mapping one takes longer than using it.
std::vector<char*> guarded_stacks, plain_stacks;
size_t guarded_made;

char* new_stack() {
  void* stack = mmap(nullptr, STACK_BYTES, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (stack == MAP_FAILED) throw std::bad_alloc();
  return static_cast<char*>(stack);
}

char* take(std::vector<char*>& stacks) {
  if (stacks.empty()) return new_stack();
  char* const stack = stacks.back();
  stacks.pop_back();
  return stack;
}

}  // namespace

void prepare_fibre(Fibre& fibre, void (*entry)()) {
  const bool is_new = guarded_stacks.empty() && guarded_made < MOST_GUARDED;
  fibre.is_guarded = is_new || !guarded_stacks.empty();
  fibre.stack = take(fibre.is_guarded ? guarded_stacks : plain_stacks);
  if (is_new) {
    mprotect(fibre.stack, PAGE_BYTES, PROT_NONE);
    ++guarded_made;
  }
  const size_t colour = colour_of_next++ % COLOURS * COLOUR_BYTES;
  void** top = reinterpret_cast<void**>(fibre.stack + STACK_BYTES - colour);
  *--top = nullptr;  // where entry would return to; also aligns its frame
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < SAVED_REGISTERS; ++i) *--top = nullptr;
  fibre.stack_pointer = top;
}

void release_stack(Fibre& fibre) {
  if (!fibre.stack) return;
  (fibre.is_guarded ? guarded_stacks : plain_stacks).push_back(fibre.stack);
  fibre.stack = nullptr;
}

void switch_fibre(Fibre& from, Fibre& to) {
  emulator_exchange_stacks(&from.stack_pointer, to.stack_pointer);
}

bool is_on_stack(const Fibre& fibre, const void* address) {
  const char* at = static_cast<const char*>(address);
  return fibre.stack && at >= fibre.stack + PAGE_BYTES && at < fibre.stack + STACK_BYTES;
}

bool is_stack_overflow(const Fibre& fibre, const void* address) {
  const char* at = static_cast<const char*>(address);
  return fibre.stack && at >= fibre.stack && at < fibre.stack + PAGE_BYTES;
}

}  // namespace emulator
