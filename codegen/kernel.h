// Fixed device code of the C++ backend: scratch memory, event lists, gathers.
// Generated kernels include this file; everything that depends on the model is in them.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "runtime.h"  // <immintrin.h> would double the time that a kernel compiles for

#if !defined(__BYTE_ORDER__) || __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "event masks are read as little-endian words"
#endif

// The lanes of the following loop are independent.
#if defined(__clang__)
#define SPARSIFY_LANES _Pragma("clang loop vectorize(assume_safety)")
#else
#define SPARSIFY_LANES _Pragma("GCC ivdep")
#endif
#define SPARSIFY_INLINE inline __attribute__((always_inline))
#define SPARSIFY_UNROLL _Pragma("GCC unroll 32")

namespace sparsify {

// DENSE_ROWS x DENSE_VECTORS sums of a dense product, and the operands beside them, fill the registers.
#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64, DENSE_ROWS = 6, DENSE_VECTORS = 4;
#elif defined(__AVX__)
constexpr int VECTOR_BYTES = 32, DENSE_ROWS = 6, DENSE_VECTORS = 2;
#else
constexpr int VECTOR_BYTES = 16, DENSE_ROWS = 4, DENSE_VECTORS = 2;
#endif

constexpr int BLOCK = 256;        // senders that are summed on their own, see gather_events
constexpr int AHEAD = 8;          // events between asking for a weight row and adding it
constexpr int DENSE_BLOCK = 128;  // senders of a dense product whose weights stay in the first cache

template <class F>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(VECTOR_BYTES)));
  typedef float anywhere __attribute__((vector_size(VECTOR_BYTES), may_alias, aligned(4)));
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(VECTOR_BYTES)));
  typedef double anywhere __attribute__((vector_size(VECTOR_BYTES), may_alias, aligned(8)));
};
template <class F>
using Vector = typename VectorOf<F>::type;
template <class F>
constexpr int WIDTH = VECTOR_BYTES / int(sizeof(F));

template <class F>
SPARSIFY_INLINE Vector<F> load(const F* from) {
  return *reinterpret_cast<const typename VectorOf<F>::anywhere*>(from);
}
template <class F>
SPARSIFY_INLINE void store(F* to, Vector<F> value) {
  *reinterpret_cast<typename VectorOf<F>::anywhere*>(to) = value;
}

}  // namespace sparsify

#include "bits.h"
#include "scalar.h"
#include "half_vectors.h"

namespace sparsify {

// ---- scratch memory ----

// Hands out 64-byte aligned pieces of one allocation. Without memory it only measures.
class Arena {
 public:
  Arena() = default;
  explicit Arena(char* memory) : memory_(memory) {}

  template <class T>
  T* take(int64_t count) {
    T* piece = memory_ ? reinterpret_cast<T*>(memory_ + used_) : nullptr;
    used_ += (count * int64_t(sizeof(T)) + 63) / 64 * 64;
    return piece;
  }
  int64_t used() const { return used_; }

 private:
  char* memory_ = nullptr;
  int64_t used_ = 0;
};

// ---- neurons of a thread ----

struct Share {
  int64_t begin, end;
};

// The thread's part of a population: whole tiles, so that no byte of a mask is shared.
template <int TILE>
SPARSIFY_INLINE Share share(int64_t neurons, const Team& team) {
  const int64_t tiles = (neurons + TILE - 1) / TILE;
  const int64_t end = tiles * (team.thread + 1) / team.threads * TILE;
  return {tiles * team.thread / team.threads * TILE, end < neurons ? end : neurons};
}

// ---- events ----

constexpr int64_t blocks_of(int64_t senders) { return (senders + BLOCK - 1) / BLOCK; }

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

template <class F, class Source>
SPARSIFY_INLINE void convert(F* to, const Source* from, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = cast<F>(from[i]);
}

// ---- gathers ----

// Sums the events from `k` to `end`, then adds that to `sums`. `last` is the row's last event.
// A weight W is a float F as it lies in memory.
template <int TILE, class Index, class F, class W>
SPARSIFY_INLINE void add_block(F* sums, const W* weight, const Index* index, const F* payload,
                               int32_t k, int32_t end, int32_t last, bool starts) {
  constexpr int VECTORS = TILE / WIDTH<F>, LINE = 64 / sizeof(W);
  Vector<F> sum[VECTORS] = {};
  for (; k < end; ++k) {
    const W* const from = weight + int64_t(index[k]) * TILE;
    const W* const later = weight + int64_t(index[k + AHEAD < last ? k + AHEAD : last]) * TILE;
    SPARSIFY_UNROLL
    for (int i = 0; i < TILE; i += LINE) __builtin_prefetch(later + i);
    SPARSIFY_UNROLL
    for (int v = 0; v < VECTORS; ++v) {
      const Vector<F> weights = load(from + v * WIDTH<F>);
      sum[v] += payload ? weights * payload[k] : weights;
    }
  }
  SPARSIFY_UNROLL
  for (int v = 0; v < VECTORS; ++v)
    store(sums + v * WIDTH<F>, starts ? sum[v] : load(sums + v * WIDTH<F>) + sum[v]);
}

// sums[row][r] = sum over the events of `row` of payload * weight[event][r], for TILE receivers.
//
// Order of additions: ascending within a block of 256 senders, then the block sums, each from +0.
// Nothing is contracted (-ffp-contract=off): every backend and every batch size gets the same bits.
// All rows walk a block before the next one, so that its weights are fetched from afar once.
template <int TILE, class Index, class F, class W>
void gather_events(F* sums, const W* weight, const Events<Index, F>& events, int64_t rows) {
  const int64_t blocks = blocks_of(events.senders);
  for (int64_t block = 0; block < blocks; ++block) {
    for (int64_t row = 0; row < rows; ++row) {
      const Index* const index = events.index + row * events.senders;
      const F* const payload = events.payload ? events.payload + row * events.senders : nullptr;
      const int32_t* const ends = events.ends + row * blocks;
      add_block<TILE>(sums + row * TILE, weight, index, payload, block ? ends[block - 1] : 0,
                      ends[block], events.count[row] - 1, block == 0);
    }
  }
}

// weight * payload + sum, with one rounding where the processor can.
#if __has_builtin(__builtin_elementwise_fma)
#define SPARSIFY_FUSED_FLOAT(w, p, s) __builtin_elementwise_fma(w, p, s)
#define SPARSIFY_FUSED_DOUBLE(w, p, s) __builtin_elementwise_fma(w, p, s)
#elif defined(__AVX512F__)
#define SPARSIFY_FUSED_FLOAT(w, p, s) __builtin_ia32_vfmaddps512_mask(w, p, s, -1, 4)
#define SPARSIFY_FUSED_DOUBLE(w, p, s) __builtin_ia32_vfmaddpd512_mask(w, p, s, -1, 4)
#elif defined(__FMA__)
#define SPARSIFY_FUSED_FLOAT(w, p, s) __builtin_ia32_vfmaddps256(w, p, s)
#define SPARSIFY_FUSED_DOUBLE(w, p, s) __builtin_ia32_vfmaddpd256(w, p, s)
#else
#define SPARSIFY_FUSED_FLOAT(w, p, s) (w * p + s)
#define SPARSIFY_FUSED_DOUBLE(w, p, s) (w * p + s)
#endif
SPARSIFY_INLINE Vector<float> fused(Vector<float> weight, Vector<float> payload,
                                    Vector<float> sum) {
  return SPARSIFY_FUSED_FLOAT(weight, payload, sum);
}
SPARSIFY_INLINE Vector<double> fused(Vector<double> weight, Vector<double> payload,
                                     Vector<double> sum) {
  return SPARSIFY_FUSED_DOUBLE(weight, payload, sum);
}
SPARSIFY_INLINE Vector<float> fused(Vector<float> weight, float payload, Vector<float> sum) {
  return fused(weight, payload - Vector<float>{}, sum);
}
SPARSIFY_INLINE Vector<double> fused(Vector<double> weight, double payload, Vector<double> sum) {
  return fused(weight, payload - Vector<double>{}, sum);
}

// ROWS batch rows times COLUMNS vectors of receivers, over some senders; adds to `sums`.
template <int TILE, int ROWS, int COLUMNS, class F, class W>
SPARSIFY_INLINE void dense_patch(F* sums, const W* weight, const F* source, int64_t source_row,
                                 int64_t senders, bool starts) {
  Vector<F> sum[ROWS][COLUMNS];
  SPARSIFY_UNROLL
  for (int r = 0; r < ROWS; ++r)
    SPARSIFY_UNROLL
    for (int c = 0; c < COLUMNS; ++c)
      sum[r][c] = starts ? Vector<F>{} : load(sums + r * TILE + c * WIDTH<F>);
  for (int64_t s = 0; s < senders; ++s) {
    Vector<F> weights[COLUMNS];
    SPARSIFY_UNROLL
    for (int c = 0; c < COLUMNS; ++c) weights[c] = load(weight + s * TILE + c * WIDTH<F>);
    SPARSIFY_UNROLL
    for (int r = 0; r < ROWS; ++r)
      SPARSIFY_UNROLL
      for (int c = 0; c < COLUMNS; ++c)
        sum[r][c] = fused(weights[c], source[r * source_row + s], sum[r][c]);
  }
  SPARSIFY_UNROLL
  for (int r = 0; r < ROWS; ++r)
    SPARSIFY_UNROLL
    for (int c = 0; c < COLUMNS; ++c) store(sums + r * TILE + c * WIDTH<F>, sum[r][c]);
}

// Adds what some senders contribute to the sums of TILE receivers; source[0] is the first one's.
template <int TILE, class F, class W>
SPARSIFY_INLINE void dense_panel(F* sums, const W* weight, const F* source, int64_t source_row,
                                 int64_t rows, int64_t senders, bool starts) {
  constexpr int VECTORS = TILE / WIDTH<F>;
  constexpr int COLUMNS = VECTORS < DENSE_VECTORS ? VECTORS : DENSE_VECTORS;
  constexpr int ALONE = VECTORS < 8 ? VECTORS : 8;  // a single row needs more sums to be fast
  const int64_t full = rows / DENSE_ROWS * DENSE_ROWS;
  for (int c = 0; c < VECTORS; c += COLUMNS)
    for (int64_t r = 0; r < full; r += DENSE_ROWS)
      dense_patch<TILE, DENSE_ROWS, COLUMNS>(sums + r * TILE + c * WIDTH<F>, weight + c * WIDTH<F>,
                                             source + r * source_row, source_row, senders, starts);
  for (int64_t r = full; r < rows; ++r)
    for (int c = 0; c < VECTORS; c += ALONE)
      dense_patch<TILE, 1, ALONE>(sums + r * TILE + c * WIDTH<F>, weight + c * WIDTH<F>,
                                  source + r * source_row, source_row, senders, starts);
}

// sums[row][r] = sum over all senders of source[row][s] * weight[s][r], for TILE receivers.
// The order of additions is free here and products are fused: compared by a bound, not by bits.
template <int TILE, class F, class W>
inline void gather_dense(F* sums, const W* weight, const F* source, int64_t source_row,
                         int64_t rows, int64_t senders) {
  for (int64_t s = 0; s < senders; s += DENSE_BLOCK) {
    const int64_t some = senders - s < DENSE_BLOCK ? senders - s : DENSE_BLOCK;
    dense_panel<TILE>(sums, weight + s * TILE, source + s, source_row, rows, some, s == 0);
  }
}

}  // namespace sparsify
