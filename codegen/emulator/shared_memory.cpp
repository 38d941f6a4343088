// Shared memory of the blocks, and its addresses in the other blocks of a cluster.
#include "checks.h"
#include "launch.h"
#include "memory.h"
#include "reports.h"
#include "scheduler.h"

namespace emulator {
namespace {

Region* find_variable(const Block& block, const void* tag) {
  for (const SharedVariable& each : block.variables)
    if (each.tag == tag) return each.region;
  return nullptr;
}

// `tag` is the same for one variable in all blocks; null stands for the dynamic memory.
Region* variable_of(Block& block, const void* tag, size_t bytes, size_t alignment,
                    const char* name) {
  if (Region* known = find_variable(block, tag)) return known;
  const Launch& launch = current_launch();
  block.shared_bytes += bytes;
  if (int64_t(block.shared_bytes) > launch.request->shared_limit)
    fail("shared limit", format("too much shared memory: %zu bytes with %s, a block can have %lld",
                                block.shared_bytes, name, (long long)launch.request->shared_limit));
  Region* region = add_shared(block, tag, bytes, alignment, name, launch.request->checks);
  if (!region) fail("memory", "out of memory: the emulator has no room for this launch");
  block.variables.push_back({tag, region});
  return region;
}

}  // namespace

extern "C" void* emulator_static_shared(const void* variable, unsigned long bytes,
                                        unsigned long alignment, const char* name) {
  return variable_of(*running->block, variable, bytes, alignment, name)->base;
}

extern "C" void* emulator_dynamic_shared() {
  return variable_of(*running->block, nullptr, current_launch().request->shared_bytes, 0, "dynamic")
      ->base;
}

extern "C" void* emulator_map_shared(const void* address, unsigned rank, Place place) {
  const Cluster& cluster = *running->block->cluster;
  if (rank >= cluster.blocks.size())
    fail("rank",
         format("cluster: rank %u in a cluster of %zu blocks, at ", rank, cluster.blocks.size()) +
             name_of(place));
  const Region* own = region_at(address);
  if (!own || !own->owner || own->owner->cluster != &cluster)
    fail("map",
         "cluster: __cluster_map_shared_rank of what is not shared memory of the cluster, at " +
             name_of(place));
  Region* mapped = variable_of(*cluster.blocks[rank], own->tag, own->bytes,
                               uintptr_t(own->base) % PAGE_BYTES, own->name.c_str());
  return mapped->base + (static_cast<const char*>(address) - own->base);
}

extern "C" unsigned emulator_shared_rank(const void* address) {
  const Region* region = region_at(address);
  return region && region->owner ? unsigned(region->owner->rank) : running->block->rank;
}

}  // namespace emulator
