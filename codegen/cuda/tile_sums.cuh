// Dense sums over senders for the slice of receivers that a block owns, on tensor cores: 16 batch
// rows and 8 receivers at a time. Who is active comes from shared memory, 256 senders at a time.
#pragma once

#include "events.cuh"
#include "exchange.cuh"
#include "mma.cuh"

namespace sparsify {

constexpr int PAIRS = BLOCK / 2;  // of senders

// Batch rows of all tiles that have one of `rows`.
SPARSIFY_INLINE int whole_tiles(int rows) { return (rows + TILE_ROWS - 1) / TILE_ROWS * TILE_ROWS; }

// Senders s and s + 1 of a row, where s is even; those behind the last one are 0.
template <class Source>
SPARSIFY_INLINE void read_pair(typename Source::Value (&pair)[2], const Source& source, int s,
                               int senders) {
  if (s < senders) pair[0] = source(s);
  if (s + 1 < senders) pair[1] = source(s + 1);
}
// Both are bits of one word.
template <class Team, int SLICE>
SPARSIFY_INLINE void read_pair(bool (&pair)[2], const ToldBits<Team, SLICE>& source, int s,
                               int senders) {
  static_assert(SLICE % 2 == 0, "both are in one slice");
  const uint32_t bits = s < senders ? source.word(s) >> (s % SLICE % WARP) : 0;
  pair[0] = bits & 1;
  pair[1] = s + 1 < senders && (bits >> 1 & 1);
}

// What a lane has kept of a row: how many values are not zero, and whether one is wild.
struct Kept {
  int count;
  bool wild;
};

// Values of ROWS batch rows and a block of senders, in PARTS, with a word for each pair of senders.
template <int ROWS, int PARTS>
struct TileValues {
  uint32_t at[PARTS][ROWS][PAIRS + 4];  // 4 more: the lanes of a warp read from different banks

  // Keeps a row, for weights W, in USED parts: one for binary values and for halves. By a whole warp.
  // Zeros unless it is there.
  template <class W, int USED, class Source>
  SPARSIFY_INLINE Kept keep(int row, const Source& source, int block, int senders, bool is_there) {
    Kept kept = {};
#pragma unroll
    for (int pair = lane_of(); pair < PAIRS; pair += WARP) {
      const int s = block * BLOCK + 2 * pair;
      typename Source::Value both[2] = {typename Source::Value(0), typename Source::Value(0)};
      if (is_there) read_pair(both, source, s, senders);
      if constexpr (USED == 1)
        at[0][row][pair] = pair_of_halves<typename Element<W>::type>(both[0], both[1]);
      else
        keep_parts<USED>(row, pair, cast<float>(both[0]), cast<float>(both[1]));
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float value = cast<float>(both[i]);
        kept.count += int(value != 0.0f);
        kept.wild |= !(absolute(value) < wild_from<float>());
      }
    }
    return kept;
  }

  template <int USED>
  SPARSIFY_INLINE void keep_parts(int row, int pair, float first, float second) {
    const Parts one(first), other(second);
#pragma unroll
    for (int part = 0; part < USED; ++part)
      at[part][row][pair] = pair_of(one.at[part], other.at[part]);
  }

  // The rows from `row` on, and the senders from `sender` of the block on.
  SPARSIFY_INLINE LeftTile tile(int part, int row, int sender) const {
    const int g = lane_of() / 4, near = sender / 2 + lane_of() % 4, far = near + 4;
    const auto& rows = at[part];
    return {{rows[row + g][near], rows[row + g + 8][near]},
            {rows[row + g][far], rows[row + g + 8][far]}};
  }
};

// The three parts of the weights of 16 senders, from s on, and 8 receivers, from i on.
template <class P, class Weights>
SPARSIFY_INLINE void load_weights(float, RightTile (&to)[3], const Weights& weight, int s, int i,
                                  int senders, int width) {
  const int receiver = i + lane_of() / 4, first = s + 2 * (lane_of() % 4);
  const auto at = [&](int sender) {
    const bool here = Weights::PADDED || (sender < senders && receiver < width);
    return P(here ? weight(sender, receiver) : 0.0f);
  };
  const P near[2] = {at(first), at(first + 1)}, far[2] = {at(first + 8), at(first + 9)};
#pragma unroll
  for (int part = 0; part < 3; ++part) {
    to[part].near = pair_of(near[0].at[part], near[1].at[part]);
    to[part].far = pair_of(far[0].at[part], far[1].at[part]);
  }
}

// The same of halves.
template <class P, class W, class Weights>
SPARSIFY_INLINE void load_weights(W, RightTile (&to)[1], const Weights& weight, int s, int i,
                                  int senders, int width) {
  const int receiver = i + lane_of() / 4, first = s + 2 * (lane_of() % 4);
  const auto at = [&](int sender) {
    const bool here = Weights::PADDED || (sender < senders && receiver < width);
    return here ? weight.stored(sender, receiver) : W(0.0f);
  };
  to[0].near = pair_of_halves<W>(at(first), at(first + 1));
  to[0].far = pair_of_halves<W>(at(first + 8), at(first + 9));
}

// What a float32 weight is taken apart to, whose products are with values of so many parts.
template <int USED>
struct WeightParts {
  typedef Parts type;
};
template <>
struct WeightParts<1> {
  typedef CutParts type;
};

// What was added of each order, the smallest first.
SPARSIFY_INLINE float added(const SumTile (&sum)[3], int half, int next) {
  return sum[2].at[half][next] + sum[1].at[half][next] + sum[0].at[half][next];
}
SPARSIFY_INLINE float added(const SumTile (&sum)[2], int half, int next) {
  return sum[1].at[half][next] + sum[0].at[half][next];
}
SPARSIFY_INLINE float added(const SumTile (&sum)[1], int half, int next) {
  return sum[0].at[half][next];
}

// sums[row][block][i] = sum over the block's senders of value * weight, for the first `rows` rows,
// and for more of them to whole tiles. Each warp takes tiles of 16 rows and 8 receivers.
//
// Weights of float32 have three parts and values USED; products of parts p and q are added where
// p + q < 3. What is left out is less than 2^-23 of value * weight. Halves are one part, and nothing is
// left out. Where a value or a weight is infinite, so is the sum, or it is NaN.
template <class W, int USED, int ROWS, int PARTS, int BLOCKS, int SLICE, class Weights>
SPARSIFY_INLINE void add_tiles(float (&sums)[ROWS][BLOCKS][SLICE], const Weights& weight,
                               const TileValues<ROWS, PARTS>& values, int block, int senders,
                               int rows, int width) {
  constexpr int ORDERS = Element<W>::PARTS;
  constexpr int ACROSS = (SLICE + TILE_COLUMNS - 1) / TILE_COLUMNS;
  const int down = whole_tiles(rows) / TILE_ROWS;
  for (int item = warp_of(); item < ACROSS * down; item += warps_of()) {
    const int first_i = item % ACROSS * TILE_COLUMNS, row = item / ACROSS * TILE_ROWS;
    SumTile sum[ORDERS];  // none waits for another
#pragma unroll 2
    for (int k = 0; k < BLOCK && block * BLOCK + k < senders; k += TILE_DEPTH) {
      RightTile right[ORDERS];
      load_weights<typename WeightParts<USED>::type>(W(0.0f), right, weight, block * BLOCK + k,
                                                     first_i, senders, width);
#pragma unroll
      for (int order = 0; order < ORDERS; ++order)
#pragma unroll
        for (int part = 0; part < USED && part <= order; ++part)
          multiply_add<typename Element<W>::type>(sum[order], values.tile(part, row, k),
                                                  right[order - part]);
    }
    const int i = first_i + 2 * (lane_of() % 4);
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int next = 0; next < 2; ++next)
        if (i + next < SLICE)
          sums[row + lane_of() / 4 + 8 * half][block][i + next] = added(sum, half, next);
  }
}

}  // namespace sparsify
