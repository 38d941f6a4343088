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

// The events of a slice for some rows, in lines of LINE words, of which readers ask for the first one before
// they know how many they need. From the lowest bit on a word has the value (16 bits, all 0 behind the last
// event), which neuron of the slice (8 bits), what `flag_of` gives for the round (5 bits), and the row: so
// each is had by one instruction.
template <int ROWS, int SLICE, int LINE>
struct FlaggedMail {
  static constexpr int LINES = (ROWS * SLICE + LINE - 1) / LINE, GROUPS = words_of(LINES * LINE);
  static constexpr int NEURON = 16, FLAG = 24, ROW = 29;
  static constexpr uint32_t FLAGS = 31u << FLAG;
  static_assert(ROWS <= 8 && SLICE <= 32, "three bits say which row, a byte which neuron");
  static_assert(LINE <= WARP && LINE % 8 == 0, "a warp reads whole sectors of a line");
  alignas(4 * WARP) uint32_t words[GROUPS * WARP];
};

// That of no round: nobody has sent anything.
constexpr uint32_t NO_FLAG = 0;
// Words are sent anew in every second round, so that none has a flag that is 31 rounds old.
SPARSIFY_INLINE uint32_t flag_of(uint32_t round) { return round % 31 + 1; }

// Before the blocks of a team meet for the first time.
template <int ROWS, int SLICE, int LINE>
SPARSIFY_INLINE void clear(FlaggedMail<ROWS, SLICE, LINE>& mail) {
  typedef FlaggedMail<ROWS, SLICE, LINE> By;
  for (int at = int(threadIdx.x); at < By::GROUPS * WARP; at += int(blockDim.x))
    *static_cast<volatile uint32_t*>(mail.words + at) = NO_FLAG << By::FLAG;
}

// Sends rows low .. high - 1, of which `value_of(row, i)` is the value of neuron i, which this thread has
// written. Warps `By` find in `active` who is, then each sends its neurons. Behind the last event follow
// empty words to the end.
template <class By, class E, int NEURONS, int ROWS, int SLICE, int LINE, int WORDS, class ValueOf>
SPARSIFY_INLINE void send(FlaggedMail<ROWS, SLICE, LINE>& to, uint32_t (&active)[WORDS],
                          const Slice<NEURONS, SLICE>& mine, int low, int high, uint32_t round,
                          const ValueOf& value_of) {
  typedef FlaggedMail<ROWS, SLICE, LINE> Sent;
  static_assert(Sent::GROUPS <= WORDS, "there is a bit for each neuron");
  constexpr int TURNS = (Sent::GROUPS + By::COUNT - 1) / By::COUNT;
  const uint32_t flag = flag_of(round) << Sent::FLAG;
  float value[TURNS];
#pragma unroll
  for (int turn = 0; turn < TURNS; ++turn) {
    const int word = By::index() + turn * By::COUNT, neuron = word * WARP + lane_of();
    const int row = low + neuron / SLICE, i = neuron % SLICE;
    value[turn] = row < high && i < mine.size ? value_of(row, i) : 0.0f;
    const uint32_t bits = __ballot_sync(ALL, value[turn] != 0.0f);
    if (lane_of() == 0 && word < Sent::GROUPS) active[word] = bits;
  }
  By::meet();  // all know who is active
#pragma unroll
  for (int turn = 0; turn < TURNS; ++turn) {
    const int word = By::index() + turn * By::COUNT, neuron = word * WARP + lane_of();
    if (word >= Sent::GROUPS) break;
    int before = 0, all = 0;
#pragma unroll
    for (int other = 0; other < Sent::GROUPS; ++other) {
      const int count = __popc(active[other]);
      before += other < word ? count : 0;
      all += count;
    }
    volatile uint32_t* const words = to.words;
    const int at = before + __popc(active[word] & first_bits(lane_of()));
    const uint32_t row = uint32_t(neuron / SLICE) << Sent::ROW;
    const uint32_t code = row | uint32_t(neuron % SLICE) << Sent::NEURON;
    if (value[turn] != 0.0f) words[at] = flag | code | E(value[turn]).bits;
    if (neuron >= all) words[neuron] = flag;
  }
}

// Who waits for the words of a round, and for how long.
template <int ROWS, int SLICE, int LINE>
struct Waiting {
  typedef FlaggedMail<ROWS, SLICE, LINE> Sent;
  const Sent* mail;
  uint32_t flag;  // where words have it
  int64_t patience;
  int64_t* stuck;
  int64_t polls = 0;

  SPARSIFY_INLINE uint32_t ask(int rank, int place) const {
    return *static_cast<const volatile uint32_t*>(mail[rank].words + place);
  }
  SPARSIFY_INLINE bool is_there(uint32_t word) const { return (word & Sent::FLAGS) == flag; }
  // Whether to ask once more. Returns false after `patience`.
  SPARSIFY_INLINE bool go_on() {
    if (polls++ >= patience) {
      *static_cast<volatile int64_t*>(stuck) = 1;
      return false;
    }
    __nanosleep(20);
    return true;
  }
};

SPARSIFY_INLINE bool has_value(uint32_t word) { return (word & 0xFFFF) != 0; }

// How warps read lines: 32 words at once of slices whose lines are thought side by side. The lane, and how
// often it has asked before, say which word that is.
template <int LINE>
struct Bundle {
  static constexpr int SLICES = LINE % 32 == 0 ? 1 : LINE % 16 == 0 ? 2 : 4, ASKS = SLICES * LINE / WARP;

  static SPARSIFY_INLINE int word(int k) { return k % ASKS * WARP + lane_of(); }
  static SPARSIFY_INLINE int slice(int k) { return word(k) / LINE; }
  static SPARSIFY_INLINE int place(int k) { return word(k) % LINE; }

  // Whose lines are full, a bit for each word of this lane; `given` are the words that are events.
  static SPARSIFY_INLINE uint32_t full(uint32_t given) {
    uint32_t found = 0;
#pragma unroll
    for (int k = 0; k < ASKS; ++k) {
      const int end = slice(k) * LINE + LINE - 1;  // read by this ask or by the next one
      const uint32_t ends = __shfl_sync(ALL, given, end % WARP) >> (end / WARP - k);
      found |= ends & every(k);
    }
    return found;
  }

 private:
  // The words of ask k of all bundles.
  static constexpr SPARSIFY_INLINE uint32_t every(int k) {
    return (ASKS == 1 ? ~0u : ASKS == 2 ? 0x55555555u : 0x49249249u) << k;
  }
};

// Hears what so many BLOCKS have sent in a round, by some warps, of which each asks for several words at
// once and hands every event to `put(row, sender, bits)`; where lines were full, for the next ones. It does
// `meanwhile` before it looks at the first answer. Returns false if some have not come after `patience`
// polls. Adds to `found` the events of this lane.
template <class By, int BLOCKS, int ROWS, int SLICE, int LINE, class Put, class Meanwhile>
SPARSIFY_INLINE bool receive(const FlaggedMail<ROWS, SLICE, LINE>* mail, uint32_t round, int64_t patience,
                             int64_t* stuck, unsigned long long& found, const Put& put,
                             const Meanwhile& meanwhile) {
  typedef FlaggedMail<ROWS, SLICE, LINE> Sent;
  typedef Bundle<LINE> Read;
  constexpr int ASKS = Read::ASKS, APART = By::COUNT * Read::SLICES, MOST = 24 / ASKS;
  constexpr int BUNDLES = (BLOCKS + APART - 1) / APART;  // of a warp
  constexpr int PARTS = (BUNDLES + MOST - 1) / MOST, ASKED = (BUNDLES + PARTS - 1) / PARTS * ASKS;
  Waiting<ROWS, SLICE, LINE> waiting{mail, flag_of(round) << Sent::FLAG, patience, stuck};
  const uint32_t none = waiting.flag;
#pragma unroll 1
  for (int part = 0; part < PARTS; ++part) {
    const int first = By::index() * Read::SLICES + part * (ASKED / ASKS) * APART;
    const auto rank_of = [&](int k) { return first + k / ASKS * APART + Read::slice(k); };
    const auto is_here = [&](int k) {  // all warps have that many slices, or this one has
      return (PARTS == 1 && (k / ASKS + 1) * APART <= BLOCKS) || rank_of(k) < BLOCKS;
    };
    uint32_t word[ASKED], given = 0;  // of these, the events: a bit each
    bool waits = false;               // some are not there
    const auto look = [&](int k) {    // without a branch, which would take more than it leaves out
      const bool is_there = waiting.is_there(word[k]), is_event = is_there && has_value(word[k]);
      const int row = int(word[k] >> Sent::ROW), i = int(byte_of(word[k], Sent::NEURON / 8));
      if (is_event) put(row, rank_of(k) * SLICE + i, uint16_t(word[k]));
      if (is_event) given |= 1u << k;
      waits |= !is_there;
    };
    // In the order in which they arrive, while others are under way; then those that were not there.
    const auto look_at_all = [&](int line) -> bool {
#pragma unroll
      for (int k = 0; k < ASKED; ++k) look(k);
      while (__any_sync(ALL, waits)) {
        if (!waiting.go_on()) return false;
        uint32_t again = 0;
#pragma unroll
        for (int k = 0; k < ASKED; ++k)
          if (!waiting.is_there(word[k])) {
            word[k] = waiting.ask(rank_of(k), line * LINE + Read::place(k));
            again |= 1u << k;
          }
        waits = false;
#pragma unroll
        for (int k = 0; k < ASKED; ++k)
          if (again >> k & 1) look(k);
      }
      found += __popc(given);
      return true;
    };
#pragma unroll
    for (int k = 0; k < ASKED; ++k)
      word[k] = is_here(k) ? waiting.ask(rank_of(k), Read::place(k)) : none;
    if (part == 0) meanwhile();
    if (!look_at_all(0)) return false;
#pragma unroll 1
    for (int line = 1; line < Sent::LINES; ++line) {
      const uint32_t more = Read::full(given);
      if (!__any_sync(ALL, more != 0)) break;
      given = 0;
#pragma unroll
      for (int k = 0; k < ASKED; ++k)
        word[k] = more >> k & 1 ? waiting.ask(rank_of(k), line * LINE + Read::place(k)) : none;
      if (!look_at_all(line)) return false;
    }
  }
  return true;
}

}  // namespace sparsify
