#include "planted.h"

__device__ __forceinline__ void meet() {
  __cluster_barrier_arrive();
  __cluster_barrier_wait();
}
template <class T>
__device__ __forceinline__ T* of_block(T* mine, unsigned rank) {
  return static_cast<T*>(__cluster_map_shared_rank(mine, rank));
}

// Each block reads what the next one of its cluster wrote.
// <<<4, 32>>> cluster 2
extern "C" __global__ void missing_cluster_barrier(const Call call) {
  __shared__ float values[32];
  const unsigned t = threadIdx.x, rank = __clusterRelativeBlockRank();
  values[t] = call.in[blockIdx.x * 32 + t];
#ifndef BUG
  meet();
#else
  __syncthreads();
#endif
  const float* other = of_block(values, (rank + 1) % __clusterSizeInBlocks());
  call.out[blockIdx.x * 32 + t] = other[t];  // reported: race|cluster|uninitialised
  meet();
}

// <<<4, 32>>> cluster 2
extern "C" __global__ void block_may_not_have_begun(const Call call) {
  __shared__ float values[32];
  const unsigned t = threadIdx.x, rank = __clusterRelativeBlockRank();
#ifndef BUG
  meet();
#endif
  of_block(values, rank ^ 1)[t] = call.in[t];  // reported: cluster
  meet();
  call.out[blockIdx.x * 32 + t] = values[t];
}

// The last barrier keeps the block, and with it its shared memory, until all have read.
// <<<4, 32>>> cluster 2
extern "C" __global__ void block_may_have_ended(const Call call) {
  __shared__ float values[32];
  const unsigned t = threadIdx.x, rank = __clusterRelativeBlockRank();
  values[t] = call.in[t];
  meet();
  call.out[blockIdx.x * 32 + t] = of_block(values, rank ^ 1)[t];  // reported: cluster
#ifndef BUG
  meet();
#endif
}

// Two buffers in turn: a block writes into the next round's while others may still read the last.
// <<<4, 64>>> cluster 4
extern "C" __global__ void exchange_in_a_loop(const Call call) {
  __shared__ float sent[2][4];
  const unsigned t = threadIdx.x, rank = __clusterRelativeBlockRank();
  float sum = call.in[rank];
  meet();
  for (int step = 0; step < 4; ++step) {
#ifdef BUG
    const int buffer = 0;
#else
    const int buffer = step & 1;
#endif
    if (t < 4) of_block(&sent[buffer][rank], t)[0] = sum;  // reported: race
    meet();
    sum = sent[buffer][0] + sent[buffer][1] + sent[buffer][2] + sent[buffer][3];
  }
  meet();
  call.out[blockIdx.x * 64 + t] = sum;
}

// <<<4, 32>>> cluster 2
extern "C" __global__ void relaxed_arrival(const Call call) {
  __shared__ float values[32];
  const unsigned t = threadIdx.x, rank = __clusterRelativeBlockRank();
  values[t] = call.in[t];
#ifdef BUG
  __cluster_barrier_arrive_relaxed();
  __cluster_barrier_wait();
#else
  meet();
#endif
  call.out[blockIdx.x * 32 + t] = of_block(values, rank ^ 1)[t];  // reported: race|cluster
  meet();
}

// Work between arriving and waiting is not ordered by the barrier.
// <<<4, 32>>> cluster 2
extern "C" __global__ void between_arrive_and_wait(const Call call) {
  __shared__ float values[32];
  const unsigned t = threadIdx.x, rank = __clusterRelativeBlockRank();
#ifndef BUG
  values[t] = call.in[t];
#endif
  __cluster_barrier_arrive();
#ifdef BUG
  values[t] = call.in[t];  // reported: race
#endif
  __cluster_barrier_wait();
  call.out[blockIdx.x * 32 + t] = of_block(values, rank ^ 1)[t];  // reported: race
  meet();
}

// <<<4, 32>>> cluster 2
extern "C" __global__ void arrives_twice(const Call call) {
  __cluster_barrier_arrive();
#ifdef BUG
  __cluster_barrier_arrive();  // reported: cluster barrier
#endif
  __cluster_barrier_wait();
  call.out[threadIdx.x + blockIdx.x * 32] = 1.0f;
}

// <<<4, 32>>> cluster 2
extern "C" __global__ void waits_without_arriving(const Call call) {
#ifndef BUG
  __cluster_barrier_arrive();
#endif
  __cluster_barrier_wait();  // reported: cluster barrier
  call.out[threadIdx.x + blockIdx.x * 32] = 1.0f;
}

// <<<4, 32>>> cluster 2
extern "C" __global__ void one_thread_does_not_arrive(const Call call) {
#ifdef BUG
  if (threadIdx.x != 5 || __clusterRelativeBlockRank() != 1) __cluster_barrier_arrive();
  else __syncthreads();  // reported: deadlock
  if (threadIdx.x != 5 || __clusterRelativeBlockRank() != 1) __cluster_barrier_wait();  // reported: deadlock
#else
  meet();
#endif
  call.out[threadIdx.x + blockIdx.x * 32] = 1.0f;
}

// <<<4, 32>>> cluster 2
extern "C" __global__ void rank_outside(const Call call) {
  __shared__ float values[32];
#ifdef BUG
  const unsigned rank = 2;
#else
  const unsigned rank = 1;
#endif
  values[threadIdx.x] = 0.0f;
  float* other = static_cast<float*>(__cluster_map_shared_rank(values, rank));  // reported: cluster
  call.out[threadIdx.x + blockIdx.x * 32] = other != nullptr;
}

// <<<4, 32>>> cluster 2
extern "C" __global__ void map_of_global_memory(const Call call) {
  __shared__ float values[32];
#ifdef BUG
  const float* mine = call.in;
#else
  const float* mine = values;
#endif
  const void* other = __cluster_map_shared_rank(mine, 1);  // reported: cluster
  call.out[threadIdx.x + blockIdx.x * 32] = other != nullptr;
}

// Counters of another block: atomics are no race, also on shared memory of others.
// <<<4, 64>>> cluster 4
extern "C" __global__ void remote_atomics(const Call call) {
  extern __shared__ unsigned counts[];  // shared 16
  const unsigned t = threadIdx.x, rank = __clusterRelativeBlockRank();
  if (t < 4) counts[t] = 0;
  meet();
#ifdef BUG
  of_block(counts, 0)[rank] += 1;  // reported: race
#else
  atomicAdd(of_block(counts, 0) + rank, 1u);
#endif
  meet();
  call.out[blockIdx.x * 64 + t] = rank == 0 && t < 4 ? counts[t] : 0;
}
