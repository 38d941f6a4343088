// Rows of weights of which only those are kept that are not zero, and a bit for each that says whether
// it is: bit i of mask w is place 32 w + i of the row.
#pragma once

#include "device.cuh"

namespace sparsify {

// As masks[row][word] and kept[row][word][ROOM]: of every 32 places at most ROOM are kept.
// What is left out is +0: products with it, and their sums, are those of the whole row.
// A weight W is a float F in memory.
template <int PLACES, int ROOM, class F, class W = F>
struct MaskedRows {
  const uint32_t* masks;
  const W* kept;

  SPARSIFY_INLINE MaskedRows(const uint32_t* masks, const W* kept) : masks(masks), kept(kept) {}

  // The lanes of a warp ask for consecutive places: they read one mask, and kept weights side by side.
  SPARSIFY_INLINE F operator()(int row, int at) const {
    const int64_t word = int64_t(row) * words_of(PLACES) + at / WARP;
    const uint32_t mask = masks[word], bit = 1u << at % WARP;
    return mask & bit ? F(kept[word * ROOM + __popc(mask & (bit - 1))]) : F(0);
  }
};

}  // namespace sparsify
