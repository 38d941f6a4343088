// Teams that are clusters: up to 8 blocks (16 where the device takes it) on neighbouring
// multiprocessors. What they exchange lies in the shared memory of each of them, written by all.
// The hardware runs a cluster's blocks at the same time: nobody waits in vain.
#pragma once

#include "device.cuh"

namespace sparsify {

template <int BLOCKS>
struct ClusterTeam {
  int rank;             // of this block in its cluster
  int64_t team, teams;  // which cluster it is in, of how many

  SPARSIFY_INLINE ClusterTeam()
      : rank(int(__clusterRelativeBlockRank())),
        team(blockIdx.x / BLOCKS),
        teams(gridDim.x / BLOCKS) {}

  // All threads of the block come; what they have written is seen by those who wait.
  SPARSIFY_INLINE void arrive() { __cluster_barrier_arrive(); }

  SPARSIFY_INLINE bool wait() {
    __cluster_barrier_wait();
    return true;
  }

  SPARSIFY_INLINE bool meet() {
    arrive();
    return wait();
  }

  // No memory goes while others may write to it.
  SPARSIFY_INLINE void leave() { meet(); }

  // `to` is a place in this block's shared memory; the same place of every block is written.
  template <class T>
  static SPARSIFY_INLINE void publish(T* to, T value) {
#pragma unroll
    for (unsigned block = 0; block < BLOCKS; ++block) *at(to, block) = value;
  }
  // By a whole warp that agrees about `word`; each lane writes to one block.
  static SPARSIFY_INLINE void publish_word(uint32_t* to, uint32_t word) {
    if (lane_of() < BLOCKS) *at(to, lane_of()) = word;
  }
  template <class T>
  static SPARSIFY_INLINE T fetch(const T* from) {
    return *from;
  }

 private:
  template <class T>
  static SPARSIFY_INLINE T* at(T* to, unsigned block) {
    return static_cast<T*>(__cluster_map_shared_rank(to, block));
  }
};

}  // namespace sparsify
