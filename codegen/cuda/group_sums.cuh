// Sums of events for a slice of receivers whose weights lie in shared memory. The lanes of a warp are
// divided into groups, each of which has a batch row and a block of 256 senders; a lane adds up PER
// receivers side by side, of which it reads the weights at once.
#pragma once

#include "slice_sums.cuh"

namespace sparsify {

// How a warp divides COLUMNS receivers with weights W among its lanes, which read 16 bytes at most.
template <int COLUMNS, class W>
struct Groups {
  static constexpr bool IS_WIDE = sizeof(W) == 2 && COLUMNS > 64 && COLUMNS % 8 == 0;
  static constexpr int PER = sizeof(W) == 8 ? 2 : IS_WIDE ? 8 : 4;
  static constexpr int LANES = (COLUMNS + PER - 1) / PER;  // that all receivers need
  static constexpr int MANY = LANES > 16 ? 1 : LANES > 10 ? 2 : LANES > 8 ? 3 : 4;
  static constexpr int WIDTH = MANY > 1 ? LANES : WARP;  // lanes of a group
  static constexpr int PASSES = (LANES + WARP - 1) / WARP;
};

// The lists of a warp, one for each group. Where there are several, they are of half a block: they are
// in the way of weights.
template <class F, bool HAS_PAYLOADS, int MANY>
struct GroupEvents {
  static constexpr int SENDERS = MANY > 1 ? BLOCK / 2 : BLOCK, LISTS = MANY;
  BlockEvents<F, HAS_PAYLOADS, SENDERS> of[MANY];
};

template <class W, int PER>
struct alignas(sizeof(W) * PER) Several {
  W of[PER];
};

// Adds the events of a group's list to its sums, ascending. The longest list of the warp has `longest`.
// `weights` are those of the list's first sender, and of the lane's first receiver.
//
// Behind the end of a list are events with a payload of 0: what began at +0 never becomes -0, and adding
// a zero changes nothing. The product with a payload of 1 is exact, and added with one rounding.
template <int COLUMNS, int PER, class W, class F, bool HAS_PAYLOADS, int SENDERS>
SPARSIFY_INLINE void add_list(F (&sum)[PER], const BlockEvents<F, HAS_PAYLOADS, SENDERS>& events,
                              int count, int longest, const W* weights) {
#pragma unroll 1
  for (int k = 0; k < longest; k += AT_ONCE) {
    const bool any = k < count;
    const uint32_t index = any ? events.index[k / AT_ONCE] : 0;
    Several<W, PER> weight[AT_ONCE];
#pragma unroll
    for (int j = 0; j < AT_ONCE; ++j)
      weight[j] = *reinterpret_cast<const Several<W, PER>*>(weights +
                                                            int(index >> 8 * j & 255) * COLUMNS);
    Payloads<F> payload = {};
    if constexpr (HAS_PAYLOADS) {
      if (any) payload = events.payload[k / AT_ONCE];
    } else {
#pragma unroll
      for (int j = 0; j < AT_ONCE; ++j) payload.of[j] = k + j < count ? F(1) : F(0);
    }
#pragma unroll
    for (int j = 0; j < AT_ONCE; ++j)
#pragma unroll
      for (int p = 0; p < PER; ++p) {
        const F own = weight[j].of[p];
        sum[p] = HAS_PAYLOADS ? sum[p] + own * payload.of[j] : fused(own, payload.of[j], sum[p]);
      }
  }
}

// sums[row][block][i] = sum over the events of payload * weight, ascending, from +0, nothing contracted:
// for rows low .. high - 1 and all blocks of SENDERS, which the groups of all warps take in turn.
//
// `source_of(row)` is whom a row hears. Weights are finite; those of receivers behind the last one of the
// slice are 0. Returns how many events there are, to all lanes of the warps that have found them.
template <int SENDERS, class Lists, class F, int ROWS, int BLOCKS, int COLUMNS, class W, class SourceOf>
SPARSIFY_INLINE int add_groups(F (&sums)[ROWS][BLOCKS][COLUMNS],
                               const Resident<COLUMNS, F, W>& weights, Lists& lists, int low, int high,
                               const SourceOf& source_of) {
  typedef Groups<COLUMNS, W> By;
  static_assert(Lists::LISTS == By::MANY, "as Division has it");
  constexpr int PARTS = BLOCK / Lists::SENDERS;  // one, or there is one pass
  const int items = high * BLOCKS, apart = warps_of();
  const int group = lane_of() / By::WIDTH < By::MANY ? lane_of() / By::WIDTH : By::MANY - 1;
  const int lane = lane_of() - group * By::WIDTH;
  int found = 0;
#pragma unroll 1
  for (int first = low * BLOCKS + warp_of(); first < items; first += By::MANY * apart) {
    const int own = first + group * apart;
    F sum[By::PER] = {};
#pragma unroll 1
    for (int part = 0; part < PARTS; ++part) {
      Heard<decltype(source_of(0)), Lists::SENDERS / WARP> heard[By::MANY];
#pragma unroll
      for (int g = 0; g < By::MANY; ++g) {
        const int item = first + g * apart;
        if (item < items)
          heard[g].hear(source_of(item / BLOCKS), item % BLOCKS * PARTS + part, SENDERS);
      }
      int count = 0, longest = 0;
      __syncwarp();  // all have read the lists before
#pragma unroll
      for (int g = 0; g < By::MANY; ++g) {
        const int events = first + g * apart < items ? write_list(lists.of[g], heard[g]) : 0;
        if (g == group) count = events;
        if (events > longest) longest = events;
        found += events;
      }
      __syncwarp();  // the lists are there
      const int begin = count > 0 ? own % BLOCKS * BLOCK + part * Lists::SENDERS : 0;
#pragma unroll 1
      for (int pass = 0; pass < By::PASSES; ++pass) {
        const int i = (pass * WARP + lane) * By::PER;
        const bool here = i < COLUMNS;
        const W* const from = weights.weights + begin * COLUMNS + (here ? i : 0);
        add_list<COLUMNS>(sum, lists.of[group], count, longest, from);
        if (part < PARTS - 1) continue;
#pragma unroll
        for (int p = 0; p < By::PER; ++p) {
          if (here && own < items) sums[own / BLOCKS][own % BLOCKS][i + p] = sum[p];
          sum[p] = F(0);
        }
      }
    }
  }
  return found;
}

}  // namespace sparsify
