// What the blocks of a grid tell each other of active neurons alone, and sums of it. A block writes down
// the events of its slice, row by row, and how many they are. From the numbers of all blocks a reader
// knows where each event belongs in its lists, and looks at none of the neurons that are silent.
#pragma once

#include "group_sums.cuh"

namespace sparsify {

// The events of a slice for some rows: of each row those in the block of 256 senders in which the slice
// begins, and those in the next one. An event has its payload in the lower half; above it, from the
// lowest bit on: the sender in its block (8 bits), the row, or ROWS more in the next block (5), and how
// many of this row and block the slice has before it.
template <int ROWS, int SLICE>
struct Mail {
  static_assert(ROWS <= 16 && SLICE <= WARP, "a warp sends it");
  static constexpr int ROW = 8, BEFORE = 13;  // where they begin
  static constexpr int WORDS = (ROWS + 3) / 4;
  uint32_t counts[2][WORDS];  // a byte for each row: of the block in which the slice begins, the next
  uint32_t count;             // of all rows
  static constexpr int EVENTS = ROWS * SLICE > WARP / 2 ? ROWS * SLICE : WARP / 2;
  uint64_t events[EVENTS];
};

// Writes down rows low .. high - 1, of which `value_of(row, i)` is the value of neuron i; by one warp.
template <class Team, int NEURONS, int ROWS, int SLICE, class ValueOf>
SPARSIFY_INLINE void send(Mail<ROWS, SLICE>& to, const Slice<NEURONS, SLICE>& mine, int low, int high,
                          const ValueOf& value_of) {
  typedef Mail<ROWS, SLICE> By;
  const int i = lane_of(), next = BLOCK - mine.first % BLOCK;  // the first neuron of the next block
  const uint32_t below = (1u << lane_of()) - 1, nearer = next < WARP ? (1u << next) - 1 : ALL;
  uint32_t counts[2][By::WORDS] = {};
  int count = 0;
  float values[ROWS];  // are read before any is sent: one need not wait for another
#pragma unroll
  for (int row = 0; row < ROWS; ++row)
    values[row] = low + row < high && i < mine.size ? value_of(low + row, i) : 0.0f;
#pragma unroll
  for (int row = 0; row < ROWS; ++row) {
    const float value = values[row];
    const uint32_t bits = __ballot_sync(ALL, value != 0.0f);
    const int before = __popc(bits & below), near = __popc(bits & nearer), all = __popc(bits);
    if (value != 0.0f) {
      const bool is_next = i >= next;
      const uint32_t code = uint32_t(mine.first + i) % BLOCK |
                            uint32_t(is_next ? row + ROWS : row) << By::ROW |
                            uint32_t(is_next ? before - near : before) << By::BEFORE;
      Team::publish(to.events + count + before, uint64_t(code) << 32 | same_bits<uint32_t>(value));
    }
    counts[0][row / 4] |= uint32_t(near) << row % 4 * 8;
    counts[1][row / 4] |= uint32_t(all - near) << row % 4 * 8;
    count += all;
  }
  if (lane_of() != 0) return;
  Team::publish(&to.count, uint32_t(count));
#pragma unroll
  for (int word = 0; word < By::WORDS; ++word) {
    Team::publish(&to.counts[0][word], counts[0][word]);
    Team::publish(&to.counts[1][word], counts[1][word]);
  }
}

// Before it is sent for the first time: readers look at events before they know how many there are.
template <class Team, class Mail>
SPARSIFY_INLINE void clear(Mail& mail) {
  for (int e = int(threadIdx.x); e < Mail::EVENTS; e += int(blockDim.x))
    Team::publish(mail.events + e, uint64_t(0));
}

// A barrier of the block. Before it the last thread asks whether all blocks have arrived for the other
// half: then nobody has to when it is waited for.
template <class Team>
SPARSIFY_INLINE void meet_asking(Team& team, int half) {
  const int other = half ^ 1;
  bool has_come = team.come == other;
  if (!has_come && threadIdx.x == blockDim.x - 1 && team.has_come(other)) {
    has_come = true;
    __threadfence();
  }
  team.come = __syncthreads_or(has_come) ? other : -1;
}

// All threads of the block come to a barrier, and the first warp writes what `write` does, of what the
// block has computed. It is seen by those who wait.
template <class Team, class Write>
SPARSIFY_INLINE void arrive_with(Team& team, int half, const Write& write) {
  meet_asking(team, half);
  if (warp_of() == 0) {
    write();
    __syncwarp();
  }
  team.count_arrival(half);
}

// Where the weights of some events are: bytes behind those of the first sender of their block.
struct alignas(16) Offsets {
  uint32_t of[AT_ONCE];
};

// Lists of all events of some rows, of each row and block of senders ascending. The weights of a sender
// have STRIDE bytes. There is ROOM for those of a block of senders; if they are more, rows are taken one
// by one.
template <int TEAM, int ROWS, int SENDERS, int ROOM, int STRIDE>
struct MailLists {
  static constexpr int BLOCKS = blocks_of(SENDERS), WORDS = (ROWS + 3) / 4, ROOM_OF_BLOCK = ROOM;
  static_assert(ROOM >= BLOCK && ROOM % AT_ONCE == 0 && BLOCKS * ROOM <= 65536, "a row has room");
  static constexpr int END = BLOCKS * ROOM / AT_ONCE;  // behind all lists: payloads of 0
  Payloads<float> payload[END + 1];
  Offsets offset[END + 1];
  uint32_t sent[TEAM];                                // events
  uint32_t overflows[BLOCKS];                         // there is not room for all rows
  uint16_t place[TEAM][2 * ROWS];                     // of the first event of a slice in its list
  uint16_t begin[BLOCKS][ROWS], count[BLOCKS][ROWS];  // of lists, in their block

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
// of a word are added at once: none of those before an event exceeds 255.
template <class Team, int TEAM, int ROWS, int SENDERS, int ROOM, int STRIDE, int SLICE>
SPARSIFY_INLINE void number_mail(MailLists<TEAM, ROWS, SENDERS, ROOM, STRIDE>& lists,
                                 const Mail<ROWS, SLICE>* mail) {
  typedef MailLists<TEAM, ROWS, SENDERS, ROOM, STRIDE> Lists;
#pragma unroll 1
  for (int block = warp_of(); block < Lists::BLOCKS; block += warps_of()) {
    const int first = block * BLOCK, end = first + BLOCK < SENDERS ? first + BLOCK : SENDERS;
    const int rank = first / SLICE + lane_of();
    const bool here = rank * SLICE < end;
    const int part = here && rank * SLICE < first;
    uint32_t own[Lists::WORDS], before[Lists::WORDS];
#pragma unroll
    for (int word = 0; word < Lists::WORDS; ++word)
      own[word] = here ? Team::fetch(&mail[rank].counts[part][word]) : 0;
    if (here && part == 0) lists.sent[rank] = Team::fetch(&mail[rank].count);
    const int last = __popc(__ballot_sync(ALL, here)) - 1;
    int count = 0;
#pragma unroll
    for (int word = 0; word < Lists::WORDS; ++word) {
      before[word] = sum_up_to(own[word]) - own[word];
      const uint32_t most = __shfl_sync(ALL, before[word], last);
      const uint32_t rest = __shfl_sync(ALL, own[word], last);
      const int byte = lane_of() % 4 * 8;
      if (lane_of() / 4 == word) count = int(most >> byte & 255) + int(rest >> byte & 255);
    }
    const int room = (count + AT_ONCE - 1) / AT_ONCE * AT_ONCE;
    const int up_to = sum_up_to(room), begin = up_to - room;
    if (lane_of() < ROWS) {
      lists.begin[block][lane_of()] = uint16_t(begin);
      lists.count[block][lane_of()] = uint16_t(count);
    }
    if (lane_of() == WARP - 1) lists.overflows[block] = up_to > ROOM;
#pragma unroll
    for (int row = 0; row < ROWS; ++row) {
      const int of_row = block * ROOM + __shfl_sync(ALL, begin, row);
      const int place = of_row + int(byte_of(before[row / 4], row % 4));
      if (here) lists.place[rank][part * ROWS + row] = uint16_t(place);
    }
  }
}

// The events that a lane puts into lists: 16 lanes have those of a slice, of which each knows the first
// before it is known how many there are. What nobody has sent is there all the same, see `clear`. They
// are asked for as soon as all have come, while neurons of the other half are computed.
template <class Team, int SENDERS, int ROWS, int SLICE, int WARPS>
struct Received {
  static constexpr int LANES = WARP / 2, APART = 2 * WARPS, HEARD = (SENDERS + SLICE - 1) / SLICE;
  static constexpr int SLICES = (HEARD + APART - 1) / APART;  // of a lane
  uint64_t first[SLICES];
  int half = -1;  // that sent them

  static SPARSIFY_INLINE int rank(int k) {
    return warp_of() * 2 + lane_of() / LANES + k * APART;
  }
  SPARSIFY_INLINE void ask(const Mail<ROWS, SLICE>* mail, int from) {
    half = from;
#pragma unroll
    for (int k = 0; k < SLICES; ++k)
      first[k] = rank(k) < HEARD ? Team::fetch(mail[rank(k)].events + lane_of() % LANES) : 0;
  }
};

// Puts an event of a slice into its list: of all rows, or of one row ALONE, whose lists begin at 0.
template <bool ALONE, int TEAM, int ROWS, int SENDERS, int ROOM, int STRIDE, int SLICE>
SPARSIFY_INLINE int put(MailLists<TEAM, ROWS, SENDERS, ROOM, STRIDE>& lists, const Mail<ROWS, SLICE>&,
                        uint64_t event, int rank, int only) {
  typedef Mail<ROWS, SLICE> By;
  const uint32_t code = uint32_t(event >> 32), row = code >> By::ROW & 31;
  int at = lists.place[rank][row] + int(code >> By::BEFORE);
  if (ALONE) {
    const int is_next = row >= ROWS, own = int(row) - is_next * ROWS;
    if (own != only) return 0;
    at -= lists.begin[rank * SLICE / BLOCK + is_next][own];
  }
  lists.set(at, code & 255, same_bits<float>(uint32_t(event)));
  return 1;
}

// Puts the events of all rows into their lists, or those of one row ALONE. What is missing at the end of
// a list has a payload of 0. Returns how many events a lane has put.
template <class Team, bool ALONE, int TEAM, int ROWS, int SENDERS, int ROOM, int STRIDE, int SLICE,
          int WARPS>
SPARSIFY_INLINE int sort_mail(MailLists<TEAM, ROWS, SENDERS, ROOM, STRIDE>& lists,
                              const Mail<ROWS, SLICE>* mail,
                              const Received<Team, SENDERS, ROWS, SLICE, WARPS>& received, int from,
                              int to) {
  typedef Received<Team, SENDERS, ROWS, SLICE, WARPS> By;
  typedef MailLists<TEAM, ROWS, SENDERS, ROOM, STRIDE> Lists;
  int found = 0, more = 0;
  if (threadIdx.x < AT_ONCE) lists.set(Lists::END * AT_ONCE + int(threadIdx.x), 0, 0.0f);
#pragma unroll
  for (int k = 0; k < By::SLICES; ++k) {
    const int rank = By::rank(k), sent = rank < By::HEARD ? int(lists.sent[rank]) : 0;
    if (lane_of() % By::LANES < sent)
      found += put<ALONE>(lists, mail[0], received.first[k], rank, from);
    if (sent > more) more = sent;
  }
  if (more > By::LANES)
#pragma unroll 1
    for (int rank = By::rank(0); rank < By::HEARD; rank += By::APART)
#pragma unroll 1
      for (int e = lane_of() % By::LANES + By::LANES; e < lists.sent[rank]; e += By::LANES)
        found += put<ALONE>(lists, mail[0], Team::fetch(mail[rank].events + e), rank, from);
#pragma unroll 1
  for (int item = int(threadIdx.x); item < (to - from) * Lists::BLOCKS; item += int(blockDim.x)) {
    const int block = item % Lists::BLOCKS, row = from + item / Lists::BLOCKS;
    const int begin = ALONE ? 0 : lists.begin[block][row];
    int at = block * ROOM + begin + lists.count[block][row];
#pragma unroll 1
    for (; at % AT_ONCE != 0; ++at) lists.set(at, 0, 0.0f);
  }
  return found;
}

// Adds the events of a group's list to its sums, as add_list; it begins at `at`. All weights are behind
// `from`. Behind the end of its list a group adds the first weights, times 0.
template <bool IS_EXACT, class W, class Lists, int PER>
SPARSIFY_INLINE void add_mailed(float (&sum)[PER], const Lists& lists, int at, int count, int longest,
                                const char* from) {
  int quad = count > 0 ? at : Lists::END;
  Offsets offset = lists.offset[quad];
  Payloads<float> payload = lists.payload[quad];
#pragma unroll 2
  for (int k = 0; k < longest; k += AT_ONCE) {
    Several<W, PER> weight[AT_ONCE];
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
        sum[p] = IS_EXACT ? fused(own, payload.of[j], sum[p]) : sum[p] + own * payload.of[j];
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
    begin = block * (Lists::ROOM_OF_BLOCK / AT_ONCE);
    if (!alone) begin += lists.begin[block][row] / AT_ONCE;
  }
};

// sums[low + row][block][i], for rows from .. to - 1 of the lists; as add_groups. Groups of a warp have
// lists of one block of senders where they can: these are of like lengths, which the last block's are not.
template <bool IS_EXACT, class Lists, int ROWS, int BLOCKS, int COLUMNS, class Weights>
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
      add_mailed<IS_EXACT, W>(sum, lists, own.begin, count, longest,
                              reinterpret_cast<const char*>(weights.weights) + at);
#pragma unroll
      for (int p = 0; p < By::PER; ++p)
        if (here && has_item) sums[low + own.row][own.block][i + p] = sum[p];
    }
  }
}

// The same of the columns that lie apart: a lane has a list for itself. Warps take these in reverse: the
// last ones have no groups where lists are few.
template <bool IS_EXACT, class Lists, int ROWS, int BLOCKS, int COLUMNS, class Weights>
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
          sum[p] = IS_EXACT ? fused(weight, payload.of[j], sum[p]) : sum[p] + weight * payload.of[j];
        }
    }
#pragma unroll
    for (int p = 0; p < APART; ++p) sums[low + own.row][own.block][GROUPED + p] = sum[p];
  }
}

// Both.
template <bool IS_EXACT, class Lists, int ROWS, int BLOCKS, int COLUMNS, class Weights>
SPARSIFY_INLINE void add_lists(float (&sums)[ROWS][BLOCKS][COLUMNS], const Weights& weights,
                               const Lists& lists, int low, int from, int to, bool alone) {
  add_sorted<IS_EXACT>(sums, weights, lists, low, from, to, alone);
  if constexpr (COLUMNS > Weights::GROUPED)
    add_apart<IS_EXACT>(sums, weights, lists, low, from, to, alone);
}

// sums[row][block][i] = sum over the events of payload * weight, as add_groups, of the mail of all slices
// for rows low .. high - 1 of a half, where payloads are what a Value may be. By all WARPS of a block. Returns how
// many events a lane has put into lists.
template <class Team, int WARPS, class Value, int TEAM, int HELD, int SENDERS, int ROOM, int STRIDE,
          class F, int ROWS, int BLOCKS, int COLUMNS, class Weights, int SLICE>
SPARSIFY_INLINE int add_mail(F (&sums)[ROWS][BLOCKS][COLUMNS], const Weights& weights,
                             MailLists<TEAM, HELD, SENDERS, ROOM, STRIDE>& lists,
                             Received<Team, SENDERS, HELD, SLICE, WARPS>& received,
                             const Mail<HELD, SLICE>* mail, int half, int low, int high) {
  typedef typename Weights::Stored W;
  static_assert(STRIDE == Weights::GROUPED * int(sizeof(W)), "lists say where weights are");
  constexpr bool IS_EXACT = IS_HALF<W> && IS_HALF<Value>;
  if (received.half != half) received.ask(mail, half);
  received.half = -1;
  number_mail<Team>(lists, mail);
  __syncthreads();  // it is known where each event belongs
  const int rows = high - low;
  int found = 0;
  if (lists.fits()) {
    found = sort_mail<Team, false>(lists, mail, received, 0, rows);
    __syncthreads();  // the lists are there
    add_lists<IS_EXACT>(sums, weights, lists, low, 0, rows, false);
    return found;
  }
  for (int row = 0; row < rows; ++row) {
    if (row > 0) __syncthreads();  // the lists before are added
    found += sort_mail<Team, true>(lists, mail, received, row, row + 1);
    __syncthreads();  // the lists of a row are there
    add_lists<IS_EXACT>(sums, weights, lists, low, row, row + 1, true);
  }
  return found;
}

}  // namespace sparsify
