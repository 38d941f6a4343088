#include "launch.h"

#include <pthread.h>
#include <xmmintrin.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <mutex>
#include <numeric>

#include "barriers.h"
#include "checks.h"
#include "memory.h"
#include "ordering.h"
#include "reports.h"
#include "scheduler.h"
#include "traps.h"

namespace emulator {
namespace {

constexpr int64_t THREADS_AT_ONCE = 4096;  // of a launch whose blocks need not all be resident
constexpr unsigned DEFAULT_MODE = 0x1F80;  // as a process starts: no flush to zero, no traps

std::mutex one_launch_at_a_time;
Launch launch;
std::vector<std::unique_ptr<Cluster>> clusters;  // those that run now
std::vector<std::unique_ptr<Block>> blocks;

// What every fibre runs: the kernel, in one thread.
void run_thread() {
  launch.request->enter(launch.words.data());
  Thread& self = *running;
  Warp& warp = *self.warp;
  warp.exited |= 1u << self.lane;
  for (int lane = 0; lane < WARP; ++lane) {
    const Thread* other = warp.lanes[lane];
    if (warp.waiting >> lane & 1 && other->mask >> self.lane & 1)
      fail("lane ends", "warp: lane " + std::to_string(self.lane) + " ends while lane " +
                            std::to_string(lane) + " waits for it at " + name_of(other->place) +
                            ", " + name_of(self));
  }
  self.state = State::done;
  --self.block->alive;
  --self.block->cluster->alive;
  leave_barriers(self);
  if (self.block->has_exited()) check_block_may_end(*self.block);
  leave_thread();
}

void add_block(Cluster& cluster, int64_t index) {
  const int64_t threads = launch.request->threads;
  blocks.push_back(std::make_unique<Block>());
  Block& block = *blocks.back();
  block.index = index;
  block.rank = int64_t(cluster.blocks.size());
  block.cluster = &cluster;
  block.alive = threads;
  block.warps.resize((threads + WARP - 1) / WARP);
  for (int64_t i = 0; i < threads; ++i) {
    block.threads.push_back(std::make_unique<Thread>());
    Thread& thread = *block.threads.back();
    thread.block = &block;
    thread.index = i;
    thread.clock.belong_to(index);
    thread.lane = int(i % WARP);
    thread.warp = &block.warps[i / WARP];
    thread.warp->lanes[thread.lane] = &thread;
    thread.warp->existing |= 1u << thread.lane;
    prepare_fibre(thread.fibre, run_thread);
  }
  cluster.blocks.push_back(&block);
  cluster.alive += threads;
}

void forget_wave() {
  for (auto& block : blocks)
    for (auto& thread : block->threads) release_stack(thread->fibre);
  blocks.clear();
  clusters.clear();
}

// Run some clusters side by side until all their threads have ended.
void run_wave(int64_t* first, int64_t* last) {
  const size_t mark = arena_mark();
  std::sort(first, last);  // the scheduler brings them into the order of the schedule
  for (const int64_t* index = first; index != last; ++index) {
    clusters.push_back(std::make_unique<Cluster>());
    for (int64_t rank = 0; rank < launch.request->cluster; ++rank)
      add_block(*clusters.back(), *index * launch.request->cluster + rank);
  }
  std::vector<Thread*> threads;
  for (auto& block : blocks)
    for (auto& thread : block->threads) threads.push_back(thread.get());
  run_threads(threads);
  forget_flags(mark);
  remove_regions(mark);
  forget_wave();
}

// Blocks that need not be resident together are run in at least two waves where there are two: one
// that waits for another then waits in vain, as it may on a device.
int64_t clusters_at_once(int64_t count) {
  if (launch.request->cooperative) return count;
  const int64_t fit = THREADS_AT_ONCE / (launch.request->threads * launch.request->cluster);
  return std::clamp<int64_t>(std::min(fit, (count + 1) / 2), 1, std::max<int64_t>(count, 1));
}

std::vector<int64_t> order_of_clusters(int64_t count) {
  std::vector<int64_t> order(count);
  std::iota(order.begin(), order.end(), 0);
  if (current_schedule() == Schedule::reverse) std::reverse(order.begin(), order.end());
  if (current_schedule() == Schedule::random)
    for (int64_t i = count; i > 1; --i) std::swap(order[i - 1], order[random_number() % i]);
  return order;
}

// The caller's mode of the floating-point unit, which may flush denormals, is not the kernel's.
class RoundToNearest {
 public:
  RoundToNearest() : old_(_mm_getcsr()) { _mm_setcsr(DEFAULT_MODE); }
  ~RoundToNearest() { _mm_setcsr(old_); }

 private:
  unsigned old_;
};

void run_grid() {
  const RoundToNearest mode;
  const Traps traps;
  const int64_t count = launch.request->blocks / launch.request->cluster,
                wave = clusters_at_once(count);
  std::vector<int64_t> order = order_of_clusters(count);
  for (int64_t i = 0; i < count && !was_ended(); i += wave)
    run_wave(&order[i], &order[0] + std::min(i + wave, count));
}

// Fill the arena and the words of the parameter. False if there is no room.
bool take_memory(std::vector<Region*>& regions) {
  const LaunchRequest& request = *launch.request;
  for (int64_t i = 0; i < request.memory_count; ++i) {
    regions.push_back(add_global(request.memories[i], request.checks));
    if (!regions.back()) return false;
  }
  for (int64_t i = 0; i < request.word_count; ++i) {
    const WordRequest& word = request.words[i];
    const char* base = word.memory < 0 ? nullptr : regions[word.memory]->base;
    launch.words.push_back(reinterpret_cast<uint64_t>(base) + uint64_t(word.value));
  }
  return true;
}

void execute(const LaunchRequest& request) {
  launch = {&request, {}};
  start_scheduler(Schedule(request.schedule), uint64_t(request.seed));
  start_checks(request.checks, reinterpret_cast<const void*>(request.enter));
  start_ordering(request.checks);
  std::vector<Region*> regions;
  if (!open_arena() || !take_memory(regions)) throw std::bad_alloc();
  run_grid();
  if (has_reports()) return;
  for (int64_t i = 0; i < request.memory_count; ++i) copy_back(request.memories[i], *regions[i]);
}

void clean_up() {
  forget_wave();
  close_arena();
  start_ordering(false);
}

// A forked process has the thread that forked only: nobody there would give the lock back.
[[maybe_unused]] const int registered =
    pthread_atfork([] { one_launch_at_a_time.lock(); }, [] { one_launch_at_a_time.unlock(); },
                   [] { one_launch_at_a_time.unlock(); });

}  // namespace

const Launch& current_launch() { return launch; }

extern "C" char* emulator_launch(const LaunchRequest* request) {
  const std::lock_guard<std::mutex> lock(one_launch_at_a_time);
  try {
    execute(*request);
  } catch (const std::bad_alloc&) {
    report("memory", "out of memory: the emulator has no room for this launch");
  }
  clean_up();
  const std::string lines = take_reports();
  return lines.empty() ? nullptr : strdup(lines.c_str());
}

extern "C" void emulator_free_reports(char* reports) { free(reports); }

extern "C" uint3 emulator_thread_index() { return {unsigned(running->index), 0, 0}; }
extern "C" uint3 emulator_block_index() { return {unsigned(running->block->index), 0, 0}; }
extern "C" uint3 emulator_block_size() { return {unsigned(launch.request->threads), 1, 1}; }
extern "C" uint3 emulator_grid_size() { return {unsigned(launch.request->blocks), 1, 1}; }
extern "C" unsigned emulator_cluster_rank() { return unsigned(running->block->rank); }
extern "C" unsigned emulator_cluster_size() { return unsigned(launch.request->cluster); }

extern "C" void emulator_sleep(Place place) { rest(place); }

// Counts steps of the scheduler, as if each took about a microsecond.
extern "C" long long emulator_clock() { return elapsed_steps() * 1000; }

extern "C" void emulator_fail(const char* message, Place place) {
  fail(message,
       std::string("trap: ") + message + " at " + name_of(place) + ", " + name_of(*running));
}

}  // namespace emulator
