// Sums of events for a slice of receivers whose weights lie in shared memory. The lanes of a warp are
// divided into groups, each of which has a batch row and a block of 256 senders; a lane adds up PER
// receivers side by side, of which it reads the weights at once.
#pragma once

#include "slice_sums.cuh"

namespace sparsify {

// Columns of several products, filled up to what a lane reads at once.
constexpr SPARSIFY_INLINE int whole_columns(int columns) { return (columns + 3) / 4 * 4; }

// How a warp divides COLUMNS receivers with weights W among its lanes, which read 16 bytes at most.
template <int COLUMNS, class W>
struct Groups {
  static constexpr bool IS_WIDE = sizeof(W) == 2 && COLUMNS > 64 && COLUMNS % 8 == 0;
  static constexpr int PER = sizeof(W) == 8 ? 2 : IS_WIDE ? 8 : 4;
  static constexpr int LANES = (COLUMNS + PER - 1) / PER;  // that all receivers need
  static constexpr int MANY = LANES > 16 ? 1 : LANES > 10 ? 2 : LANES > 8 ? 3 : 4;
  static constexpr int WIDTH = MANY > 1 ? LANES : WARP;  // lanes of a group
  static constexpr int PASSES = (LANES + WARP - 1) / WARP;

  static SPARSIFY_INLINE int group() {
    return lane_of() / WIDTH < MANY ? lane_of() / WIDTH : MANY - 1;
  }
  // Behind the last group there are lanes without receivers.
  static SPARSIFY_INLINE int lane(int group) { return lane_of() - group * WIDTH; }
};

// The lists of a warp, one for each group. Where there are several, they are of half a block: they are
// in the way of weights.
template <class F, bool HAS_PAYLOADS, int MANY>
struct GroupEvents {
  static constexpr int SENDERS = MANY > 1 ? BLOCK / 2 : BLOCK, LISTS = MANY;
  static constexpr bool HAS_VALUES = HAS_PAYLOADS;
  BlockEvents<F, HAS_PAYLOADS, SENDERS> of[MANY];
};

template <class W, int PER>
struct alignas(sizeof(W) * PER) Several {
  W of[PER];
};

// Adds the events of a group's list to its sums, ascending. The longest list of the warp has `longest`.
// The weight of the list's first sender and of the lane's first receiver is the one at `first`.
//
// Behind the end of a list are events with a payload of 0: what began at +0 never becomes -0, and adding
// a zero changes nothing.
template <int COLUMNS, bool HAS_PAYLOADS, int PER, class W, class F>
SPARSIFY_INLINE void add_list(F (&sum)[PER], const uint32_t* events, const Payloads<F>* payloads,
                              int count, int longest, const W* weights, int first) {
  const char* const from =
      reinterpret_cast<const char*>(weights) + hidden_multiple(first * int(sizeof(W)));
  uint32_t index = count > 0 ? *events : 0;
  Payloads<F> payload = {};
  if (HAS_PAYLOADS && count > 0) payload = *payloads;
#pragma unroll 2
  for (int k = 0; k < longest; k += AT_ONCE) {
    Several<W, PER> weight[AT_ONCE];
#pragma unroll
    for (int j = 0; j < AT_ONCE; ++j)
      weight[j] = *reinterpret_cast<const Several<W, PER>*>(
          from + byte_of(index, j) * (COLUMNS * uint32_t(sizeof(W))));
    if constexpr (!HAS_PAYLOADS)
#pragma unroll
      for (int j = 0; j < AT_ONCE; ++j) payload.of[j] = k + j < count ? F(1) : F(0);
    Payloads<F> next = {};  // is asked for before these are added
    const bool any = k + AT_ONCE < count;
    index = any ? *++events : 0;
    if (HAS_PAYLOADS && any) next = *++payloads;
#pragma unroll
    for (int j = 0; j < AT_ONCE; ++j)
#pragma unroll
      for (int p = 0; p < PER; ++p) {
        const F own = weight[j].of[p];
        sum[p] = fused(own, payload.of[j], sum[p]);
      }
    payload = next;
  }
}

// sums[row][block][i] = sum over the events of payload * weight, ascending, from +0, as gather_events:
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
  const int group = By::group(), lane = By::lane(group);
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
        add_list<COLUMNS, Lists::HAS_VALUES>(sum, lists.of[group].index, lists.of[group].payload, count,
                                             longest, weights.weights, begin * COLUMNS + (here ? i : 0));
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
