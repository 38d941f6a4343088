// Fixed device code for the gradient of a max-pool of spikes: that of a block goes to its first active
// neuron in row-major order, to its first one where none is active, and others get 0.
#pragma once

#include "strips.h"

namespace sparsify {

// What Python passes; see cpp_convolution_gradient.py.
struct PoolCall {
  const void *d, *y;  // of `rows` batch rows: blocks [channels][rows][columns], neurons
  void* out;          // [all_rows][channels][from_rows][from_columns], written from row `first` on
  int64_t first, rows, all_rows;
  int64_t y_run, y_outer, y_inner;
  int64_t threads;
};

// Bits of rows of blocks; those of a block are the lowest ones of the words after moving them.
template <class Map, class F, class Source, class Element>
void unpool_map(F* out, const F* d, const Element* y, int64_t channel) {
  constexpr int64_t NEURONS = Map::channels * Map::from_rows * Map::from_columns;
  constexpr int64_t WIDE = Map::pool_columns, AT_ONCE = 64 / WIDE;  // blocks
  static_assert(WIDE <= 64, "a row of a block is part of a word");
  constexpr uint64_t OF_BLOCK = WIDE < 64 ? (uint64_t(1) << WIDE % 64) - 1 : ~uint64_t(0);
  std::memset(out, 0, sizeof(F) * Map::from_rows * Map::from_columns);
  for (int64_t row = 0; row < Map::rows; ++row)
    for (int64_t column = 0; column < Map::columns; column += AT_ONCE) {
      const int64_t left = Map::columns - column, count = left < AT_ONCE ? left : AT_ONCE;
      const int64_t first = row * Map::pool_rows * Map::from_columns + column * WIDE;
      uint64_t words[Map::pool_rows];
      for (int64_t i = 0; i < Map::pool_rows; ++i)
        words[i] = Neurons<Source>::word(
            y, NEURONS, channel * Map::from_rows * Map::from_columns + first + i * Map::from_columns,
            count * WIDE);
      for (int64_t block = 0; block < count; ++block) {
        int64_t to = 0;
        SPARSIFY_UNROLL
        for (int64_t i = Map::pool_rows - 1; i >= 0; --i) {
          const uint64_t active = words[i] >> block * WIDE & OF_BLOCK;
          to = active ? i * Map::from_columns + __builtin_ctzll(active) : to;
        }
        out[first + block * WIDE + to] = d[row * Map::columns + column + block];
      }
    }
}

template <class Map, class F, class Source>
void unpool(const Runtime* runtime, const PoolCall* call) {
  constexpr int64_t FROM = Map::from_rows * Map::from_columns;
  if (call->first == 0)
    prefer_large_pages(static_cast<F*>(call->out), call->all_rows, Map::channels * FROM, 1, 0);
  runtime->parallel(
      [](void* pointer, const Team& team) {
        typedef typename Activity<Source>::Element Element;
        const PoolCall& own = *static_cast<PoolCall*>(pointer);
        const Matrix<Element> y{static_cast<const Element*>(own.y), own.y_run, own.y_outer, own.y_inner};
        const int64_t maps = own.rows * Map::channels, end = maps * (team.thread + 1) / team.threads;
        for (int64_t map = maps * team.thread / team.threads; map < end; ++map) {
          const F* const d = static_cast<const F*>(own.d) + map * Map::rows * Map::columns;
          F* const out = static_cast<F*>(own.out) + (own.first * Map::channels + map) * FROM;
          unpool_map<Map, F, Source>(out, d, y[map / Map::channels], map % Map::channels);
        }
      },
      const_cast<PoolCall*>(call), int(call->threads));
}

}  // namespace sparsify
