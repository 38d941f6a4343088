// Lists of the rows in which a sender is active, for blocks of rows.
#pragma once

#include "outer_activity.h"

namespace sparsify {

constexpr int64_t ROW_BLOCK = 512;  // rows that are summed on their own, see outer_product

// Bit j of word i becomes bit i of word j: quarters are exchanged, of ever smaller squares of bits.
SPARSIFY_INLINE void transpose_bits(uint64_t* words) {
  uint64_t low = 0xFFFFFFFFu;
  for (int half = 32; half > 0; half /= 2, low ^= low << half) {
    for (int i = 0; i < 64; i += 2 * half) {
      for (int k = i; k < i + half; ++k) {
        const uint64_t moved = (words[k] >> half ^ words[k + half]) & low;
        words[k + half] ^= moved;
        words[k] ^= moved << half;
      }
    }
  }
}

// The rows of a block in which a sender is active: places [start, start + count) of the lists.
struct Run {
  int64_t start;
  int32_t count;
  bool has_payload;

  // Moves the places in some lists next to those before them, which end at `end`; returns their end.
  template <class... T>
  int64_t close_up(int64_t end, T*... lists) {
    const int64_t from = start;
    start = end;
    const auto move = [&](auto* list) {
      if (list && from != end && count) std::memmove(list + end, list + from, count * sizeof *list);
    };
    (move(lists), ...);
    return end + count;
  }
};

constexpr int64_t LIST_SLACK = 64;  // places behind the lists of a thread, which are overwritten

// Of several blocks of rows.
template <class F>
struct Lists {
  uint16_t* row;  // within its block
  F* payload;     // or null: every payload is 1
  Run* run;       // [blocks][senders]

  Lists(Arena& arena, int64_t senders, int64_t rows, int64_t threads, bool has_payload)
      : row(arena.take<uint16_t>(senders * rows + threads * LIST_SLACK)),
        payload(has_payload ? arena.take<F>(senders * rows + threads * LIST_SLACK) : nullptr),
        run(arena.take<Run>((rows + ROW_BLOCK - 1) / ROW_BLOCK * senders)) {}
};

// Appends the set bits of `word`, as base + bit. Writes up to three places more than it fills.
SPARSIFY_INLINE uint16_t* append_bits(uint16_t* to, uint64_t word, int base) {
  const int count = __builtin_popcountll(word);
  for (int k = 0; k < count; k += 4) {
    SPARSIFY_UNROLL
    for (int i = 0; i < 4; ++i) {
      to[k + i] = uint16_t(base + (word ? __builtin_ctzll(word) : 0));
      word &= word - 1;
    }
  }
  return to + count;
}

// Lists a block of rows for the senders of one thread, from place `start` on; returns where the lists
// end. `words` is [groups of the thread][ROW_BLOCK].
template <class F, class Source, class Element>
int64_t list_rows(const Lists<F>& to, Run* runs, const Matrix<Element>& y, int64_t first,
                  int64_t rows, const Share& own, int64_t start, uint64_t* words) {
  const int64_t blocks = (rows + 63) / 64;
  bool has_payload = false;
  for (int64_t row = 0; row < rows; ++row) {
    const Element* const values = y[first + row];
    uint64_t* word = words + row;
    for (int64_t s = own.begin; s < own.end; s += GROUP, word += ROW_BLOCK) {
      const int64_t count = own.end - s < GROUP ? own.end - s : GROUP;
      *word = Activity<Source>::word(values, s, count);
    }
    if (!has_payload)
      has_payload = Activity<Source>::has_payload(values, own.begin, own.end - own.begin);
  }
  uint16_t* end = to.row + start;
  for (int64_t s = own.begin; s < own.end; s += GROUP, words += ROW_BLOCK) {
    for (int64_t row = rows; row < 64 * blocks; ++row) words[row] = 0;
    for (int64_t block = 0; block < blocks; ++block) transpose_bits(words + 64 * block);
    const int64_t count = own.end - s < GROUP ? own.end - s : GROUP;
    for (int64_t i = 0; i < count; ++i) {
      uint16_t* const begin = end;
      for (int64_t block = 0; block < blocks; ++block)
        end = append_bits(end, words[64 * block + i], int(64 * block));
      runs[s + i] = {begin - to.row, int32_t(end - begin), has_payload};
      if (!has_payload) continue;
      for (uint16_t* at = begin; at < end; ++at)
        to.payload[at - to.row] = Activity<Source>::template value<F>(y[first + *at], s + i);
    }
  }
  return end - to.row;
}

}  // namespace sparsify
