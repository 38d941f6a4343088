// Tiles of receivers of the gradient of a weight: copied, summed and written.
#pragma once

#include "outer_lists.h"
#include "square.h"

namespace sparsify {

// Sums of a sender that are kept in registers: a tile of a block of rows is 64 KiB. In larger ones
// fewer of the lines that a sender needs are still in the first cache from the one before.
constexpr int TILE_VECTORS = VECTOR_BYTES == 64 ? 2 : 4;

// Whether all of some values are finite.
template <class F>
SPARSIFY_INLINE bool is_finite(const F* values, int64_t count) {
  F others = 0;  // the difference of a value that is not finite from itself is NaN
  int64_t i = 0;
  Vector<F> sums{};
  for (; i + WIDTH<F> <= count; i += WIDTH<F>) sums += load(values + i) - load(values + i);
  for (; i < count; ++i) others += values[i] - values[i];
  for (int lane = 0; lane < WIDTH<F>; ++lane) others += sums[lane];
  return others == F(0);
}

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
  Vector<F> sum[VECTORS] = {};
  if (run.has_payload) {
    const F* const payload = lists.payload + run.start;
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

// sums[senders][width] = out[receivers][senders], or the other way round.
template <bool READS, class F>
void move_transposed(F* out, F* sums, int64_t width, int64_t receivers, int64_t senders,
                     const Share& own) {
  using Word = typename WordOf<sizeof(F)>::type;
  using Row = typename RowOf<Word>::anywhere;
  constexpr int64_t n = Square<Word>::n, LINE = 64 / sizeof(F);
  const int64_t square_receivers = receivers / n * n;
  const int64_t square_senders = own.begin + (own.end - own.begin) / n * n;
  for (int64_t line = own.begin; line < square_senders; line += LINE) {
    const int64_t end = line + LINE < square_senders ? line + LINE : square_senders;
    for (int64_t r = 0; r < square_receivers; r += n) {
      for (int64_t s = line; s < end; s += n) {  // innermost: a line of `out` is moved at once
        F* const by_receiver = out + r * senders + s;
        F* const by_sender = sums + s * width + r;
        const F* const from = READS ? by_receiver : by_sender;
        F* const to = READS ? by_sender : by_receiver;
        const int64_t from_row = READS ? senders : width, to_row = READS ? width : senders;
        Square<Word> square;
        for (int64_t i = 0; i < n; ++i)
          square.rows[i] = *reinterpret_cast<const Row*>(from + i * from_row);
        square.transpose();
        for (int64_t i = 0; i < n; ++i) *reinterpret_cast<Row*>(to + i * to_row) = square.rows[i];
      }
    }
  }
  for (int64_t s = own.begin; s < own.end; ++s) {
    for (int64_t r = s < square_senders ? square_receivers : 0; r < receivers; ++r) {
      F &by_receiver = out[r * senders + s], &by_sender = sums[s * width + r];
      (READS ? by_sender : by_receiver) = READS ? by_receiver : by_sender;
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
