// Packs rows of weights as masked_rows.cuh and kept_runs.cuh read them: what is not zero is kept. Where
// there is more than room for, `overflow` is set, and kernels read whole rows instead.
#pragma once

#include "last_block.cuh"

namespace sparsify {

constexpr int KEEPING_WARPS = 8, KEEPING_THREADS = KEEPING_WARPS * WARP;

// Weight (row, place) is at [row * down + place * across]. `overflow` becomes 0 or 1; `progress` is 0
// between launches.
template <class T>
struct WholeRows {
  const T* weights;
  int64_t rows, places, down, across;
  uint32_t* overflow;
  unsigned* progress;

  SPARSIFY_INLINE T at(int64_t row, int64_t place) const {
    return place < places ? weights[row * down + place * across] : T(0.0f);
  }

  // By all threads of all blocks, with what they have seen: the last one says whether there was room.
  SPARSIFY_INLINE void finish(bool overflows) const {
    if (is_last_block(progress, gridDim.x, overflows)) *overflow = overflows;
  }
};

// The warp of the grid that the caller is in, and how many there are.
SPARSIFY_INLINE int64_t warp_of_grid() { return int64_t(blockIdx.x) * warps_of() + warp_of(); }
SPARSIFY_INLINE int64_t warps_of_grid() { return int64_t(gridDim.x) * warps_of(); }

// Whether a weight is kept; NaN is.
template <class T>
SPARSIFY_INLINE bool is_kept(T weight) {
  return +weight != 0;
}

// Rows are divided into bands of so many places, for those who read one band alone. Of 32 places there
// is room for so many. masks[bands][rows][words], kept[bands][rows][words][room].
template <class T>
struct MaskedCall {
  WholeRows<T> whole;
  int64_t bands, band_places, room;
  uint32_t* masks;
  T* kept;
};

template <class T>
SPARSIFY_INLINE void pack_masked(const MaskedCall<T>& call) {
  const int64_t words = words_of(int(call.band_places)), of_band = call.whole.rows * words;
  bool overflows = false;
  for (int64_t item = warp_of_grid(); item < call.bands * of_band; item += warps_of_grid()) {
    const int64_t band = item / of_band, row = item % of_band / words;
    const int64_t at = item % words * WARP + lane_of();
    const bool inside = at < call.band_places;
    const T weight = inside ? call.whole.at(row, band * call.band_places + at) : T(0.0f);
    const uint32_t mask = __ballot_sync(ALL, is_kept(weight));
    const int before = __popc(mask & ((1u << lane_of()) - 1)), count = __popc(mask);
    T* const kept = call.kept + item * call.room;
    if (is_kept(weight) && before < call.room) kept[before] = weight;
    if (lane_of() >= count && lane_of() < call.room) kept[lane_of()] = T(0.0f);
    if (lane_of() == 0) call.masks[item] = mask;
    overflows |= count > call.room;
  }
  call.whole.finish(overflows);
}

// A row has `bands` of `words` words of 32 places: word w of a band is word w * warps + band % warps of
// those that `warps` bands share. A band has room for so many runs of `width` places. The runs of
// `together` rows lie side by side: of 1, or of 32. counts[rows][bands], places[...][room] and
// kept[...][room][width].
template <class Place, class T>
struct RunsCall {
  WholeRows<T> whole;
  int64_t bands, words, warps, width, room, together;
  uint16_t* counts;
  Place* places;
  T* kept;
};

// By a warp. Returns whether there was no room.
template <class Place, class T>
SPARSIFY_INLINE bool pack_band(const RunsCall<Place, T>& call, int64_t row, int64_t band) {
  const int lane = lane_of(), width = int(call.width), begin = lane / width * width;
  const uint32_t run = (width == WARP ? ALL : (1u << width) - 1) << begin;
  const int64_t apart = call.together, side = row % apart;
  const int64_t first = ((row - side) * call.bands + band * apart) * call.room;
  Place* const places = call.places + first + side;
  T* const kept = call.kept + first * width + side;
  const int64_t group = band / call.warps, warp = band % call.warps;
  int count = 0;
  for (int64_t w = 0; w < call.words; ++w) {
    const T weight = call.whole.at(row, ((group * call.words + w) * call.warps + warp) * WARP + lane);
    const bool stays = (__ballot_sync(ALL, is_kept(weight)) & run) != 0;
    const uint32_t heads = __ballot_sync(ALL, stays && lane == begin);
    const int at = count + __popc(heads & ((1u << begin) - 1));
    if (stays && at < call.room) {
      kept[(at * width + lane - begin) * apart] = weight;
      if (lane == begin) places[at * apart] = Place((w * WARP + lane) / width);
    }
    count += __popc(heads);
  }
  if (lane == 0)
    call.counts[row * call.bands + band] = uint16_t(count < call.room ? count : call.room);
  return count > call.room;
}

template <class Place, class T>
SPARSIFY_INLINE void pack_runs(const RunsCall<Place, T>& call) {
  const int64_t bands = call.bands;
  bool overflows = false;
  for (int64_t item = warp_of_grid(); item < call.whole.rows * bands; item += warps_of_grid())
    overflows |= pack_band(call, item / bands, item % bands);
  call.whole.finish(overflows);
}

}  // namespace sparsify
