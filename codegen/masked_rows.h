// Tiles of weights without those that are zero: a bit for every receiver says whether it has one.
#pragma once

#include "kernel.h"
#include "restricted.h"

namespace sparsify {

// A weight as compress.h packs it, in tiles of PLACES places of each line, which is what a sender
// sends or a receiver gets.
template <class W, int PLACES>
struct Masked {
  int64_t lines;
  const uint32_t* starts;  // [tiles][lines + 1], of weights
  const uint8_t* masks;    // [tiles][lines + 1][PLACES / 8]
  const W* weights;        // and as many behind the last one as a vector has
  int64_t fetched;         // bytes of a tile's line, on average: what is asked for ahead of it

  Masked() = default;
  explicit Masked(const void* packed) {
    const int64_t* const head = static_cast<const int64_t*>(packed);
    const char* const bytes = static_cast<const char*>(packed);
    lines = head[1];
    starts = reinterpret_cast<const uint32_t*>(bytes + head[3]);
    masks = reinterpret_cast<const uint8_t*>(bytes + head[4]);
    weights = reinterpret_cast<const W*>(bytes + head[5]);
    const int64_t parts = (head[2] + PLACES - 1) / PLACES * (lines + 1);
    fetched = parts ? int64_t(starts[parts - 1]) * int64_t(sizeof(W)) / parts + 32 : 0;
  }
  // The line of the tile that begins at place `first`.
  int64_t at(int64_t first, int64_t line) const { return first / PLACES * (lines + 1) + line; }
  const uint8_t* mask(int64_t at) const { return masks + at * (PLACES / 8); }
};

// The bits of a vector's lanes.
template <class F>
SPARSIFY_INLINE uint32_t lane_bits(const uint8_t* mask, int vector) {
  const int lane = vector * WIDTH<F>;
  if (WIDTH<F> == 16) {
    uint16_t bits;
    std::memcpy(&bits, mask + lane / 8, 2);
    return bits;
  }
  return uint32_t(mask[lane / 8] >> lane % 8) & ((1u << WIDTH<F>) - 1);
}

// Consecutive weights in the lanes whose bits are set, zero in the others. They are read first: an
// expansion that reads them itself takes five cycles.
#if defined(__AVX512F__)
template <class W>
SPARSIFY_INLINE Vector<float> expand(const float*, const W* from, uint32_t bits) {
  Vector<float> some = load(from);
  asm("" : "+v"(some));
  return __builtin_ia32_expandsf512_mask(some, own_zeros<Vector<float>>(bits), uint16_t(bits));
}
template <class W>
SPARSIFY_INLINE Vector<double> expand(const double*, const W* from, uint32_t bits) {
  Vector<double> some = load(from);
  asm("" : "+v"(some));
  return __builtin_ia32_expanddf512_mask(some, own_zeros<Vector<double>>(bits), uint8_t(bits));
}
#else
template <class F, class W>
SPARSIFY_INLINE Vector<F> expand(const F*, const W* from, uint32_t bits) {
  Vector<F> result = {};
  SPARSIFY_UNROLL
  for (int i = 0; i < WIDTH<F>; ++i) {
    const uint32_t bit = bits >> i & 1;
    result[i] = bit ? F(*from) : F(0);
    from += bit;
  }
  return result;
}
#endif

// All weights of a line in a tile.
template <class F, class W, int PLACES>
SPARSIFY_INLINE void expand_line(F* to, const Masked<W, PLACES>& weight, int64_t first,
                                 int64_t line) {
  const int64_t at = weight.at(first, line);
  const uint8_t* mask = weight.mask(at);
  const W* from = weight.weights + weight.starts[at];
  asm("" : "+r"(mask));  // else compilers keep an address for the bits of every vector
  SPARSIFY_UNROLL
  for (int v = 0; v < PLACES / WIDTH<F>; ++v) {
    const uint32_t bits = lane_bits<F>(mask, v);
    store(to + v * WIDTH<F>, expand(to, from, bits));
    from += __builtin_popcount(bits);
  }
}

// As sum_events.
template <int TILE, int VECTORS, bool PAYLOAD, class Index, class F, class W>
SPARSIFY_INLINE void sum_masked(Vector<F> (&sum)[VECTORS], const Masked<W, TILE>& weight,
                                int64_t first, const BlockEvents<Index, F>& events) {
  const auto [index, payload, begin, end, last] = events;
  const int64_t tile = weight.at(first, 0);
  const uint32_t* const starts = weight.starts + tile;
  const uint8_t* const masks = weight.mask(tile);
  for (int32_t k = begin; k < end; ++k) {
    const int64_t soon = index[k + AHEAD < last ? k + AHEAD : last];
    const int64_t later = index[k + 2 * AHEAD < last ? k + 2 * AHEAD : last];
    const char* const asked = reinterpret_cast<const char*>(weight.weights + starts[soon]);
    for (int64_t byte = 0; byte < weight.fetched; byte += 64) __builtin_prefetch(asked + byte);
    __builtin_prefetch(starts + later);
    __builtin_prefetch(masks + later * (TILE / 8));
    const uint8_t* mask = masks + index[k] * (TILE / 8);
    const W* from = weight.weights + starts[index[k]];
    asm("" : "+r"(mask));  // as above
    SPARSIFY_UNROLL
    for (int v = 0; v < VECTORS; ++v) {
      const uint32_t bits = lane_bits<F>(mask, v);
      const Vector<F> weights = expand(payload, from, bits);
      from += __builtin_popcount(bits);
      if constexpr (PAYLOAD)
        sum[v] += weights * payload[k];
      else
        sum[v] += weights;
    }
  }
}

// As add_block.
template <int TILE, class Index, class F, class W>
SPARSIFY_INLINE void add_masked_block(F* sums, const Masked<W, TILE>& weight, int64_t first,
                                      const BlockEvents<Index, F>& events, bool starts) {
  constexpr int VECTORS = TILE / WIDTH<F>;
  Vector<F> sum[VECTORS] = {};
  if (events.payload)
    sum_masked<TILE, VECTORS, true>(sum, weight, first, events);
  else
    sum_masked<TILE, VECTORS, false>(sum, weight, first, events);
  SPARSIFY_UNROLL
  for (int v = 0; v < VECTORS; ++v)
    store(sums + v * WIDTH<F>, starts ? sum[v] : load(sums + v * WIDTH<F>) + sum[v]);
}

// As gather_events, for the tile of receivers that begins with `first`.
template <int TILE, class Index, class F, class W>
void gather_masked_events(F* sums, const Masked<W, TILE>& weight, int64_t first,
                          const Events<Index, F>& events, int64_t rows) {
  const int64_t blocks = blocks_of(events.senders);
  for (int64_t block = 0; block < blocks; ++block)
    for (int64_t row = 0; row < rows; ++row)
      add_masked_block<TILE>(sums + row * TILE, weight, first, events.at(row, block), block == 0);
}

constexpr int PANEL = 32;  // senders whose weights are put in dense rows at once

// As gather_dense.
template <int TILE, class F, class W>
inline void gather_masked_dense(F* sums, const Masked<W, TILE>& weight, int64_t first,
                                const F* source, int64_t source_row, int64_t rows,
                                int64_t senders) {
  alignas(64) F panel[PANEL * TILE];
  for (int64_t s = 0; s < senders; s += PANEL) {
    const int64_t some = senders - s < PANEL ? senders - s : PANEL;
    for (int64_t i = 0; i < some; ++i) expand_line(panel + i * TILE, weight, first, s + i);
    dense_panel<TILE>(sums, panel, source + s, source_row, rows, some, s == 0);
  }
}

// Where restricted products read the weights of a receiver and a block of senders.
template <class F, class W>
struct MaskedPanels {
  const Masked<W, SOURCE_BLOCK>& weight;
  F* line;  // [SOURCE_BLOCK]

  SPARSIFY_INLINE const F* operator()(int64_t sender, int64_t receiver) const {
    expand_line(line, weight, sender, receiver);
    return line;
  }
};

// As gather_restricted, to the bit.
template <int TILE, class F, class W, class Mask>
inline int64_t gather_masked_restricted(F* sums, const Masked<W, SOURCE_BLOCK>& weight,
                                        const Blocks<F>& from, const Only<Mask>& only,
                                        int64_t rows) {
  alignas(64) F line[SOURCE_BLOCK];
  return sum_wanted<TILE>(sums, MaskedPanels<F, W>{weight, line}, from, only, rows);
}

}  // namespace sparsify
