// Fixed device code for the gradient of a convolution's weight: the sum over rows and places of
// d[receiver] * y[sender] where the sender is under the window, reading d only where y is not zero.
//
// Maps are cut into strips of some rows; several batch rows of small maps are one unit with a strip.
// Of a unit, every channel gets the list of places where a sender is active. Then, of one tile of
// receiving channels after the other, d is copied with its channels last, zeros around it, and each
// channel sums what its senders read of it for all taps of the window in registers.
#pragma once

#include "outer_product.h"
#include "strips.h"

namespace sparsify {

constexpr int MOST_SUMS = VECTOR_BYTES == 64 ? 27 : 12;  // that stay in registers
constexpr int64_t ITEMS = 16;  // parts of rows times tiles of channels, if there are few tiles

// What Python passes; see cpp_convolution_gradient.py.
struct ConvolutionCall {
  const void *d, *y;
  void* out;  // [to_channels][channels][window]
  int64_t rows;
  int64_t d_run, d_outer, d_inner, y_run, y_outer, y_inner;
  int64_t adds;  // whether to add to `out`, which is left alone if not all of d is finite
  double most;   // the share of active values above which nothing is done
  int64_t threads;
  int64_t active, seen;  // results: how many of `seen` values of y, or of its blocks, were active
};

// Sums of one channel and one class of its senders for some taps, + what they are already.
template <bool PAYLOAD, int CLASS, int FIRST, int COUNT, class Map, class F>
SPARSIFY_INLINE void add_taps(F* sums, const F* tile, const int32_t* place, const F* payload,
                              int32_t count) {
  constexpr int64_t TILE = CHANNEL_TILE, VECTORS = TILE / WIDTH<F>;
  constexpr ClassTaps<Map> taps(CLASS);
  Vector<F> sum[COUNT * VECTORS] = {};
  for (int32_t k = 0; k < count; ++k) {
    const F* const from = tile + place[k] * TILE;
    SPARSIFY_UNROLL
    for (int t = 0; t < COUNT; ++t) {
      SPARSIFY_UNROLL
      for (int v = 0; v < VECTORS; ++v) {
        const Vector<F> values = load(from + taps.place[FIRST + t] * TILE + v * WIDTH<F>);
        if constexpr (PAYLOAD)
          sum[t * VECTORS + v] += values * payload[k];
        else
          sum[t * VECTORS + v] += values;
      }
    }
  }
  SPARSIFY_UNROLL
  for (int t = 0; t < COUNT; ++t) {
    F* const to = sums + taps.tap[FIRST + t] * TILE;
    SPARSIFY_UNROLL
    for (int v = 0; v < VECTORS; ++v)
      store(to + v * WIDTH<F>, load(to + v * WIDTH<F>) + sum[t * VECTORS + v]);
  }
}

template <bool PAYLOAD, int CLASS, int FIRST, class Map, class F>
SPARSIFY_INLINE void add_all_taps(F* sums, const F* tile, const int32_t* place, const F* payload,
                                  int32_t count) {
  constexpr int MOST = MOST_SUMS * WIDTH<F> / CHANNEL_TILE, LEFT = ClassTaps<Map>(CLASS).count - FIRST;
  if constexpr (LEFT > 0) {
    constexpr int COUNT = LEFT < MOST ? LEFT : MOST;
    add_taps<PAYLOAD, CLASS, FIRST, COUNT, Map>(sums, tile, place, payload, count);
    add_all_taps<PAYLOAD, CLASS, FIRST + COUNT, Map>(sums, tile, place, payload, count);
  }
}

template <bool PAYLOAD, int CLASS, class Map, class F>
void add_classes(F* sums, const F* tile, const Places<Map, F>& places, const Run* runs) {
  if (const Run run = runs[CLASS]; run.count) {
    const F* const payload = PAYLOAD ? places.payload + run.start : nullptr;
    add_all_taps<PAYLOAD, CLASS, 0, Map>(sums, tile, places.place + run.start, payload, run.count);
  }
  if constexpr (CLASS + 1 < Strips<Map>::CLASSES)
    add_classes<PAYLOAD, CLASS + 1, Map>(sums, tile, places, runs);
}

// One call. Work items are parts of the units times tiles of channels; neither depends on threads.
template <class Map, class F, class Source>
struct ConvolutionSums {
  typedef typename Activity<Source>::Element Element;
  typedef Strips<Map> S;
  static constexpr int64_t TILE = CHANNEL_TILE, TILES = (Map::to_channels + TILE - 1) / TILE;
  static constexpr int64_t TAPS = Map::channels * S::WINDOW, SUMS = TAPS * TILE;

  const ConvolutionCall& call;
  Matrix<F> d;
  Matrix<Element> y;
  int64_t units, parts;
  F* sums;  // [parts][TILES][channels][window][TILE]
  F *tile, *before;  // of a thread: [GROUP][PLACES][TILE], [TAPS][TILE]
  int64_t places_bytes;
  char* places;
  int all_finite = 1;
  int64_t active = 0;

  ConvolutionSums(const ConvolutionCall& c, Arena& arena, int threads)
      : call(c),
        d{static_cast<const F*>(c.d), c.d_run, c.d_outer, c.d_inner},
        y{static_cast<const Element*>(c.y), c.y_run, c.y_outer, c.y_inner},
        units((c.rows + S::GROUP - 1) / S::GROUP * S::COUNT),
        parts(TILES < ITEMS ? ITEMS / TILES : 1) {
    if (parts > units) parts = units;
    sums = arena.take<F>(parts * TILES * SUMS);
    tile = arena.take<F>(threads * S::GROUP * S::PLACES * TILE);
    before = arena.take<F>(c.adds ? threads * SUMS : 0);
    Arena measured;
    Places<Map, F> one(measured, Activity<Source>::MAY_HAVE_PAYLOAD);
    places_bytes = measured.used();
    places = arena.take<char>(threads * places_bytes);
  }

  void run(const Team& team) {
    const int64_t items = parts * TILES, end = items * (team.thread + 1) / team.threads;
    Arena own(places + team.thread * places_bytes);
    const Places<Map, F> own_places(own, Activity<Source>::MAY_HAVE_PAYLOAD);
    own_places.tables.fill();
    for (int64_t item = items * team.thread / team.threads; item < end;) {
      const int64_t part = item / TILES, next = (part + 1) * TILES < end ? (part + 1) * TILES : end;
      sum_part(team, own_places, part, item - part * TILES, next - part * TILES);
      item = next;
    }
    team.wait();
    if (__atomic_load_n(&all_finite, __ATOMIC_RELAXED)) write(team);
  }

 private:
  void sum_part(const Team& team, const Places<Map, F>& own, int64_t part, int64_t first,
                int64_t last) {
    F* const to = sums + part * TILES * SUMS;
    F* const own_tile = tile + team.thread * S::GROUP * S::PLACES * TILE;
    std::memset(to + first * SUMS, 0, sizeof(F) * (last - first) * SUMS);
    bool finite = true;
    int64_t events = 0;
    for (int64_t unit = units * part / parts; unit < units * (part + 1) / parts; ++unit) {
      const int64_t row = unit / S::COUNT * S::GROUP, strip = unit % S::COUNT;
      const int64_t rows = call.rows - row < S::GROUP ? call.rows - row : S::GROUP;
      const int64_t some = own.template list<Source>(y, row, rows, strip);
      if (first == 0) events += some;
      for (int64_t at = first; at < last; ++at) {
        for (int64_t i = 0; i < rows; ++i)
          finite &= copy_strip<Map>(own_tile + i * S::PLACES * TILE, d[row + i], strip, at * TILE);
        for (int64_t c = 0; c < Map::channels; ++c) {
          const Run* const runs = own.runs + c * S::CLASSES;
          F* const of_channel = to + at * SUMS + c * S::WINDOW * TILE;
          if (runs->has_payload)
            add_classes<true, 0, Map>(of_channel, own_tile, own, runs);
          else
            add_classes<false, 0, Map>(of_channel, own_tile, own, runs);
        }
      }
    }
    if (!finite) __atomic_store_n(&all_finite, 0, __ATOMIC_RELAXED);
    __atomic_fetch_add(&active, events, __ATOMIC_RELAXED);
  }

  // Adds the parts of the thread's taps, in ascending order.
  void write(const Team& team) {
    const Share own = share<GROUP>(TAPS, team);
    if (own.begin >= own.end) return;
    F* const own_before = before + team.thread * SUMS;
    for (int64_t at = 0; at < TILES; ++at) {
      const int64_t left = Map::to_channels - at * TILE, columns = left < TILE ? left : TILE;
      F* const out = static_cast<F*>(call.out) + at * TILE * TAPS;
      F* const total = sums + at * SUMS;
      if (call.adds) move_transposed<true>(out, own_before, TILE, columns, TAPS, own);
      for (int64_t i = own.begin * TILE; i < own.end * TILE; i += WIDTH<F>) {
        Vector<F> sum = load(total + i);
        for (int64_t part = 1; part < parts; ++part) sum += load(total + part * TILES * SUMS + i);
        store(total + i, call.adds ? load(own_before + i) + sum : sum);
      }
      move_transposed<false>(out, total, TILE, columns, TAPS, own);
    }
  }
};

// Counts the active values of rows spread over all of y.
template <class Map, class F, class Source>
void sample_maps(ConvolutionCall& call, const Places<Map, F>& places) {
  typedef typename Activity<Source>::Element Element;
  const Element* const first = static_cast<const Element*>(call.y);
  const Matrix<Element> y{first, call.y_run, call.y_outer, call.y_inner};
  constexpr int64_t VALUES = Map::channels * Map::rows * Map::columns;
  const int64_t wanted = 1 + SAMPLED_VALUES / VALUES, sampled = call.rows < wanted ? call.rows : wanted;
  call.active = 0, call.seen = sampled * VALUES;
  places.tables.fill();
  for (int64_t i = 0; i < sampled; ++i)
    for (int64_t strip = 0; strip < Strips<Map>::COUNT; ++strip)
      call.active += places.template list<Source>(y, sampled_row(i, sampled, call.rows), 1, strip);
}

// out[r][c][t] = or += sum over rows and places of d[receiver] * y[sender], if at most `most` of y is
// active.
//
// Order of additions: of the senders of a channel and a unit, ascending, from +0; units within a part
// from +0; parts from the first one, and `out` + that. Products are rounded before they are added.
template <class Map, class F, class Source>
int convolution_gradient(const Runtime* runtime, ConvolutionCall* call) {
  typedef ConvolutionSums<Map, F, Source> Sums;
  Arena measured;
  Sums(*call, measured, int(call->threads));
  void* const memory = std::aligned_alloc(64, measured.used());
  if (!memory) return NO_MEMORY;
  Arena arena(static_cast<char*>(memory));
  Sums sums(*call, arena, int(call->threads));
  Arena own(sums.places);
  sample_maps<Map, F, Source>(*call, Places<Map, F>(own, Activity<Source>::MAY_HAVE_PAYLOAD));
  int outcome = TOO_ACTIVE;
  if (double(call->active) <= call->most * double(call->seen)) {
    runtime->parallel(
        [](void* pointer, const Team& team) { static_cast<Sums*>(pointer)->run(team); }, &sums,
        int(call->threads));
    outcome = sums.all_finite ? DONE : NOT_FINITE;
    call->active = sums.active;
    call->seen = call->rows * Map::channels * Map::rows * Map::columns;
  }
  std::free(memory);
  return outcome;
}

}  // namespace sparsify
