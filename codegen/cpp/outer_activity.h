// Which values of an activation are active: 64 senders of a row are one word.
#pragma once

#include "kernel.h"

namespace sparsify {

constexpr int64_t GROUP = 64;  // senders whose activity is one word

// A matrix [rows, N] whose rows are two axes of a tensor, the inner one of extent `run`.
// Strides are in elements; N is contiguous.
template <class T>
struct Matrix {
  const T* first;
  int64_t run, outer, inner;

  SPARSIFY_INLINE const T* operator[](int64_t row) const {
    if (row < run) return first + row * inner;
    return first + row / run * outer + row % run * inner;
  }
};

struct Bits {};  // y is packed, 8 senders a byte, the first one in the lowest bit

template <class Source>
struct Activity {
  typedef Source Element;
  static constexpr bool MAY_HAVE_PAYLOAD = true;

  SPARSIFY_INLINE static uint64_t word(const Source* row, int64_t sender, int64_t count) {
    uint64_t bits = 0;
    for (int64_t i = 0; i < count; i += AT_ONCE) bits |= uint64_t(next_active_bits(row + sender + i, count - i)) << i;
    return bits;
  }
  // Whether a value is neither 0 nor 1.
  SPARSIFY_INLINE static bool has_payload(const Source* row, int64_t sender, int64_t count) {
    int others = 0;
    for (int64_t i = 0; i < count; ++i) {
      const Source value = row[sender + i];
      others |= int(value != Source(0)) & int(value != Source(1));
    }
    return others != 0;
  }
  template <class F>
  SPARSIFY_INLINE static F value(const Source* row, int64_t sender) {
    return F(row[sender]);
  }
};

template <>
struct Activity<Bits> {
  typedef uint8_t Element;
  static constexpr bool MAY_HAVE_PAYLOAD = false;

  SPARSIFY_INLINE static uint64_t word(const uint8_t* row, int64_t sender, int64_t count) {
    uint64_t bits = 0;
    if (count == GROUP) {
      std::memcpy(&bits, row + sender / 8, 8);
      return bits;
    }
    std::memcpy(&bits, row + sender / 8, (count + 7) / 8);
    return bits & ((uint64_t(1) << count) - 1);
  }
  SPARSIFY_INLINE static bool has_payload(const uint8_t*, int64_t, int64_t) { return false; }
  template <class F>
  SPARSIFY_INLINE static F value(const uint8_t*, int64_t) {
    return F(1);
  }
};

#if defined(__AVX2__)
template <>
SPARSIFY_INLINE uint64_t Activity<uint8_t>::word(const uint8_t* row, int64_t sender,
                                                 int64_t count) {
  if (count < GROUP) {
    uint64_t bits = 0;
    for (int64_t i = 0; i < count; ++i) bits |= uint64_t(row[sender + i] != 0) << i;
    return bits;
  }
  const Byte32 low = *reinterpret_cast<const Byte32Anywhere*>(row + sender);
  const Byte32 high = *reinterpret_cast<const Byte32Anywhere*>(row + sender + 32);
  const uint32_t low_zeros = uint32_t(__builtin_ia32_pmovmskb256(Char32(low == Byte32{})));
  const uint32_t high_zeros = uint32_t(__builtin_ia32_pmovmskb256(Char32(high == Byte32{})));
  return ~(uint64_t(high_zeros) << 32 | low_zeros);
}
#endif

}  // namespace sparsify
