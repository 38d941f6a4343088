// Products with rows of weights that have no zeros, for whole rows of values or for wanted sums: a
// receiver reads the values of those senders that it has weights for.
#pragma once

#include "kept_rows.h"
#include "restricted.h"

namespace sparsify {

// Batch rows whose values of a sender lie side by side, so that one weight serves all of them.
template <class F>
constexpr int LANES = WIDTH<F>;
constexpr int64_t lanes_of(int64_t senders) { return (senders + 31) / 32 * 32; }  // whole runs
constexpr int RECEIVERS = 64;  // of which it is known at once who wants them

// What a product reads of `rows` batch rows. `lanes` [lanes_of(senders)][LANES] is scratch memory.
template <class F>
struct Values {
  const F* source;
  int64_t row;  // distance of rows
  uint64_t wild;
  F* lanes;
};

template <class F>
SPARSIFY_INLINE void transpose(const Values<F>& from, int64_t first, int64_t rows, int64_t senders) {
  for (int64_t s = 0; s < lanes_of(senders); ++s)
    for (int r = 0; r < LANES<F>; ++r)
      from.lanes[s * LANES<F> + r] =
          s < senders && r < rows ? from.source[(first + r) * from.row + s] : F(0);
}

// The units of one receiver.
template <class W, int RUN>
struct Line {
  const Kept<W, RUN>& weight;
  uint32_t first, end;
  int64_t base;  // place of the band's first sender

  template <class Visit>
  SPARSIFY_INLINE void each(Visit visit) const {
    _Pragma("GCC unroll 2")
    for (int64_t unit = first; unit < int64_t(end); ++unit)
      visit(weight.places_of(unit), weight.weights_of(unit));
  }
};

// Calls visit(line) for the part of a receiver's weights in each band of senders.
template <class W, int RUN, class Visit>
SPARSIFY_INLINE void each_band(const Kept<W, RUN>& weight, int64_t receiver, Visit visit) {
  const uint32_t* starts = weight.starts + receiver;
  for (int64_t base = 0; base < weight.size; base += weight.band, starts += weight.lines + 1)
    visit(Line<W, RUN>{weight, starts[0], starts[1], base});
}

// The sum of one batch row and receiver.
template <int RUN, class F, class W>
SPARSIFY_INLINE F dot(const Kept<W, RUN>& weight, int64_t receiver, const F* source) {
  F result = F(0);
  each_band(weight, receiver, [&](const Line<W, RUN>& line) {
    const F* const from = source + line.base;
    if constexpr (RUN > 1) {
      const int64_t whole = (weight.size - line.base) / RUN;  // the last run may lack senders
      F sum[RUN] = {};
      line.each([&](const uint16_t* place, const W* weights) {
        const F* const values = from + int64_t(*place) * RUN;
        const int64_t left = weight.size - line.base - int64_t(*place) * RUN;
        if (*place < whole) {
          SPARSIFY_LANES
          for (int i = 0; i < RUN; ++i) sum[i] += F(weights[i]) * values[i];
        } else {
          for (int64_t i = 0; i < left; ++i) sum[i] += F(weights[i]) * values[i];
        }
      });
      for (int i = 0; i < RUN; ++i) result += sum[i];
    } else {
      Few<F> sum[CHUNK / FEW] = {};
      line.each([&](const uint16_t* places, const W* weights) {
        each_few<F>(places, weights, [&](int i, Few<F> some, uint64_t word) {
          uint64_t at[FEW];
          split(at, word);
          sum[i] = fused(some, collect(from, at), sum[i]);
        });
      });
      static_assert(CHUNK / FEW == 2, "so many sums");
      const Few<F> all = sum[0] + sum[1];
      result += (all[0] + all[1]) + (all[2] + all[3]);
    }
  });
  return result;
}

// The sum where a value is infinite or NaN: then the zeros that were left out count as well.
template <int RUN, class F, class W>
__attribute__((noinline)) F dot_with_zeros(const Kept<W, RUN>& weight, int64_t receiver,
                                           const F* source) {
  int64_t infinite = 0;
  for (int64_t s = 0; s < weight.size; ++s) infinite += !(absolute(source[s]) < infinity<F>());
  F sum = F(0);
  each_band(weight, receiver, [&](const Line<W, RUN>& line) {
    line.each([&](const uint16_t* places, const W* weights) {
      for (int i = 0; i < Kept<W, RUN>::WEIGHTS; ++i) {
        const int64_t s = line.base + weight.place(places, i);
        if (F(weights[i]) == F(0)) continue;
        infinite -= !(absolute(source[s]) < infinity<F>());
        sum += F(weights[i]) * source[s];
      }
    });
  });
  return infinite ? not_a_number<F>() : sum;
}

// The sums of LANES batch rows and one receiver.
template <int RUN, class F, class W>
SPARSIFY_INLINE Vector<F> dots(const Kept<W, RUN>& weight, int64_t receiver, const F* lanes) {
  Vector<F> sum[4] = {};
  each_band(weight, receiver, [&](const Line<W, RUN>& line) {
    line.each([&](const uint16_t* places, const W* weights) {
      SPARSIFY_UNROLL
      for (int i = 0; i < Kept<W, RUN>::WEIGHTS; ++i) {
        const int64_t s = line.base + weight.place(places, i);
        const Vector<F> values = load(lanes + s * LANES<F>);
        sum[i % 4] = fused(values, F(weights[i]), sum[i % 4]);
      }
    });
  });
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

// The sums of one receiver for those of up to LANES batch rows, from `row` on, that want it.
template <int RUN, class F, class W>
SPARSIFY_INLINE void sum_receiver(F* sums, int64_t receivers, const Kept<W, RUN>& weight,
                                  int64_t receiver, const Values<F>& from, int64_t row,
                                  uint64_t wanted, bool transposed) {
  F* const to = sums + row * receivers + receiver;
  if (transposed && __builtin_popcountll(wanted) >= LANES<F> / 4) {
    alignas(64) F lanes[LANES<F>];
    store(lanes, dots(weight, receiver, from.lanes));
    for (uint64_t left = wanted; left; left &= left - 1)
      to[__builtin_ctzll(left) * receivers] = lanes[__builtin_ctzll(left)];
  } else {
    for (uint64_t left = wanted; left; left &= left - 1) {
      const int64_t at = __builtin_ctzll(left);
      to[at * receivers] = dot(weight, receiver, from.source + (row + at) * from.row);
    }
  }
  for (uint64_t left = wanted & from.wild >> row; left; left &= left - 1) {
    const int64_t at = __builtin_ctzll(left);
    to[at * receivers] = dot_with_zeros(weight, receiver, from.source + (row + at) * from.row);
  }
}

// Visits receivers first .. last: want(wanted, tile, row, here) says who wants RECEIVERS of them.
template <int RUN, class F, class W, class Want>
SPARSIFY_INLINE int64_t each_receiver(F* sums, int64_t receivers, const Kept<W, RUN>& weight,
                                      const Values<F>& from, int64_t rows, int64_t first,
                                      int64_t last, Want want) {
  int64_t count = 0;
  for (int64_t row = 0; row < rows; row += LANES<F>) {
    const int64_t here = rows - row < LANES<F> ? rows - row : LANES<F>;
    const bool transposed = here >= LANES<F> / 2 && here >= 4;
    if (transposed) transpose(from, row, here, weight.size);
    for (int64_t tile = first; tile < last; tile += RECEIVERS) {
      const int64_t width = last - tile < RECEIVERS ? last - tile : RECEIVERS;
      uint64_t wanted[RECEIVERS];
      want(wanted, tile, row, here);
      for (int64_t i = 0; i < width; ++i) {
        count += __builtin_popcountll(wanted[i]);
        sum_receiver(sums, receivers, weight, tile + i, from, row, wanted[i], transposed);
      }
    }
  }
  return count;
}

// sums[row][r] = sum over all senders of source[row][s] * weight[r][s], for receivers first .. last.
// The order of additions is free here and products are fused: compared by a bound, not by bits.
template <int RUN, class F, class W>
inline void gather_kept(F* sums, int64_t receivers, const Kept<W, RUN>& weight,
                        const Values<F>& from, int64_t rows, int64_t first, int64_t last) {
  each_receiver(sums, receivers, weight, from, rows, first, last,
                [](uint64_t* wanted, int64_t, int64_t, int64_t here) {
                  for (int i = 0; i < RECEIVERS; ++i) wanted[i] = ~uint64_t(0) >> (64 - here);
                });
}

// The same where a row wants the sum, else 0. Returns how many were wanted.
template <int RUN, class F, class W, class Mask>
inline int64_t gather_kept_restricted(F* sums, int64_t receivers, const Kept<W, RUN>& weight,
                                      const Values<F>& from, const Only<Mask>& only, int64_t rows,
                                      int64_t first, int64_t last) {
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t i = first; i < last; ++i) sums[row * receivers + i] = F(0);
  return each_receiver(sums, receivers, weight, from, rows, first, last,
                       [&](uint64_t* wanted, int64_t tile, int64_t row, int64_t here) {
                         const Only<Mask> some(only.values + row * only.row, only.row,
                                               only.wild >> row, only.receivers, tile);
                         find_wanted<RECEIVERS>(wanted, some, here);
                         // Wild rows behind the last one at hand were shifted in.
                         for (int i = 0; i < RECEIVERS; ++i) wanted[i] &= ~uint64_t(0) >> (64 - here);
                       });
}

}  // namespace sparsify
