#include "checks.h"

#include <dlfcn.h>
#include <link.h>

#include <algorithm>

#include "memory.h"
#include "ordering.h"
#include "reports.h"
#include "scheduler.h"

namespace emulator {
namespace {

constexpr int PREEMPT_EVERY = 32;     // accesses, on average, in the random schedule
constexpr int RESTLESS_ACCESSES = 64; // volatile or atomic ones in a row: it is a loop that waits

bool checking;
const char *image_begin, *image_end;  // the compiled kernel, with its constant tables

bool is_atomic(AccessKind kind) {
  return kind == AccessKind::atomic || kind == AccessKind::volatile_read || kind == AccessKind::volatile_write;
}
bool reads(AccessKind kind) { return kind != AccessKind::write && kind != AccessKind::volatile_write; }
bool writes(AccessKind kind) {
  return kind == AccessKind::write || kind == AccessKind::volatile_write || kind == AccessKind::atomic;
}
const char* name_of_kind(AccessKind kind) {
  return kind == AccessKind::atomic ? "atomic" : writes(kind) ? "write" : "read";
}

struct Attempt {
  const void* address;
  int bytes;
  AccessKind kind;
  const void* code;

  std::string describe() const {
    return format("%s of %d bytes by %s at %s", name_of_kind(kind), bytes,
                  name_of(*running).c_str(), name_of_code(code).c_str());
  }
  std::string key(const char* fault) const { return format("%s %p", fault, code); }
};

uint32_t short_name(const Thread& thread) { return Access::name(thread.block->index, thread.index); }

// Whether the earlier access happened before what `thread` does now.
bool is_ordered(const Access& earlier, const Thread& thread) {
  return earlier.who == short_name(thread) ||
         thread.clock.knows(earlier.block(), earlier.thread(), earlier.tick);
}

int find_image(dl_phdr_info* info, size_t, void* kernel) {
  const char *begin = nullptr, *end = nullptr;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const auto& segment = info->dlpi_phdr[i];
    if (segment.p_type != PT_LOAD) continue;
    const char* start = reinterpret_cast<const char*>(info->dlpi_addr + segment.p_vaddr);
    if (!begin || start < begin) begin = start;
    end = std::max(end, start + segment.p_memsz);
  }
  if (kernel < begin || kernel >= end) return 0;
  image_begin = begin;
  image_end = end;
  return 1;
}

// Local variables and constant tables are in nobody's region; anything else is wild.
bool is_private(const void* address) {
  return is_on_stack(running->fibre, address) || (address >= image_begin && address < image_end);
}

void fail_outside(const Attempt& attempt, const Region* region) {
  if (!region && !is_in_arena(attempt.address))
    fail(attempt.key("wild"), format("wild access: address %p, ", attempt.address) + attempt.describe());
  if (!region) region = nearest_region(attempt.address);
  const std::string near = region ? " near " + region->describe(attempt.address) : "";
  fail(attempt.key("outside"), "out of bounds:" + near + ", " + attempt.describe());
}

void check_bounds(const Attempt& attempt, const Region& region) {
  if (!region.holds(attempt.address, attempt.bytes)) fail_outside(attempt, &region);
  if (writes(attempt.kind) && !region.written)
    fail(attempt.key("const"), "write to const: " + region.describe(attempt.address) + ", " + attempt.describe());
  if (!region.holes) return;
  const char* at = static_cast<const char*>(attempt.address);
  for (int i = 0; i < attempt.bytes; ++i)
    if (region.holes[at - region.base + i])
      fail(attempt.key("hole"), "out of bounds: between the elements of the view, " + region.describe(attempt.address) + ", " + attempt.describe());
}

// Shared memory of another block: it must have begun and must not have ended.
void check_remote(const Attempt& attempt, Region& region) {
  const Thread& self = *running;
  const Block& owner = *region.owner;
  if (&owner == self.block) return;
  region.was_remote = true;
  const std::string what = region.describe(attempt.address) + ", " + attempt.describe();
  if (owner.cluster != self.block->cluster) fail(attempt.key("foreign"), "cluster: shared memory of another cluster: " + what);
  if (owner.has_exited()) report(attempt.key("ended"), "cluster: shared memory of a block that has ended: " + what);
  const bool begun = self.clock.known() && self.clock.known()->of(owner.index);
  if (!begun) report(attempt.key("begun"), "cluster: shared memory of a block that may not have begun (no barrier of the cluster came before): " + what);
}

void report_race(const Attempt& attempt, const Region& region, const char* order, const Access& earlier) {
  report(format("race %p %p", attempt.code, earlier.code),
         format("race: %s, ", order) + region.describe(attempt.address) + ", " + attempt.describe() +
             ", and the earlier access by " + name_of_thread(earlier.block(), earlier.thread()) + " at " + name_of_code(earlier.code));
}

void check_earlier_write(const Attempt& attempt, const Region& region, const Cell& cell) {
  if (!cell.write.happened() || (is_atomic(attempt.kind) && cell.atomic_write)) return;
  if (!is_ordered(cell.write, *running))
    report_race(attempt, region, writes(attempt.kind) ? "write after write" : "read after write", cell.write);
}

void check_earlier_read(const Attempt& attempt, const Region& region, const Cell& cell, const Access& read) {
  if (!read.happened() || (is_atomic(attempt.kind) && cell.atomic_read)) return;
  if (!is_ordered(read, *running)) report_race(attempt, region, "write after read", read);
}

void remember_write(const Attempt& attempt, const Region& region, Cell& cell, const Access& now) {
  check_earlier_read(attempt, region, cell, cell.read);
  if (cell.reads)
    for (const Access& read : *cell.reads) check_earlier_read(attempt, region, cell, read);
  cell.reads.reset();
  cell.read = {};
  cell.write = now;
  cell.is_written = true;
  cell.atomic_write = is_atomic(attempt.kind);
}

// Keeps the last read of each thread that the next write must be ordered after.
void remember_read(const Attempt& attempt, Cell& cell, const Access& now) {
  cell.atomic_read = is_atomic(attempt.kind);
  const bool replaces = !cell.read.happened() || is_ordered(cell.read, *running);
  if (replaces) cell.read = now;
  if (cell.reads && replaces && is_ordered(cell.reads->back(), *running)) {
    auto& reads = *cell.reads;
    reads.erase(std::remove_if(reads.begin(), reads.end(), [](const Access& each) { return is_ordered(each, *running); }), reads.end());
    if (reads.empty()) cell.reads.reset();
  }
  if (replaces) return;
  if (!cell.reads) cell.reads = std::make_unique<std::vector<Access>>();
  if (!cell.reads->empty() && cell.reads->back().who == now.who) cell.reads->back() = now;
  else cell.reads->push_back(now);
}

void check_history(const Attempt& attempt, Region& region) {
  const size_t offset = static_cast<const char*>(attempt.address) - region.base;
  region.history.refine_for(offset, attempt.bytes);
  const Access now{short_name(*running), running->clock.tick, attempt.code};
  for (size_t at = offset; at < offset + attempt.bytes; at += region.history.granule()) {
    Cell& cell = region.history[at];
    if (reads(attempt.kind) && region.fresh && !cell.is_written)
      report(attempt.key("uninitialised"), "uninitialised: " + region.describe(region.base + at) + ", " + attempt.describe());
    check_earlier_write(attempt, region, cell);
    if (writes(attempt.kind)) remember_write(attempt, region, cell, now);
    else remember_read(attempt, cell, now);
  }
}

void order_atomic(const Attempt& attempt, const Region& region) {
  Thread& self = *running;
  const Scope needed = region.owner == self.block ? Scope::block : Scope::device;
  if (reads(attempt.kind)) note_atomic_read(self, attempt.address, needed);
  if (writes(attempt.kind)) note_atomic_write(self, attempt.address, needed, attempt.kind == AccessKind::atomic);
}

// In the random schedule, others may come between any two accesses.
void maybe_preempt(AccessKind kind) {
  if (current_schedule() == Schedule::random && random_number() % PREEMPT_EVERY == 0) step_aside();
  else if (kind == AccessKind::volatile_read && ++running->accesses_since_rest % RESTLESS_ACCESSES == 0) rest();
}

}  // namespace

void start_checks(bool on, const void* kernel) {
  checking = on;
  dl_iterate_phdr(find_image, const_cast<void*>(kernel));
}

void check_access(const void* address, int bytes, AccessKind kind, const void* code, bool may_be_unaligned) {
  if (!checking || !running) return;
  const Attempt attempt{address, bytes, kind, code};
  Region* region = region_at(address);
  if (!region) {
    if (!is_private(address)) fail_outside(attempt, nullptr);
    return;
  }
  if (kind != AccessKind::atomic) maybe_preempt(kind);
  check_bounds(attempt, *region);
  if (!may_be_unaligned && uintptr_t(address) % bytes)
    report(attempt.key("misaligned"), "misaligned: " + region->describe(address) + ", " + attempt.describe());
  if (region->owner) check_remote(attempt, *region);
  if (region->history.is_kept()) check_history(attempt, *region);
  else if (region->fresh)
    report(attempt.key("uninitialised"), "uninitialised: " + region->describe(address) + ", " + attempt.describe());
  if (is_atomic(kind)) order_atomic(attempt, *region);
  if (writes(kind)) note_progress();
}

void check_shared_memory_of(const Block& block) {
  if (!checking || block.cluster->blocks.size() == 1) return;
  KnownBy known;  // by any of its threads when it ended: the block lasts until the last of them does
  for (auto& each : block.threads) known = join(known, each->clock.known());
  auto check = [&](const Region& region, const Access& access) {
    if (!access.happened() || access.block() == block.index) return;
    if (knows(known, access.block(), access.thread(), access.tick)) return;
    report(format("ends %p", access.code), "cluster: " + format("block %lld may end while ", (long long)block.index) +
           name_of_thread(access.block(), access.thread()) + " still uses its shared " + region.name + " at " + name_of_code(access.code));
  };
  for (Region* region : all_regions()) {
    if (region->owner != &block || !region->was_remote) continue;
    for (Cell& cell : region->history.cells()) {
      check(*region, cell.write);
      check(*region, cell.read);
      if (cell.reads) for (const Access& read : *cell.reads) check(*region, read);
    }
  }
}

extern "C" void emulator_before_atomic(void* address, int bytes, const void* code) {
  if (current_schedule() == Schedule::random && random_number() % 4 == 0) step_aside();
  else if (++running->accesses_since_rest % RESTLESS_ACCESSES == 0) rest();
  check_access(address, bytes, AccessKind::atomic, code);
}

extern "C" void emulator_memory_changed() { note_progress(); }

// The cache of __ldg does not see what this launch writes.
extern "C" void emulator_before_read_only(const void* address, int bytes, const void* code) {
  if (!checking) return;
  check_access(address, bytes, AccessKind::read_only, code);
  Region* region = region_at(address);
  if (!region || !region->history.is_kept()) return;
  const Attempt attempt{address, bytes, AccessKind::read_only, code};
  const size_t offset = static_cast<const char*>(address) - region->base;
  for (size_t at = offset; at < offset + bytes; at += region->history.granule())
    if (region->history[at].is_written)
      report(attempt.key("ldg"), "read-only: __ldg of what this launch wrote, " + region->describe(address) + ", " + attempt.describe());
}

}  // namespace emulator
