// Scalar operations with one spelling for float and double, for g++, Clang and NVRTC alike.
// Who includes this file has defined SPARSIFY_INLINE and the types of <cstdint>.
#pragma once

// NVRTC has the functions of <math.h> without a header; the others have them as builtins.
#if defined(__CUDACC_RTC__)
#define SPARSIFY_BUILTIN(function) function
#else
#define SPARSIFY_BUILTIN(function) __builtin_##function
#endif

namespace sparsify {

// The value of another type that has the same bits.
template <class To, class From>
SPARSIFY_INLINE To same_bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "the sizes differ");
  To to;
  SPARSIFY_BUILTIN(memcpy)(&to, &from, sizeof to);
  return to;
}

template <class F>
SPARSIFY_INLINE F infinity() {
  return F(same_bits<float>(uint32_t(0x7F800000)));
}
template <class F>
SPARSIFY_INLINE F not_a_number() {
  return F(same_bits<float>(uint32_t(0x7FC00000)));
}

// A bool goes through int: GCC vectorises only that.
template <class To, class From>
SPARSIFY_INLINE To cast(From a) {
  return To(a);
}
template <class To>
SPARSIFY_INLINE To cast(bool a) {
  return To(int(a));
}
// Of two bools as numbers: of bools GCC may make branches, and does not vectorise what has branches.
SPARSIFY_INLINE bool either(bool a, bool b) {
#if defined(__CUDACC_RTC__)
  return a | b;
#else
  return (a ? 1.0f : 0.0f) + (b ? 1.0f : 0.0f) != 0.0f;
#endif
}
SPARSIFY_INLINE float absolute(float a) { return SPARSIFY_BUILTIN(fabsf)(a); }
SPARSIFY_INLINE double absolute(double a) { return SPARSIFY_BUILTIN(fabs)(a); }
SPARSIFY_INLINE float square_root(float a) { return SPARSIFY_BUILTIN(sqrtf)(a); }
SPARSIFY_INLINE double square_root(double a) { return SPARSIFY_BUILTIN(sqrt)(a); }
SPARSIFY_INLINE float remainder_of(float a, float b) { return SPARSIFY_BUILTIN(fmodf)(a, b); }
SPARSIFY_INLINE double remainder_of(double a, double b) { return SPARSIFY_BUILTIN(fmod)(a, b); }
SPARSIFY_INLINE float round_down(float a) { return SPARSIFY_BUILTIN(floorf)(a); }
SPARSIFY_INLINE double round_down(double a) { return SPARSIFY_BUILTIN(floor)(a); }
SPARSIFY_INLINE float round_up(float a) { return SPARSIFY_BUILTIN(ceilf)(a); }
SPARSIFY_INLINE double round_up(double a) { return SPARSIFY_BUILTIN(ceil)(a); }
SPARSIFY_INLINE float round_to_zero(float a) { return SPARSIFY_BUILTIN(truncf)(a); }
SPARSIFY_INLINE double round_to_zero(double a) { return SPARSIFY_BUILTIN(trunc)(a); }
SPARSIFY_INLINE float round_half_even(float a) { return SPARSIFY_BUILTIN(rintf)(a); }
SPARSIFY_INLINE double round_half_even(double a) { return SPARSIFY_BUILTIN(rint)(a); }
SPARSIFY_INLINE float with_sign_of(float a, float b) { return SPARSIFY_BUILTIN(copysignf)(a, b); }
SPARSIFY_INLINE double with_sign_of(double a, double b) { return SPARSIFY_BUILTIN(copysign)(a, b); }

}  // namespace sparsify

#include "halves.h"

#include "elementary.h"
#include "error_function.h"
#include "logarithms.h"
