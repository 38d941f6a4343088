#include "scheduler.h"

#include <map>
#include <string>

#include "reports.h"
#include "traps.h"

namespace emulator {

Thread* running = nullptr;

namespace {

// How often all threads may rest in turn while nothing changes. Far more than any loop that waits
// needs: what it waits for comes when the others have run, not after a time.
constexpr int64_t MOST_IDLE_ROUNDS = 50000;

Schedule schedule;
uint64_t random_state;
std::vector<Thread*> ready, resting;
size_t first_ready;
std::vector<Thread*> members;  // of this run
Fibre outside;                 // the caller of run_threads
int64_t live, steps, idle_rounds;
bool ended;

const char* name_of_state(State state) {
  switch (state) {
    case State::in_block_barrier:
      return "__syncthreads";
    case State::in_named_barrier:
      return "__barrier_sync_count";
    case State::in_collective:
      return "a warp collective";
    case State::in_cluster_barrier:
      return "the barrier of the cluster";
    default:
      return "a loop";
  }
}

// "3 threads wait in __syncthreads at kernel.cu:12; ..."
std::string describe_waiting() {
  std::map<std::string, int> counts;
  for (const Thread* each : members) {
    if (each->state == State::done) continue;
    std::string where = name_of_state(each->state);
    if (each->place.file) where += " at " + name_of(each->place);
    ++counts[where];
  }
  std::string text;
  for (const auto& [where, count] : counts)
    text += format("%s%d %s in %s", text.empty() ? "" : "; ", count,
                   count == 1 ? "thread waits" : "threads wait", where.c_str());
  return text;
}

Thread* take_ready() {
  if (first_ready >= ready.size()) {
    ready.clear();
    first_ready = 0;
    if (resting.empty()) return nullptr;
    if (++idle_rounds > MOST_IDLE_ROUNDS) fail("no progress", "no progress: " + describe_waiting());
    ready.swap(resting);
  }
  Thread* next = nullptr;
  if (schedule == Schedule::forward) {
    next = ready[first_ready++];
  } else {
    if (schedule == Schedule::random)
      std::swap(ready.back(), ready[first_ready + random_number() % (ready.size() - first_ready)]);
    next = ready.back();
    ready.pop_back();
  }
  return next;
}

void run_next(Fibre& from) {
  if (running && was_interrupted()) fail("interrupt", "interrupted: the launch was ended");
  Thread* next = take_ready();
  if (!next && live) fail("deadlock", "deadlock: " + describe_waiting());
  ++steps;
  Thread* before = running;
  running = next;
  if (next != before) switch_fibre(from, next ? next->fibre : outside);
}

}  // namespace

void start_scheduler(Schedule wanted, uint64_t seed) {
  schedule = wanted;
  random_state = seed * 0x9E3779B97F4A7C15ull + 0x2545F4914F6CDD1Dull;
  if (!random_state) random_state = 1;
  steps = 0;
  ended = false;
}

void run_threads(std::vector<Thread*> threads) {
  members = std::move(threads);
  live = int64_t(members.size());
  ready = members;
  resting.clear();
  first_ready = 0;
  idle_rounds = 0;
  running = nullptr;
  run_next(outside);
  running = nullptr;
}

bool was_ended() { return ended; }

void wake(Thread& thread) {
  thread.state = State::ready;
  ready.push_back(&thread);
}

void wait_in(State state, Place place) {
  running->place = place;
  running->state = state;
  run_next(running->fibre);
}

void rest(Place place) {
  running->accesses_since_rest = 0;
  running->place = place;
  resting.push_back(running);
  run_next(running->fibre);
}

void step_aside() {
  ready.push_back(running);
  run_next(running->fibre);
}

void run_woken() { run_next(running->fibre); }

void leave_thread() {
  running->state = State::done;
  --live;
  note_progress();
  run_next(running->fibre);
  __builtin_unreachable();
}

void end_launch() {
  ended = true;
  Fibre& from = running->fibre;
  running = nullptr;
  switch_fibre(from, outside);
  __builtin_unreachable();
}

void note_progress() { idle_rounds = 0; }
Schedule current_schedule() { return schedule; }

uint64_t random_number() {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return random_state;
}

int64_t elapsed_steps() { return steps; }

}  // namespace emulator
