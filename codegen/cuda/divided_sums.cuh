// Dense sums on tensor cores where the senders are divided among blocks, too. A block has the weights of
// some senders for the receivers of several blocks, which it tells what these senders give them; each then
// adds up what it has been told.
#pragma once

#include "tile_sums.cuh"

namespace sparsify {

// Blocks of 256 senders are dealt out to DEALT blocks of threads in turn.

// Rows of a block of senders in shared memory, of which there are whole tiles.
template <int COLUMNS, class F, class W>
struct PaddedRows : Resident<COLUMNS, F, W> {
  static constexpr bool PADDED = true;
};

// In shared memory: the rows of the blocks of senders that are its own, as [sender][COLUMNS]. What is behind
// the last sender, to the end of its tile, and behind the last receiver is 0.
template <int COLUMNS, int DEALT, class F, class W = F>
struct Dealt {
  const W* weights;

  SPARSIFY_INLINE PaddedRows<COLUMNS, F, W> of_block(int block) const {
    return {weights + block / DEALT * BLOCK * COLUMNS};
  }
};
template <int ROW, class F, class W>
SPARSIFY_INLINE Streamed<ROW, F, W> of_block(const Streamed<ROW, F, W>& weight, int block) {
  return {weight.weights + int64_t(block) * BLOCK * ROW};
}
template <int COLUMNS, int DEALT, class F, class W>
SPARSIFY_INLINE PaddedRows<COLUMNS, F, W> of_block(const Dealt<COLUMNS, DEALT, F, W>& weight, int block) {
  return weight.of_block(block);
}

// Copies `width` columns of the blocks of senders `own`, own + DEALT and so on to shared memory.
template <int COLUMNS, int ROW, int DEALT, class W>
SPARSIFY_INLINE void keep_dealt(W* to, const W* weights, int senders, int own, int width) {
  const int tiled = (senders + TILE_DEPTH - 1) / TILE_DEPTH * TILE_DEPTH;
  for (int block = own; block * BLOCK < senders; block += DEALT) {
    const int first = block * BLOCK, rest = tiled - first;
    W* const here = to + block / DEALT * BLOCK * COLUMNS;
    for (int at = int(threadIdx.x); at < (rest < BLOCK ? rest : BLOCK) * COLUMNS; at += int(blockDim.x)) {
      const int s = first + at / COLUMNS, i = at % COLUMNS;
      here[at] = s < senders && i < width ? read_only(weights + int64_t(s) * ROW + i) : W(0);
    }
  }
}

// Tells sums[row][block][first + i] = sum over the block's senders of value * weight, for `width` receivers
// and the rows from `row` to rows - 1 of which `values` holds the first SOME. As add_tiles; but a warp takes
// all of these rows at once, so that it takes weights apart once.
template <class Team, class W, int USED, int COLUMNS, int SOME, int PARTS, int ROWS, int BLOCKS, int NEURONS,
          class Weights>
SPARSIFY_INLINE void tell_tiles(float (&sums)[ROWS][BLOCKS][NEURONS], const Weights& weight,
                                const TileValues<SOME, PARTS>& values, int block, int senders, int row,
                                int rows, int first, int width) {
  // Products of the largest parts are added apart from the others, which are at most 2^-7 of them.
  constexpr int ORDERS = Element<W>::PARTS, SUMS = ORDERS < 2 ? 1 : 2, DOWN = SOME / TILE_ROWS;
  const auto own = of_block(weight, block);
  const int many = senders - block * BLOCK < BLOCK ? senders - block * BLOCK : BLOCK;
#pragma unroll 1
  for (int from = warp_of() * TILE_COLUMNS; from < COLUMNS && from < width;
       from += warps_of() * TILE_COLUMNS) {
    SumTile sum[DOWN][SUMS];
#pragma unroll 1
    for (int k = 0; k < many; k += TILE_DEPTH) {
      RightTile right[ORDERS];
      load_weights<typename WeightParts<USED>::type>(W(0.0f), right, own, k, from, many, width);
#pragma unroll
      for (int down = 0; down < DOWN; ++down) {
        __syncwarp();  // values are loaded where they are used: there are no registers for more
#pragma unroll
        for (int part = 0; part < USED; ++part) {
          const LeftTile left = values.tile(part, down * TILE_ROWS, k);
#pragma unroll
          for (int order = part; order < ORDERS; ++order)
            multiply_add<typename Element<W>::type>(sum[down][order < SUMS ? order : SUMS - 1], left,
                                                    right[order - part]);
        }
      }
    }
    const int i = from + 2 * (lane_of() % 4), low = row + lane_of() / 4;
    float* const to = &sums[0][block][0] + int64_t(low) * BLOCKS * NEURONS + first + i;
#pragma unroll
    for (int down = 0; down < DOWN; ++down)
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int next = 0; next < 2; ++next) {
          constexpr int APART = BLOCKS * NEURONS;
          const int later = down * TILE_ROWS + 8 * half;
          if (low + later < rows && i + next < width)
            Team::publish(to + later * APART + next, added(sum[down], half, next));
        }
  }
}

// The sum of receiver n over all blocks of senders, ascending, from +0, as add_blocks, of what was told.
template <class Team, int BLOCKS, int NEURONS>
SPARSIFY_INLINE float add_told(const float (&sums)[BLOCKS][NEURONS], int n) {
  float part[BLOCKS], sum = 0.0f;  // all are asked for at once
#pragma unroll
  for (int block = 0; block < BLOCKS; ++block) part[block] = Team::fetch(&sums[block][n]);
#pragma unroll
  for (int block = 0; block < BLOCKS; ++block) sum = sum + part[block];
  return sum;
}

// Whether any of the flags that were told is set.
template <class Team, int BLOCKS>
SPARSIFY_INLINE bool any_told(const uint32_t (&flags)[BLOCKS]) {
  uint32_t any = 0;
#pragma unroll
  for (int block = 0; block < BLOCKS; ++block) any |= Team::fetch(&flags[block]);
  return any != 0;
}

}  // namespace sparsify
