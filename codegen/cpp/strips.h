// Strips of the maps of a convolution: which senders are active, and what receivers hand back to them.
//
// Map has the sizes: windows lie on maps of `rows` and `columns`, blocks of `pool_rows` and
// `pool_columns` of what is read. Strips have `strip_rows`; `group` batch rows are taken at once.
#pragma once

#include "outer_tiles.h"

// Of a loop whose bounds compilers know, and would make many times as much code of.
#define SPARSIFY_NOT_UNROLLED _Pragma("GCC unroll 1")

namespace sparsify {

constexpr int64_t CHANNEL_TILE = 16;          // receiving channels that lie together
constexpr int64_t SAMPLED_VALUES = 1 << 14;  // whose activity decides

// Receivers that a sender reads lie within `reach` before its own place in the map of receivers.
template <class Map>
struct Strips {
  static constexpr int64_t WINDOW = Map::window_rows * Map::window_columns;
  static constexpr int64_t REACH_ROWS = (Map::window_rows - 1) * Map::dilation_rows / Map::stride_rows;
  static constexpr int64_t REACH_COLUMNS =
      (Map::window_columns - 1) * Map::dilation_columns / Map::stride_columns;
  static constexpr int64_t COUNT = (Map::rows + Map::strip_rows - 1) / Map::strip_rows;
  static constexpr int64_t GROUP = Map::group;  // batch rows of a unit
  // Of a strip of what is copied of the receivers.
  static constexpr int64_t LEFT = Map::padding_columns / Map::stride_columns - REACH_COLUMNS;
  static constexpr int64_t COLUMNS =
      (Map::columns - 1 + Map::padding_columns) / Map::stride_columns + 1 - LEFT;
  static constexpr int64_t ROWS =
      (Map::strip_rows - 1 + Map::padding_rows % Map::stride_rows) / Map::stride_rows + 1 + REACH_ROWS;
  static constexpr int64_t PLACES = ROWS * COLUMNS;
  // Senders of a class read through the same taps.
  static constexpr int CLASSES = int(Map::stride_rows * Map::stride_columns);
  static constexpr int64_t SENDERS = Map::strip_rows * Map::columns;  // of a channel and a batch row
  static_assert(COUNT == 1 || Map::strip_rows % Map::stride_rows == 0, "strips are alike");
  static_assert(SENDERS <= 65535, "senders are listed as 16 bits");
  static_assert(CLASSES <= 256, "classes are listed as 8 bits");

  // The first row of the map of receivers that belongs to a strip.
  static constexpr int64_t top(int64_t strip) {
    return (strip * Map::strip_rows + Map::padding_rows) / Map::stride_rows - REACH_ROWS;
  }
};

// The taps through which senders of a class read, and how far from their own place.
template <class Map>
struct ClassTaps {
  int count = 0;
  int tap[Strips<Map>::WINDOW] = {};
  int64_t place[Strips<Map>::WINDOW] = {};

  constexpr explicit ClassTaps(int of_class) {
    const int64_t row = of_class / Map::stride_columns, column = of_class % Map::stride_columns;
    for (int64_t i = 0; i < Map::window_rows; ++i)
      for (int64_t j = 0; j < Map::window_columns; ++j) {
        const int64_t down = row - i * Map::dilation_rows, right = column - j * Map::dilation_columns;
        if (down % Map::stride_rows || right % Map::stride_columns) continue;
        tap[count] = int(i * Map::window_columns + j);
        place[count++] =
            down / Map::stride_rows * Strips<Map>::COLUMNS + right / Map::stride_columns;
      }
  }
};

// `count` up to 64 bits of a row of `bytes` bytes, from `first` on.
SPARSIFY_INLINE uint64_t bits_from(const uint8_t* row, int64_t bytes, int64_t first, int64_t count) {
  const int64_t byte = first / 8, shift = first % 8;
  uint64_t low = 0;
  uint8_t high = 0;
  if (byte + 9 <= bytes) {
    std::memcpy(&low, row + byte, 8);
    high = row[byte + 8];
  } else {
    for (int64_t i = byte; i < bytes; ++i) low |= uint64_t(row[i]) << 8 * (i - byte);
  }
  const uint64_t word = low >> shift | (shift ? uint64_t(high) << (64 - shift) : 0);
  return count < 64 ? word & ((uint64_t(1) << count) - 1) : word;
}

// Which of `count` up to 64 neurons of a batch row of `neurons` are active.
template <class Source>
struct Neurons {
  template <class Element>
  SPARSIFY_INLINE static uint64_t word(const Element* row, int64_t, int64_t first, int64_t count) {
    return Activity<Source>::word(row, first, count);
  }
};
template <>
struct Neurons<Bits> {
  SPARSIFY_INLINE static uint64_t word(const uint8_t* row, int64_t neurons, int64_t first,
                                       int64_t count) {
    return bits_from(row, (neurons + 7) / 8, first, count);
  }
};

// What a sender of a channel's strip, in its first batch row, is among the copied receivers.
template <class Map>
struct PlaceTables {
  typedef Strips<Map> S;
  int32_t* place_of;  // [SENDERS]
  uint8_t* class_of;  // [SENDERS]

  explicit PlaceTables(Arena& arena)
      : place_of(arena.take<int32_t>(S::SENDERS)), class_of(arena.take<uint8_t>(S::SENDERS)) {}

  void fill() const {
    for (int64_t i = 0; i < S::SENDERS; ++i) {
      const int64_t row = i / Map::columns + Map::padding_rows;
      const int64_t column = i % Map::columns + Map::padding_columns;
      place_of[i] = int32_t((row / Map::stride_rows - S::top(0)) * S::COLUMNS +
                            column / Map::stride_columns - S::LEFT);
      class_of[i] = uint8_t(row % Map::stride_rows * Map::stride_columns + column % Map::stride_columns);
    }
  }
};

// Where the active senders of a unit lie, by channel and class.
template <class Map, class F>
struct Places {
  typedef Strips<Map> S;
  static constexpr bool POOLED = Map::pool_rows * Map::pool_columns > 1;
  static constexpr int64_t WORDS = (S::SENDERS + 63) / 64, LISTED = S::GROUP * S::SENDERS;
  static constexpr int64_t MOST = (Map::channels + S::CLASSES) * LISTED;
  static constexpr int64_t NEURONS = Map::channels * Map::from_rows * Map::from_columns;

  int32_t* place;     // of all channels, one after the other
  F* payload;         // the same, or null: every payload is 1
  Run* runs;          // [channels][CLASSES]
  PlaceTables<Map> tables;
  uint16_t* senders;  // active ones of a channel and a batch row
  uint64_t* words;    // the same, or blocks of them, as bits

  Places(Arena& arena, bool has_payload)
      : place(arena.take<int32_t>(MOST)),
        payload(has_payload ? arena.take<F>(MOST) : nullptr),
        runs(arena.take<Run>(Map::channels * S::CLASSES)),
        tables(arena),
        senders(arena.take<uint16_t>(S::SENDERS + LIST_SLACK)),
        words(arena.take<uint64_t>(WORDS)) {}

  // Lists a strip of some batch rows, and returns how many senders are active.
  template <class Source, class Element>
  __attribute__((noinline)) int64_t list(const Matrix<Element>& y, int64_t first, int64_t rows,
                                         int64_t strip) const {
    int64_t end = 0;
    for (int64_t c = 0; c < Map::channels; ++c) {
      Run* const of_channel = runs + c * S::CLASSES;
      int64_t ends[S::CLASSES];
      for (int64_t i = 0; i < S::CLASSES; ++i) ends[i] = end + i * LISTED;
      bool has_payload = false;
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t count = list_senders<Source>(y[first + i], c, strip);
        for (int64_t k = 0; k < count; ++k) {
          const int64_t sender = senders[k], to = ends[S::CLASSES > 1 ? tables.class_of[sender] : 0]++;
          place[to] = tables.place_of[sender] + int32_t(i * S::PLACES);
          if constexpr (!POOLED && Activity<Source>::MAY_HAVE_PAYLOAD) {
            const int64_t at = (c * Map::rows + strip * Map::strip_rows) * Map::columns + sender;
            payload[to] = Activity<Source>::template value<F>(y[first + i], at);
            has_payload |= payload[to] != F(1);
          }
        }
      }
      for (int64_t i = 0; i < S::CLASSES; ++i) {
        const int64_t begin = end + i * LISTED, count = ends[i] - begin;
        of_channel[i] = {begin, int32_t(count), has_payload};
      }
      for (int64_t i = 0; i < S::CLASSES; ++i) end = of_channel[i].close_up(end, place, payload);
    }
    return end;
  }

 private:
  template <class Source, class Element>
  SPARSIFY_INLINE int64_t list_senders(const Element* row, int64_t channel, int64_t strip) const {
    const int64_t top = strip * Map::strip_rows, left = (Map::rows - top) * Map::columns;
    const int64_t count = left < S::SENDERS ? left : S::SENDERS;
    if constexpr (POOLED) pool<Source>(row, channel, top, count / Map::columns);
    uint16_t* to = senders;
    for (int64_t s = 0; s < count; s += 64) {
      const int64_t first = (channel * Map::rows + top) * Map::columns + s;
      const int64_t some = count - s < 64 ? count - s : 64;
      const uint64_t word = POOLED ? words[s / 64] : Neurons<Source>::word(row, NEURONS, first, some);
      to = append_bits(to, word, int(s));
    }
    return to - senders;
  }

  // Which blocks of some rows of blocks have an active neuron.
  template <class Source, class Element>
  void pool(const Element* row, int64_t channel, int64_t top, int64_t rows) const {
    std::memset(words, 0, sizeof(uint64_t) * WORDS);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t x = 0; x < Map::columns * Map::pool_columns; x += 64) {
        const int64_t left = Map::columns * Map::pool_columns - x, count = left < 64 ? left : 64;
        uint64_t word = 0;
        for (int64_t i = 0; i < Map::pool_rows; ++i) {
          const int64_t y = channel * Map::from_rows + (top + r) * Map::pool_rows + i;
          word |= Neurons<Source>::word(row, NEURONS, y * Map::from_columns + x, count);
        }
        for (; word; word &= word - 1) {
          const int64_t block =
              r * Map::columns + (x + __builtin_ctzll(word)) / Map::pool_columns;
          words[block / 64] |= uint64_t(1) << block % 64;
        }
      }
  }
};

// to[COUNT][TILE] of `channels` rows that are MAP apart. Returns whether all of them are finite.
template <int64_t COUNT, int64_t MAP, class F>
SPARSIFY_INLINE bool copy_channels_last(F* to, const F* from, int64_t channels) {
  using Word = typename WordOf<sizeof(F)>::type;
  using Row = typename RowOf<Word>::anywhere;
  typedef F Lanes __attribute__((vector_size(sizeof(Row))));
  constexpr int64_t TILE = CHANNEL_TILE, n = Square<Word>::n;
  Lanes others[4] = {};  // the difference of a value that is not finite from itself is NaN
  F other = 0;
  const bool squares = COUNT >= n && channels >= n;
  SPARSIFY_NOT_UNROLLED
  for (int64_t c = 0; squares && c < channels; c += n)
    SPARSIFY_NOT_UNROLLED
    for (int64_t x = 0; x < COUNT; x += n) {  // the last squares may overlap those before
      const int64_t row = channels - c < n ? channels - n : c, at = COUNT - x < n ? COUNT - n : x;
      Square<Word> square;
      for (int64_t i = 0; i < n; ++i) {
        square.rows[i] = *reinterpret_cast<const Row*>(from + (row + i) * MAP + at);
        const Lanes values = reinterpret_cast<Lanes>(square.rows[i]);
        others[i % 4] += values - values;
      }
      square.transpose();
      for (int64_t i = 0; i < n; ++i)
        *reinterpret_cast<Row*>(to + (at + i) * TILE + row) = square.rows[i];
    }
  SPARSIFY_NOT_UNROLLED
  for (int64_t c = 0; !squares && c < channels; ++c)
    SPARSIFY_NOT_UNROLLED
    for (int64_t x = 0; x < COUNT; ++x) {
      to[x * TILE + c] = from[c * MAP + x];
      other += from[c * MAP + x] - from[c * MAP + x];
    }
  const Lanes sum = (others[0] + others[1]) + (others[2] + others[3]);
  for (int64_t i = 0; i < n; ++i) other += sum[i];
  return other == F(0);
}

// Copies what a strip's senders read of `channel` and the next ones to [ROWS][COLUMNS][TILE], channels
// last and zeros where no receiver is. Returns whether all of it is finite.
template <class Map, class F>
__attribute__((noinline)) bool copy_strip(F* to, const F* row, int64_t strip, int64_t channel) {
  typedef Strips<Map> S;
  constexpr int64_t TILE = CHANNEL_TILE, MAP = Map::to_rows * Map::to_columns;
  constexpr int64_t LEFT = S::LEFT < 0 ? -S::LEFT : 0, SKIPPED = S::LEFT < 0 ? 0 : S::LEFT;
  constexpr int64_t RIGHT = S::COLUMNS + S::LEFT;  // the column behind the last one
  constexpr int64_t COUNT = (RIGHT < Map::to_columns ? RIGHT : Map::to_columns) - SKIPPED;
  const int64_t top = S::top(strip), left = Map::to_channels - channel;
  const int64_t channels = left < TILE ? left : TILE;
  bool finite = true;
  for (int64_t i = 0; i < S::ROWS; ++i) {
    F* const line = to + i * S::COLUMNS * TILE;
    const bool is_outside = top + i < 0 || top + i >= Map::to_rows;
    if (is_outside || channels < TILE) {
      std::memset(line, 0, sizeof(F) * S::COLUMNS * TILE);
    } else {
      std::memset(line, 0, sizeof(F) * LEFT * TILE);
      std::memset(line + (LEFT + COUNT) * TILE, 0, sizeof(F) * (S::COLUMNS - LEFT - COUNT) * TILE);
    }
    if (is_outside) continue;
    const F* const from = row + channel * MAP + (top + i) * Map::to_columns + SKIPPED;
    finite &= copy_channels_last<COUNT, MAP>(line + LEFT * TILE, from, channels);
  }
  return finite;
}

}  // namespace sparsify
