// Sums of convolutions over the events of a map.
//
// Senders that are active are sorted by their place in the padded map once. A receiver's sum then
// stays in registers while the events under its window are walked: those of a row of the window lie
// together, and outside of the map there are none.
#pragma once

namespace sparsify {

constexpr int STRIP = 16;  // receivers of a row of a map whose events are listed together

typedef int32_t Taps __attribute__((vector_size(VECTOR_BYTES)));
typedef int32_t TapsAnywhere __attribute__((vector_size(VECTOR_BYTES), may_alias, aligned(4)));
constexpr int TAPS_AT_ONCE = VECTOR_BYTES / int(sizeof(int32_t));

// to[i] = from[i] + base; up to TAPS_AT_ONCE places behind the last one are overwritten.
SPARSIFY_INLINE void put_taps(int32_t* to, const int32_t* from, int32_t count, int32_t base) {
  for (int32_t i = 0; i < count; i += TAPS_AT_ONCE)
    *reinterpret_cast<TapsAnywhere*>(to + i) =
        *reinterpret_cast<const TapsAnywhere*>(from + i) + base;
}

// The events of one batch row as the receivers of a convolution meet them. Map has the sizes: windows
// lie on maps of `rows` and `columns`, blocks of `pool_rows` and `pool_columns` of what is read.
//
// A tap is a place in [channel][row of the window][column of the window], as weights are packed.
template <class Map, class F>
struct Windows {
  static constexpr int32_t COLUMNS = Map::columns + 2 * Map::padding_columns;  // of the padded map
  static constexpr int32_t PLACES = (Map::rows + 2 * Map::padding_rows) * COLUMNS;
  static constexpr int32_t SENDERS = Map::channels * Map::rows * Map::columns;
  static constexpr bool POOLED = Map::pool_rows * Map::pool_columns > 1;
  static constexpr int32_t WINDOW = Map::window_rows * Map::window_columns;
  static constexpr int32_t TAPS = Map::channels * WINDOW;
  // Columns of the window that lie side by side are one run of events.
  static constexpr int32_t LENGTH = Map::dilation_columns == 1 ? Map::window_columns : 1;

  int32_t* starts;   // [PLACES + 2], of the events of a place
  int32_t* place;    // [SENDERS], of an event in the order of senders
  int32_t* key;      // [SENDERS]: its channel's first tap, and the padded column
  int32_t* sorted;   // [SENDERS]: keys by place, and there by channel
  F* payload;        // [SENDERS], in the order of `sorted`
  int32_t* seen;     // [PLACES]: the last channel with an event in this block, and one
  F* blocks;         // [SENDERS], values of blocks
  int32_t* taps;     // of the receivers of a strip, one after the other
  F* tap_payload;    // the same

  explicit Windows(Arena& arena)
      : starts(arena.take<int32_t>(PLACES + 2)),
        place(arena.take<int32_t>(SENDERS)),
        key(arena.take<int32_t>(SENDERS)),
        sorted(arena.take<int32_t>(SENDERS + TAPS_AT_ONCE)),
        payload(arena.take<F>(SENDERS)),
        seen(arena.take<int32_t>(POOLED ? PLACES : 0)),
        blocks(arena.take<F>(POOLED ? SENDERS : 0)),
        taps(arena.take<int32_t>(STRIP * TAPS + TAPS_AT_ONCE)),
        tap_payload(arena.take<F>(STRIP * TAPS)) {}

  // Sorts `count` events of ascending senders, and returns how many of blocks there are. `values` are
  // their payloads, or null if all are 1. Senders are neurons, or blocks of them.
  template <bool OF_BLOCKS, class SenderOf>
  SPARSIFY_INLINE int32_t sort(int32_t count, SenderOf sender_of, const F* values) const {
    constexpr bool POOLS = POOLED && !OF_BLOCKS;
    constexpr uint32_t FROM_COLUMNS = POOLS ? Map::from_columns : Map::columns;
    constexpr uint32_t MAP = FROM_COLUMNS * (POOLS ? Map::from_rows : Map::rows);
    std::memset(starts, 0, sizeof(int32_t) * (PLACES + 2));
    if (POOLS) std::memset(seen, 0, sizeof(int32_t) * PLACES);
    int32_t n = 0;
    for (int32_t k = 0; k < count; ++k) {
      const uint32_t sender = uint32_t(sender_of(k));
      const uint32_t channel = sender / MAP, at = sender % MAP;
      uint32_t row = at / FROM_COLUMNS, column = at % FROM_COLUMNS;
      if (POOLS) row /= Map::pool_rows, column /= Map::pool_columns;
      if (POOLS && (row >= Map::rows || column >= Map::columns)) continue;
      column += Map::padding_columns;
      place[n] = int32_t((row + Map::padding_rows) * COLUMNS + column);
      key[n] = int32_t(channel * WINDOW + column);
      if (POOLS) {
        const bool is_new = seen[place[n]] != int32_t(channel) + 1;
        seen[place[n]] = int32_t(channel) + 1;
        starts[place[n] + 2] += is_new;
        n += is_new;
      } else {
        ++starts[place[n++] + 2];
      }
    }
    for (int32_t p = 2; p < PLACES + 2; ++p) starts[p] += starts[p - 1];
    for (int32_t k = 0; k < n; ++k) {  // the events of a place begin at starts[place] afterwards
      const int32_t to = starts[place[k] + 1]++;
      sorted[to] = key[k];
      if (values) payload[to] = values[k];
    }
    return n;
  }

  // Values of blocks of a row, 1 where one of their neurons is active.
  void pool(const F* values) const {
    std::memset(blocks, 0, sizeof(F) * SENDERS);
    for (int64_t c = 0; c < Map::channels; ++c)
      for (int64_t y = 0; y < Map::rows * Map::pool_rows; ++y)
        for (int64_t x = 0; x < Map::columns * Map::pool_columns; ++x)
          if (values[(c * Map::from_rows + y) * Map::from_columns + x] != F(0))
            blocks[(c * Map::rows + y / Map::pool_rows) * Map::columns + x / Map::pool_columns] = F(1);
  }

  // Lists the taps of `count` receivers of a row, the first one at `column`; those of the last but
  // i end before ends[i].
  template <bool PAYLOAD>
  SPARSIFY_INLINE void list(int64_t row, int64_t column, int64_t count, int32_t* ends) const {
    int32_t n = 0;
    for (int64_t i = 0; i < count; ++i) {
      const int32_t left = int32_t(column + i) * Map::stride_columns;
      for (int32_t y = 0; y < Map::window_rows; ++y)
        for (int32_t x = 0; x < Map::window_columns; x += LENGTH) {
          const int32_t top = int32_t(row) * Map::stride_rows + y * Map::dilation_rows;
          const int32_t begins = left + x * Map::dilation_columns;
          const int32_t first = starts[top * COLUMNS + begins];
          const int32_t some = starts[top * COLUMNS + begins + LENGTH] - first;
          put_taps(taps + n, sorted + first, some, y * Map::window_columns + x - begins);
          if constexpr (PAYLOAD)
            for (int32_t k = 0; k < some; ++k) tap_payload[n + k] = payload[first + k];
          n += some;
        }
      ends[i] = n;
    }
  }
};

// Receivers of one map whose sums stay in registers: WIDTH of `channels`, at one place.
template <int CHANNELS, bool PAYLOAD, class F, class W>
SPARSIFY_INLINE void sum_taps(F* sums, const W* weight, const int32_t* taps, const F* payload,
                              int32_t begin, int32_t end) {
  constexpr int VECTORS = CHANNELS / WIDTH<F>;
  Vector<F> sum[VECTORS] = {};
  for (int32_t k = begin; k < end; ++k) {
    const W* const from = weight + int64_t(taps[k]) * CHANNELS;
    SPARSIFY_UNROLL
    for (int v = 0; v < VECTORS; ++v) {
      const Vector<F> weights = load(from + v * WIDTH<F>);
      if constexpr (PAYLOAD)
        sum[v] = fused(weights, payload[k], sum[v]);
      else
        sum[v] += weights;
    }
  }
  SPARSIFY_UNROLL
  for (int v = 0; v < VECTORS; ++v) store(sums + v * WIDTH<F>, sum[v]);
}

// The sums of the receivers `begin` to `end` of a batch row, and of others in the same tiles of
// channels; `sums` are those of all receivers.
template <int CHANNELS, bool PAYLOAD, class Map, class F, class W>
void convolve_row(F* sums, const W* weight, const Windows<Map, F>& windows, int64_t begin,
                  int64_t end) {
  constexpr int64_t PLACES = Map::to_rows * Map::to_columns;
  const int64_t first = begin / PLACES / CHANNELS * CHANNELS;
  const int64_t last = (end + PLACES - 1) / PLACES;
  alignas(64) F strip[STRIP * CHANNELS];
  int32_t ends[STRIP];
  for (int64_t row = 0; row < Map::to_rows; ++row)
    for (int64_t column = 0; column < Map::to_columns; column += STRIP) {
      const int64_t left = Map::to_columns - column, count = left < STRIP ? left : STRIP;
      windows.template list<PAYLOAD>(row, column, count, ends);
      for (int64_t c = first; c < last; c += CHANNELS) {
        const W* const tile = weight + c * Windows<Map, F>::TAPS;
        for (int64_t i = 0; i < count; ++i)
          sum_taps<CHANNELS, PAYLOAD>(strip + i * CHANNELS, tile, windows.taps,
                                      windows.tap_payload, i ? ends[i - 1] : 0, ends[i]);
        const int64_t most = Map::to_channels - c, some = most < CHANNELS ? most : CHANNELS;
        F* const to = sums + c * PLACES + row * Map::to_columns + column;
        for (int64_t r = 0; r < some; ++r)
          for (int64_t i = 0; i < count; ++i) to[r * PLACES + i] = strip[i * CHANNELS + r];
      }
    }
}

// sums[row][r] = sum over the events of `row` under the window of r of payload * weight[tap][r].
// Returns how many events there are.
//
// Order of additions: by rows of the window, in each by columns, and there by channels, from +0.
template <int CHANNELS, class Map, class Index, class F, class W>
int64_t convolve_events(F* sums, const W* weight, const Windows<Map, F>& windows,
                     const Events<Index, F>& events, int64_t rows, int64_t begin, int64_t end) {
  int64_t active = 0;
  for (int64_t row = 0; row < rows; ++row) {
    const Index* const index = events.index_of(row);
    const F* const payload = events.is_plain[row] ? nullptr : events.payload_of(row);
    const auto sender_of = [&](int32_t k) { return index[k]; };
    active += windows.template sort<false>(events.count[row], sender_of, payload);
    F* const to = sums + row * Map::to_channels * Map::to_rows * Map::to_columns;
    if (payload)
      convolve_row<CHANNELS, true>(to, weight, windows, begin, end);
    else
      convolve_row<CHANNELS, false>(to, weight, windows, begin, end);
  }
  return active;
}

// The same over all senders: what weights that are not finite make of zeros is not left out.
template <int CHANNELS, class Map, class F, class W>
int64_t convolve_dense(F* sums, const W* weight, const Windows<Map, F>& windows, const F* source,
                    int64_t source_row, int64_t rows, int64_t begin, int64_t end) {
  constexpr int32_t SENDERS = Windows<Map, F>::SENDERS;
  int64_t active = 0;
  for (int64_t row = 0; row < rows; ++row) {
    const F* values = source + row * source_row;
    if (Windows<Map, F>::POOLED) windows.pool(values), values = windows.blocks;
    active += count_active(values, SENDERS);
    windows.template sort<true>(SENDERS, [](int32_t k) { return k; }, values);
    F* const to = sums + row * Map::to_channels * Map::to_rows * Map::to_columns;
    convolve_row<CHANNELS, true>(to, weight, windows, begin, end);
  }
  return active;
}

}  // namespace sparsify
