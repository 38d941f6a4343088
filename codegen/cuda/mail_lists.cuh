// Lists of all events that blocks have sent each other as mail, sorted by rows and blocks of senders.
#pragma once

#include "group_sums.cuh"
#include "mail.cuh"

namespace sparsify {

// Where the weights of some events are: bytes behind those of the first sender of their block.
struct alignas(16) Offsets {
  uint32_t of[AT_ONCE];
};

// Lists of all events of some rows, of each row and block of senders ascending. The weights of a sender
// have STRIDE bytes. There is ROOM for those of a block of senders; if they are more, rows are taken one
// by one.
template <int TEAM, int ROWS, int SENDERS, int ROOM, int STRIDE>
struct MailLists {
  static constexpr int BLOCKS = blocks_of(SENDERS), ROOM_OF_BLOCK = ROOM;
  static constexpr int WORDS = (ROWS + 3) / 4, HELD = 4 * WORDS;
  static_assert(ROOM >= BLOCK && ROOM % AT_ONCE == 0 && BLOCKS * ROOM <= 65536, "a row has room");
  static constexpr int END = BLOCKS * ROOM / AT_ONCE;  // behind all lists: payloads of 0
  Payloads<float> payload[END + 1];
  Offsets offset[END + 1];
  uint32_t before[TEAM][2][WORDS];                    // events of its list before those of a slice, bytes
  uint32_t sent[TEAM];                                // events of a slice
  uint32_t overflows[BLOCKS];                         // there is not room for all rows
  uint32_t met;                                       // all have sent theirs
  uint16_t begin[BLOCKS][HELD], count[BLOCKS][HELD];  // of lists; where in all of them

  SPARSIFY_INLINE void set(int at, int sender, float value) {
    reinterpret_cast<uint32_t*>(offset)[at] = uint32_t(sender) * STRIDE;
    reinterpret_cast<float*>(payload)[at] = value;
  }
  SPARSIFY_INLINE bool fits() const {
    uint32_t any = 0;
#pragma unroll
    for (int block = 0; block < BLOCKS; ++block) any |= overflows[block];
    return any == 0;
  }
};

// The sum of what this lane and those before it have.
template <class T>
SPARSIFY_INLINE T sum_up_to(T sum) {
#pragma unroll
  for (int apart = 1; apart < WARP; apart *= 2) {
    const T other = __shfl_up_sync(ALL, sum, apart);
    if (lane_of() >= apart) sum += other;
  }
  return sum;
}

// Finds where lists begin, and where the events of each slice do; a warp takes a block of senders. Bytes
// of a word are added at once: none of those before an event exceeds 255. Returns how many events there
// are of the row of this lane.
template <class Team, class By, int TEAM, int ROWS, int SENDERS, int ROOM, int STRIDE, int SLICE>
SPARSIFY_INLINE int number_mail(MailLists<TEAM, ROWS, SENDERS, ROOM, STRIDE>& lists,
                                const Mail<ROWS, SLICE>* mail) {
  typedef MailLists<TEAM, ROWS, SENDERS, ROOM, STRIDE> Lists;
  int found = 0;
#pragma unroll 1
  for (int block = By::index(); block < Lists::BLOCKS; block += By::COUNT) {
    const int first = block * BLOCK, end = first + BLOCK < SENDERS ? first + BLOCK : SENDERS;
    const int rank = first / SLICE + lane_of();
    const bool here = rank * SLICE < end;
    const int part = here && rank * SLICE < first;
    uint32_t own[Lists::WORDS];
#pragma unroll
    for (int word = 0; word < Lists::WORDS; ++word)
      own[word] = here ? Team::fetch(reinterpret_cast<const uint32_t*>(mail[rank].counts[part]) + word) : 0;
    if (here && part == 0) lists.sent[rank] = Team::fetch(&mail[rank].count);
    const int last = __popc(__ballot_sync(ALL, here)) - 1;
    int count = 0;
#pragma unroll
    for (int word = 0; word < Lists::WORDS; ++word) {
      const uint32_t before = sum_up_to(own[word]) - own[word];
      if (here) lists.before[rank][part][word] = before;
      const uint32_t most = __shfl_sync(ALL, before, last);
      const uint32_t rest = __shfl_sync(ALL, own[word], last);
      const int byte = lane_of() % 4 * 8;
      if (lane_of() / 4 == word) count = int(most >> byte & 255) + int(rest >> byte & 255);
    }
    const int room = (count + AT_ONCE - 1) / AT_ONCE * AT_ONCE, up_to = sum_up_to(room);
    if (lane_of() < Lists::HELD) {
      lists.begin[block][lane_of()] = uint16_t(block * ROOM + up_to - room);
      lists.count[block][lane_of()] = uint16_t(count);
    }
    if (lane_of() == WARP - 1) lists.overflows[block] = up_to > ROOM;
    found += count;
  }
  return found;
}

// The events that a lane puts into lists: 16 lanes have those of a slice, of which each asks for the first
// before it is known how many there are. What nobody has sent is there all the same, see `clear`.
template <class Team, class By, int SENDERS, int ROWS, int SLICE>
struct Received {
  static constexpr int LANES = WARP / 2, APART = 2 * By::COUNT, HEARD = (SENDERS + SLICE - 1) / SLICE;
  static constexpr int SLICES = (HEARD + APART - 1) / APART;  // of a lane
  uint64_t first[SLICES];

  static SPARSIFY_INLINE int rank(int k) {
    return By::index() * 2 + lane_of() / LANES + k * APART;
  }
  explicit SPARSIFY_INLINE Received(const Mail<ROWS, SLICE>* mail) {
#pragma unroll
    for (int k = 0; k < SLICES; ++k)
      first[k] = rank(k) < HEARD ? Team::fetch(mail[rank(k)].events + lane_of() % LANES) : 0;
  }
};

// Puts an event of a slice into its list: of all rows, or of one row ALONE, whose lists begin at 0.
template <bool ALONE, int TEAM, int ROWS, int SENDERS, int ROOM, int STRIDE, int SLICE>
SPARSIFY_INLINE void put(MailLists<TEAM, ROWS, SENDERS, ROOM, STRIDE>& lists, const Mail<ROWS, SLICE>&,
                         uint64_t event, int rank, int only) {
  typedef Mail<ROWS, SLICE> By;
  const uint32_t code = uint32_t(event >> 32), row = code >> By::ROW & 31;
  const int block = rank * SLICE / BLOCK;  // of which the rows of the next one are behind its own
  int at = int(reinterpret_cast<const uint8_t*>(lists.before[rank])[row]) + int(code >> By::BEFORE);
  if (ALONE) {
    const int is_next = row >= By::HELD;
    if (int(row) - is_next * By::HELD != only) return;
    at += (block + is_next) * ROOM;
  } else {
    at += (&lists.begin[0][0])[block * By::HELD + int(row)];
  }
  lists.set(at, code & 255, same_bits<float>(uint32_t(event)));
}

// Puts the events of all rows into their lists, or those of one row ALONE. What is missing at the end of
// a list has a payload of 0.
template <class Team, class By, bool ALONE, int TEAM, int ROWS, int SENDERS, int ROOM, int STRIDE,
          int SLICE>
SPARSIFY_INLINE void put_all(MailLists<TEAM, ROWS, SENDERS, ROOM, STRIDE>& lists,
                             const Mail<ROWS, SLICE>* mail,
                             const Received<Team, By, SENDERS, ROWS, SLICE>& received, int from, int to) {
  typedef Received<Team, By, SENDERS, ROWS, SLICE> Own;
  typedef MailLists<TEAM, ROWS, SENDERS, ROOM, STRIDE> Lists;
  int more = 0;
  if (By::thread() < AT_ONCE) lists.set(Lists::END * AT_ONCE + By::thread(), 0, 0.0f);
#pragma unroll
  for (int k = 0; k < Own::SLICES; ++k) {
    const int rank = Own::rank(k), sent = rank < Own::HEARD ? int(lists.sent[rank]) : 0;
    if (lane_of() % Own::LANES < sent) put<ALONE>(lists, mail[0], received.first[k], rank, from);
    if (sent > more) more = sent;
  }
  if (more > Own::LANES)
#pragma unroll 1
    for (int rank = Own::rank(0); rank < Own::HEARD; rank += Own::APART)
#pragma unroll 1
      for (int e = lane_of() % Own::LANES + Own::LANES; e < lists.sent[rank]; e += Own::LANES)
        put<ALONE>(lists, mail[0], Team::fetch(mail[rank].events + e), rank, from);
#pragma unroll 1
  for (int item = By::thread(); item < (to - from) * Lists::BLOCKS; item += By::COUNT * WARP) {
    const int block = item % Lists::BLOCKS, row = from + item / Lists::BLOCKS;
    int at = (ALONE ? block * ROOM : lists.begin[block][row]) + lists.count[block][row];
#pragma unroll 1
    for (; at % AT_ONCE != 0; ++at) lists.set(at, 0, 0.0f);
  }
}

// Makes the lists of so many rows, by some warps; if they do not fit, those who read them do. Returns how
// many events a lane has counted.
template <class Team, class By, int TEAM, int ROWS, int SENDERS, int ROOM, int STRIDE, int SLICE>
SPARSIFY_INLINE int sort_mail(MailLists<TEAM, ROWS, SENDERS, ROOM, STRIDE>& lists,
                              const Mail<ROWS, SLICE>* mail, int rows) {
  const Received<Team, By, SENDERS, ROWS, SLICE> received(mail);
  const int found = number_mail<Team, By>(lists, mail);
  By::meet();  // it is known where each event belongs
  if (lists.fits()) put_all<Team, By, false>(lists, mail, received, 0, rows);
  return found;
}

// Whether all blocks have arrived, as one of the warps asks for all of them.
template <class By, class Team, class Lists>
SPARSIFY_INLINE bool wait_with(Team& team, int half, Lists& lists) {
  if (By::thread() == 0) lists.met = team.has_met(half);
  By::meet();  // what the first of them has seen
  return lists.met != 0;
}

}  // namespace sparsify
