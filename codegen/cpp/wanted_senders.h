// Lists of the senders whose gradient is wanted.
#pragma once

#include "pool_gradient.h"

namespace sparsify {

// The wanted senders of a unit, by channel and class: where they lie in the copied receivers, and in
// the maps that are written, from the first batch row of the unit on.
template <class Map>
struct WantedSenders {
  typedef Strips<Map> S;
  static constexpr bool POOLED = Map::pool_rows * Map::pool_columns > 1;
  static constexpr int64_t FROM = Map::from_rows * Map::from_columns, NEURONS = Map::channels * FROM;
  static constexpr int64_t LISTED = S::GROUP * S::SENDERS;
  static constexpr int64_t MOST = (Map::channels + S::CLASSES) * LISTED;

  int32_t *place, *target;  // of all channels, one after the other
  Run* runs;                // [channels][CLASSES]
  PlaceTables<Map> tables;

  explicit WantedSenders(Arena& arena)
      : place(arena.take<int32_t>(MOST)),
        target(arena.take<int32_t>(MOST)),
        runs(arena.take<Run>(Map::channels * S::CLASSES)),
        tables(arena) {}

  // Lists a strip of some batch rows, and returns how many senders are wanted.
  int64_t list(const Matrix<uint8_t>& y, const Matrix<uint8_t>& only, int64_t first, int64_t rows,
               int64_t strip) const {
    int64_t end = 0;
    for (int64_t c = 0; c < Map::channels; ++c) {
      Run* const of_channel = runs + c * S::CLASSES;
      int64_t ends[S::CLASSES];
      for (int64_t i = 0; i < S::CLASSES; ++i) ends[i] = end + i * LISTED;
      for (int64_t i = 0; i < rows; ++i)
        list_maps(ends, POOLED ? y[first + i] : nullptr, only[first + i], c, strip, i);
      for (int64_t i = 0; i < S::CLASSES; ++i)
        of_channel[i] = {end + i * LISTED, int32_t(ends[i] - end - i * LISTED), false};
      for (int64_t i = 0; i < S::CLASSES; ++i) end = of_channel[i].close_up(end, place, target);
    }
    return end;
  }

 private:
  void list_maps(int64_t* ends, const uint8_t* y, const uint8_t* only, int64_t channel, int64_t strip,
                 int64_t batch_row) const {
    typedef Fields<POOLED ? Map::pool_columns : 1> Row;
    const int64_t top = strip * Map::strip_rows, left = Map::rows - top;
    const int64_t rows = left < Map::strip_rows ? left : Map::strip_rows;
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t column = 0; column < Map::columns; column += Row::COUNT) {
        const int64_t more = Map::columns - column, count = more < Row::COUNT ? more : Row::COUNT;
        uint64_t words[Map::pool_rows];
        const auto at = [&](int64_t i) {
          return channel * FROM + ((top + row) * Map::pool_rows + i) * Map::from_columns +
                 column * Map::pool_columns;
        };
        const int64_t bits = count * Map::pool_columns, bytes = (NEURONS + 7) / 8;
        if constexpr (POOLED) {
          for (int64_t i = 0; i < Map::pool_rows; ++i) words[i] = bits_from(y, bytes, at(i), bits);
          Row::template choose<Map::pool_rows>(words, count);
        }
        for (int64_t i = 0; i < Map::pool_rows; ++i) {
          uint64_t word = bits_from(only, bytes, at(i), bits);
          if constexpr (POOLED) word &= words[i];
          for (; word; word &= word - 1) {
            const int64_t bit = __builtin_ctzll(word);
            const int64_t sender = row * Map::columns + column + bit / Map::pool_columns;
            const int64_t to = ends[S::CLASSES > 1 ? tables.class_of[sender] : 0]++;
            place[to] = tables.place_of[sender] + int32_t(batch_row * S::PLACES);
            target[to] = int32_t(batch_row * NEURONS + at(i) + bit);
          }
        }
      }
  }
};

}  // namespace sparsify
