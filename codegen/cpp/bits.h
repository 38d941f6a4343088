// Bools that lie in memory as bits: eight neurons a byte, the first one in the lowest bit. What is
// behind the last neuron is 0. Bytes of 0 and 1 are what loops over neurons read and write.
#pragma once

namespace sparsify {

#if defined(__AVX2__)
typedef uint8_t Byte32 __attribute__((vector_size(32)));
typedef uint8_t Byte32Anywhere __attribute__((vector_size(32), may_alias, aligned(1)));
typedef char Char32 __attribute__((vector_size(32)));
typedef uint32_t Word8 __attribute__((vector_size(32)));
#endif

// The bits of the next 64 neurons, or of those that are left; nothing is read behind their bytes.
SPARSIFY_INLINE uint64_t load_bits(const uint8_t* bits, int64_t neurons) {
  uint64_t word = 0;
  if (neurons >= 64) {
    std::memcpy(&word, bits, 8);
    return word;
  }
  for (int64_t i = 0; i < neurons; i += 8) word |= uint64_t(bits[i / 8]) << i;
  return word & ((uint64_t(1) << neurons) - 1);
}

// Bytes of 0 and 1 -> bits.
SPARSIFY_INLINE void pack(uint8_t* bits, const uint8_t* values, int64_t count) {
  int64_t i = 0;
#if defined(__AVX2__)
  for (; i + 32 <= count; i += 32) {
    const Byte32 bytes = *reinterpret_cast<const Byte32Anywhere*>(values + i);
    const uint32_t word = uint32_t(__builtin_ia32_pmovmskb256(Char32(bytes != Byte32{})));
    std::memcpy(bits + i / 8, &word, 4);
  }
#endif
  for (; i + 8 <= count; i += 8) {
    uint64_t bytes;
    std::memcpy(&bytes, values + i, 8);
    bits[i / 8] = uint8_t(bytes * 0x0102040810204080 >> 56);
  }
  if (i == count) return;
  uint32_t last = 0;
  for (int64_t bit = 0; i + bit < count; ++bit) last |= uint32_t(values[i + bit]) << bit;
  bits[i / 8] = uint8_t(last);
}

// Bits -> bytes of 0 and 1, up to the next multiple of eight.
SPARSIFY_INLINE void spread(uint8_t* values, const uint8_t* bits, int64_t count) {
  int64_t i = 0;
#if defined(__AVX2__) && __has_builtin(__builtin_shufflevector)
  for (; i + 32 <= count; i += 32) {
    uint32_t word;
    std::memcpy(&word, bits + i / 8, 4);
    const Byte32 words = Byte32(Word8{} + word);
    const Byte32 own = __builtin_shufflevector(words, words,  // of both halves of the vector
                                               0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1,
                                               18, 18, 18, 18, 18, 18, 18, 18,
                                               19, 19, 19, 19, 19, 19, 19, 19);
    const Byte32 bit = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128,
                        1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
    *reinterpret_cast<Byte32Anywhere*>(values + i) = Byte32((own & bit) == bit) & 1;
  }
#endif
  for (; i < count; i += 8) {
    // Seven bits seven times do not overlap; the lowest bit of each byte is kept.
    const uint64_t seven = (bits[i / 8] & 127) * uint64_t(0x40810204081) & 0x0101010101010101;
    const uint64_t bytes = seven | uint64_t(bits[i / 8] >> 7) << 56;
    std::memcpy(values + i, &bytes, 8);
  }
}

// Bits -> floats of 0 and 1.
template <class F>
SPARSIFY_INLINE void spread(F* values, const uint8_t* bits, int64_t count) {
  for (int64_t i = 0; i < count; ++i) values[i] = F(bits[i / 8] >> (i % 8) & 1);
}

}  // namespace sparsify
