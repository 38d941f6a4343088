// What all generated CUDA kernels begin with: integer types, scalar operations, warps. NVRTC compiles
// without any header of its own; the emulator brings <cstdint>.
#pragma once

#if defined(__CUDACC_RTC__)
typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long int64_t;
typedef unsigned long uint64_t;
#endif

#define SPARSIFY_INLINE __device__ __forceinline__

#include "scalar.h"

namespace sparsify {

constexpr int BLOCK = 256;  // senders that are summed on their own, see gather_events
constexpr int WARP = 32;
constexpr unsigned ALL = 0xFFFFFFFFu;  // lanes of a warp

constexpr SPARSIFY_INLINE int blocks_of(int senders) { return (senders + BLOCK - 1) / BLOCK; }
constexpr SPARSIFY_INLINE int words_of(int neurons) { return (neurons + WARP - 1) / WARP; }

SPARSIFY_INLINE int lane_of() { return int(threadIdx.x) % WARP; }
SPARSIFY_INLINE int warp_of() { return int(threadIdx.x) / WARP; }
SPARSIFY_INLINE int warps_of() { return int(blockDim.x) / WARP; }

// a * b + c with one rounding.
SPARSIFY_INLINE float fused(float a, float b, float c) { return __fmaf_rn(a, b, c); }
SPARSIFY_INLINE double fused(double a, double b, double c) { return __fma_rn(a, b, c); }

template <class F>
SPARSIFY_INLINE bool is_finite(F a) {
  return absolute(a) < infinity<F>();
}

// Halves are loaded and stored as the numbers that their bits are.
template <class T>
SPARSIFY_INLINE T* plain(T* at) {
  return at;
}
SPARSIFY_INLINE const uint16_t* plain(const float16* at) { return &at->bits; }
SPARSIFY_INLINE const uint16_t* plain(const bfloat16* at) { return &at->bits; }
SPARSIFY_INLINE uint16_t* plain(float16* at) { return &at->bits; }
SPARSIFY_INLINE uint16_t* plain(bfloat16* at) { return &at->bits; }

// What nobody writes while the kernel runs.
template <class T>
SPARSIFY_INLINE T read_only(const T* from) {
  return same_bits<T>(__ldg(plain(from)));
}

// The sum of what the lanes of a warp have; every lane gets it, added in the same order.
template <class F>
SPARSIFY_INLINE F warp_sum(F part) {
  for (int apart = WARP / 2; apart > 0; apart /= 2) part += __shfl_xor_sync(ALL, part, apart);
  return part;
}

// Adds to a counter of the call what the lanes of all warps have counted.
SPARSIFY_INLINE void add_count(unsigned long long* counter, unsigned long long counted) {
  counted = warp_sum(counted);
  if (lane_of() == 0 && counted > 0) atomicAdd(counter, counted);
}

// Adds to the last counter how many rows and steps the call has; by one thread of the grid.
SPARSIFY_INLINE void add_row_steps(unsigned long long* counter, int64_t steps, int64_t batch) {
  if (blockIdx.x == 0 && threadIdx.x == 0)
    atomicAdd(counter, static_cast<unsigned long long>(steps * batch));
}

}  // namespace sparsify
