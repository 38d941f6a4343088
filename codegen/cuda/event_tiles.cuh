// Sums over the events of flagged mail for the slice of receivers that a block owns, on tensor cores: 16
// receivers, 16 senders and 8 batch rows at a time. Weights stay where they are from step to step, most of
// them in registers. Events are put where their sender is in a tile of all senders; all else in it is 0.
#pragma once

#include "flagged_mail.cuh"
#include "mma.cuh"

namespace sparsify {

constexpr int EVENT_ROWS = TILE_COLUMNS;  // of the batch, that are multiplied at once

// The order of senders in a tile is the same for weights and events, and so it may be any: lane 4 g + t has
// senders 4t .. 4t + 3 of 16, which it reads at once.
constexpr int OF_LANE = 4;

// What senders have sent in some rows, as halves E.
template <class E, int SENDERS>
struct EventTile {
  static constexpr int DEPTH = (SENDERS + TILE_DEPTH - 1) / TILE_DEPTH;
  static constexpr int WORDS = DEPTH * TILE_DEPTH / 2;
  // Words between two rows: four rows of which half a warp reads lie in different banks.
  static constexpr int APART = WORDS + (WORDS % 16 == 8 ? 0 : 8);
  alignas(16) uint32_t at[EVENT_ROWS][APART];

  // All of it, by some warps.
  template <class By>
  SPARSIFY_INLINE void clear() {
    uint4* const to = reinterpret_cast<uint4*>(&at[0][0]);
#pragma unroll 4
    for (int i = By::thread(); i < EVENT_ROWS * APART / 4; i += By::COUNT * WARP)
      to[i] = make_uint4(0, 0, 0, 0);
  }
  SPARSIFY_INLINE void set(int row, int sender, uint16_t bits) {
    reinterpret_cast<uint16_t*>(at[row])[sender] = bits;
  }
  // 16 senders, of which this is number `deep`, and all rows.
  SPARSIFY_INLINE RightTile tile(int deep) const {
    const int word = deep * TILE_DEPTH / 2 + lane_of() % 4 * (OF_LANE / 2);
    return *reinterpret_cast<const RightTile*>(&at[lane_of() / 4][word]);
  }
};

// One of two tiles; where it begins is found once.
template <class Tile>
SPARSIFY_INLINE Tile& one_of(Tile (&tiles)[2], uint32_t which) {
  return *reinterpret_cast<Tile*>(reinterpret_cast<char*>(tiles) +
                                  hidden_multiple(int(which % 2 * sizeof(Tile))));
}

// The weights of COLUMNS receivers that a warp multiplies: of every WARPS-th tile of 16 senders. The first
// IN_REGISTERS of them stay there, the others in shared memory, where only the lane looks that needs them.
template <class E, int SENDERS, int COLUMNS, int WARPS, int IN_REGISTERS>
struct OwnWeights {
  static constexpr int DEPTH = EventTile<E, SENDERS>::DEPTH;
  static constexpr int TURNS = (DEPTH + WARPS - 1) / WARPS, MORE = TURNS - IN_REGISTERS;
  static constexpr int DOWN = (COLUMNS + TILE_ROWS - 1) / TILE_ROWS;
  LeftTile at[IN_REGISTERS][DOWN];
  LeftTile (*more)[DOWN][WARPS * WARP];

  static SPARSIFY_INLINE int deep(int turn) { return turn * WARPS + warp_of(); }
  SPARSIFY_INLINE LeftTile tile(int turn, int down) const {
    return turn < IN_REGISTERS ? at[turn][down] : more[turn - IN_REGISTERS][down][threadIdx.x];
  }

  // `column(i)` points to the weight of a column's first sender, or is null. Those of others are APART.
  template <int APART, class Column>
  SPARSIFY_INLINE void load(const Column& column, LeftTile (*shared)[DOWN][WARPS * WARP] = nullptr) {
    more = shared;
#pragma unroll
    for (int down = 0; down < DOWN; ++down) {
      const E* const from[2] = {column(down * TILE_ROWS + lane_of() / 4),
                                column(down * TILE_ROWS + TILE_ROWS / 2 + lane_of() / 4)};
#pragma unroll
      for (int turn = 0; turn < TURNS; ++turn) {
        __syncwarp();  // or the compiler would ask for all of them before it packs the first
        const LeftTile tile = read<APART>(from, deep(turn) * TILE_DEPTH + lane_of() % 4 * OF_LANE);
        if (turn < IN_REGISTERS)
          at[turn][down] = tile;
        else
          more[turn - IN_REGISTERS][down][threadIdx.x] = tile;
      }
    }
  }

 private:
  // Of two receivers, and the senders of a lane from s on.
  template <int APART>
  static SPARSIFY_INLINE LeftTile read(const E* const (&from)[2], int s) {
    const auto pair = [&](const E* weights, int first) {
      const auto at = [&](int sender) {
        E weight(0.0f);
        if (weights && sender < SENDERS)
          weight.bits = *static_cast<const volatile uint16_t*>(&weights[int64_t(sender) * APART].bits);
        return weight;
      };
      return pair_of_halves<E>(at(first), at(first + 1));
    };
    return {{pair(from[0], s), pair(from[1], s)}, {pair(from[0], s + 2), pair(from[1], s + 2)}};
  }
};

// What each of WARPS has added up, of rows from the first one of a tile on and COLUMNS receivers.
template <int WARPS, int COLUMNS>
struct WarpSums {
  static constexpr int DOWN = (COLUMNS + TILE_ROWS - 1) / TILE_ROWS;
  static constexpr int APART = DOWN * TILE_ROWS + 4;  // lanes of a warp write to different banks
  float at[WARPS][EVENT_ROWS][APART];

  // All of them, always in the same order.
  SPARSIFY_INLINE float total(int row, int column) const {
    float sum = at[0][row][column];
#pragma unroll
    for (int warp = 1; warp < WARPS; ++warp) sum += at[warp][row][column];
    return sum;
  }
};

// Adds up all that a tile has. Products of halves are exact; a warp adds those of its senders, in float32,
// 16 at once, of which tensor cores may cut off bits behind the 24 of the largest. Where a value or a
// weight is infinite, so is the sum, or it is NaN.
template <class E, int SENDERS, int COLUMNS, int WARPS, int IN_REGISTERS>
SPARSIFY_INLINE void add_event_tile(
    WarpSums<WARPS, COLUMNS>& to,
    const OwnWeights<E, SENDERS, COLUMNS, WARPS, IN_REGISTERS>& weights,
    const EventTile<E, SENDERS>& events) {
  typedef OwnWeights<E, SENDERS, COLUMNS, WARPS, IN_REGISTERS> Own;
  SumTile sum[Own::DOWN];
#pragma unroll
  for (int turn = 0; turn < Own::TURNS; ++turn) {
    if (Own::deep(turn) >= Own::DEPTH) break;
    const RightTile right = events.tile(Own::deep(turn));
#pragma unroll
    for (int down = 0; down < Own::DOWN; ++down)
      multiply_add<E>(sum[down], weights.tile(turn, down), right);
  }
  float(&own)[EVENT_ROWS][WarpSums<WARPS, COLUMNS>::APART] = to.at[warp_of()];
#pragma unroll
  for (int down = 0; down < Own::DOWN; ++down)
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int next = 0; next < 2; ++next)
        own[lane_of() % 4 * 2 + next][down * TILE_ROWS + half * (TILE_ROWS / 2) + lane_of() / 4] =
            sum[down].at[half][next];
}

}  // namespace sparsify
