// Rows of weights of which only runs of WIDTH places are kept, those with a weight that is not zero,
// each with its place: compressed rows have runs of one weight.
//
// What is left out is 0 and adds nothing as long as what it is multiplied with is finite. Where it may
// not be, kernels take the whole rows.
#pragma once

#include "gather.cuh"

namespace sparsify {

// ---- events: a warp adds the row of one sender after the other ----

// In memory, as counts[sender][band], places[sender][band][ROOM] and kept[sender][band][ROOM][WIDTH]:
// the runs of a sender in each band of the receivers. A band are those of a warp, see Columns.
// A weight W is a float F in memory.
template <int WIDTH, int BANDS, int ROOM, class Place, class F, class W = F>
struct KeptRuns {
  const uint16_t* counts;
  const Place* places;
  const W* kept;

  SPARSIFY_INLINE KeptRuns(const uint16_t* counts, const Place* places, const W* kept)
      : counts(counts), places(places), kept(kept) {}

  // Weights of a sender in a band.
  SPARSIFY_INLINE int count(int sender, int band) const {
    return counts[sender * BANDS + band] * WIDTH;
  }
  SPARSIFY_INLINE F weight(int sender, int band, int i) const {
    return kept[(int64_t(sender) * BANDS + band) * (ROOM * WIDTH) + i];
  }
  // Where weight i belongs in the band.
  SPARSIFY_INLINE int place(int sender, int band, int i) const {
    return places[(int64_t(sender) * BANDS + band) * ROOM + i / WIDTH] * WIDTH + i % WIDTH;
  }
};

// The sums of gather_events. `own` is memory of the warp for a sum of each of its receivers, `band` the
// number of these.
//
// A sender's receivers are different ones: lanes add to them side by side. The next sender's are added
// afterwards, so that every sum has the order of ir.Gather. Weights of AHEAD senders are asked for
// before the first of them is added.
template <int WIDTH, int BANDS, int ROOM, class Place, class F, class W, int PER, int SENDERS,
          class Payloads>
SPARSIFY_INLINE void gather_runs(F (&sums)[PER],
                                 const KeptRuns<WIDTH, BANDS, ROOM, Place, F, W>& runs, int band, F* own,
                                 const Events<SENDERS>& events, const Payloads& payload) {
  constexpr int AHEAD = sizeof(F) == 4 ? 6 : 4;
#pragma unroll
  for (int k = 0; k < PER; ++k) sums[k] = own[k * WARP + lane_of()] = F(0);
  __syncwarp();  // the zeros are there
#pragma unroll 1
  for (int block = 0; block < blocks_of(SENDERS); ++block) {
    const int end = block * BLOCK + events.counts[block];
#pragma unroll 1
    for (int e = block * BLOCK; e < end; e += AHEAD) {
      int counts[AHEAD], places[AHEAD];
      F weights[AHEAD];
#pragma unroll
      for (int a = 0; a < AHEAD; ++a)
        counts[a] = e + a < end ? runs.count(events.index[e + a], band) : 0;
#pragma unroll
      for (int a = 0; a < AHEAD; ++a)
        if (lane_of() < counts[a]) {
          const int sender = events.index[e + a];
          places[a] = runs.place(sender, band, lane_of());
          weights[a] = runs.weight(sender, band, lane_of());
        }
#pragma unroll
      for (int a = 0; a < AHEAD; ++a) {
        if (lane_of() < counts[a]) {
          F& sum = own[places[a]];
          sum = payload.add(sum, weights[a], events.index[e + a]);
        }
        for (int i = WARP + lane_of(); i < counts[a]; i += WARP) {
          const int sender = events.index[e + a];
          F& sum = own[runs.place(sender, band, i)];
          sum = payload.add(sum, runs.weight(sender, band, i), sender);
        }
        __syncwarp();  // the sender is added
      }
    }
#pragma unroll
    for (int k = 0; k < PER; ++k) {
      sums[k] += own[k * WARP + lane_of()];
      own[k * WARP + lane_of()] = F(0);
    }
    __syncwarp();  // the zeros are there
  }
}

// Whether no event's payload is infinite or NaN; a whole warp asks.
template <int SENDERS>
SPARSIFY_INLINE bool has_finite_payloads(const Events<SENDERS>&, const One&) {
  return true;
}
template <int SENDERS, class F>
SPARSIFY_INLINE bool has_finite_payloads(const Events<SENDERS>& events, const Payload<F>& payload) {
  bool finite = true;
  for (int block = 0; block < blocks_of(SENDERS); ++block)
    for (int e = block * BLOCK + lane_of(); e < block * BLOCK + events.counts[block]; e += WARP)
      finite &= is_finite(payload.values[events.index[e]]);
  return __all_sync(ALL, finite);
}

// ---- restricted sums: a warp adds the row of a receiver; it is one band ----

// The last run may end behind the last sender.
template <int WIDTH, int ROOM, class Place, class F, class W>
SPARSIFY_INLINE F part_of_row(const KeptRuns<WIDTH, 1, ROOM, Place, F, W>& runs, const F* values,
                              int senders, int receiver) {
  F part = F(0);
  const int count = runs.count(receiver, 0);
#pragma unroll 4
  for (int i = lane_of(); i < count; i += WARP) {
    const int sender = runs.place(receiver, 0, i);
    if (WIDTH == 1 || sender < senders)
      part = fused(runs.weight(receiver, 0, i), values[sender], part);
  }
  return part;
}

// ---- sums over all senders: a thread adds the row of its receiver ----

// In memory, as counts[receiver], and places and kept [receiver / 32][ROOM][receiver % 32]: the lanes of
// a warp read side by side. A place is a sender.
template <int ROOM, class Place, class F, class W = F>
struct KeptSenders {
  const uint16_t* counts;
  const Place* places;
  const W* kept;

  SPARSIFY_INLINE KeptSenders(const uint16_t* counts, const Place* places, const W* kept)
      : counts(counts), places(places), kept(kept) {}
};

// The sums of gather_dense, of values that are finite.
template <int ROOM, class Place, class W, int PER, int THREADS, class F>
SPARSIFY_INLINE void gather_kept(F (&sums)[PER], const KeptSenders<ROOM, Place, F, W>& senders,
                                 const F* values, const Columns<PER, THREADS>& columns) {
  constexpr int PARTS = 4;
#pragma unroll
  for (int k = 0; k < PER; ++k) {
    const int n = columns.at[k], count = senders.counts[n];
    const int64_t first = int64_t(n / WARP) * (ROOM * WARP) + n % WARP;
    const Place* const places = senders.places + first;
    const W* const kept = senders.kept + first;
    F parts[PARTS] = {};
    int i = 0;
    for (; i + PARTS <= count; i += PARTS)
#pragma unroll
      for (int p = 0; p < PARTS; ++p)
        parts[p] = fused(kept[(i + p) * WARP], values[places[(i + p) * WARP]], parts[p]);
    for (; i < count; ++i) parts[0] = fused(kept[i * WARP], values[places[i * WARP]], parts[0]);
    sums[k] = (parts[0] + parts[1]) + (parts[2] + parts[3]);
  }
}

}  // namespace sparsify
