// Sums of the events of mail, for the slices of receivers whose weights lie in shared memory.
#pragma once

#include "mail_lists.cuh"

namespace sparsify {

// Adds the events of a group's list to its sums, as add_list; it begins at `at`. All weights are behind
// `from`, and finite. Behind the end of its list a group adds what it has read last, times 0; or the first
// weights, if they are halves: these are read fast, and leave no registers for what was read before.
template <class W, class Lists, int PER>
SPARSIFY_INLINE void add_mailed(float (&sum)[PER], const Lists& lists, int at, int count, int longest,
                                const char* from) {
  int quad = count > 0 ? at : Lists::END;
  Offsets offset = lists.offset[quad];
  Payloads<float> payload = lists.payload[quad];
  Several<W, PER> weight[AT_ONCE] = {};
#pragma unroll 2
  for (int k = 0; k < longest; k += AT_ONCE) {
    if (sizeof(W) < sizeof(float) || k < count)
#pragma unroll
      for (int j = 0; j < AT_ONCE; ++j)
        weight[j] = *reinterpret_cast<const Several<W, PER>*>(from + offset.of[j]);
    quad = k + AT_ONCE < count ? quad + 1 : Lists::END;
    offset = lists.offset[quad];
    const Payloads<float> next = lists.payload[quad];  // is asked for before these are added
#pragma unroll
    for (int j = 0; j < AT_ONCE; ++j)
#pragma unroll
      for (int p = 0; p < PER; ++p) {
        const float own = weight[j].of[p];
        sum[p] = fused(own, payload.of[j], sum[p]);
      }
    payload = next;
  }
}

// Where the list of an item is, which is a row from `from` on and a block of senders.
template <class Lists>
struct ListOf {
  int block, row, begin, count;

  SPARSIFY_INLINE ListOf(const Lists& lists, int item, int from, int rows, bool alone) {
    const int inverse = 65536 / rows + 1;  // item * inverse / 65536 is item / rows: items are few
    block = item * inverse >> 16;
    row = from + item - block * rows;
    count = lists.count[block][row];
    begin = (alone ? block * Lists::ROOM_OF_BLOCK : lists.begin[block][row]) / AT_ONCE;
  }
};

// sums[low + row][block][i], for rows from .. to - 1 of the lists; as add_groups. Groups of a warp have
// lists of one block of senders where they can: these are of like lengths, which the last block's are not.
template <class Lists, int ROWS, int BLOCKS, int COLUMNS, class Weights>
SPARSIFY_INLINE void add_sorted(float (&sums)[ROWS][BLOCKS][COLUMNS], const Weights& weights,
                                const Lists& lists, int low, int from, int to, bool alone) {
  typedef typename Weights::Stored W;
  constexpr int GROUPED = Weights::GROUPED;
  typedef Groups<GROUPED, W> By;
  const int rows = to - from, items = rows * BLOCKS;
  const int group = By::group(), lane = By::lane(group);
#pragma unroll 1
  for (int first = warp_of() * By::MANY; first < items; first += By::MANY * warps_of()) {
    const bool has_item = first + group < items;
    const ListOf<Lists> own(lists, has_item ? first + group : 0, from, rows, alone);
    const int count = has_item ? own.count : 0;
    int longest = count;
#pragma unroll
    for (int g = 0; g < By::MANY; ++g) {
      const int events = __shfl_sync(ALL, count, g * By::WIDTH);
      if (events > longest) longest = events;
    }
#pragma unroll 1
    for (int pass = 0; pass < By::PASSES; ++pass) {
      const int i = (pass * WARP + lane) * By::PER;
      const bool here = i < GROUPED;
      const int at = hidden_multiple((own.block * BLOCK * GROUPED + (here ? i : 0)) * int(sizeof(W)));
      float sum[By::PER] = {};
      add_mailed<W>(sum, lists, own.begin, count, longest,
                    reinterpret_cast<const char*>(weights.weights) + at);
#pragma unroll
      for (int p = 0; p < By::PER; ++p)
        if (here && has_item) sums[low + own.row][own.block][i + p] = sum[p];
    }
  }
}

// The same of the columns that lie apart: a lane has a list for itself. Warps take these in reverse: the
// last ones have no groups where lists are few.
template <class Lists, int ROWS, int BLOCKS, int COLUMNS, class Weights>
SPARSIFY_INLINE void add_apart(float (&sums)[ROWS][BLOCKS][COLUMNS], const Weights& weights,
                               const Lists& lists, int low, int from, int to, bool alone) {
  typedef typename Weights::Stored W;
  constexpr int GROUPED = Weights::GROUPED, APART = COLUMNS - GROUPED;
  const int rows = to - from, items = rows * BLOCKS;
  int item = (warps_of() - 1 - warp_of()) * WARP + lane_of();
#pragma unroll 1
  for (; item < items; item += warps_of() * WARP) {
    const ListOf<Lists> own(lists, item, from, rows, alone);
    const W* const from_here = weights.weights + weights.place(own.block * BLOCK, GROUPED);
    float sum[APART] = {};
#pragma unroll 1
    for (int k = 0; k < own.count; k += AT_ONCE) {
      const Offsets offset = lists.offset[own.begin + k / AT_ONCE];
      const Payloads<float> payload = lists.payload[own.begin + k / AT_ONCE];
#pragma unroll
      for (int j = 0; j < AT_ONCE; ++j)
#pragma unroll
        for (int p = 0; p < APART; ++p) {
          const uint32_t s = offset.of[j] / (GROUPED * uint32_t(sizeof(W)));
          const float weight = from_here[s * APART + p];
          sum[p] = fused(weight, payload.of[j], sum[p]);
        }
    }
#pragma unroll
    for (int p = 0; p < APART; ++p) sums[low + own.row][own.block][GROUPED + p] = sum[p];
  }
}

// Both.
template <class Lists, int ROWS, int BLOCKS, int COLUMNS, class Weights>
SPARSIFY_INLINE void add_lists(float (&sums)[ROWS][BLOCKS][COLUMNS], const Weights& weights,
                               const Lists& lists, int low, int from, int to, bool alone) {
  add_sorted(sums, weights, lists, low, from, to, alone);
  if constexpr (COLUMNS > Weights::GROUPED)
    add_apart(sums, weights, lists, low, from, to, alone);
}

// sums[row][block][i] = sum over the events of payload * weight, as add_groups, of the lists that are there,
// for rows low .. high - 1 of a half. Rows that do not fit are sorted again, one by one. By all warps of a
// block.
template <class Team, class All, int TEAM, int HELD, int SENDERS, int ROOM, int STRIDE,
          class F, int ROWS, int BLOCKS, int COLUMNS, class Weights, int SLICE>
SPARSIFY_INLINE void add_mail(F (&sums)[ROWS][BLOCKS][COLUMNS], const Weights& weights,
                              MailLists<TEAM, HELD, SENDERS, ROOM, STRIDE>& lists,
                              const Mail<HELD, SLICE>* mail, int low, int high) {
  typedef typename Weights::Stored W;
  static_assert(STRIDE == Weights::GROUPED * int(sizeof(W)), "lists say where weights are");
  const int rows = high - low;
  if (lists.fits()) {
    add_lists(sums, weights, lists, low, 0, rows, false);
    return;
  }
  const Received<Team, All, SENDERS, HELD, SLICE> received(mail);
  for (int row = 0; row < rows; ++row) {
    if (row > 0) __syncthreads();  // the lists before are added
    put_all<Team, All, true>(lists, mail, received, row, row + 1);
    __syncthreads();  // the lists of a row are there
    add_lists(sums, weights, lists, low, row, row + 1, true);
  }
}

}  // namespace sparsify
