// The threads of a launch and what holds them together: warps, blocks, clusters.
#pragma once

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "clocks.h"
#include "cuda_runtime_calls.h"
#include "fibre.h"

namespace emulator {

struct Block;
struct Region;

constexpr int WARP = 32;

enum class State {
  ready,
  in_block_barrier,
  in_named_barrier,
  in_collective,
  in_cluster_barrier,
  done
};

struct Warp;

struct Thread {
  Fibre fibre;
  State state = State::ready;
  Place place;  // of the barrier or collective that it waits in
  Block* block = nullptr;
  Warp* warp = nullptr;
  int64_t index = 0;  // within the block
  int lane = 0;

  // Volatile reads and atomics: a loop that waits by them must let others run.
  int accesses_since_rest = 0;

  // The collective that it waits in, and its result.
  Collective collective = Collective::sync;
  unsigned mask = 0;
  unsigned long long value = 0, result = 0;
  int argument = 0;
  int votes = 0;  // the result of a block's barrier
  unsigned barrier = 0;  // which of the named ones it waits in

  // What the barrier of the cluster takes along, see barriers.cpp.
  bool has_arrived = false, arrival_releases = false;
  int64_t arrived_in = 0;
  uint32_t arrival_tick = 0;
  KnownBy arrival_known;

  Clock clock;
  Identity identity() const;
};

struct Warp {
  Thread* lanes[WARP] = {};
  unsigned existing = 0, exited = 0, waiting = 0;  // bit i: lane i
};

struct Cluster {
  std::vector<Block*> blocks;
  int64_t alive = 0, arrived = 0;  // threads
  int64_t phase = 0;               // barriers that were completed
  KnownBy released;                // by the arrivals of the last one
};

struct SharedVariable {
  const void* tag;  // the same in all blocks
  Region* region;
};

// A barrier of so many threads of a block, which the hardware knows by a number.
struct NamedBarrier {
  int64_t arrived = 0, threads = 0;
  Place place;
};
constexpr unsigned NAMED_BARRIERS = 16;  // number 0 is that of __syncthreads

struct Block {
  int64_t index = 0;
  int64_t rank = 0;  // within the cluster
  Cluster* cluster = nullptr;
  std::vector<std::unique_ptr<Thread>> threads;
  std::vector<Warp> warps;
  int64_t alive = 0;

  // The barrier that some of its threads wait in.
  int64_t arrived = 0;
  int votes = 0;
  Vote vote = Vote::none;
  Place place;
  NamedBarrier named[NAMED_BARRIERS];

  std::vector<SharedVariable> variables;
  Region* dynamic = nullptr;
  size_t shared_bytes = 0;
  bool has_exited() const { return alive == 0; }
};

inline Identity Thread::identity() const {
  return {block->index, index, int64_t(block->threads.size())};
}

}  // namespace emulator
