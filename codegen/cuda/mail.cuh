// What the blocks of a grid tell each other of active neurons alone. A block writes down the events of
// its slice, row by row, and how many they are. From the numbers of all blocks a reader knows where each
// event belongs in its lists, see mail_lists.cuh, and looks at none of the neurons that are silent.
#pragma once

#include "exchange.cuh"

namespace sparsify {

// Warps of a block that work together, and meet without the others: MANY from the FIRST on, at a barrier
// of the block. Number 0 is that of all.
template <int FIRST, int MANY, int BARRIER>
struct Warps {
  static constexpr int COUNT = MANY;

  static SPARSIFY_INLINE int index() { return warp_of() - FIRST; }
  static SPARSIFY_INLINE int thread() { return int(threadIdx.x) - FIRST * WARP; }
  static SPARSIFY_INLINE void meet() {
    if constexpr (BARRIER == 0) {
      __syncthreads();
    } else {
      __barrier_sync_count(BARRIER, MANY * WARP);
    }
  }
};

// 32 bits from `first` on of a string of which each lane of the warp has a word.
SPARSIFY_INLINE uint32_t bits_from(uint32_t word, int first) {
  const uint32_t low = __shfl_sync(ALL, word, first / WARP);
  const uint32_t high = __shfl_sync(ALL, word, first / WARP + 1);
  return __funnelshift_r(low, high, uint32_t(first % WARP));
}
// The first `count` bits, of 0 to 32.
SPARSIFY_INLINE uint32_t first_bits(int count) { return count < WARP ? (1u << count) - 1 : ALL; }

// The events of a slice for some rows: of each row those in the block of 256 senders in which the slice
// begins, and those in the next one. An event has its payload in the lower half; above it, from the
// lowest bit on: the sender in its block (8 bits), the row, or HELD more in the next block (5), and how
// many of this row and block the slice has before it.
template <int ROWS, int SLICE>
struct Mail {
  static_assert(ROWS <= 16 && SLICE <= WARP, "a warp sends it");
  static constexpr int ROW = 8, BEFORE = 13;  // where they begin
  static constexpr int WORDS = (ROWS + 3) / 4, HELD = 4 * WORDS;
  static constexpr int NEURONS = ROWS * SLICE;
  static constexpr int EVENTS = NEURONS > WARP / 2 ? NEURONS : WARP / 2;
  uint8_t counts[2][HELD];  // of each row: in the block in which the slice begins, in the next
  uint32_t count;           // of all rows
  uint64_t events[EVENTS];
};

// Writes down rows low .. high - 1, of which `value_of(row, i)` is the value of neuron i; by one warp. A
// lane has every 32nd neuron of all rows, one row after the other.
template <class Team, int NEURONS, int ROWS, int SLICE, class ValueOf>
SPARSIFY_INLINE void send(Mail<ROWS, SLICE>& to, const Slice<NEURONS, SLICE>& mine, int low, int high,
                          const ValueOf& value_of) {
  typedef Mail<ROWS, SLICE> By;
  constexpr int WORDS = words_of(By::NEURONS);
  const int begin = low * SLICE;
  const int next = BLOCK - mine.first % BLOCK;  // the first neuron of the next block
  float values[WORDS];                          // are read before any is sent
  uint32_t active = 0;                          // which of them are: a word of a lane
#pragma unroll
  for (int word = 0; word < WORDS; ++word) {
    const int neuron = begin + word * WARP + lane_of(), row = neuron / SLICE, i = neuron % SLICE;
    values[word] = row < high && i < mine.size ? value_of(row, i) : 0.0f;
  }
#pragma unroll
  for (int word = 0; word < WORDS; ++word) {
    const uint32_t bits = __ballot_sync(ALL, values[word] != 0.0f);
    if (lane_of() == word) active = bits;
  }
  int count = 0;
#pragma unroll
  for (int word = 0; word < WORDS; ++word) {
    if (begin + word * WARP >= high * SLICE) break;
    const int neuron = begin + word * WARP + lane_of(), row = neuron / SLICE, i = neuron % SLICE;
    const bool is_next = i >= next;
    const int many = is_next ? i - next : i;  // before it, in its row and block
    const int before = __popc(bits_from(active, neuron - begin - many) & first_bits(many));
    const uint32_t bits = __shfl_sync(ALL, active, word);
    if (values[word] != 0.0f) {
      const uint32_t code = uint32_t(mine.first + i) % BLOCK |
                            uint32_t(row - low + (is_next ? By::HELD : 0)) << By::ROW |
                            uint32_t(before) << By::BEFORE;
      const int at = count + __popc(bits & first_bits(lane_of()));
      Team::publish(to.events + at, uint64_t(code) << 32 | same_bits<uint32_t>(values[word]));
    }
    count += __popc(bits);
  }
  if (lane_of() == 0) Team::publish(&to.count, uint32_t(count));
  const int part = lane_of() / By::HELD, row = lane_of() % By::HELD, near = next < SLICE ? next : SLICE;
  const uint32_t own = bits_from(active, row * SLICE + (part ? near : 0));
  const int many = row < ROWS ? (part ? SLICE - near : near) : 0;
  if (part < 2) Team::publish(&to.counts[part][row], uint8_t(__popc(own & first_bits(many))));
}

// Before it is sent for the first time: readers look at events before they know how many there are.
template <class Team, class Mail>
SPARSIFY_INLINE void clear(Mail& mail) {
  for (int e = int(threadIdx.x); e < Mail::EVENTS; e += int(blockDim.x))
    Team::publish(mail.events + e, uint64_t(0));
}

// Warps `By` come to a barrier, and the first of them writes what `write` does, of what they have
// computed. It is seen by those who wait for the team's arrival, which all threads of the block expect.
template <class By, class Team, class Write>
SPARSIFY_INLINE void arrive_with(Team& team, int half, const Write& write) {
  By::meet();
  if (By::index() != 0) return;
  write();
  __syncwarp();
  if (lane_of() == 0) team.tell_arrival(half);
}

}  // namespace sparsify
