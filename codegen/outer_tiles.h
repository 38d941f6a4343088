// Tiles of receivers of the gradient of a weight: copied, summed and written.
#pragma once

#include "outer_lists.h"
#include "square.h"

namespace sparsify {

// A tile of a block is 64 KiB with vectors of 32 bytes. Larger ones were slower from 5 % activity
// on: more of the lines that a sender needs are still in the first cache from the one before.
constexpr int TILE_VECTORS = 4;  // sums of a sender that are kept in registers

// Copies receivers [column, column + count) of some rows to [rows][VECTORS], zero padded. Returns
// whether all of them are finite.
template <int VECTORS, class F>
bool copy_tile(F* to, const Matrix<F>& d, int64_t first, int64_t rows, int64_t column,
               int64_t count) {
  constexpr int64_t TILE = VECTORS * WIDTH<F>;
  Vector<F> others{};  // the difference of a value that is not finite from itself is NaN
  for (int64_t row = 0; row < rows; ++row, to += TILE) {
    const F* from = d[first + row] + column;
    F padded[TILE];
    if (count < TILE) {
      for (int64_t i = 0; i < TILE; ++i) padded[i] = i < count ? from[i] : F(0);
      from = padded;
    }
    SPARSIFY_UNROLL
    for (int v = 0; v < VECTORS; ++v) {
      const Vector<F> values = load(from + v * WIDTH<F>);
      others += values - values;
      store(to + v * WIDTH<F>, values);
    }
  }
  F sum = 0;
  for (int i = 0; i < WIDTH<F>; ++i) sum += others[i];
  return sum == F(0);
}

// sums[i] = or += the sum over a sender's active rows of payload * tile[row][i].
template <int VECTORS, class F>
SPARSIFY_INLINE void add_rows(F* sums, const F* tile, const Lists<F>& lists, const Run& run,
                              bool starts) {
  if (run.count == 0 && !starts) return;
  constexpr int64_t TILE = VECTORS * WIDTH<F>;
  const uint16_t* const row = lists.row + run.start;
  const F* const payload = lists.payload + run.start;
  Vector<F> sum[VECTORS] = {};
  if (run.has_payload) {
    for (int32_t k = 0; k < run.count; ++k) {
      const F* const from = tile + row[k] * TILE;
      SPARSIFY_UNROLL
      for (int v = 0; v < VECTORS; ++v) sum[v] += load(from + v * WIDTH<F>) * payload[k];
    }
  } else {
    for (int32_t k = 0; k < run.count; ++k) {
      const F* const from = tile + row[k] * TILE;
      SPARSIFY_UNROLL
      for (int v = 0; v < VECTORS; ++v) sum[v] += load(from + v * WIDTH<F>);
    }
  }
  SPARSIFY_UNROLL
  for (int v = 0; v < VECTORS; ++v) {
    F* const at = sums + v * WIDTH<F>;
    store(at, starts ? sum[v] : load(at) + sum[v]);
  }
}

template <int BYTES>
struct WordOf;
template <>
struct WordOf<4> {
  typedef uint32_t type;
};
template <>
struct WordOf<8> {
  typedef uint64_t type;
};

// sums[senders][width] -> out[receivers][senders], or added to it.
template <bool ADDS, class F>
void write_transposed(F* out, const F* sums, int64_t width, int64_t receivers, int64_t senders,
                      const Share& own) {
  using Word = typename WordOf<sizeof(F)>::type;
  using Row = typename RowOf<Word>::anywhere;
  typedef F Values __attribute__((vector_size(sizeof(Row))));
  typedef F ValuesAnywhere __attribute__((vector_size(sizeof(Row)), may_alias, aligned(sizeof(F))));
  constexpr int64_t n = Square<Word>::n, LINE = 64 / sizeof(F);
  const int64_t square_receivers = receivers / n * n;
  const int64_t square_senders = own.begin + (own.end - own.begin) / n * n;
  for (int64_t line = own.begin; line < square_senders; line += LINE) {
    const int64_t end = line + LINE < square_senders ? line + LINE : square_senders;
    for (int64_t r = 0; r < square_receivers; r += n) {
      for (int64_t s = line; s < end; s += n) {  // innermost: a line of `out` is written at once
        Square<Word> square;
        for (int64_t i = 0; i < n; ++i)
          square.rows[i] = *reinterpret_cast<const Row*>(sums + (s + i) * width + r);
        square.transpose();
        for (int64_t i = 0; i < n; ++i) {
          F* const to = out + (r + i) * senders + s;
          Values values = (Values)square.rows[i];
          if (ADDS) values = *reinterpret_cast<const ValuesAnywhere*>(to) + values;
          *reinterpret_cast<ValuesAnywhere*>(to) = values;
        }
      }
    }
  }
  for (int64_t s = own.begin; s < own.end; ++s) {
    for (int64_t r = s < square_senders ? square_receivers : 0; r < receivers; ++r) {
      F* const to = out + r * senders + s;
      *to = ADDS ? *to + sums[s * width + r] : sums[s * width + r];
    }
  }
}

// How receivers are divided into tiles.
template <class F>
struct Tiles {
  static constexpr int64_t TILE = TILE_VECTORS * WIDTH<F>;
  int64_t receivers;

  int64_t count() const { return (receivers + TILE - 1) / TILE; }
  int64_t columns(int64_t tile) const {
    return receivers - tile * TILE < TILE ? receivers - tile * TILE : TILE;
  }
  // The vectors of a tile: a power of two, because each number of vectors is code of its own.
  int vectors(int64_t tile) const {
    int vectors = TILE_VECTORS;
    while (vectors > 1 && columns(tile) <= vectors / 2 * WIDTH<F>) vectors /= 2;
    return vectors;
  }
};

}  // namespace sparsify
