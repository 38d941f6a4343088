// Fixed device code for the gradient of a weight: out[r][s] = sum of d[row][r] * y[row][s] over all
// rows, reading d only where y is not zero.
//
// Rows are taken in blocks. Of each block, every sender gets the list of rows in which it is
// active, and a tile of receivers is copied together so that it stays cached while all senders sum
// their rows of it in registers.
#pragma once

#include "outer_tiles.h"

namespace sparsify {

constexpr int SAMPLED_ROWS = 64;  // rows whose activity decides
constexpr double ALONE = 100000;  // cycles of work that are worth waking another thread

enum Outcome { DONE = 0, NOT_FINITE = 1, TOO_ACTIVE = 2, NO_MEMORY = 3 };

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
