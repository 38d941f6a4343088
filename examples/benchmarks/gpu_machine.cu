// What a GPU does in the smallest pieces of a kernel. GRID, its blocks, is defined in front.
#include "barrier.cuh"

using namespace sparsify;

struct Call {
  float* values;       // [count], read or copied
  unsigned* counters;  // zero
  int64_t* fault;
  int64_t count, repeats;
};

extern "C" __global__ void run_nothing(const Call call) {}

// Barriers of all blocks of the grid, as the kernels have them.
extern "C" __global__ void run_grid_barrier(const Call call) {
  GridTeam<GRID> team(call.counters, 10000000, call.fault);
  for (int64_t i = 0; i < call.repeats; ++i)
    if (!team.meet()) return;
}

extern "C" __global__ void run_block_barrier(const Call call) {
  for (int64_t i = 0; i < call.repeats; ++i) __syncthreads();
}

// A number goes to and fro between two blocks: one way is an atomic addition that is then seen.
extern "C" __global__ void run_atomic_hop(const Call call) {
  if (threadIdx.x) return;
  const volatile unsigned* const now = call.counters;
  for (unsigned i = blockIdx.x; i < 2 * call.repeats; i += 2) {
    while (*now != i) __nanosleep(1);
    atomicAdd(call.counters, 1u);
  }
}

// All blocks read all of `values`, each beginning elsewhere so that they do not queue.
extern "C" __global__ void run_read(const Call call) {
  const float4* const values = reinterpret_cast<const float4*>(call.values);
  const int64_t count = call.count / 4, stride = blockDim.x;
  float sum = 0;
  for (int64_t i = 0; i < call.repeats; ++i) {
    const int64_t first = (count / gridDim.x * blockIdx.x + i) % count;
#pragma unroll 8
    for (int64_t at = threadIdx.x; at < count; at += stride) {
      const int64_t place = first + at < count ? first + at : first + at - count;
      const float4 value = __ldcg(values + place);
      sum += value.x + value.y + value.z + value.w;
    }
  }
  if (sum == 1.25f) call.fault[0] = 2;  // never: keeps the loads
}
