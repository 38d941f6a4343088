// Teams of blocks of a grid. A team carries the same batch rows through time, its blocks share the
// neurons, and meet at a barrier in global memory between two steps. All blocks of the grid have to
// be resident at once (a cooperative launch); should one not come all the same, the others give up.
#pragma once

#include "device.cuh"

namespace sparsify {

constexpr int COUNTER_LINE = 32;  // words: two counters do not share a line of a cache

// Meetings are of all rows that a team carries, or of either half of them: one half is computed while
// blocks wait for the other. Each half has a counter.

template <int BLOCKS>
struct GridTeam {
  int rank;             // of this block in its team
  int64_t team, teams;  // which team it is in, of how many
  unsigned* arrivals;   // of the team's blocks at all barriers so far; zero between calls
  unsigned goals[2] = {};  // what `arrivals` are when all have come
  int64_t patience;     // polls before a block gives up
  int64_t* stuck;       // set by those who do

  // `counters` has two lines for each team.
  SPARSIFY_INLINE GridTeam(unsigned* counters, int64_t patience, int64_t* stuck)
      : rank(int(blockIdx.x) % BLOCKS),
        team(blockIdx.x / BLOCKS),
        teams(gridDim.x / BLOCKS),
        arrivals(counters + team * 2 * COUNTER_LINE),
        patience(patience),
        stuck(stuck) {}

  // All threads of the block come; what they have written is seen by those who wait.
  SPARSIFY_INLINE void arrive(int half = 0) {
    __syncthreads();
    expect(half);
    if (threadIdx.x == 0) tell_arrival(half);
  }

  // Another meeting: all threads of the block expect it, and one of them tells when the block arrives.
  // What this thread has written, or has seen to be written, is seen by those who wait.
  SPARSIFY_INLINE void expect(int half) {
    goals[0] += half ? 0 : BLOCKS;
    goals[1] += half ? BLOCKS : 0;
  }
  SPARSIFY_INLINE void tell_arrival(int half) {
    __threadfence();
    atomicAdd(arrivals + half * COUNTER_LINE, 1u);
  }

  // Returns to one thread when all blocks of the team have arrived, or false after `patience`.
  SPARSIFY_INLINE bool has_met(int half) {
    const bool met = poll(arrivals + half * COUNTER_LINE, half ? goals[1] : goals[0]);
    __threadfence();
    return met;
  }

  // Returns when all blocks of the team have arrived, or false after `patience`: the kernel ends.
  SPARSIFY_INLINE bool wait(int half = 0) {
    const bool met = threadIdx.x != 0 || has_met(half);
    return __syncthreads_and(met);
  }

  SPARSIFY_INLINE bool meet() {
    arrive();
    return wait();
  }

  // The block needs the others no more. The last one clears the counters for the next call.
  SPARSIFY_INLINE void leave() {
    if (threadIdx.x) return;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      unsigned* const own = arrivals + half * COUNTER_LINE;
      if (atomicAdd(own, 1u) + 1 == goals[half] + BLOCKS) atomicExch(own, 0u);
    }
  }

  // Of what the team exchanges: past the first cache, which does not see what other blocks write.
  template <class T>
  static SPARSIFY_INLINE void publish(T* to, T value) {
    store(plain(to), value);
  }
  // By a whole warp that agrees about `word`.
  static SPARSIFY_INLINE void publish_word(uint32_t* to, uint32_t word) {
    if (lane_of() == 0) __stcg(to, word);
  }
  template <class T>
  static SPARSIFY_INLINE T fetch(const T* from) {
    return same_bits<T>(__ldcg(plain(from)));
  }

 private:
  template <class P, class T>
  static SPARSIFY_INLINE void store(P* to, T value) {
    __stcg(to, same_bits<P>(value));
  }
  SPARSIFY_INLINE bool poll(const volatile unsigned* now, unsigned goal) {
    for (int64_t polls = 0; int(*now - goal) < 0; ++polls) {  // right also when it has wrapped
      if (polls >= patience) {
        *static_cast<volatile int64_t*>(stuck) = 1;
        return false;
      }
      __nanosleep(20);
    }
    return true;
  }
};

}  // namespace sparsify
