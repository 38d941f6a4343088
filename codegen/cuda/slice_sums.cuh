// Sums over senders for the slice of receivers that a block owns. A warp takes one batch row and one
// block of 256 senders at a time; each of its lanes adds up every 32nd receiver.
#pragma once

#include "exchange.cuh"
#include "gather.cuh"

namespace sparsify {

// ---- weights: from a sender and a receiver of the slice to the weight ----

// A weight W is a float F in memory.

// In shared memory, as [sender][SLICE], which groups of lanes read.
template <int SLICE, class F, class W = F>
struct Resident {
  typedef W Stored;
  static constexpr int GROUPED = SLICE;
  static constexpr bool PADDED = false;  // whether there are whole tiles, see tile_sums.cuh
  const W* weights;

  SPARSIFY_INLINE W stored(int s, int i) const { return weights[s * SLICE + i]; }
  SPARSIFY_INLINE F operator()(int s, int i) const { return stored(s, i); }
};

// In shared memory: the first MAIN columns as [sender][MAIN], behind them the others likewise.
template <int COLUMNS, int MAIN, int SENDERS, class F, class W = F>
struct Parted {
  typedef W Stored;
  static constexpr int GROUPED = MAIN;
  W* weights;

  static SPARSIFY_INLINE int place(int s, int i) {
    return i < MAIN ? s * MAIN + i : SENDERS * MAIN + s * (COLUMNS - MAIN) + i - MAIN;
  }
  SPARSIFY_INLINE W stored(int s, int i) const { return weights[place(s, i)]; }
  SPARSIFY_INLINE F operator()(int s, int i) const { return stored(s, i); }
};

// In global memory, as [sender][ROW]; `weights` points to the first receiver of the slice.
template <int ROW, class F, class W = F>
struct Streamed {
  static constexpr bool PADDED = false;
  const W* weights;

  SPARSIFY_INLINE W stored(int s, int i) const {
    return read_only(weights + int64_t(s) * ROW + i);
  }
  SPARSIFY_INLINE F operator()(int s, int i) const { return stored(s, i); }
};

// Copies the `width` columns of a slice to shared memory, where rows are APART.
template <int SLICE, int ROW, int APART = SLICE, class W>
SPARSIFY_INLINE void keep_columns(W* to, const W* weights, int senders, int width) {
  for (int at = int(threadIdx.x); at < senders * SLICE; at += int(blockDim.x)) {
    const int s = at / SLICE, i = at % SLICE;
    to[s * APART + i] = i < width ? read_only(weights + int64_t(s) * ROW + i) : W(0);
  }
}

// Copies the `width` columns of a slice to those of parted columns from `first` on.
template <int SLICE, int ROW, int COLUMNS, int MAIN, int SENDERS, class F, class W>
SPARSIFY_INLINE void keep_parted(const Parted<COLUMNS, MAIN, SENDERS, F, W>& to, int first,
                                 const W* weights, int width) {
  for (int at = int(threadIdx.x); at < SENDERS * SLICE; at += int(blockDim.x)) {
    const int s = at / SLICE, i = at % SLICE;
    to.weights[to.place(s, first + i)] = i < width ? read_only(weights + int64_t(s) * ROW + i) : W(0);
  }
}

// Clears the columns in which nobody has weights, behind the first COLUMNS of a row.
template <int COLUMNS, int APART, class W>
SPARSIFY_INLINE void fill_columns(W* to, int senders) {
  constexpr int MORE = APART - COLUMNS;
  for (int at = int(threadIdx.x); at < senders * MORE; at += int(blockDim.x))
    to[at / MORE * APART + COLUMNS + at % MORE] = W(0);
}

// Copies `count` weights of whole rows to shared memory.
template <class W>
SPARSIFY_INLINE void keep_rows(W* to, const W* weights, int count) {
  for (int at = int(threadIdx.x); at < count; at += int(blockDim.x))
    to[at] = read_only(weights + at);
}

// ---- sums over a block of senders ----

// Receivers that a lane adds up at once: three where that is all of them; more would not fit the 128
// registers of 512 threads.
template <int SLICE>
constexpr int MINE = words_of(SLICE) == 3 ? 3 : words_of(SLICE) < 2 ? 1 : 2;

// One of the products that are taken of the same events: where its sums go, and its weights.
template <int SLICE, class F, class Weights>
struct Product {
  F* sums;
  Weights weight;
  F sum[MINE<SLICE>], weights[AT_ONCE][MINE<SLICE>];

  SPARSIFY_INLINE void start() {
#pragma unroll
    for (int m = 0; m < MINE<SLICE>; ++m) sum[m] = F(0);
  }
  SPARSIFY_INLINE void load(int j, int s, const int (&receiver)[MINE<SLICE>]) {
#pragma unroll
    for (int m = 0; m < MINE<SLICE>; ++m) weights[j][m] = weight(s, receiver[m]);
  }
  SPARSIFY_INLINE void clear(int j) {
#pragma unroll
    for (int m = 0; m < MINE<SLICE>; ++m) weights[j][m] = F(0);
  }
  SPARSIFY_INLINE void add(int j) {
#pragma unroll
    for (int m = 0; m < MINE<SLICE>; ++m) sum[m] = sum[m] + weights[j][m];
  }
  SPARSIFY_INLINE void add(int j, F payload) {
#pragma unroll
    for (int m = 0; m < MINE<SLICE>; ++m) sum[m] = fused(weights[j][m], payload, sum[m]);
  }
  SPARSIFY_INLINE void store(int first, int width) {
#pragma unroll
    for (int m = 0; m < MINE<SLICE>; ++m) {
      const int i = first + m * WARP + lane_of();
      if (i < width) sums[i] = sum[m];
    }
  }
};

template <int SLICE, class F, class Weights>
SPARSIFY_INLINE Product<SLICE, F, Weights> product_of(F* sums, const Weights& weight) {
  return {sums, weight};
}

// sums[i] = sum over the events of payload * weight, ascending, from +0, as gather_events: of all
// `products`, whose weights are finite.
//
// What began at +0 never becomes -0: adding a zero for an event that is missing changes nothing.
// Receivers behind the last one stand for it; they are added up and not stored.
template <int SLICE, class F, bool HAS_PAYLOADS, class... Products>
SPARSIFY_INLINE void add_events(const BlockEvents<F, HAS_PAYLOADS>& events, int count, int block,
                                int width, Products... products) {
  for (int first = 0; first < width; first += MINE<SLICE> * WARP) {
    int receiver[MINE<SLICE>];
#pragma unroll
    for (int m = 0; m < MINE<SLICE>; ++m) {
      const int i = first + m * WARP + lane_of();
      receiver[m] = i < width ? i : width - 1;
    }
    (products.start(), ...);
    for (int k = 0; k < count; k += AT_ONCE) {
      const uint32_t index = events.index[k / AT_ONCE];
#pragma unroll
      for (int j = 0; j < AT_ONCE; ++j)
        (products.load(j, block * BLOCK + int(index >> 8 * j & 255), receiver), ...);
      if constexpr (HAS_PAYLOADS) {
        const Payloads<F> payload = events.payload[k / AT_ONCE];
#pragma unroll
        for (int j = 0; j < AT_ONCE; ++j) (products.add(j, payload.of[j]), ...);
      } else {
#pragma unroll
        for (int j = 1; j < AT_ONCE; ++j)
          if (k + j >= count) (products.clear(j), ...);
#pragma unroll
        for (int j = 0; j < AT_ONCE; ++j) (products.add(j), ...);
      }
    }
    (products.store(first, width), ...);
  }
}

// sums[i] = sum over all senders of the block of value * weight, each added with one rounding.
template <int SLICE, class F, class Source, class Weights>
SPARSIFY_INLINE void add_all(F* sums, const Weights& weight, const Heard<Source>& heard, int block,
                             int senders, int width) {
  for (int some = 0; some < width; some += MINE<SLICE> * WARP) {
    F sum[MINE<SLICE>] = {};
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
      const int first = block * BLOCK + chunk * WARP;
      const F mine = cast<F>(heard.value[chunk]);
#pragma unroll 4
      for (int j = 0; j < WARP && first + j < senders; ++j) {
        const F value = __shfl_sync(ALL, mine, j);
#pragma unroll
        for (int m = 0; m < MINE<SLICE>; ++m) {
          const int i = some + m * WARP + lane_of();
          if (i < width) sum[m] = fused(weight(first + j, i), value, sum[m]);
        }
      }
    }
#pragma unroll
    for (int m = 0; m < MINE<SLICE>; ++m) {
      const int i = some + m * WARP + lane_of();
      if (i < width) sums[i] = sum[m];
    }
  }
}

// The sum of receiver i over all blocks of senders, ascending, from +0.
template <int BLOCKS, int SLICE, class F>
SPARSIFY_INLINE F add_blocks(const F (&sums)[BLOCKS][SLICE], int i) {
  F sum = F(0);
#pragma unroll
  for (int block = 0; block < BLOCKS; ++block) sum = sum + sums[block][i];
  return sum;
}

// ---- restricted sums ----

// Whether a value of the block is wild: all lanes are told.
template <class F, class Source>
SPARSIFY_INLINE bool is_wild(const Heard<Source>& heard) {
  bool wild = false;
#pragma unroll
  for (int chunk = 0; chunk < CHUNKS; ++chunk)
    wild |= !(absolute(cast<F>(heard.value[chunk])) < wild_from<F>());
  return __any_sync(ALL, wild);
}

template <int BLOCKS>
SPARSIFY_INLINE bool any_of(const bool (&flags)[BLOCKS]) {
  bool any = false;
#pragma unroll
  for (int block = 0; block < BLOCKS; ++block) any |= flags[block];
  return any;
}

// Keeps the values of a block of senders in shared memory.
template <class F, class Source>
SPARSIFY_INLINE void keep_values(F* to, const Heard<Source>& heard, int block, int senders) {
#pragma unroll
  for (int chunk = 0; chunk < CHUNKS; ++chunk) {
    const int s = block * BLOCK + chunk * WARP + lane_of();
    if (s < senders) to[s] = cast<F>(heard.value[chunk]);
  }
}

}  // namespace sparsify
