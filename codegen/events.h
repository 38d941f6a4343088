// Lists of the active senders of batch rows, and how they are made of values and of masks.
#pragma once

namespace sparsify {

constexpr int64_t blocks_of(int64_t senders) { return (senders + BLOCK - 1) / BLOCK; }

// The events of one batch row, of which those from place `begin` to `end` are of one block of senders.
template <class Index, class F>
struct BlockEvents {
  const Index* index;
  const F* payload;
  int32_t begin, end, last;  // last: of the whole row
};

// The active senders of several batch rows, ascending. Block k of a row ends before place ends[k].
template <class Index, class F>
struct Events {
  int64_t senders;
  Index* index;    // [rows][senders]
  F* payload;      // [rows][senders], or null: every payload is 1
  int32_t* ends;   // [rows][blocks]
  int32_t* count;  // [rows]

  Events(Arena& arena, int64_t rows, int64_t population, bool has_payload)
      : senders(population),
        index(arena.take<Index>(rows * population)),
        payload(has_payload ? arena.take<F>(rows * population) : nullptr),
        ends(arena.take<int32_t>(rows * blocks_of(population))),
        count(arena.take<int32_t>(rows)) {}

  SPARSIFY_INLINE BlockEvents<Index, F> at(int64_t row, int64_t block) const {
    const int32_t* const row_ends = ends + row * blocks_of(senders);
    return {index + row * senders, payload ? payload + row * senders : nullptr,
            block ? row_ends[block - 1] : 0, row_ends[block], count[row] - 1};
  }
};

template <class Index, class F>
SPARSIFY_INLINE void clear(const Events<Index, F>& events, int64_t rows) {
  for (int64_t row = 0; row < rows; ++row) events.count[row] = 0;
}

template <class Index, class F>
SPARSIFY_INLINE int64_t count_events(const Events<Index, F>& events, int64_t rows) {
  int64_t n = 0;
  for (int64_t row = 0; row < rows; ++row) n += events.count[row];
  return n;
}

// Bit i is set where values[i] is not zero; NaN is not zero.
template <class F>
SPARSIFY_INLINE uint32_t active_bits(const F* values, int count) {
  uint32_t bits = 0;
  for (int i = 0; i < count; ++i) bits |= uint32_t(values[i] != F(0)) << i;
  return bits;
}

// The same for eight values.
template <class F>
SPARSIFY_INLINE uint32_t eight_active_bits(const F* values) {
  return active_bits(values, 8);
}
#if defined(__AVX2__)
typedef float Float8 __attribute__((vector_size(32)));
typedef float Float8Anywhere __attribute__((vector_size(32), may_alias, aligned(4)));
typedef double Double4 __attribute__((vector_size(32)));
typedef double Double4Anywhere __attribute__((vector_size(32), may_alias, aligned(8)));
SPARSIFY_INLINE uint32_t eight_active_bits(const float* values) {
  const Float8 eight = *reinterpret_cast<const Float8Anywhere*>(values);
  return uint32_t(__builtin_ia32_movmskps256(Float8(eight != Float8{})));
}
SPARSIFY_INLINE uint32_t eight_active_bits(const double* values) {
  const Double4 low = *reinterpret_cast<const Double4Anywhere*>(values);
  const Double4 high = *reinterpret_cast<const Double4Anywhere*>(values + 4);
  return uint32_t(__builtin_ia32_movmskpd256(Double4(low != Double4{})) |
                  __builtin_ia32_movmskpd256(Double4(high != Double4{})) << 4);
}
#endif

// Appends the active ones of `count` values to the list of `row`; values[0] belongs to sender
// `first`, a multiple of 8. Every block that has been seen to its end is closed.
template <class Index, class F, class Source>
SPARSIFY_INLINE void append(const Events<Index, F>& to, int64_t row, const Source* values,
                            int64_t first, int64_t count) {
  Index* const index = to.index + row * to.senders;
  F* const payload = to.payload ? to.payload + row * to.senders : nullptr;
  int32_t* const ends = to.ends + row * blocks_of(to.senders);
  int32_t n = to.count[row];
  for (int64_t i = 0; i < count; i += 8) {
    uint32_t bits = count - i < 8 ? active_bits(values + i, int(count - i))
                                  : eight_active_bits(values + i);
    for (; bits; bits &= bits - 1) {
      const int64_t at = i + __builtin_ctz(bits);
      index[n] = Index(first + at);
      if (payload) payload[n] = F(values[at]);
      ++n;
    }
    ends[(first + i) / BLOCK] = n;
  }
  to.count[row] = n;
}

// Replaces the list of `row` by the events of a whole population.
template <class Index, class F, class Source>
SPARSIFY_INLINE void scan(const Events<Index, F>& to, int64_t row, const Source* values) {
  to.count[row] = 0;
  append(to, row, values, 0, to.senders);
}

// A population's activity as bits, which threads can write side by side: 8 neurons a byte.
constexpr int64_t mask_bytes(int64_t population) { return (population + 63) / 64 * 8; }

template <class Source>
SPARSIFY_INLINE void mark(uint8_t* mask, const Source* values, int64_t first, int64_t count) {
  for (int64_t i = 0; i < count; i += 8)
    mask[(first + i) / 8] = uint8_t(count - i < 8 ? active_bits(values + i, int(count - i))
                                                  : eight_active_bits(values + i));
}

// Replaces the list of `row` by the events of a mask. `values` are read for payloads only.
template <class Index, class F>
SPARSIFY_INLINE void unpack(const Events<Index, F>& to, int64_t row, const uint8_t* mask,
                            const F* values = nullptr) {
  Index* const index = to.index + row * to.senders;
  F* const payload = to.payload ? to.payload + row * to.senders : nullptr;
  int32_t* const ends = to.ends + row * blocks_of(to.senders);
  int32_t n = 0;
  for (int64_t first = 0; first < to.senders; first += 64) {
    uint64_t bits = load_bits(mask + first / 8, to.senders - first);
    for (; bits; bits &= bits - 1) {
      const int64_t at = first + __builtin_ctzll(bits);
      index[n] = Index(at);
      if (payload) payload[n] = values[at];
      ++n;
    }
    ends[first / BLOCK] = n;
  }
  to.count[row] = n;
}

template <class Source>
SPARSIFY_INLINE int64_t count_active(const Source* values, int64_t count) {
  int64_t n = 0;
  for (int64_t i = 0; i < count; ++i) n += values[i] != Source(0);
  return n;
}

}  // namespace sparsify
