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

// A row of blocks as bits: fields of WIDE bits, of as many blocks as a word holds.
template <int64_t WIDE>
struct Fields {
  static_assert(WIDE <= 32, "a word holds blocks");
  static constexpr int64_t COUNT = 64 / WIDE;

  static constexpr uint64_t ones(int64_t count) {
    return count < 64 ? (uint64_t(1) << count) - 1 : ~uint64_t(0);
  }
  // The lowest bits of all fields.
  static constexpr uint64_t lowest() {
    uint64_t bits = 0;
    for (int64_t i = 0; i < COUNT; ++i) bits |= uint64_t(1) << i * WIDE;
    return bits;
  }

  // Of each of `count` blocks of ROWS words the first bit in row-major order stays, or is set if there
  // is none.
  template <int64_t ROWS>
  SPARSIFY_INLINE static void choose(uint64_t* words, int64_t count) {
    uint64_t done = 0;  // fields of blocks that have had their first one
    SPARSIFY_UNROLL
    for (int64_t i = 0; i < ROWS; ++i) {
      const uint64_t row = words[i];
      uint64_t later = 0, any = row;
      SPARSIFY_UNROLL
      for (int64_t k = 1; k < WIDE; ++k) {
        later |= row << k & lowest() * (ones(WIDE) & ~ones(k));
        any |= row >> k;
      }
      words[i] = row & ~later & ~done;
      done |= (any & lowest()) * ones(WIDE);
    }
    words[0] |= lowest() & ~done & ones(count * WIDE);
  }
};

template <int BYTES>
struct IntegerOf;
template <>
struct IntegerOf<4> {
  typedef int32_t type;
  typedef int32_t lanes __attribute__((vector_size(VECTOR_BYTES)));
};
template <>
struct IntegerOf<8> {
  typedef int64_t type;
  typedef int64_t lanes __attribute__((vector_size(VECTOR_BYTES)));
};

// Lane i is from[i / WIDE] where bit i is set, else 0.
template <int64_t WIDE, class F>
SPARSIFY_INLINE Vector<F> spread(const F* from, uint64_t bits) {
  using Integer = typename IntegerOf<sizeof(F)>::type;
  using Lanes = typename IntegerOf<sizeof(F)>::lanes;
  Lanes bit_of, source;
  for (int i = 0; i < WIDTH<F>; ++i) bit_of[i] = Integer(1) << i, source[i] = i / WIDE;
#if defined(__clang__)
  Vector<F> values;
  for (int i = 0; i < WIDTH<F>; ++i) values[i] = from[i / WIDE];
#else
  const Vector<F> values = __builtin_shuffle(load(from), source);
#endif
  const Lanes is_set = ((Lanes{} + Integer(bits)) & bit_of) == bit_of;
  return reinterpret_cast<Vector<F>>(reinterpret_cast<Lanes>(values) & is_set);
}

// One row of a map: `bits` are those of `count` blocks from `to` on. What lies behind them, up to
// `end`, may be overwritten by zeros.
template <int64_t WIDE, class F>
SPARSIFY_INLINE void write_blocks(F* to, const F* end, const F* d, const F* d_end, uint64_t bits,
                                  int64_t count) {
  constexpr int64_t BLOCKS = WIDE < WIDTH<F> ? WIDTH<F> / WIDE : 0;  // of a vector
  int64_t block = 0;
  if constexpr (BLOCKS > 0)
    for (; block < count; block += BLOCKS) {
      F* const at = to + block * WIDE;
      if (at + WIDTH<F> > end || d + block + WIDTH<F> > d_end) break;
      const int64_t left = count - block, lanes = (left < BLOCKS ? left : BLOCKS) * WIDE;
      store(at, spread<WIDE>(d + block, bits >> block * WIDE & Fields<WIDE>::ones(lanes)));
    }
  for (int64_t i = block * WIDE; i < count * WIDE; ++i)
    to[i] = bits >> i & 1 ? d[i / WIDE] : F(0);
}

// One map of neurons from that of blocks; d may be read up to `d_end`.
template <class Map, class F, class Source, class Element>
void unpool_map(F* out, const F* d, const F* d_end, const Element* y, int64_t channel) {
  typedef Fields<Map::pool_columns> Row;
  constexpr int64_t FROM = Map::from_rows * Map::from_columns, WIDE = Map::pool_columns;
  const F* const end = out + FROM;
  const int64_t first = channel * FROM;
  uint64_t words[Map::pool_rows][(Map::columns + Row::COUNT - 1) / Row::COUNT];
  for (int64_t row = 0; row < Map::rows; ++row, d += Map::columns) {
    for (int64_t column = 0; column < Map::columns; column += Row::COUNT) {
      const int64_t left = Map::columns - column, count = left < Row::COUNT ? left : Row::COUNT;
      uint64_t chosen[Map::pool_rows];
      for (int64_t i = 0; i < Map::pool_rows; ++i) {
        const int64_t at = (row * Map::pool_rows + i) * Map::from_columns + column * WIDE;
        chosen[i] = Neurons<Source>::word(y, Map::channels * FROM, first + at, count * WIDE);
      }
      Row::template choose<Map::pool_rows>(chosen, count);
      for (int64_t i = 0; i < Map::pool_rows; ++i) words[i][column / Row::COUNT] = chosen[i];
    }
    for (int64_t i = 0; i < Map::pool_rows; ++i, out += Map::from_columns) {  // in ascending order
      for (int64_t column = 0; column < Map::columns; column += Row::COUNT) {
        const int64_t left = Map::columns - column, count = left < Row::COUNT ? left : Row::COUNT;
        write_blocks<WIDE>(out + column * WIDE, end, d + column, d_end,
                           words[i][column / Row::COUNT], count);
      }
      std::memset(out + Map::columns * WIDE, 0, sizeof(F) * (Map::from_columns - Map::columns * WIDE));
    }
  }
  std::memset(out, 0, sizeof(F) * (end - out));
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
          const F* const d_end = d + (maps - map) * Map::rows * Map::columns;
          F* const out = static_cast<F*>(own.out) + (own.first * Map::channels + map) * FROM;
          unpool_map<Map, F, Source>(out, d, d_end, y[map / Map::channels], map % Map::channels);
        }
      },
      const_cast<PoolCall*>(call), int(call->threads));
}

}  // namespace sparsify
