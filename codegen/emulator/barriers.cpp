// __syncthreads, barriers of some warps of a block, and the barrier of a cluster.
#include "barriers.h"

#include <cstring>

#include "ordering.h"
#include "reports.h"
#include "scheduler.h"

namespace emulator {
namespace {

bool is_same(const Place& a, const Place& b) {
  return a.line == b.line && (a.file == b.file || !strcmp(a.file, b.file));
}

int result_of(Vote vote, int votes, int64_t voters) {
  switch (vote) {
    case Vote::any:
      return votes > 0;
    case Vote::all:
      return votes == voters;
    default:
      return votes;
  }
}

// Everybody is here: let them go on, each with the result of the vote.
void complete(Block& block) {
  const int result = result_of(block.vote, block.votes, block.arrived);
  std::vector<Thread*> participants;
  for (auto& each : block.threads) {
    if (each->state != State::in_block_barrier) continue;
    each->votes = result;
    participants.push_back(each.get());
  }
  block.arrived = block.votes = 0;
  order_all(participants);
  for (Thread* each : participants) wake(*each);
}

void complete(Block& block, unsigned barrier) {
  std::vector<Thread*> participants;
  for (auto& each : block.threads)
    if (each->state == State::in_named_barrier && each->barrier == barrier)
      participants.push_back(each.get());
  block.named[barrier].arrived = 0;
  order_all(participants);
  for (Thread* each : participants) wake(*each);
}

void complete(Cluster& cluster) {
  std::vector<Thread*> arrived;
  for (Block* block : cluster.blocks)
    for (auto& each : block->threads)
      if (each->has_arrived && each->arrived_in == cluster.phase) arrived.push_back(each.get());
  cluster.released = join_arrivals(arrived);
  cluster.arrived = 0;
  ++cluster.phase;
  for (Thread* each : arrived)
    if (each->state == State::in_cluster_barrier) wake(*each);
}

void check_same_barrier(const Block& block, Vote vote, const Place& place) {
  if (!block.arrived || (block.vote == vote && is_same(block.place, place))) return;
  const std::string text =
      format("divergent barrier: __syncthreads at %s meets __syncthreads at %s",
             name_of(place).c_str(), name_of(block.place).c_str());
  fail(text, text + ", " + name_of(*running));
}

void check_named_barrier(const NamedBarrier& known, unsigned barrier, unsigned threads,
                         const Place& place) {
  const std::string where = "__barrier_sync_count at " + name_of(place);
  if (barrier == 0 || barrier >= NAMED_BARRIERS)
    fail("barrier", "barrier: " + where + " names " + std::to_string(barrier) + ", not 1 to 15");
  if (threads == 0 || threads % WARP != 0)
    fail("barrier", "barrier: " + where + " is of " + std::to_string(threads) +
                        " threads, no whole warps");
  if (!known.arrived || (known.threads == threads && is_same(known.place, place))) return;
  const std::string text = "divergent barrier: " + where + " meets __barrier_sync_count at " +
                           name_of(known.place);
  fail(text, text + ", " + name_of(*running));
}

}  // namespace

extern "C" int emulator_block_barrier(Vote vote, int predicate, Place place) {
  Thread& self = *running;
  Block& block = *self.block;
  check_same_barrier(block, vote, place);
  block.vote = vote;
  block.place = place;
  block.votes += predicate;
  ++block.arrived;
  if (block.arrived == block.alive) {
    self.state = State::in_block_barrier;
    complete(block);
    run_woken();
  } else {
    wait_in(State::in_block_barrier, place);
  }
  return self.votes;
}

extern "C" void emulator_named_barrier(unsigned barrier, unsigned threads, Place place) {
  Thread& self = *running;
  Block& block = *self.block;
  check_named_barrier(block.named[barrier % NAMED_BARRIERS], barrier, threads, place);
  NamedBarrier& named = block.named[barrier];
  named.threads = threads;
  named.place = place;
  self.barrier = barrier;
  if (++named.arrived == named.threads) {
    self.state = State::in_named_barrier;
    complete(block, barrier);
    run_woken();
  } else {
    wait_in(State::in_named_barrier, place);
  }
}

extern "C" void emulator_cluster_arrive(bool releases, Place place) {
  Thread& self = *running;
  Cluster& cluster = *self.block->cluster;
  if (self.has_arrived)
    fail("arrive", "cluster barrier: " + name_of(self) + " arrives twice without waiting, at " +
                       name_of(place));
  self.has_arrived = true;
  self.arrival_releases = releases;
  self.arrived_in = cluster.phase;
  note_arrival(self);
  if (++cluster.arrived == cluster.alive) complete(cluster);
}

extern "C" void emulator_cluster_wait(Place place) {
  Thread& self = *running;
  Cluster& cluster = *self.block->cluster;
  if (!self.has_arrived)
    fail("wait", "cluster barrier: " + name_of(self) + " waits without having arrived, at " +
                     name_of(place));
  if (cluster.phase == self.arrived_in) wait_in(State::in_cluster_barrier, place);
  self.has_arrived = false;
  order_after(self, cluster.released);
}

void leave_barriers(Thread& thread) {
  Block& block = *thread.block;
  Cluster& cluster = *block.cluster;
  if (block.arrived && block.arrived == block.alive) complete(block);
  const bool counted = thread.has_arrived && thread.arrived_in == cluster.phase;
  if (counted) --cluster.arrived;  // it is no longer among those that are waited for
  if (cluster.arrived && cluster.arrived == cluster.alive) complete(cluster);
}

}  // namespace emulator
