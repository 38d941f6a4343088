// Fixed device code for the gradient of a weight: out[r][s] = sum of d[row][r] * y[row][s] over all
// rows, reading d only where y is not zero.
//
// Rows are taken in blocks. Of each block, every sender gets the list of rows in which it is
// active, and a tile of receivers is copied together so that it stays cached while all senders sum
// their rows of it in registers.
#pragma once

#include "kernel.h"
#include "square.h"

namespace sparsify {

// A tile of a block is 64 KiB with vectors of 32 bytes. Larger ones were slower from 5 % activity
// on: more of the lines that a sender needs are still in the first cache from the one before.
constexpr int64_t ROW_BLOCK = 512;   // rows that are summed on their own, see outer_product
constexpr int TILE_VECTORS = 4;      // sums of a sender that are kept in registers
constexpr int SAMPLED_ROWS = 64;     // rows whose activity decides
constexpr int64_t GROUP = 64;        // senders whose activity is one word
constexpr double ALONE = 100000;     // cycles of work that are worth waking another thread

enum Outcome { DONE = 0, NOT_FINITE = 1, TOO_ACTIVE = 2, NO_MEMORY = 3 };

// A matrix [rows, N] whose rows are two axes of a tensor, the inner one of extent `run`.
// Strides are in elements; N is contiguous.
template <class T>
struct Matrix {
  const T* first;
  int64_t run, outer, inner;

  SPARSIFY_INLINE const T* operator[](int64_t row) const {
    if (row < run) return first + row * inner;
    return first + row / run * outer + row % run * inner;
  }
};

// What Python passes; see cpp_outer_product.py.
struct OuterCall {
  const void *d, *y;
  void* out;  // [receivers][senders]
  int64_t rows, receivers, senders;
  int64_t d_run, d_outer, d_inner, y_run, y_outer, y_inner;
  int64_t adds;  // whether to add to `out`, if all of d is finite
  double most;   // the share of active values above which nothing is done
  int64_t threads;
  int64_t active, seen;  // results: how many of `seen` values of y were active
};

// ---- what a word of 64 senders says ----

struct Bits {};  // y is packed, 8 senders a byte, the first one in the lowest bit

template <class Source>
struct Activity {
  typedef Source Element;

  SPARSIFY_INLINE static uint64_t word(const Source* row, int64_t sender, int64_t count) {
    uint64_t bits = 0;
    int64_t i = 0;
    for (; i + 8 <= count; i += 8) bits |= uint64_t(eight_active_bits(row + sender + i)) << i;
    if (i < count) bits |= uint64_t(active_bits(row + sender + i, int(count - i))) << i;
    return bits;
  }
  // Whether a value is neither 0 nor 1.
  SPARSIFY_INLINE static bool has_payload(const Source* row, int64_t sender, int64_t count) {
    int others = 0;
    for (int64_t i = 0; i < count; ++i) {
      const Source value = row[sender + i];
      others |= int(value != Source(0)) & int(value != Source(1));
    }
    return others != 0;
  }
  template <class F>
  SPARSIFY_INLINE static F value(const Source* row, int64_t sender) {
    return F(row[sender]);
  }
};

template <>
struct Activity<Bits> {
  typedef uint8_t Element;

  SPARSIFY_INLINE static uint64_t word(const uint8_t* row, int64_t sender, int64_t count) {
    uint64_t bits = 0;
    if (count == GROUP) {
      std::memcpy(&bits, row + sender / 8, 8);
      return bits;
    }
    std::memcpy(&bits, row + sender / 8, (count + 7) / 8);
    return bits & ((uint64_t(1) << count) - 1);
  }
  SPARSIFY_INLINE static bool has_payload(const uint8_t*, int64_t, int64_t) { return false; }
  template <class F>
  SPARSIFY_INLINE static F value(const uint8_t*, int64_t) {
    return F(1);
  }
};

#if defined(__AVX2__)
template <>
SPARSIFY_INLINE uint64_t Activity<uint8_t>::word(const uint8_t* row, int64_t sender,
                                                 int64_t count) {
  if (count < GROUP) {
    uint64_t bits = 0;
    for (int64_t i = 0; i < count; ++i) bits |= uint64_t(row[sender + i] != 0) << i;
    return bits;
  }
  const Byte32 low = *reinterpret_cast<const Byte32Anywhere*>(row + sender);
  const Byte32 high = *reinterpret_cast<const Byte32Anywhere*>(row + sender + 32);
  const uint32_t low_zeros = uint32_t(__builtin_ia32_pmovmskb256(Char32(low == Byte32{})));
  const uint32_t high_zeros = uint32_t(__builtin_ia32_pmovmskb256(Char32(high == Byte32{})));
  return ~(uint64_t(high_zeros) << 32 | low_zeros);
}
#endif

// Bit j of word i becomes bit i of word j: quarters are exchanged, of ever smaller squares of bits.
SPARSIFY_INLINE void transpose_bits(uint64_t* words) {
  uint64_t low = 0xFFFFFFFFu;
  for (int half = 32; half > 0; half /= 2, low ^= low << half) {
    for (int i = 0; i < 64; i += 2 * half) {
      for (int k = i; k < i + half; ++k) {
        const uint64_t moved = (words[k] >> half ^ words[k + half]) & low;
        words[k + half] ^= moved;
        words[k] ^= moved << half;
      }
    }
  }
}

// ---- lists ----

// The rows of a block in which a sender is active: places [start, start + count) of the lists.
struct Run {
  int64_t start;
  int32_t count;
  bool has_payload;
};

template <class F>
struct Lists {
  uint16_t* row;  // within the block
  F* payload;
  Run* run;  // [senders]

  Lists(Arena& arena, int64_t senders, int64_t block, int64_t slack)
      : row(arena.take<uint16_t>(senders * block + slack)),
        payload(arena.take<F>(senders * block + slack)),
        run(arena.take<Run>(senders)) {}
};

// Appends the set bits of `word`, as base + bit. Writes up to three places more than it fills.
SPARSIFY_INLINE uint16_t* append_bits(uint16_t* to, uint64_t word, int base) {
  const int count = __builtin_popcountll(word);
  for (int k = 0; k < count; k += 4) {
    SPARSIFY_UNROLL
    for (int i = 0; i < 4; ++i) {
      to[k + i] = uint16_t(base + (word ? __builtin_ctzll(word) : 0));
      word &= word - 1;
    }
  }
  return to + count;
}

// Lists the rows [first, first + rows) for the senders of one thread.
// `words` is [groups of the thread][ROW_BLOCK].
template <class F, class Source, class Element>
void list_rows(const Lists<F>& to, const Matrix<Element>& y, int64_t first, int64_t rows,
               const Share& own, int64_t start, uint64_t* words) {
  const int64_t blocks = (rows + 63) / 64;
  bool has_payload = false;
  for (int64_t row = 0; row < rows; ++row) {
    const Element* const values = y[first + row];
    uint64_t* word = words + row;
    for (int64_t s = own.begin; s < own.end; s += GROUP, word += ROW_BLOCK) {
      const int64_t count = own.end - s < GROUP ? own.end - s : GROUP;
      *word = Activity<Source>::word(values, s, count);
    }
    if (!has_payload)
      has_payload = Activity<Source>::has_payload(values, own.begin, own.end - own.begin);
  }
  uint16_t* end = to.row + start;
  for (int64_t s = own.begin; s < own.end; s += GROUP, words += ROW_BLOCK) {
    for (int64_t row = rows; row < 64 * blocks; ++row) words[row] = 0;
    for (int64_t block = 0; block < blocks; ++block) transpose_bits(words + 64 * block);
    const int64_t count = own.end - s < GROUP ? own.end - s : GROUP;
    for (int64_t i = 0; i < count; ++i) {
      uint16_t* const begin = end;
      for (int64_t block = 0; block < blocks; ++block)
        end = append_bits(end, words[64 * block + i], int(64 * block));
      to.run[s + i] = {begin - to.row, int32_t(end - begin), has_payload};
      if (!has_payload) continue;
      for (uint16_t* at = begin; at < end; ++at)
        to.payload[at - to.row] = Activity<Source>::template value<F>(y[first + *at], s + i);
    }
  }
}

// ---- tiles ----

// Copies receivers [column, column + count) of some rows to [rows][VECTORS], zero padded. Returns
// whether all of them are finite.
template <int VECTORS, class F>
bool copy_tile(F* to, const Matrix<F>& d, int64_t first, int64_t rows, int64_t column,
               int64_t count) {
  constexpr int64_t TILE = VECTORS * WIDTH<F>;
  Vector<F> others{};  // the difference of a value that is not finite from itself is NaN
  for (int64_t row = 0; row < rows; ++row, to += TILE) {
    const F* from = d[first + row] + column;
    F padded[TILE];
    if (count < TILE) {
      for (int64_t i = 0; i < TILE; ++i) padded[i] = i < count ? from[i] : F(0);
      from = padded;
    }
    SPARSIFY_UNROLL
    for (int v = 0; v < VECTORS; ++v) {
      const Vector<F> values = load(from + v * WIDTH<F>);
      others += values - values;
      store(to + v * WIDTH<F>, values);
    }
  }
  F sum = 0;
  for (int i = 0; i < WIDTH<F>; ++i) sum += others[i];
  return sum == F(0);
}

// sums[i] = or += the sum over a sender's active rows of payload * tile[row][i].
template <int VECTORS, class F>
SPARSIFY_INLINE void add_rows(F* sums, const F* tile, const Lists<F>& lists, const Run& run,
                              bool starts) {
  if (run.count == 0 && !starts) return;
  constexpr int64_t TILE = VECTORS * WIDTH<F>;
  const uint16_t* const row = lists.row + run.start;
  const F* const payload = lists.payload + run.start;
  Vector<F> sum[VECTORS] = {};
  if (run.has_payload) {
    for (int32_t k = 0; k < run.count; ++k) {
      const F* const from = tile + row[k] * TILE;
      SPARSIFY_UNROLL
      for (int v = 0; v < VECTORS; ++v) sum[v] += load(from + v * WIDTH<F>) * payload[k];
    }
  } else {
    for (int32_t k = 0; k < run.count; ++k) {
      const F* const from = tile + row[k] * TILE;
      SPARSIFY_UNROLL
      for (int v = 0; v < VECTORS; ++v) sum[v] += load(from + v * WIDTH<F>);
    }
  }
  SPARSIFY_UNROLL
  for (int v = 0; v < VECTORS; ++v) {
    F* const at = sums + v * WIDTH<F>;
    store(at, starts ? sum[v] : load(at) + sum[v]);
  }
}

template <int BYTES>
struct WordOf;
template <>
struct WordOf<4> {
  typedef uint32_t type;
};
template <>
struct WordOf<8> {
  typedef uint64_t type;
};

// sums[senders][width] -> out[receivers][senders], or added to it.
template <bool ADDS, class F>
void write_transposed(F* out, const F* sums, int64_t width, int64_t receivers, int64_t senders,
                      const Share& own) {
  using Word = typename WordOf<sizeof(F)>::type;
  using Row = typename RowOf<Word>::anywhere;
  typedef F Values __attribute__((vector_size(sizeof(Row))));
  typedef F ValuesAnywhere __attribute__((vector_size(sizeof(Row)), may_alias, aligned(sizeof(F))));
  constexpr int64_t n = Square<Word>::n, LINE = 64 / sizeof(F);
  const int64_t square_receivers = receivers / n * n;
  const int64_t square_senders = own.begin + (own.end - own.begin) / n * n;
  for (int64_t line = own.begin; line < square_senders; line += LINE) {
    const int64_t end = line + LINE < square_senders ? line + LINE : square_senders;
    for (int64_t r = 0; r < square_receivers; r += n) {
      for (int64_t s = line; s < end; s += n) {  // innermost: a line of `out` is written at once
        Square<Word> square;
        for (int64_t i = 0; i < n; ++i)
          square.rows[i] = *reinterpret_cast<const Row*>(sums + (s + i) * width + r);
        square.transpose();
        for (int64_t i = 0; i < n; ++i) {
          F* const to = out + (r + i) * senders + s;
          Values values = (Values)square.rows[i];
          if (ADDS) values = *reinterpret_cast<const ValuesAnywhere*>(to) + values;
          *reinterpret_cast<ValuesAnywhere*>(to) = values;
        }
      }
    }
  }
  for (int64_t s = own.begin; s < own.end; ++s) {
    for (int64_t r = s < square_senders ? square_receivers : 0; r < receivers; ++r) {
      F* const to = out + r * senders + s;
      *to = ADDS ? *to + sums[s * width + r] : sums[s * width + r];
    }
  }
}

// ---- all together ----

// How receivers are divided into tiles.
template <class F>
struct Tiles {
  static constexpr int64_t TILE = TILE_VECTORS * WIDTH<F>;
  int64_t receivers;

  int64_t count() const { return (receivers + TILE - 1) / TILE; }
  int64_t columns(int64_t tile) const {
    return receivers - tile * TILE < TILE ? receivers - tile * TILE : TILE;
  }
  // The vectors of a tile: a power of two, because each number of vectors is code of its own.
  int vectors(int64_t tile) const {
    int vectors = TILE_VECTORS;
    while (vectors > 1 && columns(tile) <= vectors / 2 * WIDTH<F>) vectors /= 2;
    return vectors;
  }
};

// One call. Lists are made by a thread for its senders, and read by all.
template <class F, class Source>
struct Outer {
  typedef typename Activity<Source>::Element Element;

  const OuterCall& call;
  Matrix<F> d;
  Matrix<Element> y;
  Tiles<F> tiles;
  int64_t groups, block;
  Lists<F> even, odd;  // threads may be one block of rows apart
  F *sums, *tile;
  uint64_t* words;
  int all_finite = 1;
  int64_t active = 0;

  Outer(const OuterCall& c, Arena& arena, int threads)
      : call(c),
        d{static_cast<const F*>(c.d), c.d_run, c.d_outer, c.d_inner},
        y{static_cast<const Element*>(c.y), c.y_run, c.y_outer, c.y_inner},
        tiles{c.receivers},
        groups((c.senders + GROUP - 1) / GROUP),
        block(c.rows < ROW_BLOCK ? c.rows : ROW_BLOCK),
        even(arena, c.senders, block, 64 * threads),
        odd(arena, c.senders, block, 64 * threads),
        sums(arena.take<F>(tiles.count() * c.senders * Tiles<F>::TILE)),
        tile(arena.take<F>(threads * ROW_BLOCK * Tiles<F>::TILE)),
        words(arena.take<uint64_t>(groups * ROW_BLOCK)) {}

  void run(const Team& team) {
    const Share own = share<GROUP>(call.senders, team);
    const int64_t list_start = own.begin * block + 64 * team.thread;
    int64_t found = 0;
    bool finite = true;
    for (int64_t first = 0; first < call.rows; first += ROW_BLOCK) {
      const int64_t rows = call.rows - first < ROW_BLOCK ? call.rows - first : ROW_BLOCK;
      const Lists<F>& lists = first / ROW_BLOCK % 2 ? odd : even;
      list_rows<F, Source>(lists, y, first, rows, own, list_start,
                           words + own.begin / GROUP * ROW_BLOCK);
      for (int64_t s = own.begin; s < own.end; ++s) found += lists.run[s].count;
      team.wait();
      finite &= add_block_of_rows(team, lists, first, rows);
    }
    __atomic_fetch_add(&active, found, __ATOMIC_RELAXED);
    if (!finite) __atomic_store_n(&all_finite, 0, __ATOMIC_RELAXED);
    team.wait();
    if (!__atomic_load_n(&all_finite, __ATOMIC_RELAXED)) return;
    for_each_tile(team, [&](int64_t at, const Share& senders) {
      F* const to = static_cast<F*>(call.out) + at * Tiles<F>::TILE * call.senders;
      const auto write = call.adds ? write_transposed<true, F> : write_transposed<false, F>;
      const int64_t width = tiles.vectors(at) * WIDTH<F>;
      write(to, sums_of(at), width, tiles.columns(at), call.senders, senders);
    });
  }

 private:
  F* sums_of(int64_t at) const { return sums + at * call.senders * Tiles<F>::TILE; }

  // Calls work(tile, senders) for the thread's part of all tiles times all groups of senders.
  template <class Work>
  SPARSIFY_INLINE void for_each_tile(const Team& team, Work work) const {
    const int64_t items = tiles.count() * groups;
    const int64_t end = items * (team.thread + 1) / team.threads;
    for (int64_t item = items * team.thread / team.threads; item < end;) {
      const int64_t at = item / groups, next = (at + 1) * groups < end ? (at + 1) * groups : end;
      const int64_t last = (next - at * groups) * GROUP;
      work(at, Share{item % groups * GROUP, last < call.senders ? last : call.senders});
      item = next;
    }
  }

  // Adds a block of rows to the sums of some senders; returns whether its tile is finite.
  template <int VECTORS>
  bool add_tile(F* own_tile, const Lists<F>& lists, int64_t first, int64_t rows, int64_t at,
                const Share& senders) const {
    const int64_t column = at * Tiles<F>::TILE;
    const bool finite = copy_tile<VECTORS>(own_tile, d, first, rows, column, tiles.columns(at));
    F* const to = sums_of(at);
    for (int64_t s = senders.begin; s < senders.end; ++s)
      add_rows<VECTORS>(to + s * VECTORS * WIDTH<F>, own_tile, lists, lists.run[s], first == 0);
    return finite;
  }

  bool add_block_of_rows(const Team& team, const Lists<F>& lists, int64_t first, int64_t rows) {
    F* const own_tile = tile + team.thread * ROW_BLOCK * Tiles<F>::TILE;
    bool finite = true;
    for_each_tile(team, [&](int64_t at, const Share& senders) {
      const int vectors = tiles.vectors(at);
      if (vectors == 4) {
        finite &= add_tile<4>(own_tile, lists, first, rows, at, senders);
      } else if (vectors == 2) {
        finite &= add_tile<2>(own_tile, lists, first, rows, at, senders);
      } else {
        finite &= add_tile<1>(own_tile, lists, first, rows, at, senders);
      }
    });
    return finite;
  }
};

// Counts the active values of rows spread over all of y.
template <class Source>
void sample_activity(OuterCall& call) {
  typedef typename Activity<Source>::Element Element;
  const Element* const first = static_cast<const Element*>(call.y);
  const Matrix<Element> y{first, call.y_run, call.y_outer, call.y_inner};
  const int64_t sampled = call.rows < SAMPLED_ROWS ? call.rows : SAMPLED_ROWS;
  call.active = 0, call.seen = sampled * call.senders;
  for (int64_t i = 0; i < sampled; ++i) {
    // Multiples of the golden section: no period of the batch or of time lies in them.
    const uint64_t fraction = uint32_t(i) * 2654435769u;
    const int64_t row = sampled == call.rows ? i : int64_t(fraction * uint64_t(call.rows) >> 32);
    for (int64_t s = 0; s < call.senders; s += GROUP) {
      const int64_t count = call.senders - s < GROUP ? call.senders - s : GROUP;
      call.active += __builtin_popcountll(Activity<Source>::word(y[row], s, count));
    }
  }
}

// out[r][s] = sum over rows of d[row][r] * y[row][s], if at most `most` of y is active.
//
// Order of additions: ascending within a block of 512 rows, then the block sums, each from +0.
// Products are rounded before they are added. Neither threads nor tiles change the bits.
template <class F, class Source>
int outer_product(const Runtime* runtime, OuterCall* call) {
  sample_activity<Source>(*call);
  const double share = double(call->active) / double(call->seen);
  if (share > call->most) return TOO_ACTIVE;
  const double values = double(call->rows) * double(call->senders);
  const double cycles = values * (0.5 + share * (2 + double(call->receivers) / WIDTH<F>));
  const int64_t worthwhile = 1 + int64_t(cycles / ALONE);
  const int threads = int(worthwhile < call->threads ? worthwhile : call->threads);
  Arena measured;
  Outer<F, Source>(*call, measured, threads);
  void* const memory = std::aligned_alloc(64, measured.used());
  if (!memory) return NO_MEMORY;
  Arena arena(static_cast<char*>(memory));
  Outer<F, Source> outer(*call, arena, threads);
  runtime->parallel(
      [](void* pointer, const Team& team) { static_cast<Outer<F, Source>*>(pointer)->run(team); },
      &outer, threads);
  std::free(memory);
  call->active = outer.active, call->seen = call->rows * call->senders;
  return outer.all_finite ? DONE : NOT_FINITE;
}

}  // namespace sparsify
