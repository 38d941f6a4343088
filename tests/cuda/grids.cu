#include "planted.h"

// <<<4, 64>>>
extern "C" __global__ void global_race(const Call call) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= call.n) return;
#ifdef BUG
  call.counters[call.indices[i] / 2] += 1;  // reported: race
#else
  atomicAdd(&call.counters[call.indices[i] / 2], 1u);
#endif
}

// The barrier of a grid. One thread of each block counts its block and waits for the others; fences
// before and after order what all threads of the blocks did.
__device__ __forceinline__ void wait_for_grid(unsigned* counter, unsigned goal, bool release, bool acquire) {
  __syncthreads();
  if (threadIdx.x == 0) {
    if (release) __threadfence();
    atomicAdd(counter, 1u);
    while (*(volatile unsigned*)counter < goal) __nanosleep(20);  // reported: no progress
    if (acquire) __threadfence();
  }
  __syncthreads();
}

__device__ __forceinline__ void exchange(const Call& call, bool release, bool acquire) {
  const int all = gridDim.x * blockDim.x, i = blockIdx.x * blockDim.x + threadIdx.x;
  float sum = 0.0f;
  for (unsigned step = 0; step < 3; ++step) {
    float* now = call.scratch + (step & 1) * all;
    now[i] = step + i;  // reported: race
    wait_for_grid(call.counters, gridDim.x * (step + 1), release, acquire);
    sum += __ldcg(&now[(i + blockDim.x) % all]);  // reported: race
  }
  call.out[i] = sum;
}

// <<<4, 32>>> cooperative
extern "C" __global__ void barrier_without_release(const Call call) {
#ifdef BUG
  exchange(call, false, true);  // reported: race
#else
  exchange(call, true, true);
#endif
}

// <<<4, 32>>> cooperative
extern "C" __global__ void barrier_without_acquire(const Call call) {
#ifdef BUG
  exchange(call, true, false);  // reported: race
#else
  exchange(call, true, true);
#endif
}

// Blocks wait for others, although they need not all run at once. The launch is wrong, not the text:
// without BUG nobody waits.
// <<<4, 32>>>
extern "C" __global__ void not_cooperative(const Call call) {
#ifdef BUG
  wait_for_grid(call.counters, gridDim.x, true, true);
#endif
  call.out[blockIdx.x * 32 + threadIdx.x] = 1.0f;
}

// <<<2, 32>>> cooperative
extern "C" __global__ void narrow_fence(const Call call) {
  volatile unsigned* flag = call.counters;
  const int t = threadIdx.x;
  if (blockIdx.x == 0) {
    call.scratch[t] = call.in[t];
    __syncthreads();
    if (t == 0) {
#ifdef BUG
      __threadfence_block();
#else
      __threadfence();
#endif
      *flag = 1;
    }
  } else {
    if (t == 0) {
      while (!*flag) __nanosleep(20);
      __threadfence();
    }
    __syncthreads();
    call.out[t] = call.scratch[t];  // reported: race
  }
}

// A flag between threads of one block, in its shared memory: there the narrow fence suffices.
// <<<1, 64>>>
extern "C" __global__ void flag_of_a_block(const Call call) {
  __shared__ int flag;
  __shared__ float value;
  if (threadIdx.x == 0) flag = 0;
  __syncthreads();
  if (threadIdx.x == 0) {
    value = call.in[0];
    __threadfence_block();
    *(volatile int*)&flag = 1;
  }
  if (threadIdx.x == 63) {
    while (!*(volatile int*)&flag) __nanosleep(20);
#ifndef BUG
    __threadfence_block();
#endif
    call.out[0] = value;  // reported: race
  }
}

// Whoever comes last adds up what all blocks left. The blocks need not run at once.
// <<<8, 32>>>
extern "C" __global__ void last_block(const Call call) {
  __shared__ bool last;
  float value = call.in[blockIdx.x * 32 + threadIdx.x];
  for (int by = 16; by; by >>= 1) value += __shfl_xor_sync(ALL, value, by);
  if (threadIdx.x == 0) {
    call.scratch[blockIdx.x] = value;
#ifndef BUG
    __threadfence();
#endif
    last = atomicAdd(call.counters, 1u) == gridDim.x - 1;
    __threadfence();
  }
  __syncthreads();
  if (!last) return;
  float sum = threadIdx.x < gridDim.x ? __ldcg(&call.scratch[threadIdx.x]) : 0.0f;  // reported: race
  for (int by = 16; by; by >>= 1) sum += __shfl_xor_sync(ALL, sum, by);
  if (threadIdx.x == 0) call.out[0] = sum;
}

// <<<2, 32>>> cooperative
extern "C" __global__ void waits_for_nobody(const Call call) {
#ifdef BUG
  const unsigned goal = 3;
#else
  const unsigned goal = 2;
#endif
  wait_for_grid(call.counters, goal, true, true);
  call.out[blockIdx.x * 32 + threadIdx.x] = 1.0f;
}

// One thread reads the flag as data, before it is written; others only poll it, which is no race.
// <<<2, 32>>> cooperative
extern "C" __global__ void polled_and_read(const Call call) {
  volatile unsigned* flag = call.counters;
  volatile unsigned* answer = call.counters + 1;
  const bool first = threadIdx.x == 0;
  if (first && blockIdx.x == 1) call.out[2] = call.counters[0];
  if (threadIdx.x % 2) call.out[32 * blockIdx.x + threadIdx.x] = *flag;
  if (first && blockIdx.x == 1) {
#ifndef BUG
    __threadfence();
#endif
    *answer = 1;
  }
  if (first && blockIdx.x == 0) {
    while (!*answer) __nanosleep(20);
    __threadfence();
    *flag = 2;  // reported: race
  }
}
