// y[i] = 2 x[i] / 3, through a header and static and dynamic shared memory.
#include "twice.cuh"

struct Call {
  const float *x;
  float *y;
  long long n;
};

extern "C" __global__ void __launch_bounds__(256) run_doubled(const Call call) {
  extern __shared__ float kept[];
  __shared__ float mirrored[256];
  const long long i = blockIdx.x * 256ll + threadIdx.x;
  mirrored[threadIdx.x] = i < call.n ? call.x[i] : 0.0f;
  __syncthreads();
  kept[threadIdx.x] = twice(mirrored[255 - threadIdx.x]) / 3.0f;
  __syncthreads();
  if (i < call.n) call.y[i] = kept[255 - threadIdx.x];
}
