#include "checks.h"

#include <dlfcn.h>
#include <link.h>

#include <algorithm>

#include "memory.h"
#include "ordering.h"
#include "races.h"
#include "reports.h"
#include "scheduler.h"

namespace emulator {
namespace {

constexpr int PREEMPT_EVERY = 32;      // accesses, on average, in the random schedule
constexpr int RESTLESS_ACCESSES = 64;  // volatile or atomic ones in a row: it is a loop that waits

bool checking;
const char *image_begin, *image_end;  // the compiled kernel, with its constant tables

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
  return is_on_stack(running->fibre, address) || is_kernel_code(address);
}

std::string describe(const Attempt& attempt, const Region& region) {
  return region.describe(attempt.address) + ", " + attempt.describe();
}

void fail_outside(const Attempt& attempt, const Region* region) {
  if (!region && !is_in_arena(attempt.address))
    fail(attempt.key("wild"),
         format("wild access: address %p, ", attempt.address) + attempt.describe());
  if (!region) region = nearest_region(attempt.address);
  const std::string near = region ? " near " + region->describe(attempt.address) : "";
  fail(attempt.key("outside"), "out of bounds:" + near + ", " + attempt.describe());
}

void check_bounds(const Attempt& attempt, const Region& region) {
  if (!region.holds(attempt.address, attempt.bytes)) fail_outside(attempt, &region);
  if (writes(attempt.kind) && !region.written)
    fail(attempt.key("const"), "write to const: " + describe(attempt, region));
  if (!region.holes) return;
  const char* at = static_cast<const char*>(attempt.address);
  for (int i = 0; i < attempt.bytes; ++i)
    if (region.holes[at - region.base + i])
      fail(attempt.key("hole"),
           "out of bounds: between the elements of the view, " + describe(attempt, region));
}

// Shared memory of another block: it must have begun and must not have ended.
void check_remote(const Attempt& attempt, Region& region) {
  const Thread& self = *running;
  const Block& owner = *region.owner;
  if (&owner == self.block) return;
  region.was_remote = true;
  if (owner.cluster != self.block->cluster)
    fail(attempt.key("foreign"),
         "cluster: shared memory of another cluster: " + describe(attempt, region));
  if (owner.has_exited())
    report(attempt.key("ended"),
           "cluster: shared memory of a block that has ended: " + describe(attempt, region));
  const bool begun = self.clock.known() && self.clock.known()->of(owner.index);
  if (!begun)
    report(attempt.key("begun"),
           "cluster: shared memory of a block that may not have begun (no barrier of the cluster "
           "came before): " +
               describe(attempt, region));
}

void order_atomic(const Attempt& attempt, const Region& region) {
  Thread& self = *running;
  const Scope needed = region.owner == self.block ? Scope::block : Scope::device;
  if (reads(attempt.kind)) note_atomic_read(self, attempt.address, needed);
  if (writes(attempt.kind))
    note_atomic_write(self, attempt.address, needed, attempt.kind == AccessKind::atomic);
}

// In the random schedule, others may come between any two accesses.
void maybe_preempt(AccessKind kind) {
  if (current_schedule() == Schedule::random && random_number() % PREEMPT_EVERY == 0)
    step_aside();
  else if (kind == AccessKind::volatile_read &&
           ++running->accesses_since_rest % RESTLESS_ACCESSES == 0)
    rest();
}

}  // namespace

void start_checks(bool on, const void* kernel) {
  checking = on;
  dl_iterate_phdr(find_image, const_cast<void*>(kernel));
}

bool is_kernel_code(const void* code) { return code >= image_begin && code < image_end; }

void check_access(const void* address, int bytes, AccessKind kind, const void* code,
                  bool may_be_unaligned) {
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
    report(attempt.key("misaligned"), "misaligned: " + describe(attempt, *region));
  if (region->owner) check_remote(attempt, *region);
  if (region->history.is_kept())
    check_history(attempt, *region);
  else if (region->fresh)
    report(attempt.key("uninitialised"), "uninitialised: " + describe(attempt, *region));
  if (is_atomic(kind)) order_atomic(attempt, *region);
  if (writes(kind)) note_progress();
}

void check_block_may_end(const Block& block) {
  if (checking && block.cluster->blocks.size() > 1) check_end_of(block);
}

extern "C" void emulator_before_atomic(void* address, int bytes, const void* code) {
  if (current_schedule() == Schedule::random && random_number() % 4 == 0)
    step_aside();
  else if (++running->accesses_since_rest % RESTLESS_ACCESSES == 0)
    rest();
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
      report(attempt.key("ldg"),
             "read-only: __ldg of what this launch wrote, " + describe(attempt, *region));
}

}  // namespace emulator
