// Sums over senders, for PER receivers of a thread: those in `columns`, of one row of the batch.
//
// Weights are packed as [sender][receiver], of restricted products as [receiver][sender].
#pragma once

#include "events.cuh"

namespace sparsify {

// Receivers first + k * THREADS + thread of a population, k < PER. What is behind its last one stands
// for that one: it is computed and not used.
template <int PER, int THREADS>
struct Columns {
  int at[PER];
  SPARSIFY_INLINE Columns(int first, int end) {
#pragma unroll
    for (int k = 0; k < PER; ++k) {
      const int n = first + k * THREADS + int(threadIdx.x);
      at[k] = n < end ? n : end - 1;
    }
  }
};

// Weights in memory, as [sender][receiver] with rows of ROW elements, or the other way round. Sums take
// whatever says which weight a row has at a place in this way. A weight W is a float F in memory.
template <int ROW, class F, class W>
struct Rows {
  const W* weights;
  SPARSIFY_INLINE explicit Rows(const W* weights) : weights(weights) {}
  SPARSIFY_INLINE F operator()(int row, int at) const { return weights[int64_t(row) * ROW + at]; }
};

// The payload of an event: 1, or the sender's value.
struct One {
  template <class F>
  static SPARSIFY_INLINE F add(F sum, F weight, int) {
    return sum + weight;
  }
};
template <class F>
struct Payload {
  const F* values;
  SPARSIFY_INLINE explicit Payload(const F* values) : values(values) {}
  SPARSIFY_INLINE F add(F sum, F weight, int sender) const {
    return fused(weight, values[sender], sum);
  }
};

// sums[k] = sum over the active senders of payload * weight[sender][receiver k].
//
// Order of additions: ascending within a block of 256 senders, then the block sums, each from +0.
// A product is added with one rounding, and nothing else is contracted (--fmad=false): every backend
// and every batch size gets the same bits.
// AHEAD weights are asked for before the first of them is added.
template <class Weights, int PER, int THREADS, class F, int SENDERS, class Payloads>
SPARSIFY_INLINE void gather_events(F (&sums)[PER], const Weights& weight,
                                   const Events<SENDERS>& events, const Payloads& payload,
                                   const Columns<PER, THREADS>& columns) {
  constexpr int AHEAD = PER == 1 ? 8 : PER <= 4 ? 4 : 2;
#pragma unroll
  for (int k = 0; k < PER; ++k) sums[k] = F(0);
#pragma unroll 1
  for (int block = 0; block < blocks_of(SENDERS); ++block) {
    const int end = block * BLOCK + events.counts[block];
    F sum[PER] = {};
    for (int e = block * BLOCK; e < end; e += AHEAD) {
      int senders[AHEAD];
      F weights[AHEAD][PER];
#pragma unroll
      for (int a = 0; a < AHEAD; ++a) {
        senders[a] = events.index[e + a < end ? e + a : end - 1];
#pragma unroll
        for (int k = 0; k < PER; ++k) weights[a][k] = weight(senders[a], columns.at[k]);
      }
#pragma unroll
      for (int a = 0; a < AHEAD; ++a)
        if (e + a < end)
#pragma unroll
          for (int k = 0; k < PER; ++k) sum[k] = payload.add(sum[k], weights[a][k], senders[a]);
    }
#pragma unroll
    for (int k = 0; k < PER; ++k) sums[k] += sum[k];
  }
}

// The same over all senders, of weights that are not finite: 0 * inf is NaN, as in a dense product.
// Of finite ones it gives the same bits: it adds zeros to sums that are never -0.
// The payload of a sender that is not in the list is 0.
template <class F, int SENDERS>
SPARSIFY_INLINE F payload_of(const Events<SENDERS>& events, const One&, int sender, int& next) {
  const int block = sender / BLOCK;
  if (sender % BLOCK == 0) next = block * BLOCK;
  const bool active = next < block * BLOCK + events.counts[block] && events.index[next] == sender;
  next += active;
  return F(int(active));
}
template <class F, int SENDERS>
SPARSIFY_INLINE F payload_of(const Events<SENDERS>&, const Payload<F>& payload, int sender, int&) {
  return payload.values[sender];
}
template <class Weights, int PER, int THREADS, class F, int SENDERS, class Payloads>
SPARSIFY_INLINE void gather_all(F (&sums)[PER], const Weights& weight,
                                const Events<SENDERS>& events, const Payloads& payload,
                                const Columns<PER, THREADS>& columns) {
  F sum[PER] = {};
  int next = 0;
#pragma unroll
  for (int k = 0; k < PER; ++k) sums[k] = F(0);
#pragma unroll 1
  for (int sender = 0; sender < SENDERS; ++sender) {
    const F value = payload_of<F>(events, payload, sender, next);
    const bool closes = sender % BLOCK == BLOCK - 1 || sender == SENDERS - 1;
#pragma unroll
    for (int k = 0; k < PER; ++k) {
      sum[k] = fused(weight(sender, columns.at[k]), value, sum[k]);
      sums[k] += closes ? sum[k] : F(0);
      sum[k] = closes ? F(0) : sum[k];
    }
  }
}

// gather_events where the weights are finite, else gather_all. `total` is not finite if one of them is not.
template <class Weights, int PER, int THREADS, class F, int SENDERS, class Payloads>
SPARSIFY_INLINE void gather(F (&sums)[PER], const Weights& weight, const F* total,
                            const Events<SENDERS>& events, const Payloads& payload,
                            const Columns<PER, THREADS>& columns) {
  if (is_finite(*total))
    gather_events(sums, weight, events, payload, columns);
  else
    gather_all(sums, weight, events, payload, columns);
}
template <int ROW, int PER, int THREADS, class F, class W, int SENDERS, class Payloads>
SPARSIFY_INLINE void gather(F (&sums)[PER], const W* weight, const F* total,
                            const Events<SENDERS>& events, const Payloads& payload,
                            const Columns<PER, THREADS>& columns) {
  gather(sums, Rows<ROW, F, W>(weight), total, events, payload, columns);
}

// Adds what a sender contributes to the sums, with one rounding each.
template <class Weights, int PER, int THREADS, class F>
SPARSIFY_INLINE void add_sender(F (&sums)[PER], const Weights& weight, const F* values, int sender,
                                const Columns<PER, THREADS>& columns) {
#pragma unroll
  for (int k = 0; k < PER; ++k)
    sums[k] = fused(weight(sender, columns.at[k]), values[sender], sums[k]);
}

// sums[k] = sum over all senders of values[sender] * weight[sender][receiver k].
// The order of additions is free here and products are fused: compared by a bound, not by bits. Each
// sum is made of several PARTS, so that additions need not wait for each other.
template <class Weights, int PER, int THREADS, class F>
SPARSIFY_INLINE void gather_dense(F (&sums)[PER], const Weights& weight, const F* values,
                                  int senders, const Columns<PER, THREADS>& columns) {
  constexpr int PARTS = PER == 1 ? 8 : PER <= 4 ? 4 : 2;
  F parts[PARTS][PER] = {};
  const int whole = senders / PARTS * PARTS;
#pragma unroll 1
  for (int first = 0; first < whole; first += PARTS)
#pragma unroll
    for (int p = 0; p < PARTS; ++p)
      add_sender(parts[p], weight, values, first + p, columns);
  for (int sender = whole; sender < senders; ++sender)
    add_sender(parts[0], weight, values, sender, columns);
#pragma unroll
  for (int k = 0; k < PER; ++k) {
    sums[k] = parts[0][k];
#pragma unroll
    for (int p = 1; p < PARTS; ++p) sums[k] += parts[p][k];
  }
}
template <int ROW, int PER, int THREADS, class F, class W>
SPARSIFY_INLINE void gather_dense(F (&sums)[PER], const W* weight, const F* values, int senders,
                                  const Columns<PER, THREADS>& columns) {
  gather_dense(sums, Rows<ROW, F, W>(weight), values, senders, columns);
}

// What `weight` says of one receiver, added up by a whole warp: a part to each lane.
template <class Weights, class F>
SPARSIFY_INLINE F part_of_row(const Weights& weight, const F* values, int senders, int receiver) {
  F part = F(0);
#pragma unroll 4
  for (int sender = lane_of(); sender < senders; sender += WARP)
    part = fused(weight(receiver, sender), values[sender], part);
  return part;
}

// sum = sum over all senders of values[sender] * weight[n][sender] where `wanted`, else 0. The lanes
// of a warp, whose n are consecutive, add up one wanted receiver after the other. Returns to one of
// them how many there were. The order of additions is the same whoever else is wanted.
template <class Weights, class F>
SPARSIFY_INLINE int gather_wanted(F& sum, const Weights& weight, const F* values, int senders, int n,
                                  bool wanted) {
  const uint32_t all = __ballot_sync(ALL, wanted);
  sum = F(0);
  for (uint32_t left = all; left; left &= left - 1) {
    const int lane = __ffs(left) - 1;
    const F whole = warp_sum(part_of_row(weight, values, senders, n - lane_of() + lane));
    if (lane_of() == lane) sum = whole;
  }
  return lane_of() == 0 ? __popc(all) : 0;
}
template <int ROW, class F, class W>
SPARSIFY_INLINE int gather_wanted(F& sum, const W* weight, const F* values, int senders, int n,
                                  bool wanted) {
  return gather_wanted(sum, Rows<ROW, F, W>(weight), values, senders, n, wanted);
}

// Clears the sums that nobody wants; counts like gather_wanted.
template <class F>
SPARSIFY_INLINE int keep_wanted(F& sum, bool wanted) {
  if (!wanted) sum = F(0);
  const int count = __popc(__ballot_sync(ALL, wanted));
  return lane_of() == 0 ? count : 0;
}

}  // namespace sparsify
