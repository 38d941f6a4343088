// Which thread runs: one at a time, until it waits, sleeps, ends, or must let another go first.
#pragma once

#include <cstdint>
#include <vector>

#include "threads.h"

namespace emulator {

enum class Schedule { forward, reverse, random };

extern Thread* running;  // null outside of a launch

void start_scheduler(Schedule schedule, uint64_t seed);
// Run these threads until all are done or the launch was ended.
void run_threads(std::vector<Thread*> threads);
bool was_ended();

void wake(Thread& thread);
// The running thread waits in a barrier or collective, until somebody wakes it.
void wait_in(State state, Place place);
// The running thread lets others run: all that are ready, or just any other.
void rest(Place place = {});
void step_aside();
// The running thread has woken itself and others: they run in the order of the schedule.
void run_woken();
[[noreturn]] void leave_thread();  // it is done
[[noreturn]] void end_launch();    // after a fault: no thread goes on

// Something happened that may end another thread's waiting. If all only rest, nothing ever will.
void note_progress();
Schedule current_schedule();
uint64_t random_number();
int64_t elapsed_steps();

}  // namespace emulator
