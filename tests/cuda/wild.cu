#include "planted.h"

// <<<1, 32>>>
extern "C" __global__ void wild_pointer(const Call call) {
  const float* from = call.in;
#ifdef BUG
  from += 1ll << 43;
#endif
  call.out[threadIdx.x] = from[threadIdx.x];  // reported: wild access
}

// <<<1, 32>>>
extern "C" __global__ void null_pointer(const Call call) {
  float* to = call.out;
#ifdef BUG
  to = nullptr;
#endif
  to[threadIdx.x] = call.in[threadIdx.x];  // reported: wild access
}

// A pointer that was an integer: it points at memory of the process, not of the kernel.
// <<<1, 32>>>
extern "C" __global__ void memory_of_the_process(const Call call) {
  float* to = call.out;
#ifdef BUG
  to = reinterpret_cast<float*>(reinterpret_cast<unsigned long long>(&memcpy) & ~4095ull);
#endif
  to[threadIdx.x] = call.in[threadIdx.x];  // reported: wild access
}

// Whichever line takes the last of the stack is the one that is reported.
__device__ __noinline__ int deep(volatile int* level, int limit) {
  volatile int here[256];
  here[0] = 0;          // reported: crash
  *level = *level + 1;  // reported: crash
  return *level < limit ? deep(level, limit) + 1 : here[0];
}
// <<<1, 1>>>
extern "C" __global__ void stack_overflow(const Call call) {
  volatile int level = 0;
#ifdef BUG
  const int limit = 100000;
#else
  const int limit = 10;
#endif
  deep(&level, limit);
  call.out[0] = 1.0f;
}
