#include "planted.h"

// <<<1, 32>>>
extern "C" __global__ void missing_syncwarp(const Call call) {
  __shared__ float lanes[32];
  const int lane = threadIdx.x;
  lanes[lane] = call.in[lane];
#ifndef BUG
  __syncwarp();
#endif
  call.out[lane] = lanes[31 - lane];  // reported: race
}

// <<<1, 32>>>
extern "C" __global__ void lanes_that_never_come(const Call call) {
  const int lane = threadIdx.x;
  float value = call.in[lane];
#ifdef BUG
  if (lane < 20) value += __shfl_down_sync(ALL, value, 1);  // reported: warp
#else
  const float next = __shfl_down_sync(ALL, value, 1);
  if (lane < 20) value += next;
#endif
  call.out[lane] = value;
}

// <<<1, 32>>>
extern "C" __global__ void lanes_that_have_ended(const Call call) {
  const int lane = threadIdx.x;
  const bool inside = lane < 20;
#ifdef BUG
  if (!inside) return;
#endif
  const unsigned positive = __ballot_sync(ALL, inside && call.in[lane] > 0.0f);  // reported: warp
  if (inside) call.out[lane] = positive ? 1.0f : 0.0f;
}

// <<<1, 32>>>
extern "C" __global__ void shuffle_from_outside(const Call call) {
  const int lane = threadIdx.x;
  float value = call.in[lane];
#ifdef BUG
  if (lane & 1) value = __shfl_sync(0xaaaaaaaau, value, 0);  // reported: warp
#else
  if (lane & 1) value = __shfl_sync(0xaaaaaaaau, value, 1);
#endif
  call.out[lane] = value;
}

// <<<1, 32>>>
extern "C" __global__ void caller_outside_mask(const Call call) {
  const int lane = threadIdx.x;
#ifdef BUG
  call.out[lane] = __any_sync(0x0000ffffu, lane == 0);  // reported: warp
#else
  call.out[lane] = __any_sync(lane < 16 ? 0x0000ffffu : 0xffff0000u, lane == 0);
#endif
}

// <<<1, 32>>>
extern "C" __global__ void different_collectives(const Call call) {
  const int lane = threadIdx.x;
  unsigned bits = 0;
#ifdef BUG
  if (lane < 16) bits = __ballot_sync(ALL, 1);  // reported: warp
  else bits = __any_sync(ALL, 1);               // reported: warp
#else
  bits = __ballot_sync(ALL, 1);
#endif
  call.out[lane] = bits;
}

// A warp that is not full, with every kind of collective: nothing is wrong with BUG but the mask.
// <<<1, 20>>>
extern "C" __global__ void part_of_a_warp(const Call call) {
  const int lane = threadIdx.x;
#ifdef BUG
  const unsigned mask = ALL;
#else
  const unsigned mask = (1u << 20) - 1u;
#endif
  unsigned sum = __reduce_add_sync(mask, unsigned(lane));  // reported: warp
  sum += __reduce_max_sync(mask, -lane);
  sum += __match_any_sync(mask, lane / 4);
  __syncwarp();
  call.out[lane] = sum;
}
