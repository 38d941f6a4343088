// Products of small matrices on tensor cores, in bfloat16 or float16 with float32 sums: 16 rows x 16
// senders times 16 senders x 8 receivers, by a whole warp.
//
// A float32 is the sum of three bfloat16, exactly. Products with all three parts have the accuracy
// of float32 at the speed of bfloat16.
#pragma once

#include "device.cuh"

namespace sparsify {

constexpr int TILE_ROWS = 16, TILE_COLUMNS = 8, TILE_DEPTH = 16;
constexpr uint32_t UPPER_HALF = 0xFFFF0000u;  // of a float32: a bfloat16

// ---- parts ----

SPARSIFY_INLINE float truncated(float a) {
  return same_bits<float>(same_bits<uint32_t>(a) & UPPER_HALF);
}
SPARSIFY_INLINE float nearest(float a) {
  return same_bits<float>((same_bits<uint32_t>(a) + 0x8000u) & UPPER_HALF);
}
// The nearest bfloat16, but none that is infinite where `a` is not.
SPARSIFY_INLINE float rounded(float a) {
  return absolute(nearest(a)) < infinity<float>() ? nearest(a) : truncated(a);
}

// The parts of a number, the largest first; each has 8 bits, and is at most 2^-8 of the one before.
// Their sum is the number, unless it is less than 2^-110: there the last bits of bfloat16 end.
// Infinity is one part; NaN has a part that is NaN.
struct Parts {
  float at[3];

  SPARSIFY_INLINE explicit Parts(float a) {
    at[0] = rounded(a);
    const float rest = absolute(a) == infinity<float>() ? 0.0f : a - at[0];
    at[1] = nearest(rest);  // far from infinity
    at[2] = rest - at[1];
  }
};
// The same where all products with them are taken: no part has to be small for what is left out. They are
// found sooner, and are at most 2^-7 of the one before.
struct CutParts {
  float at[3];

  SPARSIFY_INLINE explicit CutParts(float a) {
    at[0] = truncated(a);
    const float rest = absolute(a) == infinity<float>() ? 0.0f : a - at[0];
    at[1] = truncated(rest);
    at[2] = rest - at[1];
  }
};

// Two bfloat16, of float32 that have no more bits; the first one is in the lower half.
SPARSIFY_INLINE uint32_t pair_of(float first, float second) {
  return same_bits<uint32_t>(first) >> 16 | (same_bits<uint32_t>(second) & UPPER_HALF);
}

// Of two halves, or of other values that a half E has: the first one is in the lower half.
template <class E, class V>
SPARSIFY_INLINE uint32_t bits_of(V value) {
  if constexpr (sizeof(V) == sizeof(E))
    return value.bits;
  else if constexpr (sizeof(V) == 1)
    return value ? E(1.0f).bits : 0;
  else
    return E(cast<float>(value)).bits;
}
template <class E, class V>
SPARSIFY_INLINE uint32_t pair_of_halves(V first, V second) {
  return bits_of<E>(first) | bits_of<E>(second) << 16;
}

// What a weight is multiplied as on tensor cores, and in how many parts.
template <class W>
struct Element {
  typedef W type;
  static constexpr int PARTS = 1;
};
template <>
struct Element<float> {
  typedef bfloat16 type;
  static constexpr int PARTS = 3;
};

// ---- tiles, of which each lane has a part: with lane = 4 g + t ----

// Rows g and g + 8, each with senders 2t, 2t + 1 and then 2t + 8, 2t + 9.
struct alignas(16) LeftTile {
  uint32_t near[2], far[2];  // [row]
};
// Receiver g, with senders 2t, 2t + 1 and then 2t + 8, 2t + 9.
struct alignas(8) RightTile {
  uint32_t near, far;
};
// Rows g and g + 8, each with receivers 2t and 2t + 1.
struct SumTile {
  float at[2][2] = {};
};

#if !defined(SPARSIFY_EMULATOR)
#define SPARSIFY_MULTIPLY_ADD(E, NAME)                                                            \
  template <>                                                                                     \
  SPARSIFY_INLINE void multiply_add<E>(SumTile& to, const LeftTile& left,                        \
                                       const RightTile& right) {                                  \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." NAME "." NAME                                    \
        ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                    \
        : "+f"(to.at[0][0]), "+f"(to.at[0][1]), "+f"(to.at[1][0]), "+f"(to.at[1][1])              \
        : "r"(left.near[0]), "r"(left.near[1]), "r"(left.far[0]), "r"(left.far[1]),               \
          "r"(right.near), "r"(right.far));                                                       \
  }
template <class E>
SPARSIFY_INLINE void multiply_add(SumTile& to, const LeftTile& left, const RightTile& right);
SPARSIFY_MULTIPLY_ADD(bfloat16, "bf16")
SPARSIFY_MULTIPLY_ADD(float16, "f16")
#undef SPARSIFY_MULTIPLY_ADD
#else
template <class E>
SPARSIFY_INLINE float half_of(uint32_t pair, int half) {
  return same_bits<E>(uint16_t(half ? pair >> 16 : pair));
}
struct WordPair {
  uint32_t at[2];
};
SPARSIFY_INLINE WordPair of_lane(uint32_t first, uint32_t second, int lane) {
  const uint64_t both = uint64_t(second) << 32 | first;
  return same_bits<WordPair>(uint64_t(__shfl_sync(ALL, both, lane)));
}
// What the instruction does, up to the order of additions and its rounding.
template <class E>
SPARSIFY_INLINE void multiply_add(SumTile& to, const LeftTile& left, const RightTile& right) {
  const int g = lane_of() / 4, t = lane_of() % 4;
  for (int other = 0; other < 4; ++other) {
    const WordPair rows[2] = {of_lane(left.near[0], left.near[1], 4 * g + other),
                              of_lane(left.far[0], left.far[1], 4 * g + other)};
    const WordPair receivers[2] = {of_lane(right.near, right.far, 4 * (2 * t) + other),
                                   of_lane(right.near, right.far, 4 * (2 * t + 1) + other)};
    for (int far = 0; far < 2; ++far)
      for (int half = 0; half < 2; ++half)
        for (int i = 0; i < 2; ++i)
          for (int j = 0; j < 2; ++j)
            to.at[i][j] +=
                half_of<E>(rows[far].at[i], half) * half_of<E>(receivers[j].at[far], half);
  }
}
#endif

}  // namespace sparsify
