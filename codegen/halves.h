// Floats of two bytes, as they lie in memory. They are computed with as the floats that they stand for;
// making one of a float rounds to nearest even. Of what a compiler knows of them nothing is used: g++,
// Clang and NVRTC agree.
#pragma once

namespace sparsify {

struct bfloat16 {
  uint16_t bits;

  bfloat16() = default;
  SPARSIFY_INLINE bfloat16(float a) {
    const uint32_t wide = same_bits<uint32_t>(a);
    const uint32_t nearest = (wide + 0x7FFFu + ((wide >> 16) & 1u)) >> 16;
    bits = uint16_t(a != a ? 0x7FC0u : nearest);
  }
  SPARSIFY_INLINE operator float() const { return same_bits<float>(uint32_t(bits) << 16); }
};

// ---- between float16 and float ----

#if defined(__CUDACC_RTC__) && !defined(SPARSIFY_EMULATOR)

// A GPU has an instruction for either; NaN becomes the one of all bits.
SPARSIFY_INLINE uint16_t nearest_half(float a) {
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(a));
  return bits;
}
SPARSIFY_INLINE float value_of_half(uint16_t bits) {
  float a;
  asm("cvt.f32.f16 %0, %1;" : "=f"(a) : "h"(bits));
  return a;
}

#else

SPARSIFY_INLINE uint16_t nearest_half(float a) {
  const uint32_t wide = same_bits<uint32_t>(a), sign = wide & 0x80000000u;
  const uint32_t size = wide ^ sign;
  // Sums with 1/2 have the steps of subnormal halves, 2^-24, and are rounded to them.
  const uint32_t small = same_bits<uint32_t>(same_bits<float>(size) + 0.5f) - 0x3F000000u;
  const uint32_t nearest = (size + 0xFFFu + ((size >> 13) & 1u) - (112u << 23)) >> 13;
  const uint32_t finite = size < 0x38800000u ? small : nearest;  // 2^-14, the least normal half
  const uint32_t rounded = size < 0x47800000u ? finite : 0x7C00u;  // from 2^16 on infinite
  return uint16_t((sign >> 16) | (a != a ? 0x7E00u : rounded));
}
// The product makes subnormal halves normal floats; it is exact.
SPARSIFY_INLINE float value_of_half(uint16_t bits) {
  const uint32_t size = bits & 0x7FFFu, sign = uint32_t(bits & 0x8000u) << 16;
  const float finite = same_bits<float>(size << 13) * 0x1p112f;
  const uint32_t special = size >= 0x7C00u ? 0x7F800000u : 0u;
  return same_bits<float>(same_bits<uint32_t>(finite) | special | sign);
}

#endif

struct float16 {
  uint16_t bits;

  float16() = default;
  SPARSIFY_INLINE float16(float a) : bits(nearest_half(a)) {}
  SPARSIFY_INLINE operator float() const { return value_of_half(bits); }
};

}  // namespace sparsify
