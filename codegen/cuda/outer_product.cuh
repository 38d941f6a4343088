// Fixed device code for the gradient of a weight: out[r][s] = sum of d[row][r] * y[row][s] over all
// rows, adding d only where y is not zero.
//
// A block of threads has a tile of senders x receivers. It takes 32 rows at a time to shared
// memory, where a word tells in which of them a sender is active. Each warp keeps the sums of 8
// senders in registers; its lanes share the receivers.
#pragma once

#include "device.cuh"

namespace sparsify {

constexpr int STAGE = WARP;        // rows that are in shared memory at once
constexpr int OWN = 8;             // senders of a warp: a byte where they come as bits
constexpr int ROWS_PER_SUM = 512;  // rows that are summed on their own, see add_rows

// A matrix [rows][N] whose rows are two axes of a tensor, the inner one of extent `run`.
// Strides are in elements; N is contiguous.
template <class T>
struct Rows {
  const T* first;
  int64_t run, outer, inner;

  SPARSIFY_INLINE const T* operator[](int64_t row) const {
    if (row < run) return first + row * inner;
    const uint32_t step = uint32_t(row) / uint32_t(run), place = uint32_t(row) % uint32_t(run);
    return first + step * outer + place * inner;
  }
};

// What Python passes; see outer_product.py. `rows` are fewer than 2^31.
struct OuterCall {
  const void *d, *y;
  void* out;                   // [receivers][senders]
  void* sums;                  // [blocks][senders][receivers], written instead of `out`; or null
  unsigned long long* active;  // grows by the number of values of y that are not zero
  int64_t rows, receivers, senders;
  int64_t d_run, d_outer, d_inner, y_run, y_outer, y_inner;
  int64_t adds;    // whether to add to `out`
  int64_t chunks;  // of rows, which different blocks of threads add; 1 if there are no `sums`
};

// ---- 32 rows of the senders of a tile ----

struct Bits {};  // y is packed, 8 senders a byte, the first one in the lowest bit

// Of a type whose values are payloads.
template <class Source, int WARPS>
struct Activity {
  typedef Source Element;
  static constexpr int COLUMNS = OWN * WARPS;
  static constexpr int PADDED = COLUMNS + (sizeof(Source) == 1 ? 4 : 1);  // lanes read one column
  Element at[STAGE][PADDED];

  SPARSIFY_INLINE static Element fetch(const Element* row, int first, int column, int senders) {
    return first + column < senders ? __ldg(row + first + column) : Element(0);
  }
  SPARSIFY_INLINE static bool is_weighted(Element y) { return y != Element(0) && y != Element(1); }
  // Whether sender `own` of the warp is active, in the row of the lane.
  SPARSIFY_INLINE bool is_active(int own) const {
    return at[lane_of()][warp_of() * OWN + own] != Element(0);
  }
  template <class F>
  SPARSIFY_INLINE F payload(int row, int own) const {
    return F(at[row][warp_of() * OWN + own]);
  }
};

template <int WARPS>
struct Activity<Bits, WARPS> {
  typedef uint8_t Element;
  static constexpr int COLUMNS = WARPS, PADDED = COLUMNS + 4;
  Element at[STAGE][PADDED];

  SPARSIFY_INLINE static Element fetch(const Element* row, int first, int column, int senders) {
    const int left = senders - first - OWN * column;
    if (left <= 0) return 0;
    const unsigned byte = __ldg(row + first / OWN + column);
    return Element(left < OWN ? byte & ((1u << left) - 1) : byte);
  }
  SPARSIFY_INLINE static bool is_weighted(Element) { return false; }
  SPARSIFY_INLINE bool is_active(int own) const { return at[lane_of()][warp_of()] >> own & 1; }
  template <class F>
  SPARSIFY_INLINE F payload(int row, int own) const {
    return F(at[row][warp_of()] >> own & 1);
  }
};

// ---- a tile ----

// What a lane adds at once: its receivers are next to each other.
template <class F, int WIDTH>
struct alignas(sizeof(F) * WIDTH) Few {
  F at[WIDTH];
};

template <class F, class Source, int WARPS, int WIDTH>
struct OuterTile {
  typedef Activity<Source, WARPS> Y;
  typedef typename Y::Element Element;
  static constexpr int THREADS = WARPS * WARP, RECEIVERS = WARP * WIDTH;
  static constexpr int D_LOADS = STAGE * RECEIVERS / THREADS;
  static constexpr int Y_LOADS = STAGE * Y::COLUMNS / THREADS;

  struct Shared {
    Few<F, WIDTH> d[STAGE][WARP];
    Y y;
  };

  Shared& shared;
  Rows<F> d;
  Rows<Element> y;
  int end, receivers, senders;       // behind the last row, receiver and sender
  int first_receiver, first_sender;  // of the tile
  F next_d[D_LOADS];                 // the rows after those in shared memory
  Element next_y[Y_LOADS];
  Few<F, WIDTH> sum[OWN];        // of a block of 512 rows
  unsigned long long found = 0;  // events of the warp's senders

  SPARSIFY_INLINE OuterTile(Shared& shared, const OuterCall& call, int end, int64_t tile)
      : shared(shared),
        d{static_cast<const F*>(call.d), call.d_run, call.d_outer, call.d_inner},
        y{static_cast<const Element*>(call.y), call.y_run, call.y_outer, call.y_inner},
        end(end),
        receivers(int(call.receivers)),
        senders(int(call.senders)) {
    const int across = (receivers + RECEIVERS - 1) / RECEIVERS;
    first_receiver = int(tile) % across * RECEIVERS;
    first_sender = int(tile) / across * OWN * WARPS;
    clear();
  }

  SPARSIFY_INLINE int sender(int own) const { return first_sender + warp_of() * OWN + own; }
  SPARSIFY_INLINE int receiver(int i) const { return first_receiver + lane_of() * WIDTH + i; }

  SPARSIFY_INLINE void clear() {
#pragma unroll
    for (int own = 0; own < OWN; ++own)
#pragma unroll
      for (int i = 0; i < WIDTH; ++i) sum[own].at[i] = F(0);
  }

  // Asks for the rows from `first` on; what is not there is zero.
  SPARSIFY_INLINE void fetch(int first) {
#pragma unroll
    for (int k = 0; k < D_LOADS; ++k) {
      const int place = k * THREADS + int(threadIdx.x);
      const int row = first + place / RECEIVERS, r = first_receiver + place % RECEIVERS;
      next_d[k] = row < end && r < receivers ? __ldg(d[row] + r) : F(0);
    }
#pragma unroll
    for (int k = 0; k < Y_LOADS; ++k) {
      const int place = k * THREADS + int(threadIdx.x);
      const int row = first + place / Y::COLUMNS;
      next_y[k] = row < end ? Y::fetch(y[row], first_sender, place % Y::COLUMNS, senders) : 0;
    }
  }

  // Puts them where all threads of the block see them, when these have met.
  SPARSIFY_INLINE void keep() {
    F* const to = &shared.d[0][0].at[0];
#pragma unroll
    for (int k = 0; k < D_LOADS; ++k) to[k * THREADS + int(threadIdx.x)] = next_d[k];
#pragma unroll
    for (int k = 0; k < Y_LOADS; ++k) {
      const int place = k * THREADS + int(threadIdx.x);
      shared.y.at[place / Y::COLUMNS][place % Y::COLUMNS] = next_y[k];
    }
  }

  // Of what this thread has fetched. A value that is not finite less itself is NaN.
  SPARSIFY_INLINE bool is_finite() const {
    bool finite = true;
#pragma unroll
    for (int k = 0; k < D_LOADS; ++k) finite &= next_d[k] - next_d[k] == F(0);
    return finite;
  }
  SPARSIFY_INLINE bool is_weighted() const {
    bool weighted = false;
#pragma unroll
    for (int k = 0; k < Y_LOADS; ++k) weighted |= Y::is_weighted(next_y[k]);
    return weighted;
  }

  // Adds d of the rows in `mask`, the lowest first.
  SPARSIFY_INLINE void add(Few<F, WIDTH>& to, uint32_t mask) const {
    while (mask) {  // two at a time: both loads are under way before the first sum
      const int row = __ffs(int(mask)) - 1;
      mask &= mask - 1;
      const Few<F, WIDTH> one = shared.d[row][lane_of()];
      Few<F, WIDTH> other{};
      if (mask) other = shared.d[__ffs(int(mask)) - 1][lane_of()];
      mask &= mask - 1;
#pragma unroll
      for (int i = 0; i < WIDTH; ++i) to.at[i] = to.at[i] + one.at[i] + other.at[i];
    }
  }
  SPARSIFY_INLINE void add_weighted(Few<F, WIDTH>& to, uint32_t mask, int own) const {
    for (; mask; mask &= mask - 1) {
      const int row = __ffs(int(mask)) - 1;
      const F payload = shared.y.template payload<F>(row, own);
      const Few<F, WIDTH> one = shared.d[row][lane_of()];
#pragma unroll
      for (int i = 0; i < WIDTH; ++i) to.at[i] += payload * one.at[i];
    }
  }

  // Adds the rows in shared memory to the sums. All of them count where d is not finite: 0 * inf is
  // NaN. Where it is, adding a zero changes no sum, so other threads may do as they like.
  SPARSIFY_INLINE void add_stage(bool weighted, bool finite) {
#pragma unroll
    for (int own = 0; own < OWN; ++own) {
      const uint32_t mask = __ballot_sync(ALL, shared.y.is_active(own));
      found += __popc(mask);
      if (finite && !weighted)
        add(sum[own], mask);
      else
        add_weighted(sum[own], finite ? mask : ALL, own);
    }
  }

  // ---- the sums of a block of 512 rows, to where those of all blocks are ----

  // sums[block][senders][receivers]
  SPARSIFY_INLINE void write_sums(F* sums, int64_t block) const {
    each_own([&](int own, int i, int64_t s, int64_t r) {
      sums[(block * senders + s) * receivers + r] = sum[own].at[i];
    });
  }
  // In shared memory, since registers are short; only this thread reads it.
  SPARSIFY_INLINE void add_to(F* total, bool starts) const {
    each_own([&](int own, int i, int64_t, int64_t) {
      F& at = total[(own * WIDTH + i) * THREADS];
      at = starts ? sum[own].at[i] : at + sum[own].at[i];
    });
  }
  // out[receivers][senders]
  SPARSIFY_INLINE void write(F* out, const F* total, bool adds) const {
    each_own([&](int own, int i, int64_t s, int64_t r) {
      F& at = out[r * senders + s];
      const F value = total[(own * WIDTH + i) * THREADS];
      at = adds ? at + value : value;
    });
  }

 private:
  template <class Work>
  SPARSIFY_INLINE void each_own(Work work) const {
#pragma unroll
    for (int own = 0; own < OWN; ++own)
#pragma unroll
      for (int i = 0; i < WIDTH; ++i)
        if (sender(own) < senders && receiver(i) < receivers)
          work(own, i, int64_t(sender(own)), int64_t(receiver(i)));
  }
};

// Adds the rows of a chunk to a tile of out[receivers][senders], or writes the sum of each block.
//
// Order of additions: ascending within a block of 512 rows, then the block sums, each from +0.
// Products are rounded before they are added. Neither tiles nor chunks change the bits.
template <class F, class Source, int WARPS, int WIDTH>
SPARSIFY_INLINE void add_outer_products(const OuterCall& call) {
  typedef OuterTile<F, Source, WARPS, WIDTH> Tile;
  __shared__ typename Tile::Shared shared;
  extern __shared__ double totals[];  // [own senders][own receivers][threads] of F
  F* const total = reinterpret_cast<F*>(totals) + threadIdx.x;
  const int64_t tiles = gridDim.x / call.chunks, chunk = blockIdx.x / tiles;
  const int64_t blocks = (call.rows + ROWS_PER_SUM - 1) / ROWS_PER_SUM;
  const int begin = int(blocks * chunk / call.chunks * ROWS_PER_SUM);
  const int64_t behind = blocks * (chunk + 1) / call.chunks * ROWS_PER_SUM;
  const int end = int(behind < call.rows ? behind : call.rows);
  Tile tile(shared, call, end, blockIdx.x % tiles);
  tile.fetch(begin);
  for (int first = begin; first < end; first += STAGE) {
    __syncthreads();  // the rows before are added
    tile.keep();
    bool finite = tile.is_finite(), weighted = tile.is_weighted();
    if (__syncthreads_or(weighted || !finite)) {
      finite = __syncthreads_and(finite);
      weighted = true;
    }
    if (first + STAGE < end) tile.fetch(first + STAGE);
    tile.add_stage(weighted, finite);
    if ((first + STAGE) % ROWS_PER_SUM != 0 && first + STAGE < end) continue;
    if (call.sums)
      tile.write_sums(static_cast<F*>(call.sums), first / ROWS_PER_SUM);
    else
      tile.add_to(total, first < ROWS_PER_SUM);
    tile.clear();
  }
  if (tile.first_receiver == 0 && lane_of() == 0 && tile.found) atomicAdd(call.active, tile.found);
  if (!call.sums) tile.write(static_cast<F*>(call.out), total, call.adds);
}

// ---- the sums of blocks ----

struct SumsCall {
  const void* sums;  // [blocks][senders][receivers]
  void* out;         // [receivers][senders]
  int64_t blocks, receivers, senders;
  int64_t adds;  // whether to add to `out`
};

constexpr int SQUARE = WARP;  // senders and receivers of a block of threads

// out[r][s] = or += the sum over the blocks, in ascending order from +0.
template <class F>
SPARSIFY_INLINE void add_sums(const SumsCall& call) {
  __shared__ F square[SQUARE][SQUARE + 1];  // so that both memories are read and written along rows
  const int64_t across = (call.receivers + SQUARE - 1) / SQUARE;
  const int64_t first_r = blockIdx.x % across * SQUARE, first_s = blockIdx.x / across * SQUARE;
  const F* const sums = static_cast<const F*>(call.sums);
  F* const out = static_cast<F*>(call.out);
  for (int line = warp_of(); line < SQUARE; line += warps_of()) {
    const int64_t s = first_s + line, r = first_r + lane_of();
    F total = 0;
    if (s < call.senders && r < call.receivers)
      for (int64_t block = 0; block < call.blocks; ++block)
        total += __ldg(sums + (block * call.senders + s) * call.receivers + r);
    square[line][lane_of()] = total;
  }
  __syncthreads();
  for (int line = warp_of(); line < SQUARE; line += warps_of()) {
    const int64_t r = first_r + line, s = first_s + lane_of();
    if (s >= call.senders || r >= call.receivers) continue;
    F* const to = out + r * call.senders + s;
    *to = call.adds ? *to + square[lane_of()][line] : square[lane_of()][line];
  }
}

}  // namespace sparsify
