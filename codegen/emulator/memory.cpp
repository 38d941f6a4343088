#include "memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <memory>

#include "fibre.h"
#include "reports.h"
#include "threads.h"

namespace emulator {
namespace {

constexpr size_t ARENA_BYTES = size_t(8) << 30;  // of addresses; pages are taken when touched
constexpr size_t LEAST_GUARD = 64 * 1024;
constexpr size_t MOST_KEPT = size_t(64) << 20;  // bytes that stay allocated between launches
constexpr size_t DEVICE_ALIGNMENT = 512;        // of memory that torch takes from a GPU
constexpr size_t DYNAMIC_ALIGNMENT = 16;        // what CUDA promises of dynamic shared memory
constexpr int UNWRITTEN = 0xFF;  // a float that is not a number, an index far outside

char* arena;
uint32_t* region_of_page;  // its index plus one; 0: none
size_t top = PAGE_BYTES;
std::vector<std::unique_ptr<Region>> regions;
std::vector<Region*> region_list;

size_t up_to(size_t value, size_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// A region whose base is `offset` bytes behind the beginning of a page.
Region* add(size_t bytes, size_t offset, const char* name) {
  const size_t pages = up_to(std::max<size_t>(offset + bytes, 1), PAGE_BYTES);
  const size_t guard = std::max(up_to(bytes, PAGE_BYTES), LEAST_GUARD);
  if (top + pages + guard > ARENA_BYTES) return nullptr;
  char* start = arena + top;
  if (mprotect(start, pages, PROT_READ | PROT_WRITE)) return nullptr;
  regions.push_back(std::make_unique<Region>());
  Region& region = *regions.back();
  region_list.push_back(&region);
  region.base = start + offset;
  region.bytes = bytes;
  region.name = name;
  for (size_t page = 0; page < pages / PAGE_BYTES; ++page)
    region_of_page[top / PAGE_BYTES + page] = uint32_t(regions.size());
  top += pages + guard;
  return &region;
}

void* reserve(size_t bytes, int protection) {
  void* memory =
      mmap(nullptr, bytes, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return memory == MAP_FAILED ? nullptr : memory;
}

}  // namespace

bool Region::holds(const void* address, size_t size) const {
  const char* at = static_cast<const char*>(address);
  return at >= base && at + size <= base + bytes;
}

std::string Region::describe(const void* address) const {
  const long byte = long(static_cast<const char*>(address) - base);
  const std::string where =
      owner ? format("shared %s of block %lld", name.c_str(), (long long)owner->index)
            : "global " + name;
  return where + format(", byte %ld of %zu", byte, bytes);
}

bool open_arena() {
  if (!arena) arena = static_cast<char*>(reserve(ARENA_BYTES, PROT_NONE));
  if (arena && !region_of_page)
    region_of_page = static_cast<uint32_t*>(
        reserve(ARENA_BYTES / PAGE_BYTES * sizeof(uint32_t), PROT_READ | PROT_WRITE));
  return arena && region_of_page;
}

Region* add_global(const MemoryRequest& request, bool checks) {
  Region* region = add(request.bytes, request.alignment_offset % DEVICE_ALIGNMENT, request.name);
  if (!region) return nullptr;
  region->written = request.written;
  region->fresh = request.fresh;
  region->holes = request.holes;
  if (request.fresh)
    memset(region->base, UNWRITTEN, request.bytes);
  else
    memcpy(region->base, request.host, request.bytes);
  if (checks && request.written) region->history.cover(request.bytes);
  char* page = region->base - request.alignment_offset % DEVICE_ALIGNMENT;
  if (!request.written)
    mprotect(page, up_to(region->base + region->bytes - page, PAGE_BYTES), PROT_READ);
  return region;
}

void copy_back(const MemoryRequest& request, const Region& region) {
  if (!request.written) return;
  if (!request.holes) {
    memcpy(request.host, region.base, request.bytes);
    return;
  }
  for (int64_t i = 0; i < request.bytes; ++i)
    if (!request.holes[i]) request.host[i] = region.base[i];
}

Region* add_shared(const Block& owner, const void* tag, size_t bytes, size_t alignment,
                   const char* name, bool checks) {
  // Not aligned any better than was asked for, so that a missing alignas is found.
  const size_t offset = tag ? std::max<size_t>(alignment, 1) : DYNAMIC_ALIGNMENT;
  Region* region = add(bytes, offset, name);
  if (!region) return nullptr;
  region->owner = &owner;
  region->tag = tag;
  memset(region->base, UNWRITTEN, bytes);
  if (checks) region->history.cover(bytes);
  return region;
}

bool is_in_arena(const void* address) {
  const char* at = static_cast<const char*>(address);
  return at >= arena && at < arena + ARENA_BYTES;
}

Region* region_at(const void* address) {
  if (!is_in_arena(address)) return nullptr;
  const uint32_t found = region_of_page[(static_cast<const char*>(address) - arena) / PAGE_BYTES];
  return found ? regions[found - 1].get() : nullptr;
}

Region* nearest_region(const void* address) {
  const char* at = static_cast<const char*>(address);
  Region* nearest = nullptr;
  size_t least = ~size_t(0);
  for (Region* each : region_list) {
    const size_t away = at < each->base                 ? each->base - at
                        : at < each->base + each->bytes ? 0
                                                        : at - (each->base + each->bytes);
    if (away < least) nearest = each, least = away;
  }
  return nearest;
}

const std::vector<Region*>& all_regions() { return region_list; }

size_t arena_mark() { return top; }

bool is_after_mark(const void* address, size_t mark) {
  return is_in_arena(address) && static_cast<const char*>(address) >= arena + mark;
}

void remove_regions(size_t mark) {
  while (!regions.empty() && size_t(regions.back()->base - arena) >= mark) {
    regions.pop_back();
    region_list.pop_back();
  }
  memset(region_of_page + mark / PAGE_BYTES, 0, (top - mark) / PAGE_BYTES * sizeof(uint32_t));
  top = mark;
}

void close_arena() {
  if (!arena || !region_of_page) return;
  const size_t used = top;
  remove_regions(PAGE_BYTES);
  mprotect(arena, used, PROT_NONE);
  if (used > MOST_KEPT) madvise(arena, used, MADV_DONTNEED);
}

}  // namespace emulator
