#include "races.h"

#include <algorithm>

#include "memory.h"
#include "reports.h"
#include "scheduler.h"

namespace emulator {
namespace {

uint32_t short_name(const Thread& thread) {
  return Access::name(thread.block->index, thread.index);
}

// Whether the earlier access happened before what `thread` does now.
bool is_ordered(const Access& earlier, const Thread& thread) {
  return earlier.who == short_name(thread) ||
         thread.clock.knows(earlier.block(), earlier.thread(), earlier.tick);
}

void report_race(const Attempt& attempt, const Region& region, const char* order,
                 const Access& earlier) {
  report(format("race %p %p", attempt.code, earlier.code),
         format("race: %s, ", order) + region.describe(attempt.address) + ", " +
             attempt.describe() + ", and the earlier access by " +
             name_of_thread(earlier.block(), earlier.thread()) + " at " +
             name_of_code(earlier.code));
}

void check_earlier_write(const Attempt& attempt, const Region& region, const Cell& cell) {
  if (!cell.write.happened() || (is_atomic(attempt.kind) && cell.write.atomic)) return;
  if (!is_ordered(cell.write, *running))
    report_race(attempt, region, writes(attempt.kind) ? "write after write" : "read after write",
                cell.write);
}

void check_earlier_read(const Attempt& attempt, const Region& region, const Access& read) {
  if (!read.happened() || (is_atomic(attempt.kind) && read.atomic)) return;
  if (!is_ordered(read, *running)) report_race(attempt, region, "write after read", read);
}

void remember_write(const Attempt& attempt, const Region& region, Cell& cell, const Access& now) {
  check_earlier_read(attempt, region, cell.read);
  if (cell.reads)
    for (const Access& read : *cell.reads) check_earlier_read(attempt, region, read);
  cell.reads.reset();
  cell.read = {};
  cell.write = now;
  cell.is_written = true;
}

// Keeps the last read of each thread that the next write must be ordered after.
void remember_read(Cell& cell, const Access& now) {
  const bool replaces = !cell.read.happened() || is_ordered(cell.read, *running);
  if (replaces) cell.read = now;
  if (cell.reads && replaces && is_ordered(cell.reads->back(), *running)) {
    auto& reads = *cell.reads;
    reads.erase(std::remove_if(reads.begin(), reads.end(),
                               [](const Access& each) { return is_ordered(each, *running); }),
                reads.end());
    if (reads.empty()) cell.reads.reset();
  }
  if (replaces) return;
  if (!cell.reads) cell.reads = std::make_unique<std::vector<Access>>();
  if (!cell.reads->empty() && cell.reads->back().who == now.who)
    cell.reads->back() = now;
  else
    cell.reads->push_back(now);
}

}  // namespace

void check_history(const Attempt& attempt, Region& region) {
  const size_t offset = static_cast<const char*>(attempt.address) - region.base;
  region.history.refine_for(offset, attempt.bytes);
  const Access now{short_name(*running), running->clock.tick, is_atomic(attempt.kind),
                   attempt.code};
  for (size_t at = offset; at < offset + attempt.bytes; at += region.history.granule()) {
    Cell& cell = region.history[at];
    if (reads(attempt.kind) && region.fresh && !cell.is_written)
      report(attempt.key("uninitialised"),
             "uninitialised: " + region.describe(region.base + at) + ", " + attempt.describe());
    check_earlier_write(attempt, region, cell);
    if (writes(attempt.kind))
      remember_write(attempt, region, cell, now);
    else
      remember_read(cell, now);
  }
}

void check_end_of(const Block& block) {
  // By any of its threads when it ended: the block lasts until the last of them does.
  KnownBy known;
  for (auto& each : block.threads) known = join(known, each->clock.known());
  auto check = [&](const Region& region, const Access& access) {
    if (!access.happened() || access.block() == block.index) return;
    if (knows(known, access.block(), access.thread(), access.tick)) return;
    report(format("ends %p", access.code),
           "cluster: " + format("block %lld may end while ", (long long)block.index) +
               name_of_thread(access.block(), access.thread()) + " still uses its shared " +
               region.name + " at " + name_of_code(access.code));
  };
  for (Region* region : all_regions()) {
    if (region->owner != &block || !region->was_remote) continue;
    for (Cell& cell : region->history.cells()) {
      check(*region, cell.write);
      check(*region, cell.read);
      if (cell.reads)
        for (const Access& read : *cell.reads) check(*region, read);
    }
  }
}

}  // namespace emulator
