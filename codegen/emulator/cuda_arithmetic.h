// Arithmetic that CUDA has without a header. Each function rounds as on the device (none contracts
// or flushes); exp, log and their like are those of the processor's library.
#pragma once

extern "C" {
#define EMULATOR_LIBRARY_1(NAME) \
  double NAME(double) noexcept;  \
  float NAME##f(float) noexcept;
#define EMULATOR_LIBRARY_2(NAME)        \
  double NAME(double, double) noexcept; \
  float NAME##f(float, float) noexcept;
EMULATOR_LIBRARY_1(fabs)
EMULATOR_LIBRARY_1(sqrt)
EMULATOR_LIBRARY_1(floor)
EMULATOR_LIBRARY_1(ceil)
EMULATOR_LIBRARY_1(trunc) EMULATOR_LIBRARY_1(rint) EMULATOR_LIBRARY_1(round) EMULATOR_LIBRARY_1(exp)
    EMULATOR_LIBRARY_1(exp2) EMULATOR_LIBRARY_1(expm1) EMULATOR_LIBRARY_1(log)
        EMULATOR_LIBRARY_1(log2) EMULATOR_LIBRARY_1(log10) EMULATOR_LIBRARY_1(log1p)
            EMULATOR_LIBRARY_1(sin) EMULATOR_LIBRARY_1(cos) EMULATOR_LIBRARY_1(tanh)
                EMULATOR_LIBRARY_1(erf) EMULATOR_LIBRARY_2(fmod) EMULATOR_LIBRARY_2(fmin)
                    EMULATOR_LIBRARY_2(fmax) EMULATOR_LIBRARY_2(pow) EMULATOR_LIBRARY_2(copysign)
                        EMULATOR_LIBRARY_2(nextafter) double fma(double, double, double) noexcept;
float fmaf(float, float, float) noexcept;
double ldexp(double, int) noexcept;
float ldexpf(float, int) noexcept;
int abs(int) noexcept;
#undef EMULATOR_LIBRARY_1
#undef EMULATOR_LIBRARY_2
}

// CUDA overloads these by type.
inline float fabs(float a) { return __builtin_fabsf(a); }
inline float sqrt(float a) { return __builtin_sqrtf(a); }
inline float floor(float a) { return __builtin_floorf(a); }
inline float ceil(float a) { return __builtin_ceilf(a); }
inline float trunc(float a) { return __builtin_truncf(a); }
inline float rint(float a) { return __builtin_rintf(a); }
inline float fmod(float a, float b) { return __builtin_fmodf(a, b); }
inline float copysign(float a, float b) { return __builtin_copysignf(a, b); }
inline float rsqrtf(float a) { return 1.0f / __builtin_sqrtf(a); }
template <class T>
inline bool isnan(T a) {
  return __builtin_isnan(a);
}
template <class T>
inline bool isinf(T a) {
  return __builtin_isinf(a);
}
template <class T>
inline bool isfinite(T a) {
  return __builtin_isfinite(a);
}
template <class T>
inline bool signbit(T a) {
  return __builtin_signbit(a);
}

// Of two floats the one that is a number, as fminf; of others the common type.
template <class A, class B>
inline auto min(A a, B b) -> decltype(true ? A() : B()) {
  typedef decltype(true ? A() : B()) Both;
  return Both(b) < Both(a) ? Both(b) : Both(a);
}
template <class A, class B>
inline auto max(A a, B b) -> decltype(true ? A() : B()) {
  typedef decltype(true ? A() : B()) Both;
  return Both(a) < Both(b) ? Both(b) : Both(a);
}
inline float min(float a, float b) { return __builtin_fminf(a, b); }
inline float max(float a, float b) { return __builtin_fmaxf(a, b); }
inline double min(double a, double b) { return __builtin_fmin(a, b); }
inline double max(double a, double b) { return __builtin_fmax(a, b); }

// One rounding each, to the nearest: never fused with what surrounds them.
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return __builtin_sqrtf(a); }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fmaf_rn(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline double __dsqrt_rn(double a) { return __builtin_sqrt(a); }
inline double __fma_rn(double a, double b, double c) { return __builtin_fma(a, b, c); }

inline int __popc(unsigned a) { return __builtin_popcount(a); }
inline int __popcll(unsigned long long a) { return __builtin_popcountll(a); }
inline int __clz(int a) { return a ? __builtin_clz(unsigned(a)) : 32; }
inline int __clzll(long long a) { return a ? __builtin_clzll((unsigned long long)a) : 64; }
inline int __ffs(int a) { return __builtin_ffs(a); }
inline int __ffsll(long long a) { return __builtin_ffsll(a); }
inline unsigned __brev(unsigned a) {
  unsigned reversed = 0;
  for (int i = 0; i < 32; ++i) reversed |= (a >> i & 1u) << (31 - i);
  return reversed;
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned by) {
  return unsigned(((unsigned long long)high << 32 | low) << (by & 31) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned by) {
  return unsigned(((unsigned long long)high << 32 | low) >> (by & 31));
}
inline int __mulhi(int a, int b) { return int((long long)a * b >> 32); }
inline unsigned __umulhi(unsigned a, unsigned b) {
  return unsigned((unsigned long long)a * b >> 32);
}
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return (unsigned long long)((unsigned __int128)a * b >> 64);
}

namespace emulator {
template <class To, class From>
inline To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}
}  // namespace emulator
inline int __float_as_int(float a) { return emulator::bits_as<int>(a); }
inline unsigned __float_as_uint(float a) { return emulator::bits_as<unsigned>(a); }
inline float __int_as_float(int a) { return emulator::bits_as<float>(a); }
inline float __uint_as_float(unsigned a) { return emulator::bits_as<float>(a); }
inline long long __double_as_longlong(double a) { return emulator::bits_as<long long>(a); }
inline double __longlong_as_double(long long a) { return emulator::bits_as<double>(a); }
inline int __float2int_rz(float a) { return int(a); }
inline int __float2int_rn(float a) { return int(__builtin_rintf(a)); }
inline unsigned __float2uint_rz(float a) { return unsigned(a); }
inline float __int2float_rn(int a) { return float(a); }
inline float __uint2float_rn(unsigned a) { return float(a); }
inline float __double2float_rn(double a) { return float(a); }
// Bytes of low (0 to 3) and high (4 to 7), each chosen by 4 bits; with the fourth, its sign fills the byte.
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned chosen) {
  const unsigned long long bytes = (unsigned long long)high << 32 | low;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned byte = unsigned(bytes >> (chosen >> 4 * i & 7) * 8) & 255;
    const bool sign = chosen >> 4 * i & 8;
    result |= (sign ? byte >> 7 ? 255u : 0u : byte) << 8 * i;
  }
  return result;
}
