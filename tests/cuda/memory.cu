#include "planted.h"

// <<<1, 64>>>
extern "C" __global__ void uninitialised_shared(const Call call) {
  __shared__ float values[64];
  const int t = threadIdx.x;
#ifdef BUG
  if (t < 63) values[t] = call.in[t];
#else
  values[t] = call.in[t];
#endif
  __syncthreads();
  call.out[t] = values[63 - t];  // reported: uninitialised
}

// <<<1, 64>>>
extern "C" __global__ void uninitialised_scratch(const Call call) {
  const int t = threadIdx.x;
#ifdef BUG
  if (t != 17) call.scratch[t] = call.in[t];
#else
  call.scratch[t] = call.in[t];
#endif
  call.out[t] = call.scratch[t];  // reported: uninitialised
}

// <<<1, 64>>>
extern "C" __global__ void uninitialised_dynamic(const Call call) {  // shared 256
  extern __shared__ float values[];
  const int t = threadIdx.x;
#ifndef BUG
  values[t] = 0.0f;
#endif
  values[t] += call.in[t];  // reported: uninitialised
  call.out[t] = values[t];
}

// <<<1, 8>>>
extern "C" __global__ void misaligned_vector(const Call call) {
#ifdef BUG
  const int first = 1 + 4 * threadIdx.x;
#else
  const int first = 4 * threadIdx.x;
#endif
  const float4 four = *reinterpret_cast<const float4*>(call.in + first);  // reported: misaligned
  call.out[threadIdx.x] = four.x + four.y + four.z + four.w;
}

// The emulator gives a shared variable no better alignment than it asks for.
// <<<1, 8>>>
extern "C" __global__ void missing_alignment(const Call call) {
#ifdef BUG
  __shared__ float values[32];
#else
  __shared__ alignas(16) float values[32];
#endif
  for (int i = threadIdx.x; i < 32; i += 8) values[i] = call.in[i];
  __syncthreads();
  const float4 four = *reinterpret_cast<const float4*>(values + 4 * threadIdx.x);  // reported: misaligned
  call.out[threadIdx.x] = four.x + four.w;
}

// <<<1, 64>>>
extern "C" __global__ void beyond_the_row(const Call call) {
  __shared__ float values[2][32];
  const int t = threadIdx.x;
#ifdef BUG
  values[t / 32][t % 32 + (t == 31)] = call.in[t];  // reported: undefined
#else
  values[t / 32][t % 32] = call.in[t];
#endif
  __syncthreads();
  call.out[t] = values[1 - t / 32][t % 32];
}

// <<<1, 64>>>
extern "C" __global__ void beyond_the_end(const Call call) {
  const int t = threadIdx.x;
#ifdef BUG
  call.out[t + 193] = call.in[t];  // reported: out of bounds
#else
  call.out[t + 192] = call.in[t];
#endif
}

// <<<1, 64>>>
extern "C" __global__ void beyond_dynamic(const Call call) {  // shared 256
  extern __shared__ __align__(16) float values[];
  const int t = threadIdx.x;
#ifdef BUG
  values[t + 1] = call.in[t];  // reported: out of bounds
#else
  values[t] = call.in[t];
#endif
  call.out[t] = call.in[t];
}

// <<<1, 64>>>
extern "C" __global__ void before_the_beginning(const Call call) {
  const unsigned t = threadIdx.x;
#ifdef BUG
  call.out[t] = call.in[t - 1];  // reported: out of bounds|wild access
#else
  call.out[t] = t ? call.in[t - 1] : 0.0f;
#endif
}

// <<<1, 32>>>
extern "C" __global__ void write_to_const(const Call call) {
#ifdef BUG
  float* to = const_cast<float*>(call.in);
#else
  float* to = call.out;
#endif
  to[threadIdx.x] = 1.0f;  // reported: write to const
}

// <<<1, 32>>>
extern "C" __global__ void read_only_cache(const Call call) {
  const int t = threadIdx.x;
  call.scratch[t] = call.in[t];
#ifdef BUG
  call.out[t] = __ldg(&call.scratch[t]);  // reported: read-only
#else
  call.out[t] = __ldcg(&call.scratch[t]) + __ldg(&call.in[t]);
#endif
}

// Bytes of one word that different threads write are no race.
// <<<1, 64>>>
extern "C" __global__ void bytes_of_a_word(const Call call) {
  __shared__ unsigned char bytes[64];
  const int t = threadIdx.x;
#ifdef BUG
  bytes[t & ~1] = t;  // reported: race
#else
  bytes[t] = t;
#endif
  __syncthreads();
  call.out[t] = bytes[t & ~1];
}

// <<<1, 32>>>
extern "C" __global__ void signed_overflow(const Call call) {
  int large = 0x7fffffff - 16;
#ifdef BUG
  large += threadIdx.x < 32 ? int(threadIdx.x) : 0;  // reported: undefined
#endif
  call.out[threadIdx.x] = large;
}

// <<<1, 32>>>
extern "C" __global__ void division_by_zero(const Call call) {
#ifdef BUG
  call.out[threadIdx.x] = 10 / call.indices[threadIdx.x];  // reported: undefined
#else
  call.out[threadIdx.x] = 10 / (call.indices[threadIdx.x] + 1);
#endif
}

// <<<1, 32>>>
extern "C" __global__ void failed_assertion(const Call call) {
#ifdef BUG
  const int limit = 31;
#else
  const int limit = 32;
#endif
  if (threadIdx.x >= limit) __trap();  // reported: trap
  call.out[threadIdx.x] = 0.0f;
}

// gcc calls a function for a copy of unknown size.
// <<<1, 32>>>
extern "C" __global__ void copy_beyond_the_end(const Call call) {
  const int t = threadIdx.x;
#ifdef BUG
  const long long bytes = call.n;
#else
  const long long bytes = call.n / 50;
#endif
  memcpy(call.out + 8 * t, call.in + t, bytes);  // reported: out of bounds|race
}

struct Row {
  float values[40];
};
// <<<1, 1>>>
extern "C" __global__ void large_struct(const Call call) {
#ifdef BUG
  const Row* from = reinterpret_cast<const Row*>(call.scratch);
#else
  const Row* from = reinterpret_cast<const Row*>(call.in);
#endif
  *reinterpret_cast<Row*>(call.out) = *from;  // reported: uninitialised
}
