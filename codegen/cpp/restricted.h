// Restricted products: sums for those receivers that a batch row wants. The way back from a neuron
// with a compact surrogate gradient reads no others. A sum is a product of two rows: the weights of
// a receiver and the values of a batch row.
#pragma once

#include "kernel.h"

namespace sparsify {

constexpr int SOURCE_BLOCK = 128;  // senders; their values of all rows stay in the first cache
constexpr int TOGETHER = 4;        // rows that read the weights of a receiver at once
constexpr int PARTS = 2;           // of each sum, to hide the latency of additions

// The values of at most 64 rows: those of a block of senders lie together, whatever the row.
template <class F>
struct Blocks {
  int64_t rows, senders;
  F* values;  // [blocks][rows][SOURCE_BLOCK], zero behind the last sender

  Blocks(Arena& arena, int64_t rows, int64_t population)
      : rows(rows),
        senders(population),
        values(arena.take<F>((population + SOURCE_BLOCK - 1) / SOURCE_BLOCK * rows * SOURCE_BLOCK)) {}

  // Where the block that begins with sender `first` has its values of `row`.
  F* at(int64_t row, int64_t first) const { return values + first * rows + row * SOURCE_BLOCK; }
};

// Sets `count` values of `row`; values[0] belongs to sender `first`. The last sender comes last.
template <class F, class Source>
SPARSIFY_INLINE void arrange(const Blocks<F>& to, int64_t row, const Source* values, int64_t first,
                             int64_t count) {
  for (int64_t done = 0; done < count;) {
    const int64_t inside = (first + done) % SOURCE_BLOCK, left = count - done;
    const int64_t some = left < SOURCE_BLOCK - inside ? left : SOURCE_BLOCK - inside;
    F* const place = to.at(row, first + done - inside);
    convert(place + inside, values + done, some);
    done += some;
    if (first + done == to.senders)
      for (int64_t i = inside + some; i < SOURCE_BLOCK; ++i) place[i] = F(0);
  }
}

// ---- wild values ----

// From here on a sum of products may overflow, however it is added up. Infinities and NaN are not
// below it either.
template <class F>
constexpr F WILD = sizeof(F) == 4 ? F(0x1p63) : F(0x1p511);

template <class F>
SPARSIFY_INLINE uint64_t is_wild(const F* values, int64_t count) {
  int wild = 0;
  for (int64_t i = 0; i < count; ++i) wild |= absolute(values[i]) < WILD<F> ? 0 : 1;
  return uint64_t(wild);
}

// Bit r is set if a value of row r is wild.
template <class F>
inline uint64_t wild_rows(const F* values, int64_t value_row, int64_t rows, int64_t senders) {
  uint64_t wild = 0;
  for (int64_t row = 0; row < rows; ++row) wild |= is_wild(values + row * value_row, senders) << row;
  return wild;
}
template <class F>
inline uint64_t wild_rows(const Blocks<F>& from, int64_t rows) {
  uint64_t wild = 0;
  for (int64_t s = 0; s < from.senders; s += SOURCE_BLOCK)
    for (int64_t row = 0; row < rows; ++row) wild |= is_wild(from.at(row, s), SOURCE_BLOCK) << row;
  return wild;
}

// ---- who wants what ----

// A tile of receivers, from `first` on, and which of them the rows want: those whose value is not
// zero, and wild rows want all.
template <class Mask>
struct Only {
  const Mask* values;  // [rows][receivers]
  int64_t row;         // distance of rows
  uint64_t wild;
  int64_t receivers, first;

  Only(const Mask* values, int64_t row, uint64_t wild, int64_t receivers, int64_t first)
      : values(values), row(row), wild(wild), receivers(receivers), first(first) {}
};

// Eight values as bits of a byte.
struct EightBits {
  uint8_t eight;
};
SPARSIFY_INLINE const EightBits* as_bits(const uint8_t* values) {
  return reinterpret_cast<const EightBits*>(values);
}

// wanted[i] gets the bit of `row` where values[i] is not zero, for neurons from `first` on.
template <class Mask>
SPARSIFY_INLINE void add_row(uint64_t* wanted, const Mask* values, int64_t first, int64_t width,
                             int64_t row) {
  const Mask* const from = values + first;
  for (int64_t i = 0; i < width; ++i) wanted[i] |= uint64_t(from[i] != Mask(0)) << row;
}
SPARSIFY_INLINE void add_row(uint64_t* wanted, const EightBits* values, int64_t first, int64_t width,
                             int64_t row) {
  for (int64_t at = 0; at < width; at += 64) {
    const int64_t left = width - at, count = left < 64 ? left : 64;
    const uint64_t bits = load_bits(&values[(first + at) / 8].eight, left);
    for (int64_t i = 0; i < count; ++i) wanted[at + i] |= (bits >> i & 1) << row;
  }
}

// Bit r of wanted[i] is set if row r wants the tile's receiver i.
template <int TILE, class Mask>
SPARSIFY_INLINE void find_wanted(uint64_t* wanted, const Only<Mask>& only, int64_t rows) {
  const int64_t left = only.receivers - only.first, width = left < TILE ? left : TILE;
  for (int64_t i = 0; i < TILE; ++i) wanted[i] = i < width ? only.wild : 0;
  for (int64_t row = 0; row < rows; ++row)
    add_row(wanted, only.values + row * only.row, only.first, width, row);
}

// ---- sums ----

typedef float Float4 __attribute__((vector_size(16)));
typedef double Double2 __attribute__((vector_size(16)));
SPARSIFY_INLINE float total(Float4 a) { return (a[0] + a[2]) + (a[1] + a[3]); }
SPARSIFY_INLINE double total(Double2 a) { return a[0] + a[1]; }
#if defined(__AVX__)
SPARSIFY_INLINE float total(Float8 a) {
  Float4 half[2];
  std::memcpy(half, &a, sizeof a);
  return total(half[0] + half[1]);
}
SPARSIFY_INLINE double total(Double4 a) {
  Double2 half[2];
  std::memcpy(half, &a, sizeof a);
  return total(half[0] + half[1]);
}
#endif
#if defined(__AVX512F__)
SPARSIFY_INLINE float total(Vector<float> a) {
  Float8 half[2];
  std::memcpy(half, &a, sizeof a);
  return total(half[0] + half[1]);
}
SPARSIFY_INLINE double total(Vector<double> a) {
  Double4 half[2];
  std::memcpy(half, &a, sizeof a);
  return total(half[0] + half[1]);
}
#endif

// Adds to ROWS sums what a block of senders contributes: those of the rows that are the lowest bits
// of `wanted`. Returns the other bits. How a sum is added up does not depend on ROWS.
template <int TILE, int ROWS, class F, class W>
SPARSIFY_INLINE uint64_t add_rows(F* sums, const W* weight, const F* block, uint64_t wanted,
                                  int vectors) {
  const F* from[ROWS];
  F* to[ROWS];
  SPARSIFY_UNROLL
  for (int r = 0; r < ROWS; ++r) {
    const int row = __builtin_ctzll(wanted);
    wanted &= wanted - 1;
    from[r] = block + row * SOURCE_BLOCK;
    to[r] = sums + row * TILE;
  }
  Vector<F> sum[PARTS][ROWS] = {};
  for (int v = 0; v < vectors; v += PARTS) {
    SPARSIFY_UNROLL
    for (int p = 0; p < PARTS; ++p) {
      const int64_t at = (v + p) * WIDTH<F>;
      const Vector<F> weights = load(weight + at);
      SPARSIFY_UNROLL
      for (int r = 0; r < ROWS; ++r) sum[p][r] = fused(weights, load(from[r] + at), sum[p][r]);
    }
  }
  SPARSIFY_UNROLL
  for (int r = 0; r < ROWS; ++r) {
    SPARSIFY_UNROLL
    for (int p = 1; p < PARTS; ++p) sum[0][r] += sum[p][r];
    *to[r] += total(sum[0][r]);
  }
  return wanted;
}

template <int TILE, class F, class W>
SPARSIFY_INLINE void add_receiver(F* sums, const W* weight, const F* block, uint64_t wanted,
                                  int vectors) {
  int left = __builtin_popcountll(wanted);
  for (; left >= TOGETHER; left -= TOGETHER)
    wanted = add_rows<TILE, TOGETHER>(sums, weight, block, wanted, vectors);
  if (left == 3) add_rows<TILE, 3>(sums, weight, block, wanted, vectors);
  if (left == 2) add_rows<TILE, 2>(sums, weight, block, wanted, vectors);
  if (left == 1) add_rows<TILE, 1>(sums, weight, block, wanted, vectors);
}

// sums[row][i] = sum over all senders of value[row][s] * weight[first + i][s] for a tile of receivers
// where the row wants it, else 0. Returns how many sums were wanted.
//
// `line(s, r)` has the weights of receiver r for the block of senders that begins with s, zero behind
// the last sender. The order of additions is free and products are fused: compared by a bound, not by
// bits. It is the same whoever else wants a receiver, so that other batch sizes and threads give the
// same bits.
template <int TILE, class F, class Mask, class LineOf>
SPARSIFY_INLINE int64_t sum_wanted(F* sums, const LineOf& line, const Blocks<F>& from,
                                   const Only<Mask>& only, int64_t rows) {
  constexpr int VECTORS = SOURCE_BLOCK / WIDTH<F>;
  uint64_t wanted[TILE];
  find_wanted<TILE>(wanted, only, rows);
  for (int64_t i = 0; i < rows * TILE; ++i) sums[i] = F(0);
  for (int64_t s = 0; s < from.senders; s += SOURCE_BLOCK) {
    const F* const block = from.at(0, s);
    const int64_t left = from.senders - s;
    const int vectors = left < SOURCE_BLOCK ? int((left + WIDTH<F> - 1) / WIDTH<F>) : VECTORS;
    for (int i = 0; i < TILE; ++i) {
      if (!wanted[i]) continue;
      const auto weights = line(s, only.first + i);
      if (vectors == VECTORS)  // a constant
        add_receiver<TILE>(sums + i, weights, block, wanted[i], VECTORS);
      else
        add_receiver<TILE>(sums + i, weights, block, wanted[i], vectors);
    }
  }
  int64_t count = 0;
  for (int i = 0; i < TILE; ++i) count += __builtin_popcountll(wanted[i]);
  return count;
}

// The same with weights that are packed as [block of senders][receiver][SOURCE_BLOCK].
template <int TILE, class F, class W, class Mask>
inline int64_t gather_restricted(F* sums, const W* weight, const Blocks<F>& from,
                                 const Only<Mask>& only, int64_t rows) {
  const auto line = [&](int64_t s, int64_t receiver) {
    return weight + s * only.receivers + receiver * SOURCE_BLOCK;
  };
  return sum_wanted<TILE>(sums, line, from, only, rows);
}

// wanted[i] is 1 where values[i] is not zero, for neurons from `first` on; 0 elsewhere.
template <class Mask>
SPARSIFY_INLINE void spread_row(uint8_t* wanted, const Mask* values, int64_t first, int64_t width) {
  for (int64_t i = 0; i < width; ++i) wanted[i] = values[first + i] != Mask(0);
}
SPARSIFY_INLINE void spread_row(uint8_t* wanted, const EightBits* values, int64_t first,
                                int64_t width) {
  spread(wanted, &values[first / 8].eight, width);
}

// Clears those of all sums of a tile that nobody wants; returns how many were wanted.
template <int TILE, class F, class Mask>
inline int64_t keep_wanted(F* sums, const Only<Mask>& only, int64_t rows) {
  const int64_t left = only.receivers - only.first, width = left < TILE ? left : TILE;
  int64_t count = 0;
  for (int64_t row = 0; row < rows; ++row, sums += TILE) {
    alignas(64) uint8_t wanted[TILE] = {};
    if (only.wild >> row & 1)
      std::memset(wanted, 1, width);
    else
      spread_row(wanted, only.values + row * only.row, only.first, width);
    int32_t found = 0;
    for (int i = 0; i < TILE; ++i) found += wanted[i];
    for (int i = 0; i < TILE; ++i) sums[i] = wanted[i] ? sums[i] : F(0);
    count += found;
  }
  return count;
}

}  // namespace sparsify
