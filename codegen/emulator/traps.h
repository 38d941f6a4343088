// Signals that a wrong kernel raises become reports, for as long as this object lives. Ctrl-C ends the
// launch: the process's own handler runs, and what it wants follows when the launch has returned.
#pragma once

#include <signal.h>

namespace emulator {

class Traps {
 public:
  Traps();   // of the calling thread; the handlers and the stack for signals are put back
  ~Traps();  // as they were found
  Traps(const Traps&) = delete;

 private:
  stack_t old_stack_;
};

// Whether Ctrl-C was pressed since the last Traps were set.
bool was_interrupted();

}  // namespace emulator
