// Vectors of floats out of memory that holds halves: what the weights of a product are read with.
#pragma once

namespace sparsify {

// Of the width of a vector of floats, with two bytes an element.
typedef uint16_t HalfVector __attribute__((vector_size(VECTOR_BYTES / 2), may_alias, aligned(2)));
typedef uint32_t WordVector __attribute__((vector_size(VECTOR_BYTES)));

SPARSIFY_INLINE WordVector load_bits(const uint16_t* from) {
  return __builtin_convertvector(*reinterpret_cast<const HalfVector*>(from), WordVector);
}

// Bit i is set where half i of eight is not zero: whatever its kind, zero has no bit but the sign.
#if defined(__SSE2__)
SPARSIFY_INLINE uint32_t eight_active_bits(const uint16_t* halves) {
  typedef short Eight __attribute__((vector_size(16)));
  typedef Eight Anywhere __attribute__((may_alias, aligned(2)));
  const Eight active = (Eight)((*reinterpret_cast<const Anywhere*>(halves) & 0x7FFF) != 0);
  return uint32_t(__builtin_ia32_pmovmskb128(__builtin_ia32_packsswb128(active, Eight{})));
}
SPARSIFY_INLINE uint32_t eight_active_bits(const bfloat16* halves) {
  return eight_active_bits(&halves->bits);
}
SPARSIFY_INLINE uint32_t eight_active_bits(const float16* halves) {
  return eight_active_bits(&halves->bits);
}
#endif

SPARSIFY_INLINE Vector<float> load(const bfloat16* from) {
  return (Vector<float>)(load_bits(&from->bits) << 16);
}

// The processor's conversion where it has one: a register of bits takes six operations.
#if defined(__F16C__) && (defined(__AVX512F__) || defined(__AVX__))
typedef short ShortVector __attribute__((vector_size(VECTOR_BYTES / 2)));
typedef short ShortAnywhere __attribute__((vector_size(VECTOR_BYTES / 2), may_alias, aligned(2)));
SPARSIFY_INLINE Vector<float> load(const float16* from) {
  const ShortVector halves = *reinterpret_cast<const ShortAnywhere*>(from);
#if defined(__AVX512F__)
  return __builtin_ia32_vcvtph2ps512_mask(halves, Vector<float>{}, uint16_t(-1), 4);
#else
  return __builtin_ia32_vcvtph2ps256(halves);
#endif
}
#else
SPARSIFY_INLINE Vector<float> load(const float16* from) {
  const WordVector bits = load_bits(&from->bits), size = bits & 0x7FFF;
  const Vector<float> finite = (Vector<float>)(size << 13) * 0x1p112f;
  const WordVector special = (WordVector)(size >= 0x7C00) & 0x7F800000;
  return (Vector<float>)((WordVector)finite | special | (bits & 0x8000) << 16);
}
#endif

}  // namespace sparsify
