// Rows of weights without those that are zero, and what active senders add through them.
#pragma once

#include "kernel.h"

namespace sparsify {

constexpr int CHUNK = 8;           // weights of a unit that are kept one by one
constexpr int WIDEST_BAND = 4096;  // receivers whose sums stay in the first cache
constexpr int ROWS_AHEAD = 4;      // events between asking for a line and adding it

// A weight as compress.h packs it. A line holds what a sender sends, or what a receiver gets. Its
// units are those of a band of places first: chunks of CHUNK weights with a place each if RUN is 1,
// else the weights of RUN places in a row, of which one is not zero. Zeros fill up the last chunk. The
// places of a chunk lie before its weights, those of runs lie apart.
template <class W, int RUN>
struct Kept {
  static constexpr int WEIGHTS = RUN == 1 ? CHUNK : RUN;
  static constexpr int64_t BYTES = WEIGHTS * sizeof(W) + (RUN == 1 ? 2 * CHUNK : 0);
  int64_t band, lines, size;  // size: of all places
  const uint32_t* starts;     // [bands][lines + 1] units
  const char* places;         // of units, from the band's first one, in runs
  const char* weights;        // of runs

  Kept() = default;
  explicit Kept(const void* packed) {
    const int64_t* const head = static_cast<const int64_t*>(packed);
    const char* const bytes = static_cast<const char*>(packed);
    band = head[0], lines = head[1], size = head[2];
    starts = reinterpret_cast<const uint32_t*>(bytes + head[3]);
    places = bytes + head[4];
    weights = bytes + head[5];
  }
  // Where weight i of a unit belongs, from the band's first place on.
  static int64_t place(const uint16_t* places, int i) {
    return RUN == 1 ? places[i] : int64_t(*places) * RUN + i;
  }
  const uint16_t* places_of(int64_t unit) const {
    return reinterpret_cast<const uint16_t*>(places + unit * (RUN == 1 ? BYTES : 2));
  }
  const W* weights_of(int64_t unit) const {
    const char* const first = RUN == 1 ? places + 2 * CHUNK : weights;
    return reinterpret_cast<const W*>(first + unit * BYTES);
  }
  // Where a unit begins, but for the places of runs.
  const char* unit(int64_t unit) const { return (RUN == 1 ? places : weights) + unit * BYTES; }
  const uint32_t* starts_of(int64_t first) const { return starts + first / band * (lines + 1); }
};

// The thread's part of a population: whole bands.
SPARSIFY_INLINE Share share_bands(int64_t neurons, int64_t band, const Team& team) {
  const int64_t bands = (neurons + band - 1) / band;
  const int64_t end = bands * (team.thread + 1) / team.threads * band;
  return {bands * team.thread / team.threads * band, end < neurons ? end : neurons};
}

// ---- units ----

// Weights of a chunk are read as vectors and their places as words: a Zen 4 core stores one sum in a
// cycle, and what comes beside that is kept below it. Gathers and scatters of the processor take twice
// as long there.
constexpr int FEW = 4;
template <class F>
struct FewOf;
template <>
struct FewOf<float> {
  typedef float type __attribute__((vector_size(FEW * 4)));
  typedef float anywhere __attribute__((vector_size(FEW * 4), may_alias, aligned(4)));
};
template <>
struct FewOf<double> {
  typedef double type __attribute__((vector_size(FEW * 8)));
  typedef double anywhere __attribute__((vector_size(FEW * 8), may_alias, aligned(8)));
};
template <class F>
using Few = typename FewOf<F>::type;

// FEW places that a word holds.
SPARSIFY_INLINE void split(uint64_t (&at)[FEW], uint64_t word) {
  SPARSIFY_UNROLL
  for (int k = 0; k < FEW; ++k) at[k] = word >> 16 * k & 0xFFFF;
}
// The same in fewer instructions, which takes two registers from the loop around it.
SPARSIFY_INLINE void split_fast(uint64_t (&at)[FEW], uint64_t word) {
  split(at, word);
#if defined(__BMI__) && defined(__x86_64__)
  at[1] = __builtin_ia32_bextr_u64(word, 16 << 8 | 16);
  at[2] = __builtin_ia32_bextr_u64(word, 16 << 8 | 32);
#endif
}

// Calls visit(i, weights, word) for the i-th FEW weights of a chunk; the word holds their places.
template <class F, class W, class Visit>
SPARSIFY_INLINE void each_few(const uint16_t* places, const W* weights, Visit visit) {
  if constexpr (sizeof(W) != sizeof(F)) {
    constexpr int SOME = CHUNK < WIDTH<F> ? CHUNK : WIDTH<F>;
    F wide[CHUNK];
    SPARSIFY_UNROLL
    for (int i = 0; i < CHUNK; i += SOME) {
      const Vector<F> loaded = load(weights + i);
      std::memcpy(wide + i, &loaded, SOME * sizeof(F));
    }
    each_few<F>(places, wide, visit);
  } else {
    SPARSIFY_UNROLL
    for (int i = 0; i < CHUNK / FEW; ++i) {
      uint64_t word;
      std::memcpy(&word, places + i * FEW, sizeof word);
      visit(i, *reinterpret_cast<const typename FewOf<F>::anywhere*>(weights + i * FEW), word);
    }
  }
}

// from[at[k]], in a register that waits for nothing else.
template <class F>
SPARSIFY_INLINE Few<F> collect(const F* from, const uint64_t (&at)[FEW]) {
  Few<F> some = {from[at[0]]};
  SPARSIFY_UNROLL
  for (int k = 1; k < FEW; ++k) some[k] = from[at[k]];
#if defined(__AVX__)
  asm("" : "+x"(some));  // else compilers compute with them one by one
#endif
  return some;
}

// Adds what a unit's weights contribute; no place is there twice.
template <int RUN, bool PAYLOAD, class F, class W>
SPARSIFY_INLINE void add_unit(F* sums, const uint16_t* places, const W* weights, F payload) {
  if constexpr (RUN > 1) {
    F* const to = sums + int64_t(*places) * RUN;
    SPARSIFY_LANES
    for (int i = 0; i < RUN; ++i)
      to[i] = PAYLOAD ? fused(F(weights[i]), payload, to[i]) : to[i] + F(weights[i]);
  } else {
    each_few<F>(places, weights, [&](int, Few<F> values, uint64_t word) {
      uint64_t at[FEW];
      split_fast(at, word);
      Few<F> some = collect(sums, at);
      some = PAYLOAD ? fused(values, payload - Few<F>{}, some) : some + values;
      SPARSIFY_UNROLL
      for (int k = 0; k < FEW; ++k) sums[at[k]] = some[k];
    });
  }
}

// Asks for a unit.
template <int64_t BYTES>
SPARSIFY_INLINE void fetch_unit(const char* unit) {
  SPARSIFY_UNROLL
  for (int64_t byte = 0; byte < BYTES; byte += 64) __builtin_prefetch(unit + byte);
}

// ---- gathers ----

// A payload that is infinite or NaN makes NaN of a zero: it is added to all receivers of a band.
template <int RUN, class F, class W>
__attribute__((noinline)) void add_to_all(F* sums, const Kept<W, RUN>& from, uint32_t first,
                                          uint32_t end, F payload, int64_t width) {
  F line[WIDEST_BAND + CHUNK];
  for (int64_t i = 0; i < width; ++i) line[i] = F(0);
  for (int64_t unit = first; unit < end; ++unit)
    for (int i = 0; i < Kept<W, RUN>::WEIGHTS; ++i)
      line[from.place(from.places_of(unit), i)] = F(from.weights_of(unit)[i]);
  for (int64_t i = 0; i < width; ++i) sums[i] = fused(line[i], payload, sums[i]);
}

// Sums the events of a block.
template <bool PAYLOAD, int RUN, class Index, class F, class W>
SPARSIFY_INLINE void add_kept(F* sums, const Kept<W, RUN>& from, const uint32_t* starts,
                              const BlockEvents<Index, F>& events, int64_t width) {
  const auto [index, payload, begin, end, last] = events;
  constexpr int64_t BYTES = Kept<W, RUN>::BYTES;
  for (int32_t k = begin; k < end; ++k) {
    const uint32_t later = starts[index[k + ROWS_AHEAD < last ? k + ROWS_AHEAD : last]];
    const uint32_t first = starts[index[k]], after = starts[index[k] + 1];
    const F value = PAYLOAD ? payload[k] : F(1);
    if (PAYLOAD && !(absolute(value) < infinity<F>())) {
      add_to_all(sums, from, first, after, value, width);
      continue;
    }
    // Each unit asks for its like in a later line, and for one more as that may be longer: asked for
    // all at once, a line takes all that a core can wait for.
    const char* asked = from.unit(later);
    if (RUN > 1) __builtin_prefetch(from.places_of(later));
    fetch_unit<BYTES>(asked);
    for (int64_t unit = first; unit < int64_t(after); ++unit) {
      fetch_unit<BYTES>(asked += BYTES);
      add_unit<RUN, PAYLOAD>(sums, from.places_of(unit), from.weights_of(unit), value);
    }
  }
}

template <class F>
SPARSIFY_INLINE void clear_sums(F* sums, int64_t width) {
  for (int64_t i = 0; i < width; ++i) sums[i] = F(0);
}

// Adds the sums of a block, which are cleared, to those of a row, or begins a row with them.
template <bool BEGINS, class F>
SPARSIFY_INLINE void take_sums(F* to, F* block_sums, int64_t width) {
  SPARSIFY_LANES
  for (int64_t i = 0; i < width; ++i) {
    to[i] = BEGINS ? block_sums[i] : to[i] + block_sums[i];
    block_sums[i] = F(0);
  }
}

// sums[row][r] = sum over the events of `row` of payload * weight[r][event], for receivers
// first .. last, which are whole bands; as gather_events does it, and with the same bits: what is
// left out would add a zero to a sum that is never -0.
template <int RUN, class Index, class F, class W>
void gather_kept_events(F* sums, int64_t receivers, const Kept<W, RUN>& weight,
                        const Events<Index, F>& events, int64_t rows, int64_t first,
                        int64_t last) {
  const int64_t blocks = blocks_of(events.senders);
  alignas(64) F block_sums[WIDEST_BAND + CHUNK];
  clear_sums(block_sums, weight.band + CHUNK);
  for (; first < last; first += weight.band) {
    const int64_t width = last - first < weight.band ? last - first : weight.band;
    const uint32_t* const starts = weight.starts_of(first);
    for (int64_t row = 0; row < rows; ++row)
      if (!events.count[row]) clear_sums(sums + row * receivers + first, width);
    for (int64_t block = 0; block < blocks; ++block) {
      for (int64_t row = 0; row < rows; ++row) {
        const BlockEvents<Index, F> some = events.at(row, block);
        if (some.begin == some.end) continue;
        if (some.payload)
          add_kept<true>(block_sums, weight, starts, some, width);
        else
          add_kept<false>(block_sums, weight, starts, some, width);
        F* const to = sums + row * receivers + first;
        if (some.begin)
          take_sums<false>(to, block_sums, width);
        else
          take_sums<true>(to, block_sums, width);
      }
    }
  }
}

}  // namespace sparsify
