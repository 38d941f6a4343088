// What the blocks of a grid tell each other of active neurons whose values are halves, without a barrier:
// each word of mail says in which round it was sent, and readers ask for it until it does.
//
// A block sends to either half of its rows in turn, round after round, and to two places in turn. It sends
// round r + 2 when it has read round r + 1 of all blocks, which these have sent when they had read all of
// round r: so nobody overwrites what is still to be read. All that is told is in the words themselves.
// A word is read and written as a whole, past the first cache, and orders nothing else.
#pragma once

#include "mail.cuh"

namespace sparsify {

// The events of a slice for some rows, in words of which every LINE is read at once. From the lowest bit on
// a word has the value (16 bits, all 0 behind the last event), which neuron of the slice (5 bits), the row
// (3 bits) and what `flag_of` gives for the round.
template <int ROWS, int SLICE>
struct FlaggedMail {
  static constexpr int LINES = words_of(ROWS * SLICE), NEURON = 16, ROW = 21, FLAG = 24;
  static_assert(ROWS <= 8 && SLICE <= 32, "a byte says which neuron of which row");
  alignas(4 * WARP) uint32_t words[LINES][WARP];
};

// That of no round: nobody has sent anything.
constexpr uint32_t NO_FLAG = 0;
// Words are sent anew in every second round, so that none has a flag that is 255 rounds old.
SPARSIFY_INLINE uint32_t flag_of(uint32_t round) { return round % 255 + 1; }

// Before the blocks of a team meet for the first time.
template <int ROWS, int SLICE>
SPARSIFY_INLINE void clear(FlaggedMail<ROWS, SLICE>& mail) {
  typedef FlaggedMail<ROWS, SLICE> By;
  for (int line = warp_of(); line < By::LINES; line += warps_of())
    *static_cast<volatile uint32_t*>(&mail.words[line][lane_of()]) = NO_FLAG << By::FLAG;
}

// Sends rows low .. high - 1, of which `value_of(row, i)` is the value of neuron i, which this thread has
// written. Warps `By` find in `active` who is, then each sends its neurons. Behind the last event follow
// empty words to the end.
template <class By, class E, int NEURONS, int ROWS, int SLICE, int WORDS, class ValueOf>
SPARSIFY_INLINE void send(FlaggedMail<ROWS, SLICE>& to, uint32_t (&active)[WORDS],
                          const Slice<NEURONS, SLICE>& mine, int low, int high, uint32_t round,
                          const ValueOf& value_of) {
  typedef FlaggedMail<ROWS, SLICE> Sent;
  static_assert(Sent::LINES <= WORDS, "there is a bit for each neuron");
  constexpr int TURNS = (Sent::LINES + By::COUNT - 1) / By::COUNT;
  const uint32_t flag = flag_of(round) << Sent::FLAG;
  float value[TURNS];
#pragma unroll
  for (int turn = 0; turn < TURNS; ++turn) {
    const int word = By::index() + turn * By::COUNT, neuron = word * WARP + lane_of();
    const int row = low + neuron / SLICE, i = neuron % SLICE;
    value[turn] = row < high && i < mine.size ? value_of(row, i) : 0.0f;
    const uint32_t bits = __ballot_sync(ALL, value[turn] != 0.0f);
    if (lane_of() == 0 && word < Sent::LINES) active[word] = bits;
  }
  By::meet();  // all know who is active
#pragma unroll
  for (int turn = 0; turn < TURNS; ++turn) {
    const int word = By::index() + turn * By::COUNT, neuron = word * WARP + lane_of();
    if (word >= Sent::LINES) break;
    int before = 0, all = 0;
#pragma unroll
    for (int other = 0; other < Sent::LINES; ++other) {
      const int count = __popc(active[other]);
      before += other < word ? count : 0;
      all += count;
    }
    volatile uint32_t* const words = &to.words[0][0];
    const int at = before + __popc(active[word] & first_bits(lane_of()));
    const uint32_t row = uint32_t(neuron / SLICE) << Sent::ROW;
    const uint32_t code = row | uint32_t(neuron % SLICE) << Sent::NEURON;
    if (value[turn] != 0.0f) words[at] = flag | code | E(value[turn]).bits;
    if (neuron >= all) words[neuron] = flag;
  }
}

// Who waits for the words of a round, and for how long.
template <int ROWS, int SLICE>
struct Waiting {
  typedef FlaggedMail<ROWS, SLICE> Sent;
  const Sent* mail;
  uint32_t flag;
  int64_t patience;
  int64_t* stuck;
  int64_t polls = 0;

  SPARSIFY_INLINE uint32_t ask(int rank, int line) const {
    return *static_cast<const volatile uint32_t*>(&mail[rank].words[line][lane_of()]);
  }
  // Asks again for those words of every APARTth block from `rank` on that are not there, until all are.
  // Returns false after `patience`. No lambda: NVRTC 13.0 takes those of any type for host code.
  template <int APART, int MANY>
  SPARSIFY_INLINE bool for_all(uint32_t (&word)[MANY], int rank, int line) {
    for (;; ++polls) {
      bool waits = false;
#pragma unroll
      for (int k = 0; k < MANY; ++k)
        if (word[k] >> Sent::FLAG != flag) {
          word[k] = ask(rank + k * APART, line);
          waits = true;
        }
      if (!__any_sync(ALL, waits)) return true;
      if (polls >= patience) {
        *static_cast<volatile int64_t*>(stuck) = 1;
        return false;
      }
      __nanosleep(20);
    }
  }
};

// Hears what so many BLOCKS have sent in a round, by some warps, of which each asks for several at once and
// hands every event to `put(row, sender, bits)`. It does `meanwhile` before it looks at the first answer.
// Returns false if some have not come after `patience` polls. Adds to `found` the events of this lane.
template <class By, int BLOCKS, int ROWS, int SLICE, class Put, class Meanwhile>
SPARSIFY_INLINE bool receive(const FlaggedMail<ROWS, SLICE>* mail, uint32_t round, int64_t patience,
                             int64_t* stuck, unsigned long long& found, const Put& put,
                             const Meanwhile& meanwhile) {
  typedef FlaggedMail<ROWS, SLICE> Sent;
  constexpr int SLICES = (BLOCKS + By::COUNT - 1) / By::COUNT, MOST = 24;
  constexpr int PARTS = (SLICES + MOST - 1) / MOST, ASKED = (SLICES + PARTS - 1) / PARTS;
  const uint32_t flag = flag_of(round);
  Waiting<ROWS, SLICE> waiting{mail, flag, patience, stuck};
  const auto give = [&](uint32_t word, int rank) {
    if (uint16_t(word) == 0) return;
    put(int(word >> Sent::ROW & 7), rank * SLICE + int(word >> Sent::NEURON & 31), uint16_t(word));
    ++found;
  };
#pragma unroll 1
  for (int part = 0; part < PARTS; ++part) {
    const int first = By::index() + part * ASKED * By::COUNT;
    uint32_t word[ASKED];
#pragma unroll
    for (int k = 0; k < ASKED; ++k) {
      const int rank = first + k * By::COUNT;
      word[k] = rank < BLOCKS ? waiting.ask(rank, 0) : flag << Sent::FLAG;
    }
    if (part == 0) meanwhile();
    if (!waiting.template for_all<By::COUNT>(word, first, 0)) return false;
    uint32_t more = 0;  // of which blocks a line is full, a bit each
#pragma unroll
    for (int k = 0; k < ASKED; ++k) {
      give(word[k], first + k * By::COUNT);
      more |= uint32_t(uint16_t(word[k]) != 0) << k;
    }
    if (Sent::LINES == 1) continue;
    more = __shfl_sync(ALL, more, WARP - 1);
#pragma unroll 1
    for (; more != 0; more &= more - 1) {
      const int rank = first + (__ffs(int(more)) - 1) * By::COUNT;
#pragma unroll 1
      for (int line = 1; line < Sent::LINES; ++line) {
        uint32_t next[1] = {waiting.ask(rank, line)};
        if (!waiting.template for_all<1>(next, rank, line)) return false;
        give(next[0], rank);
        if (!__any_sync(ALL, lane_of() == WARP - 1 && uint16_t(next[0]) != 0)) break;
      }
    }
  }
  return true;
}

}  // namespace sparsify
