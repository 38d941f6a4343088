// Activity of neurons: words of 32 bits, and lists of the active senders in shared memory.
//
// A list has a place for each sender. Those of block k of 256 senders begin at place 256 k, ascending,
// and counts[k] says how many they are: a warp lists a block and waits for no other.
#pragma once

#include "device.cuh"

namespace sparsify {

template <bool SMALL>
struct IndexOf {
  typedef uint16_t type;
};
template <>
struct IndexOf<false> {
  typedef uint32_t type;
};

template <int SENDERS>
struct Events {
  static constexpr int senders = SENDERS;
  typename IndexOf<SENDERS <= 65536>::type index[SENDERS];
  int counts[blocks_of(SENDERS)];
};

// ---- where words of activity come from; a whole warp asks for word(w), neurons 32 w and up ----

// Words that are in memory: bit i of word w is neuron 32 w + i.
struct Words {
  const uint32_t* words;
  SPARSIFY_INLINE explicit Words(const uint32_t* words) : words(words) {}
  SPARSIFY_INLINE uint32_t word(int w, int) const { return words[w]; }
};

// Values of which those that are not zero are active; NaN is.
template <class T>
struct Values {
  const T* values;
  SPARSIFY_INLINE explicit Values(const T* values) : values(values) {}
  SPARSIFY_INLINE uint32_t word(int w, int neurons) const {
    const int n = w * WARP + lane_of();
    return __ballot_sync(ALL, n < neurons && values[n] != T(0));
  }
};

// Eight neurons a byte, the first in the lowest bit; nothing is read behind the last byte.
struct Bits {
  const uint8_t* bytes;
  SPARSIFY_INLINE explicit Bits(const uint8_t* bytes) : bytes(bytes) {}
  SPARSIFY_INLINE uint32_t word(int w, int neurons) const {
    const int n = w * WARP + lane_of();
    return __ballot_sync(ALL, n < neurons && (bytes[n / 8] >> (n % 8) & 1) != 0);
  }
  SPARSIFY_INLINE bool operator[](int n) const { return (bytes[n / 8] >> (n % 8) & 1) != 0; }
};

// ---- lists ----

// Lists the active senders of a block of 256; by one warp.
template <int SENDERS, class Source>
SPARSIFY_INLINE void list_block(Events<SENDERS>& events, const Source& source, int block) {
  constexpr int WORDS = BLOCK / WARP;
  const int first = block * WORDS;
  uint32_t words[WORDS];
#pragma unroll
  for (int w = 0; w < WORDS; ++w)
    words[w] = first + w < words_of(SENDERS) ? source.word(first + w, SENDERS) : 0;
  int count = 0;
#pragma unroll
  for (int w = 0; w < WORDS; ++w) {
    const int before = __popc(words[w] & ((1u << lane_of()) - 1));
    const int sender = (first + w) * WARP + lane_of();
    if (words[w] >> lane_of() & 1) events.index[block * BLOCK + count + before] = sender;
    count += __popc(words[w]);
  }
  if (lane_of() == 0) events.counts[block] = count;
}

// Lists all active senders, by the warps of a block of threads, which meet afterwards. Returns how
// many the caller's warp has found, to one of its lanes.
template <int SENDERS, class Source>
SPARSIFY_INLINE int list_events(Events<SENDERS>& events, const Source& source) {
  int found = 0;
  for (int block = warp_of(); block < blocks_of(SENDERS); block += warps_of()) {
    list_block(events, source, block);
    if (lane_of() == 0) found += events.counts[block];
  }
  return found;
}

// ---- what neurons publish; by whole warps, whose lanes have consecutive neurons n ----

// Sets the word of 32 neurons; those behind the last one are not active.
SPARSIFY_INLINE void mark(uint32_t* words, int n, int neurons, bool active) {
  const uint32_t word = __ballot_sync(ALL, n < neurons && active);
  if (lane_of() == 0 && n < neurons) words[n / WARP] = word;
}

// Sets the bytes of 32 neurons, of which n is a multiple of 32 in the first lane.
SPARSIFY_INLINE void store_bits(uint8_t* bytes, int n, int neurons, bool bit) {
  const uint32_t word = __ballot_sync(ALL, n < neurons && bit);
  const int byte = (n - lane_of()) / 8 + lane_of();
  if (lane_of() < WARP / 8 && byte * 8 < neurons) bytes[byte] = uint8_t(word >> lane_of() * 8);
}

// ---- values of a population, by all threads of a block, which meet afterwards ----

template <class F, class Source>
SPARSIFY_INLINE void copy_values(F* to, const Source& from, int neurons) {
  for (int n = threadIdx.x; n < neurons; n += blockDim.x) to[n] = cast<F>(from[n]);
}

// How many values are not zero. Each thread looks at those of the neurons that it computes, or has
// copied: it needs no barrier after these.
template <class Source>
SPARSIFY_INLINE int count_active(const Source* values, int neurons) {
  int found = 0;
  for (int n = threadIdx.x; n < neurons; n += blockDim.x) found += values[n] != Source(0);
  return found;
}

// From here on a sum of products may overflow, however it is added up; see ir.WILD.
template <class F>
SPARSIFY_INLINE F wild_from() {
  return sizeof(F) == 4 ? F(0x1p63) : F(0x1p511);
}

// Whether some value is wild: infinities and NaN are, too. Threads share the values as above.
template <class F>
SPARSIFY_INLINE bool is_wild(const F* values, int neurons) {
  bool wild = false;
  for (int n = threadIdx.x; n < neurons; n += blockDim.x)
    wild |= !(absolute(values[n]) < wild_from<F>());
  return wild;
}

}  // namespace sparsify
