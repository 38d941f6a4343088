// Fixed device code for the gradient of what a convolution reads, of wanted senders only: the sum over
// receivers and taps of d[receiver] * w, and 0 for all other senders.
//
// Of a unit (see strips.h), every channel gets the list of its wanted senders. d is copied with its
// channels last, as in convolution_gradient.h. A sender's sums lie in the lanes of a vector: of one
// tile of receiving channels after the other, all senders of a channel are multiplied by its weights
// while these stay in registers. Lanes are added up in the end.
#pragma once

#include "outer_product.h"
#include "sender_sums.h"
#include "wanted_senders.h"

namespace sparsify {

constexpr int64_t SUMS_AT_ONCE = 2048;  // senders: 128 KiB of float32

// What Python passes; see cpp_sender_gradient.py.
struct SenderCall {
  const void *d, *w, *y, *only;  // rows of receivers, [to_channels][channels][window], bits, bits
  void* out;                     // [rows][channels][from_rows][from_columns]
  int64_t rows;
  int64_t d_run, d_outer, d_inner, y_run, y_outer, y_inner, only_run, only_outer, only_inner;
  double most;  // the share of wanted senders, or blocks of them, above which nothing is done
  int64_t threads;
  int64_t wanted, seen;  // results: how many of `seen` senders, or of their blocks, were wanted
};

// The largest magnitude of some values, which are finite.
template <class F>
SPARSIFY_INLINE F largest_of(const F* values, int64_t count) {
  Vector<F> most{};
  for (int64_t i = 0; i < count; i += WIDTH<F>) {
    const Vector<F> value = load(values + i), magnitude = value < 0 ? -value : value;
    most = most < magnitude ? magnitude : most;
  }
  F largest = 0;
  for (int lane = 0; lane < WIDTH<F>; ++lane) largest = most[lane] > largest ? most[lane] : largest;
  return largest;
}

// One call: units are divided among threads.
template <class Map, class F>
struct SenderSums {
  typedef Strips<Map> S;
  typedef WantedSenders<Map> Wanted;
  static constexpr int64_t TILE = CHANNEL_TILE, TILES = (Map::to_channels + TILE - 1) / TILE;
  static constexpr int64_t CHANNEL_WEIGHTS = TILES * S::WINDOW * TILE;
  static constexpr int64_t COPIED = S::GROUP * S::PLACES * TILE;  // of a tile of receivers
  static constexpr int64_t SUMS = (SUMS_AT_ONCE + Wanted::LISTED) * TILE;

  SenderCall& call;
  Matrix<F> d;
  Matrix<uint8_t> y, only;
  int64_t units;
  F* weights;     // [channels][TILES][window][TILE]
  F* largest;     // of the weights, by thread
  F *tiles, *sums;  // of a thread: [TILES][COPIED], [SUMS]
  int64_t wanted_bytes;
  char* wanted;
  int all_finite = 1;
  int64_t count = 0;

  SenderSums(SenderCall& c, Arena& arena, int threads)
      : call(c),
        d{static_cast<const F*>(c.d), c.d_run, c.d_outer, c.d_inner},
        y{static_cast<const uint8_t*>(c.y), c.y_run, c.y_outer, c.y_inner},
        only{static_cast<const uint8_t*>(c.only), c.only_run, c.only_outer, c.only_inner},
        units((c.rows + S::GROUP - 1) / S::GROUP * S::COUNT) {
    weights = arena.take<F>(Map::channels * CHANNEL_WEIGHTS);
    largest = arena.take<F>(threads);
    tiles = arena.take<F>(threads * TILES * COPIED);
    sums = arena.take<F>(threads * SUMS);
    Arena measured;
    Wanted one(measured);
    wanted_bytes = measured.used();
    wanted = arena.take<char>(threads * wanted_bytes);
  }

  Wanted wanted_of(int thread) const {
    Arena own(wanted + thread * wanted_bytes);
    return Wanted(own);
  }

  // Counts what is wanted of rows spread over all.
  void sample() const {
    constexpr int64_t VALUES = Map::channels * Map::rows * Map::columns;
    const int64_t most = 1 + SAMPLED_VALUES / VALUES, sampled = call.rows < most ? call.rows : most;
    call.wanted = 0, call.seen = sampled * VALUES;
    const Wanted own = wanted_of(0);
    own.tables.fill();
    for (int64_t i = 0; i < sampled; ++i)
      for (int64_t strip = 0; strip < S::COUNT; ++strip)
        call.wanted += own.list(y, only, sampled_row(i, sampled, call.rows), 1, strip);
  }

  void run(const Team& team) {
    pack(team);
    team.wait();
    F weight = 0;
    for (int i = 0; i < team.threads; ++i) weight = largest[i] > weight ? largest[i] : weight;
    const Wanted own = wanted_of(team.thread);
    own.tables.fill();
    bool finite = true;
    int64_t some = 0;
    for (int64_t unit = units * team.thread / team.threads;
         finite && unit < units * (team.thread + 1) / team.threads; ++unit) {
      const int64_t row = unit / S::COUNT * S::GROUP, strip = unit % S::COUNT;
      const int64_t rows = call.rows - row < S::GROUP ? call.rows - row : S::GROUP;
      some += own.list(y, only, row, rows, strip);
      for (int64_t i = 0; i < rows; ++i) clear(row + i, strip);
      finite = copy(team, row, rows, strip, weight);
      for (int64_t c = 0; finite && c < Map::channels;) c = sum_channels(team, own, row, c);
    }
    if (!finite) __atomic_store_n(&all_finite, 0, __ATOMIC_RELAXED);
    __atomic_fetch_add(&count, some, __ATOMIC_RELAXED);
  }

 private:
  // Copies the weights of some channels, and finds the largest of them: NaN if one is not finite.
  void pack(const Team& team) {
    const F* const from = static_cast<const F*>(call.w);
    const int64_t first = Map::channels * team.thread / team.threads;
    const int64_t end = Map::channels * (team.thread + 1) / team.threads;
    std::memset(weights + first * CHANNEL_WEIGHTS, 0, sizeof(F) * (end - first) * CHANNEL_WEIGHTS);
    F most = 0, other = 0;
    for (int64_t receiver = 0; receiver < Map::to_channels; ++receiver)
      for (int64_t c = first; c < end; ++c) {
        const F* const window = from + (receiver * Map::channels + c) * S::WINDOW;
        F* const to = weights + c * CHANNEL_WEIGHTS + receiver / TILE * S::WINDOW * TILE + receiver % TILE;
        for (int64_t tap = 0; tap < S::WINDOW; ++tap) {
          const F magnitude = window[tap] < 0 ? -window[tap] : window[tap];
          to[tap * TILE] = window[tap];
          most = magnitude > most ? magnitude : most;
          other += window[tap] - window[tap];
        }
      }
    largest[team.thread] = most;
    if (!(other == F(0))) __atomic_store_n(&all_finite, 0, __ATOMIC_RELAXED);
  }

  // Writes zeros to a strip of the maps of a batch row, and to what lies below the last one.
  void clear(int64_t row, int64_t strip) const {
    constexpr int64_t ROWS = Map::strip_rows * Map::pool_rows;
    const int64_t top = strip * ROWS, end = strip + 1 < S::COUNT ? top + ROWS : Map::from_rows;
    for (int64_t c = 0; c < Map::channels; ++c)
      std::memset(
          static_cast<F*>(call.out) + row * Wanted::NEURONS + c * Wanted::FROM + top * Map::from_columns,
          0, sizeof(F) * (end - top) * Map::from_columns);
  }

  // Copies the receivers of a strip; false if a sum of them might not be finite.
  bool copy(const Team& team, int64_t row, int64_t rows, int64_t strip, F weight) const {
    F* const own = tiles + team.thread * TILES * COPIED;
    bool finite = true;
    F most = 0;
    for (int64_t at = 0; at < TILES; ++at)
      for (int64_t i = 0; i < rows; ++i) {
        F* const to = own + at * COPIED + i * S::PLACES * TILE;
        finite &= copy_strip<Map>(to, d[row + i], strip, at * TILE);
        const F some = largest_of(to, S::PLACES * TILE);
        most = some > most ? some : most;
      }
    const F bound = most * weight * F(Map::to_channels * S::WINDOW) * 2;  // 2: what is rounded
    return finite && bound - bound == F(0);
  }

  // Writes the sums of channels from `first` on, and returns the one behind the last of these.
  int64_t sum_channels(const Team& team, const Wanted& own, int64_t row, int64_t first) const {
    F* const own_sums = sums + team.thread * SUMS;
    const int64_t begin = own.runs[first * S::CLASSES].start;
    const auto behind = [&](int64_t c) {
      const Run& last = own.runs[(c + 1) * S::CLASSES - 1];
      return last.start + last.count - begin;
    };
    int64_t end = first + 1;
    while (end < Map::channels && behind(end - 1) < SUMS_AT_ONCE) ++end;
    const int64_t listed = behind(end - 1);
    std::memset(own_sums, 0, sizeof(F) * listed * TILE);
    for (int64_t at = 0; at < TILES; ++at)
      for (int64_t c = first; c < end; ++c) {
        const Run* const runs = own.runs + c * S::CLASSES;
        multiply_classes<0, Map>(own_sums + (runs->start - begin) * TILE,
                                 tiles + (team.thread * TILES + at) * COPIED,
                                 weights + c * CHANNEL_WEIGHTS + at * S::WINDOW * TILE,
                                 own.place + runs->start, runs);
      }
    F* const out = static_cast<F*>(call.out) + row * Wanted::NEURONS;
    write_sums(out, own.target + begin, own_sums, listed);
    return end;
  }
};

// out = the gradient of wanted senders, 0 for others, if at most `most` of them are wanted.
//
// Order of additions: taps in ascending order within a channel's place in its tile, tiles in ascending
// order, products with one rounding; then the lanes of tiles.
template <class Map, class F>
int sender_gradient(const Runtime* runtime, SenderCall* call) {
  typedef SenderSums<Map, F> Sums;
  Arena measured;
  Sums(*call, measured, int(call->threads));
  void* const memory = std::aligned_alloc(64, measured.used());
  if (!memory) return NO_MEMORY;
  Arena arena(static_cast<char*>(memory));
  Sums sums(*call, arena, int(call->threads));
  sums.sample();
  int outcome = TOO_ACTIVE;
  if (double(call->wanted) <= call->most * double(call->seen)) {
    runtime->parallel(
        [](void* pointer, const Team& team) { static_cast<Sums*>(pointer)->run(team); }, &sums,
        int(call->threads));
    outcome = sums.all_finite ? DONE : NOT_FINITE;
    call->wanted = sums.count;
    call->seen = call->rows * Map::channels * Map::rows * Map::columns;
  }
  std::free(memory);
  return outcome;
}

}  // namespace sparsify
