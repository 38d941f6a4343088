#include "planted.h"

// <<<2, 64>>>
extern "C" __global__ void missing_barrier(const Call call) {
  __shared__ float values[64];
  const int t = threadIdx.x;
  values[t] = call.in[t];
#ifndef BUG
  __syncthreads();
#endif
  call.out[blockIdx.x * 64 + t] = values[63 - t];  // reported: race
}

// The second barrier of a loop keeps the next round from overwriting what is still read.
// <<<1, 64>>>
extern "C" __global__ void missing_second_barrier(const Call call) {
  __shared__ float values[64];
  const int t = threadIdx.x;
  float sum = 0.0f;
  for (int round = 0; round < 3; ++round) {
    values[t] = call.in[t] + round;  // reported: race
    __syncthreads();
    sum += values[63 - t];
#ifndef BUG
    __syncthreads();
#endif
  }
  call.out[t] = sum;
}

// Ballots and shuffles exchange values of lanes, but order no memory.
// <<<1, 64>>>
extern "C" __global__ void ballot_as_barrier(const Call call) {
  __shared__ float values[64];
  const int t = threadIdx.x;
  values[t] = call.in[t];
#ifdef BUG
  __ballot_sync(ALL, 1);
#else
  __syncwarp();
#endif
  call.out[t] = values[t ^ 1];  // reported: race
}

// <<<1, 64>>>
extern "C" __global__ void different_barriers(const Call call) {
  const int t = threadIdx.x;
#ifdef BUG
  if (t < 32) {
    __syncthreads();  // reported: divergent barrier
  } else {
    __syncthreads();  // reported: divergent barrier
  }
#else
  __syncthreads();
#endif
  call.out[t] = t;
}

// <<<1, 64>>>
extern "C" __global__ void barrier_and_collective(const Call call) {
  const int t = threadIdx.x;
#ifdef BUG
  if (t % 2) __syncthreads();  // reported: deadlock
#else
  __syncthreads();
#endif
  __syncwarp();  // reported: deadlock
  call.out[t] = t;
}

// <<<1, 64>>>
extern "C" __global__ void votes_of_a_block(const Call call) {
  __shared__ int found;
  const int t = threadIdx.x;
#ifndef BUG
  if (t == 0) found = 0;
  __syncthreads();
#endif
  if (call.indices[t] == 15) atomicAdd(&found, 1);  // reported: uninitialised
  const int count = __syncthreads_count(call.indices[t] == 15);
  call.out[t] = __syncthreads_and(count == found);
}

// Half of the warps meet without the others.
// <<<1, 128>>>
extern "C" __global__ void missing_named_barrier(const Call call) {
  __shared__ float values[64];
  const int t = threadIdx.x;
  if (t < 64) {
    values[t] = call.in[t];
#ifndef BUG
    __barrier_sync_count(1, 64);
#endif
    call.out[t] = values[63 - t];  // reported: race
  } else {
    call.out[t] = call.in[t];
  }
}

// <<<1, 128>>>
extern "C" __global__ void named_barrier_of_more(const Call call) {
  const int t = threadIdx.x;
#ifdef BUG
  if (t < 64) __barrier_sync_count(2, 96);  // reported: deadlock
#else
  if (t < 64) __barrier_sync_count(2, 64);
#endif
  call.out[t] = t;
}

// <<<1, 128>>>
extern "C" __global__ void named_barriers_of_two_sizes(const Call call) {
  const int t = threadIdx.x;
#ifdef BUG
  __barrier_sync_count(1, t < 64 ? 128 : 96);  // reported: divergent barrier
#else
  __barrier_sync_count(t < 64 ? 1 : 2, 64);
#endif
  call.out[t] = t;
}

// <<<1, 64>>>
extern "C" __global__ void named_barrier_that_is_not_there(const Call call) {
  const int t = threadIdx.x;
#ifdef BUG
  __barrier_sync_count(call.indices[15] + 1, 64);  // reported: barrier
#else
  __barrier_sync_count(call.indices[15], 64);
#endif
  call.out[t] = t;
}
