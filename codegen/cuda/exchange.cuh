// What neurons tell each other, as a warp of a team reads it: 256 senders of one batch row at a time.
// Where what they tell lies, in global memory or in that of a cluster, only the team knows.
#pragma once

#include "device.cuh"

namespace sparsify {

constexpr int CHUNKS = BLOCK / WARP;

// Byte j of a word.
SPARSIFY_INLINE uint32_t byte_of(uint32_t word, int j) { return __byte_perm(word, 0, 0x4440u + j); }

// Where something begins, in bytes. The compiler does not see that it is a multiple, which it would divide by
// before it adds a row, and multiply with afterwards; or find anew for each access.
SPARSIFY_INLINE uint32_t hidden_multiple(int bytes) {
  return __byte_perm(uint32_t(bytes), 0, 0x3210u);
}

// The neurons of a population that a block owns: `size` of them, from `first` on.
template <int NEURONS, int SLICE>
struct Slice {
  int first, size;

  SPARSIFY_INLINE explicit Slice(int rank)
      : first(rank * SLICE < NEURONS ? rank * SLICE : NEURONS),
        size(NEURONS - first < SLICE ? NEURONS - first : SLICE) {}
};

// ---- sources: from a sender to its value; what is 0 is silent ----

// Published as bits. Every slice of the population begins a word of its own.
template <class Team, int SLICE>
struct ToldBits {
  const uint32_t* words;
  typedef bool Value;

  SPARSIFY_INLINE uint32_t word(int s) const {
    return Team::fetch(words + s / SLICE * words_of(SLICE) + s % SLICE / WARP);
  }
  SPARSIFY_INLINE bool operator()(int s) const { return word(s) >> (s % SLICE % WARP) & 1; }
};

// Published as numbers.
template <class Team, class F>
struct ToldValues {
  const F* values;
  typedef F Value;

  SPARSIFY_INLINE F operator()(int s) const { return Team::fetch(values + s); }
};

// A row of an operand.
template <class T>
struct Given {
  const T* values;
  typedef T Value;

  SPARSIFY_INLINE T operator()(int s) const { return read_only(values + s); }
};

// A row of an operand that lies in memory as bits.
struct GivenBits {
  const uint8_t* bytes;
  typedef bool Value;

  SPARSIFY_INLINE bool operator()(int s) const { return __ldg(bytes + s / 8) >> (s % 8) & 1; }
};

// The values of a block of so many words of senders, of which a lane has every 32nd. All are asked
// for at once, because they come from afar.
template <class Source, int WORDS = CHUNKS>
struct Heard {
  typedef typename Source::Value Value;
  Value value[WORDS];

  Heard() = default;
  SPARSIFY_INLINE Heard(const Source& source, int block, int senders) {
    hear(source, block, senders);
  }
  SPARSIFY_INLINE void hear(const Source& source, int block, int senders) {
#pragma unroll
    for (int chunk = 0; chunk < WORDS; ++chunk) {
      const int s = (block * WORDS + chunk) * WARP + lane_of();
      value[chunk] = s < senders ? source(s) : Value(0);
    }
  }

  // Whether the lane's sender of a chunk is active; NaN is.
  SPARSIFY_INLINE bool is_active(int chunk) const { return value[chunk] != Value(0); }

  SPARSIFY_INLINE int count() const {
    int count = 0;
#pragma unroll
    for (int chunk = 0; chunk < WORDS; ++chunk) count += __popc(__ballot_sync(ALL, is_active(chunk)));
    return count;
  }
};

// Asks for what a later step reads, which then comes from the second cache. Nobody waits for it.
template <class T>
SPARSIFY_INLINE void touch(const T* value) {
  (void)*static_cast<const volatile T*>(value);
}
SPARSIFY_INLINE void touch(const float16* value) { touch(plain(value)); }
SPARSIFY_INLINE void touch(const bfloat16* value) { touch(plain(value)); }

// ---- events ----

// The active ones of a block of senders, ascending: how far they are behind its first. Each warp has
// a list of its own. Events are taken AT_ONCE, so that the last of them may be missing: what is in
// their places is the first sender, with a payload of 0.
constexpr int AT_ONCE = 4;

template <class F>
struct alignas(16) Payloads {
  F of[AT_ONCE];
};

template <class F, bool HAS_PAYLOADS, int SENDERS = BLOCK>
struct BlockEvents {
  uint32_t index[SENDERS / AT_ONCE];  // a byte each
  Payloads<F> payload[HAS_PAYLOADS ? SENDERS / AT_ONCE : 1];

  SPARSIFY_INLINE void set(int at, int sender, F value) {
    reinterpret_cast<uint8_t*>(index)[at] = uint8_t(sender);
    if constexpr (HAS_PAYLOADS) payload[at / AT_ONCE].of[at % AT_ONCE] = value;
  }
};

// Lists the events of a block and returns how many there are; the lanes of a warp meet before and
// afterwards.
template <class F, bool HAS_PAYLOADS, int SENDERS, class Source>
SPARSIFY_INLINE int write_list(BlockEvents<F, HAS_PAYLOADS, SENDERS>& to,
                               const Heard<Source, SENDERS / WARP>& heard) {
  int count = 0;
#pragma unroll
  for (int chunk = 0; chunk < SENDERS / WARP; ++chunk) {
    const bool active = heard.is_active(chunk);
    const uint32_t bits = __ballot_sync(ALL, active);
    const int at = count + __popc(bits & ((1u << lane_of()) - 1));
    if (active) to.set(at, chunk * WARP + lane_of(), cast<F>(heard.value[chunk]));
    count += __popc(bits);
  }
  const int behind = count + lane_of();
  if (lane_of() < AT_ONCE - 1 && behind < SENDERS) to.set(behind, 0, F(0));
  return count;
}
template <class F, bool HAS_PAYLOADS, class Source>
SPARSIFY_INLINE int list_events(BlockEvents<F, HAS_PAYLOADS>& to, const Heard<Source>& heard) {
  __syncwarp();  // all have read the list before
  const int count = write_list(to, heard);
  __syncwarp();  // the list is there
  return count;
}

}  // namespace sparsify
