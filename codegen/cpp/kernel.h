// Fixed device code of the C++ backend: vectors, scratch memory, gathers.
// Generated kernels include this file; everything that depends on the model is in them.
#pragma once

#include <sys/mman.h>

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

constexpr int EVENT_VECTORS = 8;  // sums of events at once
constexpr int BLOCK = 256;        // senders that are summed on their own, see gather_events
constexpr int AHEAD = 8;          // events between asking for a weight row and adding it
// Senders of a dense product of which a patch's weights stay in the first cache. Those of a part of a
// wide tile lie apart and so reach a part of that cache only.
template <int TILE>
constexpr int DENSE_BLOCK = TILE > 64 ? 64 : 128;

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

#if defined(__AVX512F__)
// Zeros in a register of their own. A compression waits for what was in the register that it writes,
// also where it puts zeros there: one after the other into the same one they take five cycles each
// instead of 1.3 (Zen 4). `bits` is what differs from one to the next.
template <class V>
SPARSIFY_INLINE V own_zeros(uint32_t bits) {
  V zeros;
  asm("vpxor %x0, %x0, %x0" : "=x"(zeros) : "r"(bits));  // else compilers share them
  return zeros;
}
#endif

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

// ---- outputs ----

constexpr int64_t LARGE_PAGE = 2 << 20, LARGE_OUTPUT = 8 << 20;  // bytes

// A large output lies in memory that nobody has touched: the system fills each page with zeros when
// it is written first, which takes as long as the kernel itself if pages are small.
template <class T>
inline void prefer_large_pages(T* output, int64_t steps, int64_t t, int64_t batch, int64_t b) {
#if defined(MADV_HUGEPAGE)
  const int64_t bytes = ((steps - 1) * t + (batch - 1) * b) * int64_t(sizeof(T));
  if (bytes < LARGE_OUTPUT) return;
  const int64_t begin = reinterpret_cast<int64_t>(output), end = begin + bytes;
  const int64_t first = (begin + LARGE_PAGE - 1) / LARGE_PAGE * LARGE_PAGE;
  madvise(reinterpret_cast<void*>(first), end / LARGE_PAGE * LARGE_PAGE - first, MADV_HUGEPAGE);
#endif
}

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

}  // namespace sparsify

#include "events.h"
#include "fused.h"

namespace sparsify {

// ---- gathers ----

template <class F, class Source>
SPARSIFY_INLINE void convert(F* to, const Source* from, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = cast<F>(from[i]);
}

// The sums of VECTORS vectors of receivers over the events of a block, each from +0.
template <int TILE, int VECTORS, bool FRESH, bool PAYLOAD, class Index, class F, class W>
SPARSIFY_INLINE void sum_events(Vector<F> (&sum)[VECTORS], const W* weight,
                                const BlockEvents<Index, F>& events) {
  const auto [index, payload, begin, end, last] = events;
  constexpr int LINE = 64 / sizeof(W);
  for (int32_t k = begin; k < end; ++k) {
    const W* const from = weight + int64_t(index[k]) * TILE;
    if constexpr (FRESH) {
      const W* const later = weight + int64_t(index[k + AHEAD < last ? k + AHEAD : last]) * TILE;
      SPARSIFY_UNROLL
      for (int i = 0; i < VECTORS * WIDTH<F>; i += LINE) __builtin_prefetch(later + i);
    }
    SPARSIFY_UNROLL
    for (int v = 0; v < VECTORS; ++v) {
      const Vector<F> weights = load(from + v * WIDTH<F>);
      if constexpr (PAYLOAD)
        sum[v] = fused(weights, payload[k], sum[v]);
      else
        sum[v] += weights;
    }
  }
}

// Of the receivers of a tile so many are summed at once, of a wide one part after the other.
template <int TILE, class F>
constexpr int PART = TILE < EVENT_VECTORS * WIDTH<F> ? TILE : EVENT_VECTORS * WIDTH<F>;

// Sums the events of a block for a part of a tile, then adds that to `sums`. A weight W is a float F
// as it lies in memory.
// FRESH: the weights may have to come from afar. Asking for those of later events hides that, but
// takes as many loads as adding does, so it slows rows down that find them cached.
template <int TILE, bool FRESH, class Index, class F, class W>
SPARSIFY_INLINE void add_block(F* sums, const W* weight, const BlockEvents<Index, F>& events,
                               bool starts) {
  constexpr int VECTORS = PART<TILE, F> / WIDTH<F>;
  Vector<F> sum[VECTORS] = {};
  if (events.payload)
    sum_events<TILE, VECTORS, FRESH, true>(sum, weight, events);
  else
    sum_events<TILE, VECTORS, FRESH, false>(sum, weight, events);
  SPARSIFY_UNROLL
  for (int v = 0; v < VECTORS; ++v)
    store(sums + v * WIDTH<F>, starts ? sum[v] : load(sums + v * WIDTH<F>) + sum[v]);
}

// sums[row][r] = sum over the events of `row` of payload * weight[event][r], for TILE receivers.
//
// Order of additions: ascending within a block of 256 senders, then the block sums, each from +0.
// A product is added with one rounding, and nothing else is contracted (-ffp-contract=off): every
// backend and every batch size gets the same bits.
// All rows walk a block before the next one, so that its weights are fetched once if they come from FAR.
template <int TILE, bool FAR, class Index, class F, class W>
void gather_events(F* sums, const W* weight, const Events<Index, F>& events, int64_t rows) {
  const int64_t blocks = blocks_of(events.senders);
  for (int64_t block = 0; block < blocks; ++block)
    for (int part = 0; part < TILE; part += PART<TILE, F>) {
      F* const to = sums + part;
      add_block<TILE, FAR>(to, weight + part, events.at(0, block), block == 0);
      for (int64_t row = 1; row < rows; ++row)
        add_block<TILE, false>(to + row * TILE, weight + part, events.at(row, block), block == 0);
    }
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

// Adds what some senders contribute to the sums of ROWS rows and TILE receivers, by patches.
template <int TILE, int ROWS, class F, class W>
SPARSIFY_INLINE void dense_rows(F* sums, const W* weight, const F* source, int64_t source_row,
                                int64_t senders, bool starts) {
  constexpr int VECTORS = TILE / WIDTH<F>;
  constexpr int MOST = ROWS == 1 ? 8 : DENSE_VECTORS;  // a single row needs more sums to be fast
  constexpr int COLUMNS = VECTORS < MOST ? VECTORS : MOST;
  for (int c = 0; c < VECTORS; c += COLUMNS)
    dense_patch<TILE, ROWS, COLUMNS>(sums + c * WIDTH<F>, weight + c * WIDTH<F>, source, source_row,
                                     senders, starts);
}

// The same for any number of rows; source[0] is the first sender's.
template <int TILE, class F, class W>
SPARSIFY_INLINE void dense_panel(F* sums, const W* weight, const F* source, int64_t source_row,
                                 int64_t rows, int64_t senders, bool starts) {
  constexpr int VECTORS = TILE / WIDTH<F>;
  constexpr int COLUMNS = VECTORS < DENSE_VECTORS ? VECTORS : DENSE_VECTORS;
  const int64_t full = rows / DENSE_ROWS * DENSE_ROWS;
  for (int c = 0; c < VECTORS; c += COLUMNS)  // all rows read some weights before the next ones
    for (int64_t r = 0; r < full; r += DENSE_ROWS)
      dense_patch<TILE, DENSE_ROWS, COLUMNS>(sums + r * TILE + c * WIDTH<F>, weight + c * WIDTH<F>,
                                             source + r * source_row, source_row, senders, starts);
  int64_t r = full;
  for (; r + 3 < rows; r += 4)
    dense_rows<TILE, 4>(sums + r * TILE, weight, source + r * source_row, source_row, senders, starts);
  for (; r + 1 < rows; r += 2)
    dense_rows<TILE, 2>(sums + r * TILE, weight, source + r * source_row, source_row, senders, starts);
  if (r < rows)
    dense_rows<TILE, 1>(sums + r * TILE, weight, source + r * source_row, source_row, senders, starts);
}

// sums[row][r] = sum over all senders of source[row][s] * weight[s][r], for TILE receivers.
// The order of additions is free here: compared by a bound, not by bits.
template <int TILE, class F, class W>
inline void gather_dense(F* sums, const W* weight, const F* source, int64_t source_row,
                         int64_t rows, int64_t senders) {
  constexpr int MOST = DENSE_BLOCK<TILE>;
  for (int64_t s = 0; s < senders; s += MOST) {
    const int64_t some = senders - s < MOST ? senders - s : MOST;
    dense_panel<TILE>(sums, weight + s * TILE, source + s, source_row, rows, some, s == 0);
  }
}

}  // namespace sparsify
