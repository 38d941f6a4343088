// Tiles of weights without those that are zero: a bit for every receiver says whether it has one.
#pragma once

#include "kernel.h"
#include "restricted.h"

namespace sparsify {

// A weight as compress.h packs it, in tiles of PLACES places of each line, which is what a sender
// sends or a receiver gets. A tile's line is its mask, and its weights behind that.
template <class W, int PLACES>
struct Masked {
  static constexpr int MASK = (PLACES / 8 + int(sizeof(W)) - 1) / int(sizeof(W));  // in words
  static constexpr uint32_t FULL = 1u << 31;  // of some vector more than half of the lanes are kept
  int64_t lines;
  const uint32_t* starts;  // [tiles][lines + 1], in words, and whether a line is FULL
  const W* words;          // and as many behind the last one as a vector has
  int64_t fetched;         // bytes of a tile's line, on average: what is asked for ahead of it

  Masked() = default;
  explicit Masked(const void* packed) {
    const int64_t* const head = static_cast<const int64_t*>(packed);
    const char* const bytes = static_cast<const char*>(packed);
    lines = head[1];
    starts = reinterpret_cast<const uint32_t*>(bytes + head[3]);
    words = reinterpret_cast<const W*>(bytes + head[5]);
    const int64_t parts = (head[2] + PLACES - 1) / PLACES * (lines + 1);
    fetched = parts ? int64_t(starts[parts - 1]) * int64_t(sizeof(W)) / parts + 32 : 0;
  }
  // The lines of the tile that begins at place `first`.
  const uint32_t* starts_of(int64_t first) const { return starts + first / PLACES * (lines + 1); }
  const W* line(uint32_t start) const { return words + (start & ~FULL); }
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

// Whether half a vector of weights is read where that has all of a vector's lanes: a whole one lies in
// two lines of the cache nearly always.
template <class W>
constexpr bool READS_HALF = VECTOR_BYTES == 64 && sizeof(W) > 2;

// Consecutive weights in the lanes whose bits are set, zero in the others.
#if defined(__AVX512F__)
template <bool FULL, class W>
SPARSIFY_INLINE auto load_kept(const W* from) {
  if constexpr (FULL || !READS_HALF<W>) {
    return load(from);
  } else {
    Vector<W> some;
    asm("vmovups %1, %t0" : "=v"(some) : "m"(*reinterpret_cast<const W(*)[WIDTH<W> / 2]>(from)));
    return some;
  }
}
// An expansion waits for what was in the register that it writes, so it writes the one that it reads.
SPARSIFY_INLINE void expand_lanes(Vector<float>& some, uint32_t bits) {
  asm("vexpandps %0, %0%{%1%}%{z%}" : "+v"(some) : "Yk"(uint16_t(bits)));
}
SPARSIFY_INLINE void expand_lanes(Vector<double>& some, uint32_t bits) {
  asm("vexpandpd %0, %0%{%1%}%{z%}" : "+v"(some) : "Yk"(uint8_t(bits)));
}
template <bool FULL, class F, class W>
SPARSIFY_INLINE Vector<F> expand(const W* from, uint32_t bits) {
  Vector<F> some = load_kept<FULL>(from);
  expand_lanes(some, bits);
  return some;
}
#else
template <bool FULL, class F, class W>
SPARSIFY_INLINE Vector<F> expand(const W* from, uint32_t bits) {
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

// Calls visit(v, weights) for the vectors of a tile's line.
template <bool FULL, class F, int PLACES, class W, class Visit>
SPARSIFY_INLINE void each_vector(const W* line, Visit visit) {
  const uint8_t* mask = reinterpret_cast<const uint8_t*>(line);
  const W* from = line + Masked<W, PLACES>::MASK;
  asm("" : "+r"(mask));  // else compilers keep an address for the bits of every vector
  SPARSIFY_UNROLL
  for (int v = 0; v < PLACES / WIDTH<F>; ++v) {
    const uint32_t bits = lane_bits<F>(mask, v);
    visit(v, expand<FULL, F>(from, bits));
    uint32_t counted = bits;
    asm("" : "+r"(counted));  // else 16 bits are counted, into a part of a register
    from += __builtin_popcount(counted);
  }
}
template <class F, int PLACES, class W, class Visit>
SPARSIFY_INLINE void each_vector(const Masked<W, PLACES>& weight, uint32_t start, Visit visit) {
  if (!READS_HALF<W> || start & Masked<W, PLACES>::FULL)
    each_vector<true, F, PLACES>(weight.line(start), visit);
  else
    each_vector<false, F, PLACES>(weight.line(start), visit);
}

// All weights of a line in a tile.
template <class F, class W, int PLACES>
SPARSIFY_INLINE void expand_line(F* to, const Masked<W, PLACES>& weight, uint32_t start) {
  each_vector<F>(weight, start, [&](int v, Vector<F> weights) __attribute__((always_inline)) {
    store(to + v * WIDTH<F>, weights);
  });
}

constexpr int LINES_AHEAD = 8;  // events between asking for a line and adding it

// As sum_events.
template <int TILE, int VECTORS, bool PAYLOAD, class Index, class F, class W>
SPARSIFY_INLINE void sum_masked(Vector<F> (&sum)[VECTORS], const Masked<W, TILE>& weight,
                                int64_t first, const BlockEvents<Index, F>& events) {
  const auto [index, payload, begin, end, last] = events;
  const uint32_t* const starts = weight.starts_of(first);
  for (int32_t k = begin; k < end; ++k) {
    const uint32_t soon = starts[index[k + LINES_AHEAD < last ? k + LINES_AHEAD : last]];
    const char* const asked = reinterpret_cast<const char*>(weight.line(soon));
    for (int64_t byte = 0; byte < weight.fetched; byte += 64) __builtin_prefetch(asked + byte);
    const F value = PAYLOAD ? payload[k] : F(1);
    const auto add = [&](int v, Vector<F> weights) __attribute__((always_inline)) {
      sum[v] = PAYLOAD ? fused(weights, value, sum[v]) : sum[v] + weights;
    };
    each_vector<F>(weight, starts[index[k]], add);
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
  const uint32_t* const starts = weight.starts_of(first);
  for (int64_t s = 0; s < senders; s += PANEL) {
    const int64_t some = senders - s < PANEL ? senders - s : PANEL;
    for (int64_t i = 0; i < some; ++i) expand_line(panel + i * TILE, weight, starts[s + i]);
    dense_panel<TILE>(sums, panel, source + s, source_row, rows, some, s == 0);
  }
}

// Where restricted products read the weights of a receiver and a block of senders.
template <class F, class W>
struct MaskedPanels {
  const Masked<W, SOURCE_BLOCK>& weight;
  F* line;  // [SOURCE_BLOCK]

  SPARSIFY_INLINE const F* operator()(int64_t sender, int64_t receiver) const {
    expand_line(line, weight, weight.starts_of(sender)[receiver]);
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
