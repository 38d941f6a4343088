// Lists of the active senders of batch rows, and how they are made of values and of masks.
#pragma once

namespace sparsify {

constexpr int64_t blocks_of(int64_t senders) { return (senders + BLOCK - 1) / BLOCK; }

// The events of one batch row, of which those from place `begin` to `end` are of one block of senders.
template <class Index, class F>
struct BlockEvents {
  const Index* index;
  const F* payload;  // or null: every payload is 1
  int32_t begin, end, last;  // last: of the whole row
};

constexpr int SPARE = 32;  // places behind a list, because events are written in whole vectors

// The active senders of several batch rows, ascending. Block k of a row ends before place ends[k].
template <class Index, class F>
struct Events {
  int64_t senders;
  Index* index;    // [rows][senders + SPARE]
  F* payload;      // [rows][senders + SPARE], or null: every payload is 1
  int32_t* ends;   // [rows][blocks]
  int32_t* count;  // [rows]
  bool* is_plain;  // [rows], whether all payloads are 1: multiplying takes as long as adding does

  Events(Arena& arena, int64_t rows, int64_t population, bool has_payload)
      : senders(population),
        index(arena.take<Index>(rows * (population + SPARE))),
        payload(has_payload ? arena.take<F>(rows * (population + SPARE)) : nullptr),
        ends(arena.take<int32_t>(rows * blocks_of(population))),
        count(arena.take<int32_t>(rows)),
        is_plain(arena.take<bool>(rows)) {}

  Index* index_of(int64_t row) const { return index + row * (senders + SPARE); }
  F* payload_of(int64_t row) const {
    return payload ? payload + row * (senders + SPARE) : nullptr;
  }
  int32_t* ends_of(int64_t row) const { return ends + row * blocks_of(senders); }

  SPARSIFY_INLINE BlockEvents<Index, F> at(int64_t row, int64_t block) const {
    const int32_t* const row_ends = ends_of(row);
    return {index_of(row), is_plain[row] ? nullptr : payload_of(row),
            block ? row_ends[block - 1] : 0, row_ends[block], count[row] - 1};
  }
};

template <class Index, class F>
SPARSIFY_INLINE void clear_row(const Events<Index, F>& events, int64_t row) {
  events.count[row] = 0;
  events.is_plain[row] = true;
}

template <class Index, class F>
SPARSIFY_INLINE void clear(const Events<Index, F>& events, int64_t rows) {
  for (int64_t row = 0; row < rows; ++row) clear_row(events, row);
}

template <class Index, class F>
SPARSIFY_INLINE int64_t count_events(const Events<Index, F>& events, int64_t rows) {
  int64_t n = 0;
  for (int64_t row = 0; row < rows; ++row) n += events.count[row];
  return n;
}

// ---- which of some values are active ----

// Bit i is set where values[i] is not zero; NaN is not zero. At most 16 values.
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
SPARSIFY_INLINE uint32_t eight_active_bits(const uint8_t* values) {
  uint64_t bytes;
  std::memcpy(&bytes, values, 8);
  bytes |= bytes >> 4, bytes |= bytes >> 2, bytes |= bytes >> 1;  // into the lowest bit of each
  return uint32_t((bytes & 0x0101010101010101) * 0x0102040810204080 >> 56);
}

#if defined(__AVX512F__)
constexpr int AT_ONCE = 16;  // values that are looked at together

template <class F>
SPARSIFY_INLINE uint32_t all_active_bits(const F* values) {
  return eight_active_bits(values) | eight_active_bits(values + 8) << 8;
}

SPARSIFY_INLINE uint32_t active_lanes(Vector<float> some) {  // 4: not equal, rounding as it is
  return uint16_t(__builtin_ia32_cmpps512_mask(some, Vector<float>{}, 4, uint16_t(-1), 4));
}
SPARSIFY_INLINE uint32_t active_lanes(Vector<double> some) {
  return uint8_t(__builtin_ia32_cmppd512_mask(some, Vector<double>{}, 4, uint8_t(-1), 4));
}
SPARSIFY_INLINE uint32_t all_active_bits(const float* values) {
  return active_lanes(load(values));
}
SPARSIFY_INLINE uint32_t all_active_bits(const double* values) {
  return active_lanes(load(values)) | active_lanes(load(values + 8)) << 8;
}
#else
constexpr int AT_ONCE = 8;

template <class F>
SPARSIFY_INLINE uint32_t all_active_bits(const F* values) {
  return eight_active_bits(values);
}
#endif

// The same for the next AT_ONCE values, or for those that are left.
template <class F>
SPARSIFY_INLINE uint32_t next_active_bits(const F* values, int64_t left) {
  return left < AT_ONCE ? active_bits(values, int(left)) : all_active_bits(values);
}
#if defined(__AVX512F__)
SPARSIFY_INLINE uint32_t next_active_bits(const float* values, int64_t left) {
  const uint16_t wanted = left < AT_ONCE ? uint16_t((1u << left) - 1) : uint16_t(-1);
  return active_lanes(__builtin_ia32_loadups512_mask(values, Vector<float>{}, wanted));
}
#endif

// The same for the next 64 values, or for those that are left.
template <class F>
SPARSIFY_INLINE uint64_t active_word(const F* values, int64_t left) {
  uint64_t word = 0;
  if (left >= 64) {
    SPARSIFY_UNROLL
    for (int i = 0; i < 64; i += AT_ONCE) word |= uint64_t(all_active_bits(values + i)) << i;
    return word;
  }
  for (int64_t i = 0; i < left; i += AT_ONCE)
    word |= uint64_t(next_active_bits(values + i, left - i)) << i;
  return word;
}

// ---- lists ----

// to[0], to[1], ... are the senders whose bits are set, of AT_ONCE from `first` on. What lies behind
// them, up to AT_ONCE places in all, is overwritten: no jump depends on how many there are.
#if defined(__AVX512F__)
typedef int32_t Int16 __attribute__((vector_size(64)));
typedef int32_t Int16Anywhere __attribute__((vector_size(64), may_alias, aligned(4)));
typedef short Narrow16 __attribute__((vector_size(32)));
typedef short Narrow16Anywhere __attribute__((vector_size(32), may_alias, aligned(2)));
SPARSIFY_INLINE Int16 active_senders(int64_t first, uint32_t bits) {
  const Int16 lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const Int16 senders = lanes + int32_t(first);
  return __builtin_ia32_compresssi512_mask(senders, own_zeros<Int16>(bits), uint16_t(bits));
}
SPARSIFY_INLINE void put_senders(int32_t* to, int64_t first, uint32_t bits) {
  *reinterpret_cast<Int16Anywhere*>(to) = active_senders(first, bits);
}
SPARSIFY_INLINE void put_senders(uint16_t* to, int64_t first, uint32_t bits) {
  *reinterpret_cast<Narrow16Anywhere*>(to) =
      __builtin_ia32_pmovdw512_mask(active_senders(first, bits), Narrow16{}, uint16_t(-1));
}
#else
struct BitPlaces {
  uint8_t of[256][8];  // the places of the bits of a byte, ascending

  constexpr BitPlaces() : of() {
    for (int byte = 0; byte < 256; ++byte)
      for (int bit = 0, n = 0; bit < 8; ++bit)
        if (byte >> bit & 1) of[byte][n++] = uint8_t(bit);
  }
};
constexpr BitPlaces BIT_PLACES;
template <class Index>
SPARSIFY_INLINE void put_senders(Index* to, int64_t first, uint32_t bits) {
  typedef uint8_t Bytes __attribute__((vector_size(8), may_alias, aligned(1)));
  typedef Index Senders __attribute__((vector_size(8 * sizeof(Index))));
  typedef Index SendersAnywhere
      __attribute__((vector_size(8 * sizeof(Index)), may_alias, aligned(sizeof(Index))));
  const Bytes places = *reinterpret_cast<const Bytes*>(BIT_PLACES.of[bits]);
  *reinterpret_cast<SendersAnywhere*>(to) =
      __builtin_convertvector(places, Senders) + Index(first);
}
#endif

// The same for 64 senders, or those that are left. How many there are is returned.
template <class Index>
SPARSIFY_INLINE int32_t put_word(Index* to, int64_t first, uint64_t word, int64_t left) {
  int32_t n = 0;
  SPARSIFY_UNROLL
  for (int i = 0; i < 64; i += AT_ONCE) {
    if (i >= left) break;
    const uint32_t bits = uint32_t(word >> i) & ((1u << AT_ONCE) - 1);
    put_senders(to + n, first + i, bits);
    n += __builtin_popcount(bits);
  }
  return n;
}
#if defined(__AVX512VBMI2__) && defined(__AVX512BW__)
typedef char Char64 __attribute__((vector_size(64)));
typedef uint16_t Short32 __attribute__((vector_size(64)));
typedef uint16_t Short32Anywhere __attribute__((vector_size(64), may_alias, aligned(2)));
SPARSIFY_INLINE int32_t put_word(uint16_t* to, int64_t first, uint64_t word, int64_t) {
  constexpr Char64 LANES = {0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15,
                            16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31,
                            32, 33, 34, 35, 36, 37, 38, 39, 40, 41, 42, 43, 44, 45, 46, 47,
                            48, 49, 50, 51, 52, 53, 54, 55, 56, 57, 58, 59, 60, 61, 62, 63};
  const Char64 zeros = own_zeros<Char64>(uint32_t(word));
  const Char64 places = __builtin_ia32_compressqi512_mask(LANES, zeros, word);
  const int32_t n = __builtin_popcountll(word);
  const auto put = [&](int half) {
    Byte32 bytes;
    std::memcpy(&bytes, reinterpret_cast<const char*>(&places) + 32 * half, sizeof bytes);
    *reinterpret_cast<Short32Anywhere*>(to + 32 * half) =
        __builtin_convertvector(bytes, Short32) + uint16_t(first);
  };
  put(0);
  if (n > 32) put(1);
  return n;
}
#endif

// Sets the payloads of the events from place `begin` to `end`; values[0] belongs to sender `first`.
template <class Index, class F, class Source>
SPARSIFY_INLINE void put_payloads(const Events<Index, F>& to, int64_t row, const Source* values,
                                  int64_t first, int32_t begin, int32_t end) {
  if (!to.payload) return;
  const Index* const index = to.index_of(row);
  F* const payload = to.payload_of(row);
  bool is_plain = to.is_plain[row];
  for (int32_t k = begin; k < end; ++k) {
    payload[k] = F(values[index[k] - first]);
    is_plain &= payload[k] == F(1);
  }
  to.is_plain[row] = is_plain;
}

// Appends the active ones of `count` values to the list of `row`; values[0] belongs to sender
// `first`, a multiple of 16; 64 of them, or all, are of one block. Every block that has been seen to its
// end is closed.
template <class Index, class F, class Source>
SPARSIFY_INLINE void append(const Events<Index, F>& to, int64_t row, const Source* values,
                            int64_t first, int64_t count) {
  Index* const index = to.index_of(row);
  int32_t* const ends = to.ends_of(row);
  const int32_t before = to.count[row];
  int32_t n = before;
  for (int64_t i = 0; i < count; i += 64) {
    const int64_t left = count - i;
    n += put_word(index + n, first + i, active_word(values + i, left), left);
    ends[(first + i) / BLOCK] = n;
  }
  to.count[row] = n;
  put_payloads(to, row, values, first, before, n);
}

// Replaces the list of `row` by the events of a whole population.
template <class Index, class F, class Source>
SPARSIFY_INLINE void scan(const Events<Index, F>& to, int64_t row, const Source* values) {
  clear_row(to, row);
  append(to, row, values, 0, to.senders);
}

// A population's activity as bits, which threads can write side by side: 8 neurons a byte.
constexpr int64_t mask_bytes(int64_t population) { return (population + 63) / 64 * 8; }

// values[0] belongs to neuron `first`, a multiple of 16. Bits behind the last neuron are 0.
template <class Source>
SPARSIFY_INLINE void mark(uint8_t* mask, const Source* values, int64_t first, int64_t count) {
  for (int64_t i = 0; i < count; i += AT_ONCE) {
    const uint32_t bits = next_active_bits(values + i, count - i);
    std::memcpy(mask + (first + i) / 8, &bits, AT_ONCE / 8);
  }
}

// Replaces the list of `row` by the events of a mask. `values` are read for payloads only.
template <class Index, class F>
SPARSIFY_INLINE void unpack(const Events<Index, F>& to, int64_t row, const uint8_t* mask,
                            const F* values = nullptr) {
  Index* const index = to.index_of(row);
  int32_t* const ends = to.ends_of(row);
  int32_t n = 0;
  clear_row(to, row);
  for (int64_t first = 0; first < to.senders; first += 64) {
    const int64_t left = to.senders - first;
    n += put_word(index + n, first, load_bits(mask + first / 8, left), left);
    ends[first / BLOCK] = n;
  }
  to.count[row] = n;
  put_payloads(to, row, values, 0, 0, n);
}

template <class Source>
SPARSIFY_INLINE int64_t count_active(const Source* values, int64_t count) {
  int64_t n = 0;
  for (int64_t i = 0; i < count; ++i) n += values[i] != Source(0);
  return n;
}

}  // namespace sparsify
