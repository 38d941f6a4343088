// Fixed device code for the gradient of a weight: out[r][s] = sum of d[row][r] * y[row][s] over all
// rows, reading d only where y is not zero.
//
// Rows are taken in blocks. Of each block, every sender gets the list of rows in which it is
// active. Then a thread takes one tile of receivers after another: of each block the tile is copied
// together, so that it stays cached while all senders sum their rows of it in registers.
#pragma once

#include "outer_tiles.h"

namespace sparsify {

constexpr int SAMPLED_ROWS = 64;    // rows whose activity decides
constexpr double ALONE = 100000;    // cycles of work that are worth waking another thread
constexpr int64_t MOST_BLOCKS = 4;  // of which there are lists at once

enum Outcome { DONE = 0, NOT_FINITE = 1, TOO_ACTIVE = 2, NO_MEMORY = 3 };

// What Python passes; see cpp_outer_product.py.
struct OuterCall {
  const void *d, *y;
  void* out;  // [receivers][senders]
  int64_t rows, receivers, senders;
  int64_t d_run, d_outer, d_inner, y_run, y_outer, y_inner;
  int64_t adds;  // whether to add to `out`, which is left alone if not all of d is finite
  double most;   // the share of active values above which nothing is done
  int64_t threads;
  int64_t active, seen;  // results: how many of `seen` values of y were active
};

// One call. Lists are made by a thread for its senders, and read by all.
template <class F, class Source>
struct Outer {
  typedef typename Activity<Source>::Element Element;
  static constexpr int64_t TILE = Tiles<F>::TILE;

  const OuterCall& call;
  Matrix<F> d;
  Matrix<Element> y;
  Tiles<F> tiles;
  int64_t groups, span;  // span: rows of which there are lists at once
  Lists<F> lists;
  F *sums, *tile;  // of a thread: [senders][TILE] and [ROW_BLOCK][TILE]
  uint64_t* words;
  int all_finite = 1;
  int64_t active = 0;

  Outer(const OuterCall& c, Arena& arena, int threads)
      : call(c),
        d{static_cast<const F*>(c.d), c.d_run, c.d_outer, c.d_inner},
        y{static_cast<const Element*>(c.y), c.y_run, c.y_outer, c.y_inner},
        tiles{c.receivers},
        groups((c.senders + GROUP - 1) / GROUP),
        span(c.rows < MOST_BLOCKS * ROW_BLOCK ? c.rows : MOST_BLOCKS * ROW_BLOCK),
        lists(arena, c.senders, span, threads, Activity<Source>::MAY_HAVE_PAYLOAD),
        sums(arena.take<F>(threads * groups * GROUP * TILE)),
        tile(arena.take<F>(threads * ROW_BLOCK * TILE)),
        words(arena.take<uint64_t>(groups * ROW_BLOCK)) {}

  void run(const Team& team) {
    if (call.adds && !is_all_finite(team)) return;
    for (int64_t first = 0; first < call.rows; first += span) {
      const int64_t rows = call.rows - first < span ? call.rows - first : span;
      if (first) team.wait();  // until the lists are read
      list_span(team, first, rows);
      team.wait();
      add_span(team, first, rows);
    }
  }

 private:
  bool is_all_finite(const Team& team) {
    const int64_t end = call.rows * (team.thread + 1) / team.threads;
    bool finite = true;
    for (int64_t row = call.rows * team.thread / team.threads; row < end; ++row)
      finite &= is_finite(d[row], call.receivers);
    note(finite);
    team.wait();
    return __atomic_load_n(&all_finite, __ATOMIC_RELAXED);
  }

  void note(bool finite) {
    if (!finite) __atomic_store_n(&all_finite, 0, __ATOMIC_RELAXED);
  }

  void list_span(const Team& team, int64_t first, int64_t rows) {
    const Share own = share<GROUP>(call.senders, team);
    uint64_t* const own_words = words + own.begin / GROUP * ROW_BLOCK;
    int64_t place = own.begin * span + team.thread * LIST_SLACK;
    for (int64_t done = 0; done < rows; done += ROW_BLOCK) {
      const int64_t some = rows - done < ROW_BLOCK ? rows - done : ROW_BLOCK;
      Run* const runs = lists.run + done / ROW_BLOCK * call.senders;
      const int64_t end = list_rows<F, Source>(lists, runs, y, first + done, some, own, place, own_words);
      __atomic_fetch_add(&active, end - place, __ATOMIC_RELAXED);
      place = end;
    }
  }

  // The thread's part of all tiles times all groups of senders.
  void add_span(const Team& team, int64_t first, int64_t rows) {
    const int64_t items = tiles.count() * groups;
    const int64_t end = items * (team.thread + 1) / team.threads;
    for (int64_t item = items * team.thread / team.threads; item < end;) {
      const int64_t at = item / groups, next = (at + 1) * groups < end ? (at + 1) * groups : end;
      const int64_t last = (next - at * groups) * GROUP;
      const Share senders{item % groups * GROUP, last < call.senders ? last : call.senders};
      const int vectors = tiles.vectors(at);
      if (vectors == 4)
        add_tile<4>(team, first, rows, at, senders);
      else if (vectors == 2)
        add_tile<2>(team, first, rows, at, senders);
      else
        add_tile<1>(team, first, rows, at, senders);
      item = next;
    }
  }

  template <int VECTORS>
  void add_tile(const Team& team, int64_t first, int64_t rows, int64_t at, const Share& senders) {
    constexpr int64_t WIDE = VECTORS * WIDTH<F>;
    F* const own_tile = tile + team.thread * ROW_BLOCK * TILE;
    F* const own_sums = sums + team.thread * groups * GROUP * TILE;
    F* const out = static_cast<F*>(call.out) + at * TILE * call.senders;
    const bool starts = first == 0 && !call.adds;
    if (!starts)
      move_transposed<true>(out, own_sums, WIDE, tiles.columns(at), call.senders, senders);
    for (int64_t done = 0; done < rows; done += ROW_BLOCK) {
      const int64_t some = rows - done < ROW_BLOCK ? rows - done : ROW_BLOCK;
      const Run* const runs = lists.run + done / ROW_BLOCK * call.senders;
      note(copy_tile<VECTORS>(own_tile, d, first + done, some, at * TILE, tiles.columns(at)));
      for (int64_t s = senders.begin; s < senders.end; ++s)
        add_rows<VECTORS>(own_sums + s * WIDE, own_tile, lists, runs[s], starts && done == 0);
    }
    move_transposed<false>(out, own_sums, WIDE, tiles.columns(at), call.senders, senders);
  }
};

// One of `sampled` rows that are spread over all of them.
SPARSIFY_INLINE int64_t sampled_row(int64_t i, int64_t sampled, int64_t rows) {
  // Multiples of the golden section: no period of the batch or of time lies in them.
  const uint64_t fraction = uint32_t(i) * 2654435769u;
  return sampled == rows ? i : int64_t(fraction * uint64_t(rows) >> 32);
}

// Counts the active values of rows spread over all of y.
template <class Source>
void sample_activity(OuterCall& call) {
  typedef typename Activity<Source>::Element Element;
  const Element* const first = static_cast<const Element*>(call.y);
  const Matrix<Element> y{first, call.y_run, call.y_outer, call.y_inner};
  const int64_t sampled = call.rows < SAMPLED_ROWS ? call.rows : SAMPLED_ROWS;
  call.active = 0, call.seen = sampled * call.senders;
  for (int64_t i = 0; i < sampled; ++i) {
    const int64_t row = sampled_row(i, sampled, call.rows);
    for (int64_t s = 0; s < call.senders; s += GROUP) {
      const int64_t count = call.senders - s < GROUP ? call.senders - s : GROUP;
      call.active += __builtin_popcountll(Activity<Source>::word(y[row], s, count));
    }
  }
}

// out[r][s] = or += sum over rows of d[row][r] * y[row][s], if at most `most` of y is active.
//
// Order of additions: ascending within a block of 512 rows, each from +0, then the block sums, from
// the first one or from `out`. Products are rounded before they are added. Neither threads nor tiles
// change the bits.
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
