#include "ordering.h"

#include <unordered_map>

#include "memory.h"
#include "scheduler.h"

namespace emulator {
namespace {

bool ordering;
std::unordered_map<const void*, KnownBy> flags;  // what who reads this address atomically can learn

}  // namespace

void start_ordering(bool checks) {
  ordering = checks;
  flags.clear();
}

void forget_flags(size_t mark) {
  for (auto each = flags.begin(); each != flags.end();)
    each = is_after_mark(each->first, mark) ? flags.erase(each) : std::next(each);
}

void order_all(const std::vector<Thread*>& threads) {
  if (!ordering) return;
  std::vector<Participant> participants;
  for (const Thread* each : threads)
    participants.push_back({each->identity(), &each->clock.known(), each->clock.tick});
  const KnownBy known = join_all(participants);
  for (Thread* each : threads) {
    each->clock.learn(known);
    ++each->clock.tick;
  }
}

void note_arrival(Thread& thread) {
  if (!ordering || !thread.arrival_releases) return;
  thread.arrival_known = thread.clock.known();
  thread.arrival_tick = thread.clock.tick++;
}

KnownBy join_arrivals(const std::vector<Thread*>& threads) {
  if (!ordering) return nullptr;
  std::vector<Participant> participants;
  for (const Thread* each : threads)
    if (each->arrival_releases)
      participants.push_back({each->identity(), &each->arrival_known, each->arrival_tick});
  return join_all(participants);
}

void order_after(Thread& thread, const KnownBy& known) {
  if (!ordering) return;
  // Usually it has learned nothing since it arrived, and then all threads can share one Known.
  const bool learned = !thread.arrival_releases || thread.clock.known() != thread.arrival_known;
  thread.clock.learn(learned ? join(thread.clock.known(), known) : known);
}

extern "C" void emulator_fence(Scope scope) {
  if (!ordering) return;
  Thread& self = *running;
  Clock& clock = self.clock;
  for (int each = 0; each <= int(scope); ++each) {  // a fence of the device is one of the block too
    clock.learn(join(clock.known(), clock.seen[each]));
    clock.seen[each] = nullptr;
  }
  const KnownBy told = with_tick(clock.known(), self.identity(), clock.tick++);
  for (int each = 0; each <= int(scope); ++each) clock.released[each] = told;
}

void note_atomic_read(Thread& thread, const void* address, Scope needed) {
  if (!ordering) return;
  const auto flag = flags.find(address);
  if (flag == flags.end()) return;
  KnownBy& seen = thread.clock.seen[int(needed)];
  seen = join(seen, flag->second);
}

void note_atomic_write(Thread& thread, const void* address, Scope needed, bool also_reads) {
  if (!ordering) return;
  const KnownBy& released = thread.clock.released[int(needed)];
  if (!also_reads && !released) {
    flags.erase(address);
  } else if (released) {
    KnownBy& flag = flags[address];
    flag = also_reads ? join(flag, released) : released;
  }
}

}  // namespace emulator
