// CUDA C++ for the compiler of the processor: included before the text of a kernel.
// It includes no standard header, as NVRTC has none: what a kernel needs is declared in these
// files.
#pragma once

#define SPARSIFY_EMULATOR 1
#define __CUDACC__ 1
#define __CUDACC_RTC__ 1
#define __CUDA_ARCH__ 900

#define __global__
#define __device__
#define __host__
#define __constant__ static const
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __restrict__ __restrict
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __grid_constant__
#define __align__(bytes) alignas(bytes)
// `__shared__` is rewritten before compiling, by shared_variables.py.

// For what must not be checked itself, because it tells the checks. It cannot be inlined then.
#define EMULATOR_UNCHECKED \
  __attribute__((noinline, no_sanitize("thread"), no_sanitize("undefined")))
// The last parameter of what stands for a barrier: the place of the call.
#define EMULATOR_PLACE emulator::Place place = {__builtin_FILE(), __builtin_LINE()}

typedef decltype(sizeof 0) size_t;
typedef decltype(nullptr) nullptr_t;

// gcc makes small copies itself, which are checked like any access; it calls a function for others.
#ifdef EMULATOR_CHECKS
#define EMULATOR_CALLED(NAME) __asm__(NAME)
#else
#define EMULATOR_CALLED(NAME)
#endif
extern "C" {
void* memcpy(void* to, const void* from, size_t bytes) noexcept EMULATOR_CALLED("emulator_memcpy");
void* memset(void* to, int byte, size_t bytes) noexcept EMULATOR_CALLED("emulator_memset");
int printf(const char* format, ...);
}

#include "cuda_runtime_calls.h"

#define threadIdx (emulator::emulator_thread_index())
#define blockIdx (emulator::emulator_block_index())
#define blockDim (emulator::emulator_block_size())
#define gridDim (emulator::emulator_grid_size())
constexpr int warpSize = 32;

#include "cuda_arithmetic.h"
#include "cuda_blocks.h"
#include "cuda_warps.h"
#include "cuda_atomics.h"
#include "cuda_clusters.h"

// The function that the emulator calls in every thread: `words` are those of the one parameter.
namespace emulator {
template <class Call>
EMULATOR_UNCHECKED void enter(void (*kernel)(Call), const void* words) {
  kernel(*static_cast<const Call*>(words));
}
template <class Call>
constexpr int words_of(void (*)(Call)) {
  static_assert(sizeof(Call) % 8 == 0, "the parameter of a kernel consists of 8-byte words");
  return sizeof(Call) / 8;
}
}  // namespace emulator
#define EMULATOR_EXPORT(KERNEL)                                                                   \
  extern "C" __attribute__((visibility("default"))) void emulator_enter_##KERNEL(const void* w) { \
    emulator::enter(&KERNEL, w);                                                                  \
  }                                                                                               \
  extern "C" __attribute__((visibility("default"))) int emulator_words_##KERNEL() {               \
    return emulator::words_of(&KERNEL);                                                           \
  }
