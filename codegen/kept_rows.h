// Rows of weights without those that are zero, and what active senders add through them.
#pragma once

#include "kernel.h"

namespace sparsify {

constexpr int CHUNK = 16;           // weights of a unit that are kept one by one
constexpr int WIDEST_BAND = 4096;   // receivers whose sums stay in the first cache
constexpr int LISTED = 1024;        // units that are listed before they are added
constexpr int UNITS_AHEAD = 8;      // units between asking for one and adding it

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
  const char* weights;        // of units

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
    return reinterpret_cast<const W*>(weights + unit * BYTES);
  }
  const uint32_t* starts_of(int64_t first) const { return starts + first / band * (lines + 1); }
};

// The thread's part of a population: whole bands.
SPARSIFY_INLINE Share share_bands(int64_t neurons, int64_t band, const Team& team) {
  const int64_t bands = (neurons + band - 1) / band;
  const int64_t end = bands * (team.thread + 1) / team.threads * band;
  return {bands * team.thread / team.threads * band, end < neurons ? end : neurons};
}

// ---- units ----

#if defined(__AVX512F__)
typedef int32_t Places16 __attribute__((vector_size(64)));
typedef int32_t Places8 __attribute__((vector_size(32)));
typedef uint16_t Short16 __attribute__((vector_size(32), may_alias, aligned(2)));
typedef uint16_t Short8 __attribute__((vector_size(16), may_alias, aligned(2)));
SPARSIFY_INLINE Places16 places_of(const float*, const uint16_t* places) {
  return __builtin_convertvector(*reinterpret_cast<const Short16*>(places), Places16);
}
SPARSIFY_INLINE Places8 places_of(const double*, const uint16_t* places) {
  return __builtin_convertvector(*reinterpret_cast<const Short8*>(places), Places8);
}
SPARSIFY_INLINE Vector<float> take(const float* from, Places16 places) {
  return __builtin_ia32_gathersiv16sf(Vector<float>{}, from, places, uint16_t(-1), 4);
}
SPARSIFY_INLINE Vector<double> take(const double* from, Places8 places) {
  return __builtin_ia32_gathersiv8df(Vector<double>{}, from, places, uint8_t(-1), 8);
}
SPARSIFY_INLINE void put(float* to, Places16 places, Vector<float> values) {
  __builtin_ia32_scattersiv16sf(to, uint16_t(-1), places, values, 4);
}
SPARSIFY_INLINE void put(double* to, Places8 places, Vector<double> values) {
  __builtin_ia32_scattersiv8df(to, uint8_t(-1), places, values, 8);
}
#endif

// Adds what a unit's weights contribute; no place is there twice.
template <int RUN, bool PAYLOAD, class F, class W>
SPARSIFY_INLINE void add_unit(F* sums, const uint16_t* places, const W* weights, F payload) {
  if constexpr (RUN > 1) {
    F* const to = sums + int64_t(*places) * RUN;
    SPARSIFY_LANES
    for (int i = 0; i < RUN; ++i) to[i] += PAYLOAD ? F(weights[i]) * payload : F(weights[i]);
  } else {
#if defined(__AVX512F__)
    SPARSIFY_UNROLL
    for (int i = 0; i < CHUNK; i += WIDTH<F>) {
      const auto at = places_of(sums, places + i);
      const Vector<F> weight = load(weights + i);
      put(sums, at, take(sums, at) + (PAYLOAD ? weight * payload : weight));
    }
#else
    SPARSIFY_UNROLL
    for (int i = 0; i < CHUNK; ++i)
      sums[places[i]] += PAYLOAD ? F(weights[i]) * payload : F(weights[i]);
#endif
  }
}

// Units to be added one after the other, whoever sends them: a loop that the processor foresees,
// however short the rows of senders are.
template <int RUN, bool PAYLOAD, class F, class W>
struct Listed {
  typedef uint32_t Numbers __attribute__((vector_size(64), may_alias, aligned(4)));
  static constexpr Numbers NUMBERS = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  uint32_t unit[LISTED + 16 + UNITS_AHEAD];
  F payload[PAYLOAD ? LISTED + 16 : 1];
  int64_t count = 0;

  // At most WIDEST_BAND / 8 units, from `first` to `end`.
  SPARSIFY_INLINE void append(F* sums, const Kept<W, RUN>& from, uint32_t first, uint32_t end,
                              F value) {
    if (count + (end - first) > LISTED) add(sums, from, first);
    for (uint32_t at = first; at < end; at += 16) {
      const int64_t to = count + (at - first);
      *reinterpret_cast<Numbers*>(unit + to) = NUMBERS + at;
      if (PAYLOAD)
        for (int i = 0; i < 16; ++i) payload[to + i] = value;
    }
    count += end - first;
  }

  // `then` is the unit that is read afterwards.
  SPARSIFY_INLINE void add(F* sums, const Kept<W, RUN>& from, uint32_t then) {
    if (!count) return;
    for (int i = 0; i < UNITS_AHEAD; ++i) unit[count + i] = then + i;
    for (int64_t k = 0; k < count; ++k) {
      const int64_t at = unit[k], later = unit[k + UNITS_AHEAD];
      const char* const soon = reinterpret_cast<const char*>(from.places_of(later));
      if (RUN > 1) __builtin_prefetch(soon);
      const char* const lines = RUN == 1 ? soon : reinterpret_cast<const char*>(from.weights_of(later));
      SPARSIFY_UNROLL
      for (int64_t i = 0; i < Kept<W, RUN>::BYTES; i += 64) __builtin_prefetch(lines + i);
      add_unit<RUN, PAYLOAD>(sums, from.places_of(at), from.weights_of(at),
                             PAYLOAD ? payload[k] : F(1));
    }
    count = 0;
  }
};

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
  for (int64_t i = 0; i < width; ++i) sums[i] += line[i] * payload;
}

// Sums the events of a block.
template <bool PAYLOAD, int RUN, class Index, class F, class W>
SPARSIFY_INLINE void add_kept(F* sums, const Kept<W, RUN>& from, const uint32_t* starts,
                              const BlockEvents<Index, F>& events, int64_t width) {
  const auto [index, payload, begin, end, last] = events;
  const int64_t then = index[end <= last ? end : last];  // the sender that is read afterwards
  Listed<RUN, PAYLOAD, F, W> listed;
  for (int32_t k = begin; k < end; ++k) {
    const int64_t sender = index[k];
    const F value = PAYLOAD ? payload[k] : F(1);
    if (PAYLOAD && !(absolute(value) < infinity<F>())) {
      listed.add(sums, from, starts[sender]);
      add_to_all(sums, from, starts[sender], starts[sender + 1], value, width);
    } else {
      listed.append(sums, from, starts[sender], starts[sender + 1], value);
    }
  }
  listed.add(sums, from, starts[then]);
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
  for (int64_t i = 0; i < weight.band + CHUNK; ++i) block_sums[i] = F(0);
  for (; first < last; first += weight.band) {
    const int64_t width = last - first < weight.band ? last - first : weight.band;
    const uint32_t* const starts = weight.starts_of(first);
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t i = 0; i < width; ++i) sums[row * receivers + first + i] = F(0);
    for (int64_t block = 0; block < blocks; ++block) {
      for (int64_t row = 0; row < rows; ++row) {
        const BlockEvents<Index, F> some = events.at(row, block);
        if (some.begin == some.end) continue;
        if (some.payload)
          add_kept<true>(block_sums, weight, starts, some, width);
        else
          add_kept<false>(block_sums, weight, starts, some, width);
        F* const to = sums + row * receivers + first;
        SPARSIFY_LANES
        for (int64_t i = 0; i < width; ++i) {
          to[i] += block_sums[i];
          block_sums[i] = F(0);
        }
      }
    }
  }
}

}  // namespace sparsify
