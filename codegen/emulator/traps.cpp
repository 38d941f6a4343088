#include "traps.h"

#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <iterator>

#include "checks.h"
#include "memory.h"
#include "reports.h"
#include "scheduler.h"
#include "threads.h"

namespace emulator {
namespace {

constexpr int SIGNALS[] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE};
struct sigaction old_actions[std::size(SIGNALS)];
alignas(16) char signal_stack[64 * 1024];  // a fibre's own may have overflowed
long launching_thread;
struct sigaction old_interrupt;
volatile sig_atomic_t interrupted;

std::string meaning_of(int signal, const void* address) {
  if (signal == SIGFPE) return "crash: division by zero";
  if (signal == SIGILL) return "crash: illegal instruction";
  if (is_stack_overflow(running->fibre, address)) return "crash: the stack is full";
  if (const Region* region = region_at(address))
    return "write to const: " + region->describe(address);
  return format("wild access: address %p", address);
}

void give_back() {
  for (size_t i = 0; i < std::size(SIGNALS); ++i) sigaction(SIGNALS[i], &old_actions[i], nullptr);
}

// Where the kernel was: if the emulator took the last of a full stack, where it was called from.
const void* place_in_kernel(const void* code, const char* stack_pointer) {
  if (is_kernel_code(code)) return code;
  const char* const stack = running->fibre.stack;
  auto word = reinterpret_cast<void* const*>(std::max(stack_pointer, stack + PAGE_BYTES));
  const auto end = reinterpret_cast<void* const*>(stack + STACK_BYTES);
  while (word < end && !is_kernel_code(*word)) ++word;
  return word < end ? *word : code;
}

// Of another thread, or of the emulator itself: the process's own handler gets it when the
// instruction is executed again.
bool is_ours() { return running && syscall(SYS_gettid) == launching_thread; }

void on_signal(int signal, siginfo_t* info, void* context) {
  if (!is_ours()) return give_back();
  auto& registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  const void* const code = place_in_kernel(reinterpret_cast<void*>(registers[REG_RIP] + 1),
                                           reinterpret_cast<char*>(registers[REG_RSP]));
  report(format("signal %p", code), meaning_of(signal, info->si_addr) + ", by " +
                                        name_of(*running) + " at " + name_of_code(code));
  // Leave the handler into end_launch, on a stack that is as after a call.
  registers[REG_RSP] = greg_t(running->fibre.stack + STACK_BYTES - 256 - 8);
  registers[REG_RIP] = reinterpret_cast<greg_t>(&end_launch);
}

bool is_handled(const struct sigaction& action) {
  return action.sa_handler != SIG_DFL && action.sa_handler != SIG_IGN;
}

void on_interrupt(int signal, siginfo_t* info, void* context) {
  interrupted = 1;
  if (old_interrupt.sa_flags & SA_SIGINFO)
    old_interrupt.sa_sigaction(signal, info, context);
  else
    old_interrupt.sa_handler(signal);
}

}  // namespace

bool was_interrupted() { return interrupted; }

Traps::Traps() {
  interrupted = 0;
  launching_thread = syscall(SYS_gettid);
  stack_t stack{};
  stack.ss_sp = signal_stack;
  stack.ss_size = sizeof signal_stack;
  sigaltstack(&stack, &old_stack_);
  struct sigaction action{};
  action.sa_sigaction = on_signal;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  for (size_t i = 0; i < std::size(SIGNALS); ++i) sigaction(SIGNALS[i], &action, &old_actions[i]);
  sigaction(SIGINT, nullptr, &old_interrupt);
  action.sa_sigaction = on_interrupt;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_RESTART;
  if (is_handled(old_interrupt)) sigaction(SIGINT, &action, nullptr);
}

Traps::~Traps() {
  give_back();
  if (is_handled(old_interrupt)) sigaction(SIGINT, &old_interrupt, nullptr);
  sigaltstack(&old_stack_, nullptr);
}

}  // namespace emulator
